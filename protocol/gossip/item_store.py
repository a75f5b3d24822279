"""The items that a node holds for others: bounded in bytes, in number and in age.

Beyond a bound one of the oldest that can be spared goes first, or the oldest; a large one while several of them have
more than half of the bytes: two of the largest size would push out all small ones, which were just announced.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

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
LOOKED_AT = 64  # of the oldest items, for one that nobody near needs any more


@dataclass(slots=True)
class _Held:
    item: Item
    since: float
    withdrawn: bool = False
    entry: Entry | None = None  # made when it is first announced: where all are linked with all, few are


class Store:
    """Items in the order they were added, of at most `capacity` bytes; see the module's comment."""

    def __init__(self, capacity: int, max_age: float) -> None:
        self._capacity = capacity
        self._max_age = max_age * OFFER_AGE
        self._held: OrderedDict[ItemId, _Held] = OrderedDict()
        self._large: OrderedDict[ItemId, _Held] = OrderedDict()  # those of them that are
        self.size = 0  # bytes

    def __len__(self) -> int:
        return len(self._held)

    def add(self, item: Item, now: Instant, spare: Callable[[Item], bool] = lambda _: True) -> None:
        """Hold an item; `spare` tells of a held one whether all who are near have it."""
        if item.id in self._held:  # it was forgotten that it came: a clock that was set back holds it for longer
            self.pop(item.id)
        self._held[item.id] = held = _Held(item, now.steady)
        self.size += len(item.frame)
        if item.is_large:
            self._large[item.id] = held
        while self.size > self._capacity or len(self._held) > MAX_HELD:
            several_large = len(self._large) > 1 and self._size_of_large() > self._capacity // 2
            self._let_one_go(self._large if several_large else self._held, spare)

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
        self._large.pop(item_id, None)
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

    def _size_of_large(self) -> int:
        return sum(len(held.item.frame) for held in self._large.values())  # 256 by default, at the most

    def _let_one_go(self, of: Mapping[ItemId, _Held], spare: Callable[[Item], bool]) -> None:
        oldest = islice(of.values(), LOOKED_AT)
        spared = next((held.item.id for held in oldest if spare(held.item)), None)
        self.pop(next(iter(of)) if spared is None else spared)
