"""A lock that says who holds it and that somebody waits for it, so that a test finds a missing `with` each time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


class WatchedLock:
    """A `threading.Lock` that tells whether this thread holds it; `awaited` is set when a thread finds it held."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None
        self.awaited = threading.Event()

    @property
    def is_mine(self) -> bool:
        return self._holder == threading.get_ident()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if not self._lock.acquire(blocking=False):
            if not blocking:
                return False
            self.awaited.set()
            if not self._lock.acquire(timeout=timeout):
                return False
        self._holder = threading.get_ident()
        return True

    def release(self) -> None:
        self._holder = None
        self._lock.release()

    def __enter__(self) -> "WatchedLock":
        self.acquire()
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()


@contextmanager
def watched(place: str = "threading.Lock") -> Iterator[WatchedLock]:
    """The lock that the block's call of `place` gets."""
    lock = WatchedLock()
    with mock.patch(place, lambda: lock):
        yield lock
