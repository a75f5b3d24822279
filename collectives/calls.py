"""One call of an operation, from Begin to its verdict, as the thread that runs it sees it.

The control thread says when it starts and how it ended; the caller's thread carries it out between.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from collectives.agreement.events import Begin, CallVerdict, Finished, Perform, Performed
from collectives.errors import (
    Aborted,
    BadArgument,
    CollectiveError,
    CommunicatorClosed,
    DeadlineExceeded,
    Evicted,
    InDoubt,
    Mismatch,
)
from collectives.mesh.socket_port import SocketPort
from collectives.threads import add_thread, join_all

T = TypeVar("T")

# Verdicts come from the core, which has deadlines of its own; this is for a core that failed.
LAST_RESORT_S = 5.0
MAX_TIMEOUT_S = 366 * 86_400.0  # every wait has an end, and one that a thread can be told
MAX_IN_FLIGHT = 64  # threads; a caller that starts more waits for one to end
FLAGS = {False: b"\0", True: b"\1"}  # before each share: does its sender know of anybody who waits?


class PendingCall:
    """Where the control thread leaves what becomes of the call under `tag`. `deadline` is on the monotonic clock."""

    def __init__(self, tag: int, deadline: float) -> None:
        self.tag = tag
        self.deadline = deadline
        self.port: SocketPort | None = None
        self._changed = threading.Condition()
        self._started: Perform | None = None
        self._finished: Finished | None = None
        self._failed: CollectiveError | None = None

    def start(self, start: Perform, port: SocketPort) -> None:
        """It is to be carried out."""
        with self._changed:
            self._started, self.port = start, port
            self._changed.notify_all()

    def finish(self, finished: Finished) -> None:
        """It is over."""
        with self._changed:
            self._finished = finished
            self._changed.notify_all()

    def fail(self, error: CollectiveError) -> None:
        """It was never begun, or nobody is left to end it."""
        with self._changed:
            self._failed = error
            self._changed.notify_all()

    def wait_start(self, until: float) -> tuple[Perform, SocketPort] | None:
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
                if self._failed is not None:
                    raise self._failed
                if not self._changed.wait(until - time.monotonic()) and time.monotonic() >= until:
                    raise InDoubt("no verdict came, which is a defect: leave the group and connect again")


@dataclass(frozen=True, slots=True)
class Committed(Generic[T]):
    """A call that counted: `outcome` is what carrying it out gave, in scratch; publish it."""

    outcome: T
    finished: Finished
    bytes_sent: int
    bytes_received: int


class Runner(Protocol):
    """A call's needs of the control thread."""

    def begin(self, begin: Begin) -> PendingCall:
        """Hand a call to the core."""

    def done(self, event: Performed) -> None:
        """Say how carrying it out went."""

    def give_up(self, call: PendingCall) -> None:
        """Say that nobody waits for it any more."""


Work = Callable[[Perform, SocketPort], T]


