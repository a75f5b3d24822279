"""The items that a node holds for others: bounded in bytes, in number and in age.

Beyond a bound the oldest goes first, but none that we signed, nor one that is being given to somebody: these stay
until they are stale, as nobody else may have them yet.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from protocol.config import Instant
from protocol.events import Item
from protocol.identity import NodeId
from protocol.wire.envelope import ItemId
from protocol.wire.messages import Entry

# A holder stops offering an item before it is stale for a receiver whose clock is ahead.
OFFER_AGE = 0.8
# One takes some 700 bytes beside its frame, so bytes alone would let a peer with the smallest items have five times as
# many. It is also below the number of items that gossip knows again: what is held does not come twice.
MAX_HELD = 1 << 15


@dataclass(slots=True)
class _Held:
    item: Item
    since: float
    withdrawn: bool = False
    entry: Entry | None = None  # made when it is first announced


class Store:
    """Items in the order they were added, of at most `capacity` bytes; see the module's comment."""

    def __init__(self, own: NodeId, capacity: int, max_age: float) -> None:
        self._own = own
        self._capacity = capacity
        self._max_age = max_age * OFFER_AGE
        self._held: OrderedDict[ItemId, _Held] = OrderedDict()
        self._evictable: OrderedDict[ItemId, None] = OrderedDict()  # those that we did not sign
        self._in_service: Counter[ItemId] = Counter()
        self.size = 0  # bytes

    def __len__(self) -> int:
        return len(self._held)

    def add(self, item: Item, now: Instant) -> None:
        """Hold an item."""
        self.pop(item.id)  # it was forgotten that it came: a clock that was set back holds it for longer
        self._held[item.id] = _Held(item, now.steady)
        if item.signer != self._own:
            self._evictable[item.id] = None
        self.size += len(item.frame)
        while self.size > self._capacity or len(self._held) > MAX_HELD:
            self.pop(self._oldest_to_spare())

    def get(self, item_id: ItemId) -> Item | None:
        """Return the item if it is held."""
        held = self._held.get(item_id)
        return held.item if held else None

    def offered(self, item_id: ItemId, now: Instant) -> Entry | None:
        """Return what is announced of an item if it is held, was not withdrawn, and is not stale soon."""
        held = self._held.get(item_id)
        if held is None or held.withdrawn or held.item.time + self._max_age <= now.unix:
            return None
        held.entry = held.entry or held.item.entry
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
        """Offer the item to nobody any more, if it is held."""
        if (held := self._held.get(item_id)) is not None:
            held.withdrawn = True

    def withdraw_signed(self, is_by: Callable[[NodeId], bool]) -> None:
        """Offer nobody any more what somebody signed for whom `is_by` holds."""
        for held in self._held.values():
            held.withdrawn = held.withdrawn or is_by(held.item.signer)

    def pop(self, item_id: ItemId) -> None:
        """Let go of an item, if it is held."""
        held = self._held.pop(item_id, None)
        self._evictable.pop(item_id, None)
        if held is not None:
            self.size -= len(held.item.frame)

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

    def _oldest_to_spare(self) -> ItemId:
        for _ in range(len(self._evictable)):
            item_id = next(iter(self._evictable))
            if item_id not in self._in_service:
                return item_id
            self._evictable.move_to_end(item_id)
        return next(iter(self._held))
