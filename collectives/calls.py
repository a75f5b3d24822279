"""One call of an operation, from Begin to its verdict, as the thread that runs it sees it.

The control thread says when it starts and how it ended; the caller's thread carries it out between.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from collectives.agreement.events import Begin, Done, Finished, Start, Verdict
from collectives.errors import Aborted, CollectiveError, DeadlineExceeded, Evicted, Mismatch, NotEnoughPeers
from collectives.mesh.socket_port import SocketPort

T = TypeVar("T")

# Verdicts come from the core, which has deadlines of its own; this is for a core that failed.
LAST_RESORT_S = 5.0


class Call:
    """Where the control thread leaves what becomes of a call. `deadline` is on the monotonic clock."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.port: SocketPort | None = None
        self._changed = threading.Condition()
        self._started: Start | None = None
        self._finished: Finished | None = None
        self._failed = ""

    def start(self, start: Start, port: SocketPort) -> None:
        """It is to be carried out."""
        with self._changed:
            self._started, self.port = start, port
            self._changed.notify_all()

    def finish(self, finished: Finished) -> None:
        """It is over."""
        with self._changed:
            self._finished = finished
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """It was never begun, or nobody is left to end it."""
        with self._changed:
            self._failed = reason
            self._changed.notify_all()

    def wait_start(self, until: float) -> tuple[Start, SocketPort] | None:
        """Wait until it starts; None: it ended before. Raises `CollectiveError` if it failed."""
        self._wait(lambda: self._started is not None or self._finished is not None, until)
        if self._started is None or self.port is None:
            return None
        return self._started, self.port

    def wait_finish(self, until: float) -> Finished:
        """Wait until it is over. Raises `CollectiveError` if it failed."""
        self._wait(lambda: self._finished is not None, until)
        assert self._finished is not None
        return self._finished

    def _wait(self, reached: Callable[[], bool], until: float) -> None:
        with self._changed:
            while not reached():
                if self._failed:
                    raise Evicted(self._failed)
                if not self._changed.wait(until - time.monotonic()) and time.monotonic() >= until:
                    raise Evicted("no verdict came, which is a defect: leave the group and connect again")


@dataclass(frozen=True, slots=True)
class Committed(Generic[T]):
    """A call that counted: `outcome` is what carrying it out gave, in scratch; publish it."""

    outcome: T
    finished: Finished
    bytes_sent: int
    bytes_received: int


class Runner(Protocol):
    """What a call needs of the control thread."""

    def begin(self, begin: Begin) -> Call:
        """Hand a call to the core."""

    def done(self, event: Done) -> None:
        """Say how carrying it out went."""


Perform = Callable[[Start, SocketPort], T]


def finish_call(control: Runner, call: Call, settling: float, perform: Perform[T]) -> Committed[T]:
    """Carry out a call that was begun, and wait for its verdict.

    Raises:
        Aborted, DeadlineExceeded, Mismatch, NotEnoughPeers, Evicted: as the verdict says.
        Exception: what `perform` raised by itself; the operation was called off for everybody.
    """
    last = call.deadline + settling + LAST_RESORT_S
    started = call.wait_start(last)
    if started is None:
        raise error_of(call.wait_finish(last))
    start, port = started
    try:
        outcome = perform(start, port)
    except (Aborted, DeadlineExceeded) as error:
        control.done(Done(start.op, ok=False, reason=str(error)))
        finished = call.wait_finish(last)
        if isinstance(error, DeadlineExceeded) and finished.verdict is Verdict.ABORT:
            raise
        raise error_of(finished) from error
    except BaseException as error:
        control.done(Done(start.op, ok=False, reason=f"{type(error).__name__}: {error}"))
        if isinstance(error, Exception):
            call.wait_finish(last)
        raise
    control.done(Done(start.op))
    finished = call.wait_finish(last)
    if finished.verdict is not Verdict.COMMIT:
        raise error_of(finished)
    return Committed(outcome, finished, port.bytes_sent, port.bytes_received)


def error_of(finished: Finished) -> CollectiveError:
    """Return the error that a verdict is told as."""
    reason = finished.reason or "a member failed"
    match finished.verdict:
        case Verdict.DEADLINE:
            return DeadlineExceeded(f"called off: {reason}; call it again, or allow it more time")
        case Verdict.MISMATCH if finished.mismatch is not None:
            found = finished.mismatch
            return Mismatch(found.member, found.field, found.theirs, found.ours)
        case Verdict.DOUBT:
            return InDoubt(f"what became of this call is unknown here ({reason}): its buffer is as it was")
        case Verdict.MINORITY:
            return NotEnoughPeers(f"{reason}: wait for others to join, then admit them")
        case Verdict.EVICTED:
            return Evicted(f"{reason}: admit() waits to be let in again; then sync")
        case _:
            return Aborted(f"called off for everybody: {reason}; call it again, with whoever is left")


class InDoubt(Evicted):
    """The others may have committed this call and may not; this member is still in the group, or in what is left."""
