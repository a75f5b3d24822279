"""Operations in the background: each has a thread of its own, which mostly waits, and a handle."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from collectives.errors import DeadlineExceeded

T = TypeVar("T")

MAX_IN_FLIGHT = 64  # threads; whoever starts more waits for one to end


class Handle(Generic[T]):
    """An operation under way."""

    def __init__(self, work: Callable[[], T], over: Callable[[], None]) -> None:
        self._work: Callable[[], T] | None = work
        self._over = over
        self._done = threading.Event()
        self._result: list[T] = []
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="gossamer-operation", daemon=True).start()

    def done(self) -> bool:
        """Tell whether `wait` would return, or raise, at once."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> T:
        """Return the operation's result, or raise its error; the buffer is filled then, and not before.

        Args:
            timeout: seconds to wait at most; None: until the operation's own deadline ends it.

        Raises:
            DeadlineExceeded: it is not over yet. It goes on: wait again.
            CollectiveError: what the operation ended with.
        """
        if not self._done.wait(timeout):
            raise DeadlineExceeded(f"not over after {timeout:g} s: it goes on, wait for it again")
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


class Pool:
    """Starts handles, a bounded number at a time."""

    def __init__(self) -> None:
        self._free = threading.BoundedSemaphore(MAX_IN_FLIGHT)

    def start(self, begin: Callable[[], Callable[[], T]], timeout: float) -> Handle[T]:
        """Call `begin` here, and what it returns on a thread.

        Raises:
            DeadlineExceeded: as many as may be are under way, and none ended within `timeout` seconds.
        """
        if not self._free.acquire(timeout=timeout):
            raise DeadlineExceeded(f"{MAX_IN_FLIGHT} operations are in flight, and none ended: wait for some first")
        try:
            return Handle(begin(), self._free.release)
        except BaseException:
            self._free.release()
            raise
