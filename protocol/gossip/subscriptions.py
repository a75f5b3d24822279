"""How much a node takes of what its peers hold: topics, a demand, and shards of the signers.

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
    demand, the node asks its peers to announce only, and draws what it pulls by lot.
 4. Shards. While more than `MUCH` times the demand is on offer for about a minute, the node halves
    what it is told of: it asks for those signers only whose shard (16 bits of a hash of the
    signer and the hour) begins with one bit more of its own. Below `LITTLE` times the demand it asks for
    one bit less. What a peer signed itself is wanted whatever its shard is.

What is traded away. Beyond its demand a node holds a random part of what there is, and an item
spreads as far as demand carries it and not to everybody. With shards, for an hour at a time a
node learns from 1 in 2^bits of the signers and its own neighbours; the next hour draws others.
The nodes of a shard reach each other through each other only, so a node asks for no more bits
than leave it `MIN_SHARD_PEERS` links into its shard: a random graph with fewer falls to pieces.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from protocol.config import Instant
from protocol.identity import NodeId
from protocol.wire.messages import MAX_DIRECT, MAX_SHARD_BITS, MAX_TOPICS, NO_TOPIC, Interest, hint

RESHUFFLE_S = 3600.0  # the age at which items are stale: a signer out of reach in one hour is in reach in another
MEMORY_S = 60.0  # of the measured supply: several rounds of most nodes, as rounds come in bursts
FIRST_S = 5.0  # which the average is over at the least: a burst at the start is no rate
ADJUST_S = 60.0  # between two changes of the shard: until the last one shows in the supply
BURST_S = 1.0  # of demand at once; what comes faster waits its turn in the want list
MIN_BURST = 32.0  # items: a round of eight nodes of four groups comes in one burst
RESERVE = 0.25  # of the burst, which pushes leave to pulls
# An id costs a fiftieth of an item. A dozen links to nodes of the same demand offer less than a dozen times that, and
# the signers of a shard are few: so halving begins late, and is undone while there is still a choice.
MUCH, LITTLE = 8.0, 2.0
MIN_SHARD_PEERS = 2  # the mean degree above which most of a random graph hangs together


def shard(signer: bytes, unix: float) -> int:
    """Return the shard (`MAX_SHARD_BITS` bits) of the signer with that hint in the hour of `unix`."""
    hour = int(unix // RESHUFFLE_S).to_bytes(8, "big", signed=True)
    return int.from_bytes(hashlib.sha256(hour + signer).digest()[:2], "big") >> (16 - MAX_SHARD_BITS)


def same_shard(one: bytes, other: bytes, bits: int, unix: float) -> bool:
    """Tell whether two hints have the first `bits` bits of their shards in common."""
    return bits == 0 or (shard(one, unix) ^ shard(other, unix)) >> (MAX_SHARD_BITS - bits) == 0


@dataclass(frozen=True, slots=True)
class Filter:
    """The interest of one node, its `reader`; by default in everything, as of a peer that has not said."""

    reader: bytes
    topics: frozenset[bytes] | None = None
    bits: int = 0
    announce_only: bool = False
    direct: frozenset[NodeId] = frozenset()  # signers of whose small items it hears without us

    @classmethod
    def of(cls, node: NodeId, interest: Interest) -> "Filter":
        """Return what `node` says it wants."""
        topics = None if interest.topics is None else frozenset(interest.topics)
        return cls(hint(node), topics, interest.bits, interest.announce_only, frozenset(interest.direct))

    def interest(self, direct: Iterable[NodeId]) -> Interest:
        """Return what is told to a peer that need not announce items of the signers `direct`."""
        topics = None if self.topics is None else tuple(sorted(self.topics))
        return Interest(topics, self.bits, self.announce_only, tuple(sorted(direct))[:MAX_DIRECT])

    def includes(self, other: "Filter") -> bool:
        """Tell whether the reader takes all items that the reader of `other` takes."""
        if self.announce_only or self.bits:
            return False
        return self.topics is None or (other.topics is not None and other.topics <= self.topics)

    def covers_topic(self, topic: bytes) -> bool:
        """Tell whether items of the topic are wanted at all; one without a topic is for everybody."""
        return self.topics is None or topic == NO_TOPIC or topic in self.topics

    def covers(self, topic: bytes, signer: bytes, holder: bytes, unix: float) -> bool:
        """Tell whether the reader wants to hear from `holder` of an item of `signer` (hints, both)."""
        return self.covers_topic(topic) and (signer == holder or same_shard(signer, self.reader, self.bits, unix))


class Rate:
    """Events a second, as an exponential average over `MEMORY_S`, or over the time since the start if that is less."""

    __slots__ = ("_began", "_count", "_updated")

    def __init__(self, now: float) -> None:
        self._count = 0.0  # of events, the older the less
        self._began = self._updated = now

    def add(self, now: float, events: int = 1) -> None:
        """Note some events."""
        self._count = self._faded(now) + events
        self._updated = now

    def value(self, now: float) -> float:
        """Return the average as of now."""
        return self._faded(now) / (MEMORY_S * -math.expm1(-max(FIRST_S, now - self._began) / MEMORY_S))

    def _faded(self, now: float) -> float:
        return self._count * math.exp(-max(0.0, now - self._updated) / MEMORY_S)


class Appetite:
    """What this node wants, how much of it is on offer, and what it may still take; see the module's comment."""

    def __init__(self, own: NodeId, now: Instant) -> None:
        self.filter = Filter(hint(own))
        self.told = False  # whether peers were ever told: without a word from us they offer everything
        self._demand = math.inf
        self.bounded = False  # whether there can be more than is wanted
        self._level = math.inf
        self._filled = now.steady
        self._supply = Rate(now.steady)
        self._next_adjust = now.steady + ADJUST_S

    def subscribe(self, topics: frozenset[bytes] | None, demand: float, now: Instant) -> bool:
        """Take the node's wish (more topics than a message holds are all topics); True if peers are to be told."""
        before = self.filter
        if topics is not None and len(topics) > MAX_TOPICS:
            topics = None
        level = self.level(now)
        self._demand = max(0.0, demand)
        self.bounded = not math.isinf(self._demand)
        self._level = min(self._burst, level) if self.bounded else math.inf
        self.filter = replace(self.filter, topics=topics)
        self._mind_pushes(now)
        news = not self.told or self.filter != before
        self.told = True
        return news

    def offered(self, now: Instant, items: int = 1) -> None:
        """Note items that are on offer and were not before."""
        self._supply.add(now.steady, items)

    def level(self, now: Instant) -> float:
        """Return how many items may be taken now."""
        if self.bounded:
            elapsed = max(0.0, now.steady - self._filled)
            self._level = min(self._burst, self._level + elapsed * self._demand)
        self._filled = now.steady
        return self._level

    def spend(self, count: int) -> None:
        """Count items that were asked for."""
        self._level -= count

    def has_room(self, now: Instant) -> bool:
        """Tell whether pulls leave over room for an item that comes unasked."""
        return not self.bounded or self.level(now) - 1 >= RESERVE * self._burst

    def take_push(self, now: Instant) -> bool:
        """Count an item that came unasked; False: it is more than pulls leave over."""
        if not self.has_room(now):
            return False
        self._level -= 1
        return True

    def refund(self, count: int) -> None:
        """Take back what was spent on items that did not come."""
        self._level = min(self._burst, self._level + count)

    def adjust(self, peers: int, now: Instant) -> bool:
        """Fit the interest to what is on offer from `peers` live peers; True if they are to be told."""
        before = self.filter
        self._mind_pushes(now)
        if now.steady >= self._next_adjust:
            self._resize(peers, self._supply.value(now.steady))
        if self.filter.bits != before.bits:
            self._next_adjust = now.steady + ADJUST_S
        return self.filter != before

    @property
    def _burst(self) -> float:
        return max(MIN_BURST, BURST_S * self._demand) if self._demand > 0 else 0.0

    def _mind_pushes(self, now: Instant) -> None:
        supply = self._supply.value(now.steady)
        # Between the two bounds what was asked before holds, so that peers are not told at every change.
        wish = supply > self._demand or (self.filter.announce_only and supply > self._demand / 2)
        self.filter = replace(self.filter, announce_only=wish or self._demand == 0)

    def _resize(self, peers: int, supply: float) -> None:
        bits = self.filter.bits
        if bits > 0 and (supply < LITTLE * self._demand or peers >> bits < MIN_SHARD_PEERS):
            self.filter = replace(self.filter, bits=bits - 1)
        elif supply > MUCH * self._demand and peers >> (bits + 1) >= MIN_SHARD_PEERS and bits < MAX_SHARD_BITS:
            self.filter = replace(self.filter, bits=bits + 1)
