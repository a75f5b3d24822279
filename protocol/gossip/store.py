"""The items that a node holds for others: bounded in bytes in memory and on disk, in number and in age.

When memory is full, the least recently used item moves to the `Shelf`, on disk. When the shelf is full, its oldest item
is deleted. If the shelf takes nothing, the oldest item in memory is deleted. Our own items are deleted last, as nobody
else may have them yet. An item on the shelf is fetched before it is given; an outline needs no fetch. At most about
`max_coming_bytes` are on their way from the shelf at a time.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from protocol.config import Instant, Limits, Shelf
from protocol.events import Item
from protocol.identity import NodeId
from protocol.wire.envelope import CHUNK_BYTES, HEAD_BYTES, ItemId
from protocol.wire.messages import Entry, ItemOutline

# A holder stops offering an item before it is stale for a receiver whose clock is ahead.
OFFER_AGE = 0.8


@dataclass(slots=True)
class _Held:
    item: Item  # if it is not in memory, with the head of its frame only
    entry: Entry
    since: float
    withdrawn: bool = False
    shelved: bool = False  # whether the shelf has its frame, too

    @property
    def size(self) -> int:
        return self.entry.size


class Store:
    """Items in the order they were added; see the module's comment."""

    def __init__(self, own: NodeId, limits: Limits, shelf: Shelf) -> None:
        self._own = own
        self._limits = limits
        self._max_age = limits.max_item_age_s * OFFER_AGE
        self._shelf = shelf
        self._held: OrderedDict[ItemId, _Held] = OrderedDict()
        self._used: OrderedDict[ItemId, None] = OrderedDict()  # those in memory, the one last used last
        self._coming: dict[ItemId, int] = {}  # bytes on their way from the shelf
        self.in_memory = 0  # bytes
        self.on_shelf = 0

    def add(self, item: Item, now: Instant) -> None:
        self.pop(item.id)  # held already if our clock was set back: then it is held for longer than it is remembered
        self._held[item.id] = _Held(item, item.entry, now.steady)
        self._used[item.id] = None
        self.in_memory += len(item.frame)
        self._make_room()

    def get(self, item_id: ItemId) -> Item | None:
        """Return the item if it is in memory."""
        if item_id not in self._used:
            return None
        self._used.move_to_end(item_id)
        return self._held[item_id].item

    def outline(self, item_id: ItemId) -> ItemOutline | None:
        """Return the outline of a large item, wherever its frame is."""
        held = self._held.get(item_id)
        return held.item.outline if held is not None and held.size > HEAD_BYTES + CHUNK_BYTES else None

    def fetch(self, item_id: ItemId) -> bool:
        """Begin to bring an item from the shelf, unless too much is on its way; False if the item is not held."""
        held = self._held.get(item_id)
        is_away = item_id not in self._used and item_id not in self._coming
        if held is not None and is_away and sum(self._coming.values()) < self._limits.max_coming_bytes:
            self._coming[item_id] = held.size
            self._shelf.fetch(item_id)
        return held is not None

    def fetched(self, item_id: ItemId, frame: bytes) -> None:
        """Take a frame that came from the shelf. An empty one says that it was lost there."""
        self._coming.pop(item_id, None)
        held = self._held.get(item_id)
        if held is None or item_id in self._used:
            return
        if len(frame) != held.size:
            self.pop(item_id)
            return
        held.item = replace(held.item, frame=frame)
        self._used[item_id] = None
        self.in_memory += held.size
        self._make_room()

    def entry(self, item_id: ItemId) -> Entry | None:
        held = self._held.get(item_id)
        return held.entry if held is not None else None

    def offered(self, item_id: ItemId, now: Instant) -> Entry | None:
        """Return what is announced of an item if it is held, was not withdrawn, and is not stale soon."""
        held = self._held.get(item_id)
        if held is None or held.withdrawn or held.item.time + self._max_age <= now.unix:
            return None
        return held.entry

    def withdraw(self, item_id: ItemId) -> None:
        if (held := self._held.get(item_id)) is not None:
            held.withdrawn = True

    def withdraw_signed(self, is_by: Callable[[NodeId], bool]) -> None:
        """Stop offering items for whose signer `is_by` holds."""
        for held in self._held.values():
            held.withdrawn = held.withdrawn or is_by(held.item.signer)

    def pop(self, item_id: ItemId) -> None:
        held = self._held.pop(item_id, None)
        if held is None:
            return
        if item_id in self._used:
            del self._used[item_id]
            self.in_memory -= held.size
        if held.shelved:
            self.on_shelf -= held.size
            self._shelf.drop(item_id)

    def expire(self, now: Instant) -> None:
        """Let go of what is too old. Items came roughly in the order of their stamps: stop at the first good one."""
        while self._held:
            oldest = next(iter(self._held.values()))
            if oldest.item.time + self._max_age > now.unix:
                return
            self.pop(oldest.item.id)

    def newest(self, count: int, since: float = float("-inf")) -> list[ItemId]:
        """Return the ids of at most `count` newest items that were added at or after `since`, oldest first."""
        ids: list[ItemId] = []
        for item_id, held in reversed(self._held.items()):
            if len(ids) == count or held.since < since:
                break
            ids.append(item_id)
        return ids[::-1]

    def _make_room(self) -> None:
        limits = self._limits
        while len(self._held) > limits.max_held:
            self._spare(self._held.values())
        while self.in_memory > limits.held_bytes:
            item_id = next(iter(self._used))
            held = self._held[item_id]
            if not held.shelved:
                if not self._shelf.put(item_id, held.item.frame):
                    self._spare(held for held in self._held.values() if not held.shelved)
                    continue
                self.on_shelf += held.size
                held.shelved = True
            held.item = replace(held.item, frame=held.item.frame[:HEAD_BYTES])
            del self._used[item_id]
            self.in_memory -= held.size
        while self.on_shelf > limits.shelf_bytes:
            self._spare(held for held in self._held.values() if held.shelved)

    def _spare(self, those: Iterable[_Held]) -> None:
        """Delete the oldest of some items; one of our own only if there is no other."""
        oldest: _Held | None = None
        for held in those:
            oldest = oldest or held
            if held.item.signer != self._own:
                oldest = held
                break
        assert oldest is not None
        self.pop(oldest.item.id)
