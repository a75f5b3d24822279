"""A queue between two threads that never blocks and never grows beyond its bounds."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Holds at most `max_items` items and `max_bytes` bytes; the oldest are dropped and counted."""

    def __init__(self, max_items: int, max_bytes: int, size_of: Callable[[T], int]) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._lock = threading.Lock()
        self._items: deque[T] = deque()
        self._bytes = 0
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        """Append an item."""
        with self._lock:
            self._items.append(item)
            self._bytes += self._size_of(item)
            while len(self._items) > self._max_items or self._bytes > self._max_bytes:
                self._bytes -= self._size_of(self._items.popleft())
                self.dropped += 1

    def take(self, limit: int) -> list[T]:
        """Remove and return up to `limit` items, oldest first."""
        with self._lock:
            taken = [self._items.popleft() for _ in range(min(limit, len(self._items)))]
            self._bytes -= sum(map(self._size_of, taken))
            return taken
