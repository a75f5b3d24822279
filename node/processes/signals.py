"""The signals that ask a process to stop, or to save: collected instead of dying of them.

SIGINT is a person's Ctrl-C, SIGTERM a service manager's, SIGHUP a terminal's that goes away; under `nohup` the
last one is ignored, and stays so. SIGUSR1 asks for a checkpoint.

A process with work in progress stops in this order (`Stopping`):

    the first signal    the work may end by itself, for as long as the grace period lasts
    grace is over       `GivenUp` is raised in the main thread, wherever that is, every few seconds until it is caught
    10 s later          the main thread is in a call that never returns: its stack is printed, and the process ends
    a second signal     ends the process at once, as if it had never been caught
"""

import faulthandler
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

TWICE_S = 1.0  # `timeout` and a terminal that closes send one request as two signals
AGAIN_S = 5.0  # an exception that is raised in a destructor is lost; what is left to unwind takes less
STUCK_S = 10.0  # from `GivenUp` to the end of what does not heed it: some kernels on a GPU take seconds
STDERR = 2


Handler = Callable[[int, FrameType | None], object]


class GivenUp(BaseException):
    """The work in progress is not to be waited for; no `Exception`, so that no library takes it for its own failure."""


class Stopping:
    """Requests to stop, and how long the work in progress is waited for; true once a signal came.

    Made by `graceful_stop`. It begins with nothing in progress that is worth waiting for: `GivenUp` comes with the
    signal. All methods are for the main thread, but for the truth, which any thread may ask for.
    """

    def __init__(self, grace: float = 0.0) -> None:
        self.received: list[int] = []
        self._grace = grace
        self._first = 0.0
        self._waits = False
        self._over = False
        self._save = False

    def __bool__(self) -> bool:
        return bool(self.received)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Let the work in the block end by itself within the grace period; raise `GivenUp` if a signal came already."""
        if self.received:
            raise GivenUp
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def finish(self) -> None:
        """Raise `GivenUp` no more: the work has ended or was given up, and what is left to do has to be done."""
        self._over = True
        if self.received:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()

    def takes_save(self) -> bool:
        """Tell whether a signal asked for a checkpoint since the last call."""
        asked, self._save = self._save, False
        return asked

    def stop(self, number: int, _: FrameType | None) -> None:
        """Take a signal to stop."""
        now = time.monotonic()
        if self.received:
            if number != signal.SIGHUP and now - self._first > TWICE_S:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
                os._exit(128 + number)  # the first process of a container does not die of it
            return
        self.received.append(number)
        self._first = now
        if self._over:
            return
        grace = self._grace if self._waits else 0.0
        faulthandler.dump_traceback_later(grace + STUCK_S, exit=True, file=STDERR)
        signal.setitimer(signal.ITIMER_REAL, grace or AGAIN_S, AGAIN_S)
        if not grace:
            raise GivenUp

    def save(self, number: int, _: FrameType | None) -> None:
        """Take a request for a checkpoint."""
        self._save = True

    def give_up(self, number: int, _: FrameType | None) -> None:
        """Take the end of the grace period."""
        if not self._over:
            raise GivenUp


def signals_to_stop() -> frozenset[signal.Signals]:
    """Return the signals that ask this process to stop, without what it was started to ignore."""
    asking = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    return frozenset(number for number in asking if signal.getsignal(number) is not signal.SIG_IGN)


@contextmanager
def graceful_stop(grace: float) -> Iterator[Stopping]:
    """Yield what has come of `signals_to_stop` and SIGUSR1 while the block lasts; `grace` is in seconds."""
    stopping = Stopping(grace)
    others = {signal.SIGALRM: stopping.give_up, signal.SIGUSR1: stopping.save}
    with _handled(dict.fromkeys(signals_to_stop(), stopping.stop) | others):
        try:
            yield stopping
        finally:
            stopping.finish()


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield the list to which each of `signals_to_stop` is added while the block lasts."""
    received: list[int] = []
    with _handled(dict.fromkeys(signals_to_stop(), lambda number, _: received.append(number))):
        yield received


@contextmanager
def save_signal(ask: Callable[[], object]) -> Iterator[None]:
    """Call `ask` whenever SIGUSR1 comes, while the block lasts."""
    with _handled({signal.SIGUSR1: lambda number, _: ask()}):
        yield


@contextmanager
def interrupting_signals() -> Iterator[None]:
    """Let each of `signals_to_stop` raise `KeyboardInterrupt`, as Ctrl-C does, and SIGUSR1 do nothing."""
    handlers: dict[signal.Signals, Handler] = dict.fromkeys(signals_to_stop(), signal.default_int_handler)
    with _handled(handlers | {signal.SIGUSR1: lambda number, _: None}):
        yield


@contextmanager
def _handled(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
