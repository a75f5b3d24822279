"""What gossip keeps of one live peer; every part is bounded."""

import math
from dataclasses import dataclass, field
from enum import IntEnum

from protocol.config import Limits
from protocol.gossip.subscriptions import Filter
from protocol.identity import NodeId
from protocol.limits.rate_limits import TokenBucket
from protocol.lru import Recent
from protocol.wire.envelope import ItemId

KNOWN_ITEMS = 4096  # remembered for each peer
MAX_PENDING = 8192  # ids that wait to be announced to one peer
MAX_BROUGHT = 256  # looked at in the patience for a pull, to find out who tells us first
AGAIN_S = 600.0
AGAIN_BYTES = 1 << 10  # what giving something again counts for at least: to send a small one costs time, not bytes
# After we asked a peer to announce only: what it had pushed by then has left the queues of the link, twice our own.
PUSH_GRACE_S, PUSH_GRACE_BYTES = 10.0, 2 * Limits().max_link_queue_bytes

RETRY_S = 1.0  # after a full queue
FULL_S = 32.0  # a full queue takes so long on a line of 1 Mbit/s


class Knows(IntEnum):
    """What a peer knows of an item, as far as we can tell."""

    TOLD = 0  # we announced it
    HAS = 1  # it announced it after we did, or we sent it
    SAID = 2  # it announced it before we did
    SENT = 3  # it sent it to us


class Account:
    """What a peer may have of us, an allowance of bytes and one more for what it was given before, and may push to us.

    It outlives the link, so that hanging up and dialling again renews nothing.
    """

    def __init__(self, limits: Limits, now: float) -> None:
        self._all = TokenBucket(limits.bytes_per_second, limits.bytes_burst, now)
        # A peer that lost its memory asks for everything that we hold again; twice in ten minutes it has other holders.
        self._again = TokenBucket(limits.held_bytes / AGAIN_S, limits.held_bytes, now)
        self._served: Recent[bytes, int] = Recent(KNOWN_ITEMS)  # how often, by item, or item and chunk
        self._declined = float("inf")  # when it was asked to announce only
        self._pushed_since = 0  # bytes

    def had(self, what: bytes) -> bool:
        """Tell whether it was given this item, or chunk of one, before."""
        return (self._served.get(what) or 0) > 0

    def take(self, what: bytes, size: int, now: float) -> bool:
        """Account for an item, or a chunk of one, of `size` bytes; False: it is too much."""
        if self.had(what) and not self._again.take(max(size, AGAIN_BYTES), now):
            return False
        if not self._all.take(size, now):
            return False
        self._served.set(what, (self._served.get(what) or 0) + 1)
        return True

    def undo(self, what: bytes) -> None:
        """It did not leave that time."""
        if self.had(what):
            self._served.set(what, (self._served.get(what) or 0) - 1)

    def linked(self, now: float) -> None:
        """Its link begins, and it may push until it is told otherwise, as it may have done ten minutes ago."""
        if now >= self._declined + AGAIN_S:
            self._declined, self._pushed_since = float("inf"), 0

    def told(self, announce_only: bool, now: float) -> None:
        """Note that it is told our interest."""
        if announce_only:
            self._declined = min(self._declined, now)
        else:
            self._declined, self._pushed_since = float("inf"), 0

    def pushed(self, size: int) -> None:
        """Note that it sent so many bytes that nobody asked for."""
        if self._declined < float("inf"):
            self._pushed_since += size

    def should_know(self, now: float) -> bool:
        """Tell whether a push from it is an offence by now."""
        return now >= self._declined + PUSH_GRACE_S and self._pushed_since > PUSH_GRACE_BYTES


@dataclass(slots=True)
class Peer:
    """A live peer: what it wants, what it knows, and what it is still to be told."""

    wants: Filter
    known: Recent[ItemId, Knows]
    account: Account
    backlog: list[ItemId]  # what it may have missed, the newest last
    backlog_due: float
    pending: dict[ItemId, None] = field(default_factory=dict)
    quiet_until: float = 0.0
    full_since: float = math.inf  # when its queue refused something of which it is yet to be told
    repeats: bool = False  # whether it announced what others sign, since we last looked
    brought: dict[ItemId, None] = field(default_factory=dict)  # such items that we lacked
    direct: frozenset[NodeId] = frozenset()  # signers that it was told it need not announce

    def remind(self, *ids: ItemId) -> None:
        """Let ids be announced at the next tick; beyond the bound the oldest are dropped."""
        for item_id in ids:
            self.pending[item_id] = None
        while len(self.pending) > MAX_PENDING:
            del self.pending[next(iter(self.pending))]

    @property
    def quiet(self) -> float:
        """Until when nothing is announced to it."""
        return min(self.quiet_until, self.full_since + FULL_S)

    def found_full(self, now: float) -> None:
        """Its queue refused something: nothing is announced to it for a while."""
        self.quiet_until = now + RETRY_S
        self.full_since = min(self.full_since, now)

    def look_at_queue(self, is_congested: bool, now: float) -> None:
        """Note whether items wait for it: after a refusal nothing is announced to it meanwhile, as far as `FULL_S`."""
        if not is_congested:
            self.full_since = math.inf if now >= self.quiet_until else self.full_since
        elif self.full_since < math.inf:
            self.quiet_until = max(self.quiet_until, now + RETRY_S)

    def bring(self, item_id: ItemId) -> None:
        """Note that it told us of an item of somebody else that we lack."""
        if len(self.brought) < MAX_BROUGHT:
            self.brought[item_id] = None

    def note(self, item_id: ItemId, knows: Knows) -> None:
        """Note what the peer knows of an item, unless we know of more."""
        before = self.known.get(item_id)
        if before is None or before < knows:
            self.known.set(item_id, knows)

    def said(self, item_id: ItemId) -> None:
        """Note that the peer announced an item."""
        self.note(item_id, Knows.SAID if self.known.get(item_id) is None else Knows.HAS)
        self.pending.pop(item_id, None)

    def has(self, item_id: ItemId) -> bool:
        """Tell whether the peer surely has the item."""
        return self._knows(item_id, Knows.HAS)

    def told_us(self, item_id: ItemId) -> bool:
        """Tell whether we heard of the item from the peer, and not it from us."""
        return self._knows(item_id, Knows.SAID)

    def _knows(self, item_id: ItemId, least: Knows) -> bool:
        knows = self.known.get(item_id)
        return knows is not None and knows >= least
