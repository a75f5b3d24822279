"""A mapping that remembers only the newest entries, so that no peer can make it grow."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Holds at most `capacity` entries; the one that was set longest ago is forgotten first."""

    __slots__ = ("_capacity", "_entries", "get")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[K, V] = OrderedDict()
        self.get: Callable[[K], V | None] = self._entries.get  # the entry, or None: without a call of ours between

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def set(self, key: K, value: V) -> None:
        """Add or renew an entry."""
        entries = self._entries
        entries[key] = value
        entries.move_to_end(key)
        if len(entries) > self._capacity:
            entries.popitem(last=False)

    def take_all(self) -> list[V]:
        """Forget every entry and return them, oldest first."""
        values = list(self._entries.values())
        self._entries.clear()
        return values

    def values(self) -> list[V]:
        """Return all entries, the one that was set longest ago first."""
        return list(self._entries.values())

    def pop(self, key: K) -> V | None:
        """Forget an entry and return it, or None."""
        return self._entries.pop(key, None)
