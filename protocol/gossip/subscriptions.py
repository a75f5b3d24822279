"""How much a node takes of what its peers hold: topics, and a demand.

A node has a dozen links into a swarm of any size. If every item reached every node, a node's cost would grow with the
swarm. But a node's training uses only so many items a round.

Rules
 1. Topics. A node asks for the topics it subscribed to and is not told of others.
 2. Demand. A node takes `demand` items a second on average. Each item that comes takes one token from a bucket. Items
    that were asked for just now count as taken until they come. Wanted items that the demand does not reach are
    forgotten after a while; nobody is to blame for these. Peers announce only what they hold, so a node with k links to
    others of the same demand hears of k x demand ids a second at most, however large the swarm.
 3. A node is sated while less than a quarter of its bucket is left, and then until three quarters are. It tells its
    peers, so that they announce in batches; it draws by lot from what they announce. Only items that came count. An
    announced item may not exist.
 4. Small items of the topics `beside` the others have an allowance of their own, `BESIDE` of the demand. So a rare kind
    of item spreads even where there is too much of another kind.

The price: beyond its demand a node holds a random part of what there is, and an item reaches only a part of the swarm.
"""

from dataclasses import replace

from protocol.config import Instant
from protocol.limits.rate_limits import TokenBucket
from protocol.wire.messages import MAX_TOPICS, Interest

BURST_S = 1.0  # of demand at once; what comes faster waits its turn in the want list
MIN_BURST = 32.0  # items: a round of eight nodes of four groups comes in one burst
SATED = 0.25  # of the burst
# Where a thousand nodes want two groups a second, each takes one of 13 reports: one of its twelve links has a given
# report with a probability of 60 %. Reports are a twentieth of the traffic at most.
BESIDE = 1 / 8
BESIDE_BURST = 8.0  # items at once
NO_BOUND = 1e9  # items a second: more than there can be
EVERYTHING = Interest(None)  # what a node wants until it says otherwise


class Appetite:
    """What this node wants, and how much of it may come now; see the module's comment."""

    def __init__(self, now: Instant) -> None:
        self.interest = EVERYTHING
        self.beside: frozenset[bytes] = frozenset()
        self._set_demand(NO_BOUND, now, NO_BOUND, BESIDE_BURST)

    def _set_demand(self, demand: float, now: Instant, level: float, level_beside: float) -> None:
        self._demand = demand
        self._burst = max(MIN_BURST, BURST_S * demand) if demand > 0 else 0.0
        self._all = TokenBucket(demand, self._burst, now.steady)
        self._all.spend(self._burst - level)
        self._apart = TokenBucket(BESIDE * demand, BESIDE_BURST, now.steady)
        self._apart.spend(BESIDE_BURST - level_beside)

    @property
    def bounded(self) -> bool:
        """Whether this node's demand has a bound."""
        return self._demand < NO_BOUND

    def subscribe(
        self, topics: frozenset[bytes] | None, demand: float, now: Instant, beside: frozenset[bytes] = frozenset()
    ) -> bool:
        """Take the node's wish; True if peers are to be told. More topics than a message holds count as all topics."""
        self.beside = beside
        before = self.interest
        if topics is not None and len(topics) > MAX_TOPICS:
            topics = None
        demand = min(NO_BOUND, max(0.0, demand))
        level = self.level(now) if demand < NO_BOUND else NO_BOUND
        self._set_demand(demand, now, level, self.level_beside(now))
        self.interest = replace(self.interest, topics=topics)
        self.adjust(now)
        return self.interest != before

    def level(self, now: Instant) -> float:
        """Return how many items may be taken now."""
        return self._all.level(now.steady)

    def level_beside(self, now: Instant) -> float:
        """Return how many items of the topics beside the others may be taken now."""
        return self._apart.level(now.steady)

    def took(self, now: Instant, *, is_beside: bool = False) -> None:
        """Count an item that came."""
        if not (is_beside and self._apart.take(1, now.steady)):
            self._all.spend(1)

    def adjust(self, now: Instant) -> bool:
        """Fit the interest to what comes; True if peers are to be told."""
        was = self.interest.is_sated
        is_sated = self.level(now) - 1 < (1 - SATED if was else SATED) * self._burst
        self.interest = replace(self.interest, is_sated=is_sated)
        return is_sated != was
