"""Partial items: larger than one chunk, with some chunks here. Each chunk is checked as it comes.

Such an item is never sent whole. A WANT of it is answered with its **outline**: the header that its signer signed, and
the hashes of its chunks, which the header's digest proves (see `protocol.wire.envelope`). Chunks are fetched from all
peers that have them, the rarest first. A node gives each chunk that it has.
"""

from dataclasses import dataclass, field

from protocol.events import Item, Outline
from protocol.wire.envelope import chunk_count
from protocol.wire.messages import ItemChunk


@dataclass(slots=True)
class Partial:
    """An item that is being fetched, and what is there of it."""

    outline: Outline
    touched: float  # when something of it last came
    missing: int  # the chunks that are neither there nor asked for, a bit each
    voice: str  # as whom the node counts that gave the outline
    chunks: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def begin(cls, outline: Outline, now: float, voice: str = "") -> "Partial":
        """Return a partial item without chunks."""
        return cls(outline, now, (1 << chunk_count(outline.header.size)) - 1, voice)

    @property
    def size(self) -> int:
        """The bytes that the item will have."""
        return self.outline.header.size

    @property
    def is_whole(self) -> bool:
        return len(self.chunks) == chunk_count(self.size)

    @property
    def parts(self) -> bytes:
        """Which chunks are there, as HAVE says it."""
        bits = sum(1 << index for index in self.chunks)
        return bits.to_bytes((chunk_count(self.size) + 7) // 8, "little")

    def add(self, chunk: ItemChunk, now: float) -> None:
        """Take a chunk that is asked of nobody and was found good."""
        self.chunks[chunk.index] = chunk.data
        self.missing &= ~(1 << chunk.index)
        self.touched = now

    def chunk(self, index: int) -> ItemChunk | None:
        data = self.chunks.get(index)
        return None if data is None else self.outline.chunk(index, data)

    def item(self) -> Item:
        return self.outline.fill(data for _, data in sorted(self.chunks.items()))
