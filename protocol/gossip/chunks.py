"""Partial items: those larger than one chunk, of which some chunks are there, each proven as it came.

Such an item is never sent whole. A WANT of it is answered with its **outline**: the header that its signer signed, and
the hashes of its chunks, which the header's digest proves (see `protocol.wire.envelope`). Its chunks come from all who
have them, the rarest first, and who has a chunk gives it.

Partial items have `held_bytes`, by what their signers say of their sizes, and `max_partials` places. Without room,
the item that got nothing for longest gives way, if that is more than `STALL_S`. Its chunks are dropped, and it is
wanted as if nothing of it had come.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from protocol.config import Limits
from protocol.events import Item, Outline
from protocol.identity import NodeId
from protocol.wire.envelope import ItemId, chunk_count
from protocol.wire.messages import ItemChunk

STALL_S = 10.0  # a chunk on a sixteenth of a line of 2 Mbit/s


@dataclass(slots=True)
class Partial:
    """An item that is being fetched: what is there, what is asked of whom, and how many holders each chunk has."""

    outline: Outline
    touched: float  # when something of it last came
    missing: int = 0  # the chunks that are neither there nor asked for, a bit each
    chunks: dict[int, bytes] = field(default_factory=dict)
    asked: dict[int, NodeId] = field(default_factory=dict)
    holders: list[int] = field(default_factory=list)  # of each chunk, how many have it

    @classmethod
    def begin(cls, outline: Outline, now: float) -> "Partial":
        """Return one of which nothing is there."""
        count = chunk_count(outline.header.size)
        return cls(outline, now, (1 << count) - 1, holders=[0] * count)

    @property
    def count(self) -> int:
        return len(self.holders)

    @property
    def is_whole(self) -> bool:
        return len(self.chunks) == self.count

    @property
    def parts(self) -> bytes:
        """Which chunks are there, as HAVE says it."""
        bits = sum(1 << index for index in self.chunks)
        return bits.to_bytes((self.count + 7) // 8, "little")

    def held(self, parts: int, by: int) -> None:
        """Count one holder more (`by` 1) or less (-1) of the chunks in `parts`."""
        for index in range(self.count):
            if parts >> index & 1:
                self.holders[index] += by

    def chunk(self, index: int) -> ItemChunk | None:
        data = self.chunks.get(index)
        return None if data is None else self.outline.chunk(index, data)

    def item(self) -> Item:
        return self.outline.fill(self.chunks[index] for index in range(self.count))


class Partials:
    """All partial items, within their bounds. `now` is steady, in seconds."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._partials: dict[ItemId, Partial] = {}  # in the order of their beginnings
        self._size = 0
        self.get: Callable[[ItemId], Partial | None] = self._partials.get

    def __len__(self) -> int:
        return len(self._partials)

    def __contains__(self, item_id: ItemId) -> bool:
        return item_id in self._partials

    def has_room(self, size: int, now: float) -> bool:
        """Tell whether an item of that size can be begun, in place of some that stall if need be."""
        return self._giving_way(size, now) is not None

    def begin(self, outline: Outline, now: float) -> list[ItemId] | None:
        """Begin an item; return those that gave way, or None if there is no room, and nothing gave way."""
        size = outline.header.size
        gone = self._giving_way(size, now)
        if gone is None:
            return None
        for item_id in gone:
            self.pop(item_id)
        self._partials[outline.id] = Partial.begin(outline, now)
        self._size += size
        return gone

    def items(self) -> Iterator[tuple[ItemId, Partial]]:
        """Return them in the order of their beginnings."""
        return iter(self._partials.items())

    def _giving_way(self, size: int, now: float) -> list[ItemId] | None:
        """Return those that stall, which give way to an item of that size; None if there is no room even so."""
        limits, gone = self._limits, list[ItemId]()
        room, places = limits.held_bytes - self._size, limits.max_partials - len(self._partials)
        if room >= size and places > 0:
            return gone
        for item_id, partial in sorted(self._partials.items(), key=lambda one: one[1].touched):
            if partial.touched + STALL_S > now:
                return None
            gone.append(item_id)
            room, places = room + partial.outline.header.size, places + 1
            if room >= size and places > 0:
                return gone
        return None

    def pop(self, item_id: ItemId) -> Partial | None:
        partial = self._partials.pop(item_id, None)
        if partial is not None:
            self._size -= partial.outline.header.size
        return partial
