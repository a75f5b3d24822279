"""The items that a node holds for others: bounded in bytes in memory and on disk, in number and in age.

Where the memory's bound is reached, the item that was not used for longest moves to the `Shelf`, the disk, and the
oldest there goes for good where that is full. An item that the disk does not take is gone for good. None goes that we
signed, nor one that is being given to somebody: these stay until they are stale, while there is another, as nobody else
may have them yet. What is on the shelf is fetched before it is given, but for an outline: so much at a time that
`max_coming_bytes` are on their way, whoever asks for how much.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto

from protocol.config import Instant, Limits, Shelf
from protocol.events import Item
from protocol.identity import NodeId
from protocol.wire.envelope import CHUNK_BYTES, HEAD_BYTES, ItemId
from protocol.wire.messages import Entry, ItemOutline

# A holder stops offering an item before it is stale for a receiver whose clock is ahead.
OFFER_AGE = 0.8


class FramePlace(Enum):
    """Where an item's frame is."""

    MEMORY = auto()
    BOTH = auto()  # in memory, and on the shelf
    SHELF = auto()
    FETCHING = auto()  # on its way from the shelf


@dataclass(slots=True)
class _Held:
    item: Item  # of its frame only the head while that is on the shelf only
    entry: Entry
    since: float
    withdrawn: bool = False
    place: FramePlace = FramePlace.MEMORY

    @property
    def size(self) -> int:
        return self.entry.size

    @property
    def is_in_memory(self) -> bool:
        return self.place in (FramePlace.MEMORY, FramePlace.BOTH)


class Store:
    """Items in the order they were added, of at most so many bytes in memory and on the shelf; see above."""

    def __init__(self, own: NodeId, limits: Limits, shelf: Shelf) -> None:
        self._own = own
        self._limits = limits
        self._max_age = limits.max_item_age_s * OFFER_AGE
        self._shelf = shelf
        self._held: OrderedDict[ItemId, _Held] = OrderedDict()
        self._used: OrderedDict[ItemId, None] = OrderedDict()  # those in memory, the one last used last
        self._in_service: Counter[ItemId] = Counter()
        self._to_fetch: deque[ItemId] = deque()
        self._coming: dict[ItemId, int] = {}  # bytes on their way from the shelf
        self.in_memory = 0  # bytes
        self.on_shelf = 0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, item_id: ItemId) -> bool:
        return item_id in self._held

    def add(self, item: Item, now: Instant) -> None:
        self.pop(item.id)  # it was forgotten that it came: a clock that was set back holds it for longer
        self._held[item.id] = _Held(item, item.entry, now.steady)
        self._used[item.id] = None
        self.in_memory += len(item.frame)
        self._make_room()

    def get(self, item_id: ItemId) -> Item | None:
        """Return the item if it is in memory."""
        held = self._held.get(item_id)
        if held is None or not held.is_in_memory:
            return None
        self._used.move_to_end(item_id)
        return held.item

    def outline(self, item_id: ItemId) -> ItemOutline | None:
        """Return the outline of a large item, wherever its frame is."""
        held = self._held.get(item_id)
        return held.item.outline if held is not None and held.size > HEAD_BYTES + CHUNK_BYTES else None

    def fetch(self, item_id: ItemId) -> bool:
        """Have an item that is on the shelf brought; False if it is not held. `fetched` is to follow."""
        held = self._held.get(item_id)
        if held is not None and held.place is FramePlace.SHELF:
            held.place = FramePlace.FETCHING
            self._to_fetch.append(item_id)
            self._fetch_more()
        return held is not None

    def _fetch_more(self) -> None:
        while self._to_fetch and sum(self._coming.values()) < self._limits.max_coming_bytes:
            item_id = self._to_fetch.popleft()
            held = self._held.get(item_id)
            if held is not None and held.place is FramePlace.FETCHING and item_id not in self._coming:
                self._coming[item_id] = held.size
                self._shelf.fetch(item_id)

    def fetched(self, item_id: ItemId, frame: bytes) -> None:
        """A frame came from the shelf; an empty one: it is lost there."""
        self._coming.pop(item_id, None)
        self._keep(item_id, frame)
        self._fetch_more()

    def _keep(self, item_id: ItemId, frame: bytes) -> None:
        held = self._held.get(item_id)
        if held is None or held.is_in_memory:
            return
        if len(frame) != held.size:
            self.pop(item_id)
            return
        held.item = _with_frame(held.item, frame)
        held.place = FramePlace.BOTH
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

    def serve(self, item_id: ItemId) -> None:
        """Keep an item, of which something is to be given to somebody, until as many times `served` is said."""
        self._in_service[item_id] += 1

    def served(self, item_id: ItemId) -> None:
        """It was given, or is not wanted any more."""
        self._in_service[item_id] -= 1
        if self._in_service[item_id] <= 0:
            del self._in_service[item_id]

    def withdraw(self, item_id: ItemId) -> None:
        if (held := self._held.get(item_id)) is not None:
            held.withdrawn = True

    def withdraw_signed(self, is_by: Callable[[NodeId], bool]) -> None:
        """Offer nobody any more what somebody signed for whom `is_by` holds."""
        for held in self._held.values():
            held.withdrawn = held.withdrawn or is_by(held.item.signer)

    def pop(self, item_id: ItemId) -> None:
        held = self._held.pop(item_id, None)
        if held is None:
            return
        if held.is_in_memory:
            del self._used[item_id]
            self.in_memory -= held.size
        if held.place is not FramePlace.MEMORY:
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
        while len(self._held) > self._limits.max_held:
            self.pop(self._first_to_spare(self._held))
        while self.in_memory > self._limits.held_bytes:
            item_id = next(iter(self._used))
            held = self._held[item_id]
            if held.place is FramePlace.MEMORY and not self._shelve(item_id, held):
                self.pop(self._first_to_spare(self._used))
                continue
            held.item = _with_frame(held.item, held.item.frame[:HEAD_BYTES])
            held.place = FramePlace.SHELF
            del self._used[item_id]
            self.in_memory -= held.size

    def _shelve(self, item_id: ItemId, held: _Held) -> bool:
        """Put an item on the shelf, in place of what can be spared there if need be."""
        spared, excess = list[ItemId](), self.on_shelf + held.size - self._limits.shelf_bytes
        for one, other in self._held.items() if excess > 0 else ():
            if self._may_go(one) and not other.is_in_memory:
                spared.append(one)
                excess -= other.size
                if excess <= 0:
                    break
        if excess > 0 or not self._shelf.put(item_id, held.item.frame):
            return False
        for one in spared:
            self.pop(one)
        self.on_shelf += held.size
        return True

    def _may_go(self, item_id: ItemId) -> bool:
        return item_id not in self._in_service and self._held[item_id].item.signer != self._own

    def _first_to_spare(self, ids: Iterable[ItemId]) -> ItemId:
        return next(filter(self._may_go, ids), next(iter(ids)))


def _with_frame(item: Item, frame: bytes) -> Item:
    return Item(item.id, item.signer, item.time, item.topic, frame, item.hashes)
