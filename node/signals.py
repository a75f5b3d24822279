"""The signals that ask a process to stop, collected instead of dying of them.

SIGINT is a person's Ctrl-C, SIGTERM a service manager's, SIGHUP a terminal's that goes away; under `nohup` the
last one is ignored, and stays so.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def signals_to_stop() -> frozenset[signal.Signals]:
    """Return the signals that ask this process to stop, without what it was started to ignore."""
    asking = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    return frozenset(number for number in asking if signal.getsignal(number) is not signal.SIG_IGN)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield the list to which each of `signals_to_stop` is added while the block lasts."""
    received: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, remember) for number in signals_to_stop()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
