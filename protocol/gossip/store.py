"""The items that a node holds for others: bounded in bytes, in number and in age.

Beyond these bounds the oldest item is deleted. Our own items are deleted last, as nobody else may have them yet.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from protocol.config import Instant
from protocol.events import Item
from protocol.identity import NodeId
from protocol.limits.limits import Limits
from protocol.wire.envelope import CHUNK_BYTES, HEAD_BYTES, ItemId
from protocol.wire.messages import Entry, ItemOutline

# A holder stops offering an item before it is stale for a receiver whose clock is ahead.
OFFER_AGE = 0.8


@dataclass(slots=True)
class _Held:
    item: Item
    entry: Entry
    since: float
    withdrawn: bool = False

    @property
    def size(self) -> int:
        return self.entry.size


class Store:
    """Items in the order they were added; see the module's comment."""

    def __init__(self, own: NodeId, limits: Limits) -> None:
        self._own = own
        self._limits = limits
        self._max_age = limits.max_item_age_s * OFFER_AGE
        self._held: OrderedDict[ItemId, _Held] = OrderedDict()
        self.held_bytes = 0

    def add(self, item: Item, now: Instant) -> None:
        self.pop(item.id)  # held already if our clock was set back: then it is held for longer than it is remembered
        self._held[item.id] = _Held(item, item.entry, now.steady)
        self.held_bytes += len(item.frame)
        while len(self._held) > self._limits.max_held or self.held_bytes > self._limits.held_bytes:
            self._delete_oldest()

    def get(self, item_id: ItemId) -> Item | None:
        held = self._held.get(item_id)
        return held.item if held is not None else None

    def outline(self, item_id: ItemId) -> ItemOutline | None:
        """Return the outline of a large item."""
        held = self._held.get(item_id)
        return held.item.outline if held is not None and held.size > HEAD_BYTES + CHUNK_BYTES else None

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
        if held is not None:
            self.held_bytes -= held.size

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

    def _delete_oldest(self) -> None:
        """Delete the oldest item; one of our own only if there is no other."""
        others = (held for held in self._held.values() if held.item.signer != self._own)
        oldest = next(others, None) or next(iter(self._held.values()))
        self.pop(oldest.item.id)
