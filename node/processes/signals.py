"""The signals that ask a process to stop, collected instead of dying of them.

SIGINT is a person's Ctrl-C, SIGTERM a service manager's, SIGHUP a terminal's that goes away; under `nohup` the
last one is ignored, and stays so.
"""

import signal
from collections.abc import Callable, Iterator
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
    with _handled(lambda number, _: received.append(number)):
        yield received


@contextmanager
def interrupting_signals() -> Iterator[None]:
    """Let each of `signals_to_stop` raise `KeyboardInterrupt`, as Ctrl-C does, while the block lasts."""
    with _handled(signal.default_int_handler):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in signals_to_stop()}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
