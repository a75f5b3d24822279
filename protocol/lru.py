"""A mapping that remembers only the newest entries, so that no peer can make it grow."""

from collections import OrderedDict, deque
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
        self.get: Callable[[K], V | None] = self._entries.get  # returns the entry or None; bound here for speed

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


class Expiring(Recent[K, V]):
    """A `Recent` that also forgets, at `expire`, what was set `life` seconds ago or earlier, up to an eighth late.

    It notes the time once in that eighth, and not with each entry, which would double the memory of small entries.
    """

    __slots__ = ("_life", "_marks", "_times_set")

    def __init__(self, capacity: int, life: float) -> None:
        super().__init__(capacity)
        self._life = life
        self._marks: deque[tuple[float, int]] = deque()  # when, and how often an entry had been set by then
        self._times_set = 0

    def set(self, key: K, value: V) -> None:
        """Add or renew an entry."""
        self._times_set += 1
        super().set(key, value)

    def expire(self, now: float) -> None:
        """Forget what is too old at `now`, in seconds of a clock that never steps back."""
        if not self._marks or now >= self._marks[-1][0] + self._life / 8:
            self._marks.append((now, self._times_set))
        while self._marks and self._marks[0][0] + self._life <= now:
            younger = self._times_set - self._marks.popleft()[1]
            while len(self._entries) > younger:
                self._entries.popitem(last=False)
