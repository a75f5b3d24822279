"""What gossip keeps of one live peer; every part is bounded."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

from protocol.gossip.subscriptions import Filter
from protocol.limits.rate_limits import TokenBucket
from protocol.lru import Recent
from protocol.wire.envelope import ItemId

KNOWN_ITEMS = 4096  # remembered for each peer
MAX_PENDING = 8192  # ids that wait to be announced to one peer
PUSH_GRACE_S = 10.0  # after we asked a peer to announce only: what it had pushed by then is here


class Knows(IntEnum):
    """What a peer knows of an item, as far as we can tell."""

    TOLD = 0  # we announced it
    HAS = 1  # it announced it, or we sent it
    SENT = 2  # it sent it to us


@dataclass(slots=True)
class Peer:
    """A live peer: what it wants, what it knows, and what it is still to be told."""

    wants: Filter
    known: Recent[ItemId, Knows]
    serving: TokenBucket
    backlog: list[ItemId]  # what it may have missed, the newest last
    backlog_due: float
    pending: dict[ItemId, None] = field(default_factory=dict)
    quiet_until: float = 0.0
    declined: float = float("inf")  # when it was asked to announce only

    def tell(self, announce_only: bool, now: float) -> None:
        """Note that it is told our interest."""
        self.declined = min(self.declined, now) if announce_only else float("inf")

    def should_know(self, now: float) -> bool:
        """Tell whether a push from it is an offence by now."""
        return now >= self.declined + PUSH_GRACE_S

    def remind(self, ids: Iterable[ItemId]) -> None:
        """Let ids be announced at the next tick; beyond the bound the oldest are dropped."""
        self.pending.update(dict.fromkeys(ids))
        while len(self.pending) > MAX_PENDING:
            del self.pending[next(iter(self.pending))]

    def note(self, item_id: ItemId, knows: Knows) -> None:
        """Note what the peer knows of an item, unless we know of more."""
        before = self.known.get(item_id)
        if before is None or before < knows:
            self.known.set(item_id, knows)

    def has(self, item_id: ItemId) -> bool:
        """Tell whether the peer surely has the item."""
        return self.known.get(item_id) in (Knows.HAS, Knows.SENT)
