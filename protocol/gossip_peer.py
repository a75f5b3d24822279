"""What gossip keeps of one live peer; every part is bounded."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from protocol.envelope import ItemId
from protocol.interest import Filter
from protocol.limits import TokenBucket
from protocol.recent import Recent

KNOWN_ITEMS = 4096  # remembered for each peer
MAX_PENDING = 8192  # ids that wait to be announced to one peer


@dataclass(slots=True)
class Peer:
    """A live peer: what it wants, what it knows, and what it is still to be told."""

    wants: Filter
    known: Recent[ItemId, bool]  # True: it sent us the item itself
    serving: TokenBucket
    backlog: list[ItemId]  # what it may have missed, the newest last
    backlog_due: float
    pending: dict[ItemId, None] = field(default_factory=dict)
    quiet_until: float = 0.0

    def remind(self, ids: Iterable[ItemId]) -> None:
        """Let ids be announced at the next tick; beyond the bound the oldest are dropped."""
        self.pending.update(dict.fromkeys(ids))
        while len(self.pending) > MAX_PENDING:
            del self.pending[next(iter(self.pending))]

    def told(self, item_id: ItemId) -> None:
        """Note that the peer has the item or is about to know of it."""
        if item_id not in self.known:
            self.known.set(item_id, False)
