"""A table that is walked in random order at the cost of what is taken: a book is asked for a few at every hello."""

import random
from collections.abc import Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class RandomTable(Generic[K, V]):
    """What a dict does, as far as it is needed, and `shuffled`."""

    def __init__(self) -> None:
        self._values: dict[K, V] = {}
        self._order: list[K] = []
        self._places: dict[K, int] = {}  # in the order

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def get(self, key: K) -> V | None:
        """Return the value of a key, None if there is none."""
        return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        """Set the value of a key."""
        if key not in self._values:
            self._places[key] = len(self._order)
            self._order.append(key)
        self._values[key] = value

    def pop(self, key: K) -> V | None:
        """Remove a key and return its value, None if there was none."""
        if key not in self._values:
            return None
        place, last = self._places.pop(key), self._order.pop()
        if last != key:
            self._order[place], self._places[last] = last, place
        return self._values.pop(key)

    def items(self) -> Iterator[tuple[K, V]]:
        """Yield keys with their values, those that were put first first."""
        yield from self._values.items()

    def values(self) -> Iterator[V]:
        """Yield the values in the same order."""
        yield from self._values.values()

    def shuffled(self, rng: random.Random) -> Iterator[tuple[K, V]]:
        """Yield keys and values in uniformly random order (Fisher and Yates, as far as is asked).

        Nothing may be put or popped meanwhile.
        """
        order, count = self._order, len(self._order)
        moved: dict[int, int] = {}  # places that hold another's key by now
        for at in range(count):
            drawn = at + int(rng.random() * (count - at))
            key = order[moved.get(drawn, drawn)]
            moved[drawn] = moved.pop(at, at)
            yield key, self._values[key]