@contextmanager
def waiting(control: Runner, call: PendingCall) -> Iterator[None]:
    """Give the call up if the block is interrupted (Ctrl-C): its tag is free then, and nobody waits for this member."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception):
            control.give_up(call)
        raise


def finish_call(control: Runner, call: PendingCall, settling: float, perform: Work[T]) -> Committed[T]:
    """Carry out a call that was begun, and wait for its verdict.

    Raises:
        Aborted, DeadlineExceeded, Mismatch, NotEnoughPeers, Evicted, InDoubt: as the verdict says.
        CommunicatorClosed: this member left meanwhile.
        Exception: what `perform` raised by itself; the operation was called off for everybody.
    """
    last = last_moment(call, settling)
    with waiting(control, call):
        started = call.wait_start(last)
    if started is None:
        raise error_of(call.wait_finish(last))
    start, port = started
    try:
        outcome = perform(start, port)
    except (Aborted, DeadlineExceeded) as error:
        blames = error.member if isinstance(error, Aborted) else ""
        control.done(Performed(start.op, ok=False, reason=str(error), blames=blames))
        finished = call.wait_finish(last)
        if isinstance(error, DeadlineExceeded) and finished.verdict is CallVerdict.ABORT:
            raise
        raise error_of(finished) from error
    except BaseException as error:
        control.done(Performed(start.op, ok=False, reason=f"{type(error).__name__}: {error}"))
        if isinstance(error, Exception):
            call.wait_finish(last)
        raise
    control.done(Performed(start.op))
    finished = call.wait_finish(last)
    if finished.verdict is not CallVerdict.COMMIT:
        raise error_of(finished)
    return Committed(outcome, finished, port.bytes_sent, port.bytes_received)


def check_timeout(timeout: float) -> float:
    """Return the seconds that something may take; raises `BadArgument` for what no wait can be given."""
    if not timeout <= MAX_TIMEOUT_S:  # NaN too
        raise BadArgument(f"timeout = {timeout:g}: give seconds, at most {MAX_TIMEOUT_S:.0f}")
    return timeout


def last_moment(call: PendingCall, settling: float) -> float:
    """Return by when a verdict has come: the core may take `settling` seconds after the deadline."""
    return call.deadline + settling + LAST_RESORT_S


def error_of(finished: Finished) -> CollectiveError:
    """Return the error that a verdict is told as."""
    reason = finished.reason or "a member failed"
    match finished.verdict:
        case CallVerdict.DEADLINE:
            return DeadlineExceeded(f"called off: {reason}; call it again, or allow it more time")
        case CallVerdict.MISMATCH if finished.mismatch is not None:
            mismatch = finished.mismatch
            return Mismatch(mismatch.member, mismatch.field, mismatch.theirs, mismatch.ours)
        case CallVerdict.DOUBT:
            return InDoubt(
                f"what became of this call is unknown here ({reason}): its buffer is as it was; "
                "call it again, or sync with those who may have the result"
            )
        case CallVerdict.EVICTED:
            return Evicted(f"{reason}: admit() waits to be let in again; then sync")
        case CallVerdict.CLOSED:
            return CommunicatorClosed(f"{reason}: connect again")
        case _:
            return Aborted(f"called off for everybody: {reason}; call it again, with whoever is left")


class Handle(Generic[T]):
    """An operation under way."""

    def __init__(self, work: Callable[[], T], over: Callable[[], None]) -> None:
        self._work: Callable[[], T] | None = work
        self._over = over
        self._done = threading.Event()
        self._result: list[T] = []
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="gossamer-operation", daemon=True)
        self.thread.start()

    def done(self) -> bool:
        """Tell whether `wait` would return, or raise, at once."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> T:
        """Return the operation's result, or raise its error; the buffer is filled then, and not before.

        Args:
            timeout: seconds to wait at most; None: until the operation's own deadline ends it.

        Raises:
            TimeoutError: it is not over yet. It goes on: wait again.
            CollectiveError: what the operation ended with.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"not over after {timeout:g} s: it goes on, wait for it again")
        if self._error is not None:
            raise self._error
        return self._result[0]

    def settle(self) -> None:
        """Wait until it is over, whatever comes of it."""
        self._done.wait()

    def _run(self) -> None:
        assert self._work is not None
        try:
            self._result.append(self._work())
        except BaseException as error:  # noqa: BLE001  # it belongs to whoever waits
            self._error = error
        finally:
            self._work = None  # it holds the caller's tensors
            self._over()
            self._done.set()


class HandlesInFlight:
    """Starts handles, a bounded number at a time."""

    def __init__(self) -> None:
        self._free = threading.BoundedSemaphore(MAX_IN_FLIGHT)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def join(self, timeout: float) -> None:
        """Wait for the threads of all handles."""
        join_all(self._threads, timeout)

    def start(self, begin: Callable[[], Callable[[], T]], timeout: float) -> Handle[T]:
        """Call `begin` here, and what it returns on a thread.

        Raises:
            DeadlineExceeded: as many as may be are under way, and none ended within `timeout` seconds.
        """
        if not self._free.acquire(timeout=timeout):
            raise DeadlineExceeded(f"{MAX_IN_FLIGHT} operations are in flight, and none ended: wait for some first")
        try:
            handle = Handle(begin(), self._free.release)
        except BaseException:
            self._free.release()
            raise
        with self._lock:
            self._threads = add_thread(self._threads, handle.thread)
        return handle


@dataclass(frozen=True, slots=True)
class AgreedPending:
    """Whether applicants wait, by the last operation that counted: the same at all members of its view."""

    mark: bytes = b""
    pending: bool = False
    since: float = float("-inf")
