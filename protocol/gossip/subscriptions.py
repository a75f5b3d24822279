"""How much a node takes of what its peers hold: topics, and a demand.

A node has a dozen links into a swarm of any size. Were everything to reach everybody, its
cost would grow with the swarm; its sampler, though, uses so many items a round and no more.

Rules
 1. Topics. A node asks for the topics it subscribed to and is not told of others.
 2. Demand. It pulls `demand` items a second on average. What it wants above that is forgotten
    after a while, and that is nobody's offence. Peers announce what they hold, so a node that
    has k links to others of the same demand hears of k x demand ids a second at most, however
    large the swarm.
 3. A small item that its signer pushes counts as well, but takes only what pulls leave over: whoever
    pushes must not be able to starve a node of what it asks for. What is pushed beyond that is
    dropped before its signature is checked; any holder may announce it yet. While more is on offer than the
    demand, the node asks its peers to announce only, and draws what it asks for by lot. What is on offer is measured
    from what came, never from what was only announced: nothing proves that there is such an item.
 4. Small items of a topic that the node wants `beside` the others have an allowance of their own, `BESIDE` of the
    demand. So a rare kind of item spreads where there is far more of another than anybody takes.

What is traded away. Beyond its demand a node holds a random part of what there is, and an item
spreads as far as demand carries it and not to everybody.
"""

import math
from dataclasses import dataclass, replace

from protocol.config import Instant
from protocol.limits.rate_limits import TokenBucket
from protocol.wire.messages import MAX_TOPICS, NO_TOPIC, Interest

MEMORY_S = 60.0  # of the measured supply: several rounds of most nodes, as rounds come in bursts
FIRST_S = 5.0  # which the average is over at the least: a burst at the start is no rate
BURST_S = 1.0  # of demand at once; what comes faster waits its turn in the want list
MIN_BURST = 32.0  # items: a round of eight nodes of four groups comes in one burst
RESERVE = 0.25  # of the burst, which pushes leave to what is asked for
# Of a thousand nodes of two groups a second, each takes one report in 13 of them all: of twelve links one has it with a
# probability of 60 %. They are a twentieth of the traffic at most.
BESIDE = 1 / 8
BESIDE_BURST = 8.0  # items: a few that came while nobody had room for them
NO_BOUND = 1e9  # items a second: more than there can be


@dataclass(frozen=True, slots=True)
class Filter:
    """The interest of one node; by default in everything, as of a peer that has not said."""

    topics: frozenset[bytes] | None = None
    announce_only: bool = False

    @classmethod
    def of(cls, interest: Interest) -> "Filter":
        return cls(None if interest.topics is None else frozenset(interest.topics), interest.announce_only)

    @property
    def interest(self) -> Interest:
        return Interest(None if self.topics is None else tuple(sorted(self.topics)), self.announce_only)

    def covers(self, topic: bytes) -> bool:
        """Tell whether items of the topic are wanted at all; one without a topic is for everybody."""
        return self.topics is None or topic == NO_TOPIC or topic in self.topics


class Rate:
    """Events a second, as an exponential average over `MEMORY_S`, or over the time since the start if that is less."""

    __slots__ = ("_began", "_count", "_updated")

    def __init__(self, now: float) -> None:
        self._count = 0.0  # of events, the older the less
        self._began = self._updated = now

    def add(self, now: float, events: int = 1) -> None:
        self._count = self._faded(now) + events
        self._updated = now

    def value(self, now: float) -> float:
        return self._faded(now) / (MEMORY_S * -math.expm1(-max(FIRST_S, now - self._began) / MEMORY_S))

    def _faded(self, now: float) -> float:
        return self._count * math.exp(-max(0.0, now - self._updated) / MEMORY_S)


class Appetite:
    """What this node wants, how much of it is on offer, and what it may still take; see the module's comment."""

    def __init__(self, now: Instant) -> None:
        self.filter = Filter()
        self.told = False  # whether peers were ever told: without a word from us they offer everything
        self.beside: frozenset[bytes] = frozenset()
        self._supply = Rate(now.steady)
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
        """Whether there can be more than is wanted."""
        return self._demand < NO_BOUND

    def subscribe(
        self, topics: frozenset[bytes] | None, demand: float, now: Instant, beside: frozenset[bytes] = frozenset()
    ) -> bool:
        """Take the node's wish (more topics than a message holds are all topics); True if peers are to be told."""
        self.beside = beside
        before = self.filter
        if topics is not None and len(topics) > MAX_TOPICS:
            topics = None
        demand = min(NO_BOUND, max(0.0, demand))
        level = self.level(now) if demand < NO_BOUND else NO_BOUND
        self._set_demand(demand, now, level, self.level_beside(now))
        self.filter = replace(self.filter, topics=topics)
        self._mind_pushes(now)
        news = not self.told or self.filter != before
        self.told = True
        return news

    def came(self, now: Instant) -> None:
        """Note an item that came, be it taken or declined, and was not here before."""
        self._supply.add(now.steady)

    def level(self, now: Instant) -> float:
        """Return how many items may be taken now."""
        return self._all.level(now.steady)

    def level_beside(self, now: Instant) -> float:
        """Return how many items of the topics beside the others may be taken now."""
        return self._apart.level(now.steady)

    def spend(self, count: int) -> None:
        """Count items that were asked for; less than 0: that many did not come."""
        self._all.spend(count)

    def spend_beside(self, count: int) -> None:
        self._apart.spend(count)

    def has_room(self, now: Instant) -> bool:
        """Tell whether pulls leave over room for an item that comes unasked."""
        return self.level(now) - 1 >= RESERVE * self._burst

    def take_push(self, now: Instant) -> bool:
        """Count an item that came unasked; False: it is more than pulls leave over."""
        if not self.has_room(now):
            return False
        self.spend(1)
        return True

    def adjust(self, now: Instant) -> bool:
        """Fit the interest to what comes; True if peers are to be told."""
        before = self.filter
        self._mind_pushes(now)
        return self.filter != before

    def _mind_pushes(self, now: Instant) -> None:
        supply = self._supply.value(now.steady)
        # Between the two bounds what was asked before holds, so that peers are not told at every change.
        wish = supply > self._demand or (self.filter.announce_only and supply > self._demand / 2)
        self.filter = replace(self.filter, announce_only=wish or self._demand == 0)
