"""Gossip alone, on a fixed random graph of degree 8: reach, cost, and what demand does to both.

A toy loop stands for the network: every message takes `DELAY`, nothing is lost, nobody leaves.
"""

import hashlib
import heapq
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import count

import pytest

from protocol.config import Instant, Setup
from protocol.events import Deliver, Item, Send, Serve, Subscribe
from protocol.gossip.exchange import Gossip
from protocol.identity import Identity, NodeId, id_of_bytes
from protocol.limits.timing import LAN
from protocol.wire.envelope import ItemId
from protocol.wire.messages import NO_TOPIC, Have

DEGREE = 8
DELAY = 0.01
LOOK_S = 0.01  # between two looks at whether a tick is due
CONTROL_BYTES = 10  # before the body of what is said to one peer
UNIX = 1_700_000_000.0
SETUP = Setup(Identity(bytes(32)), b"a swarm of tests")


def regular_graph(size: int, rng: random.Random) -> dict[int, set[int]]:
    """`DEGREE` / 2 random rings through all nodes: connected, and of degree 8 but for the few edges that coincide."""
    edges: dict[int, set[int]] = {node: set() for node in range(size)}
    for _ in range(DEGREE // 2):
        ring = rng.sample(range(size), size)
        for one, other in zip(ring, ring[1:] + ring[:1], strict=True):
            edges[one].add(other)
            edges[other].add(one)
    return edges


@dataclass
class Model:
    """The nodes, the messages on their way, and what was counted."""

    size: int
    seed: int = 1
    now: float = 0.0
    nodes: dict[NodeId, Gossip] = field(default_factory=dict)
    items: dict[ItemId, Item] = field(default_factory=dict)
    delivered: dict[NodeId, Counter[ItemId]] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    announced: Counter[NodeId] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        self.ids = [id_of_bytes(hashlib.sha256(b"%d" % n).digest()[:20]) for n in range(self.size)]
        self._queue: list = []
        self._order = count()
        for node in self.ids:
            self.nodes[node] = Gossip(node, SETUP, random.Random(rng.getrandbits(64)), self.clock())
            self.delivered[node] = Counter()
        for one, others in regular_graph(self.size, rng).items():
            for other in sorted(others):
                self.call(self.ids[one], Gossip.up, self.ids[other])
        for number, node in enumerate(self.ids):
            self._push(number * LOOK_S / self.size, node, Gossip.tick)

    def clock(self) -> Instant:
        return Instant(self.now, UNIX + self.now)

    def publish(self, number: int, size: int, serial: int = 0) -> ItemId:
        node = self.ids[number]
        item_id = ItemId(hashlib.sha256(b"%d %d" % (number, serial)).digest())
        self.items[item_id] = Item(item_id, node, UNIX + self.now, NO_TOPIC, bytes(size))
        self.call(node, Gossip.publish, self.items[item_id])
        return item_id

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._queue and self._queue[0][0] <= until:
            self.now, _, node, method, arguments = heapq.heappop(self._queue)
            if method is Gossip.tick:
                self._push(LOOK_S, node, method)
            if method is not Gossip.tick or self.now >= self.nodes[node].due:
                self.call(node, method, *arguments)
        self.now = until

    def call(self, node: NodeId, method, *arguments) -> None:
        for action in method(self.nodes[node], *arguments, self.clock()) or ():
            match action:
                case Deliver(item):
                    self.delivered[node][item.id] += 1
                case Serve(to):
                    while isinstance(item := self.nodes[node].serve(to, self.clock()), Item):
                        self._send("items", len(item.frame), to, Gossip.got, node, item)
                case Send(to, message):
                    self.announced[to] += len(message.items) if isinstance(message, Have) else 0
                    self._send(message.kind.name, len(message.encode()), to, Gossip.heard, node, message)

    def _send(self, kind: str, size: int, to: NodeId, method, *arguments) -> None:
        self.sent[kind] += size + CONTROL_BYTES * (kind != "items")
        self._push(DELAY, to, method, *arguments)

    def _push(self, delay: float, node: NodeId, method, *arguments) -> None:
        heapq.heappush(self._queue, (self.now + delay, next(self._order), node, method, arguments))


@pytest.mark.parametrize("size", [10_000, 100_000])
def test_everything_reaches_everybody_exactly_once_at_little_more_than_its_own_bytes(size: int) -> None:
    model = Model(64)
    published = {model.publish(number, size): model.ids[number] for number in range(64)}
    model.run(10.0)
    for node, got in model.delivered.items():
        assert got == Counter(item for item, signer in published.items() if signer != node)
    overhead = sum(model.sent.values()) / (64 * 63 * size)
    assert overhead <= {10_000: 1.5, 100_000: 1.1}[size], model.sent
    assert model.sent["items"] == 64 * 63 * size  # no duplicate


def test_an_item_crosses_the_overlay_in_two_ticks_and_a_pull_for_each_hop() -> None:
    model = Model(512)
    item = model.publish(0, 10_000)
    hop = 2 * (LAN.announce_interval + LOOK_S) + 3 * DELAY  # an announcement, a pull, the item
    model.run(4 * hop)  # 8 peers, then at most 7 new ones of each: 512 nodes are within 4 hops, most within 3
    assert sum(item in got for got in model.delivered.values()) >= 500
    model.run(2 * hop)
    assert sum(item in got for got in model.delivered.values()) == 511


def steady(size: int, demand: float, seconds: int) -> Model:
    """Everybody publishes an item a second and wants `demand` of others' a second."""
    model = Model(size)
    for node in model.ids:
        model.call(node, Gossip.subscribe, Subscribe(None, demand))
    for second in range(seconds):
        for number in range(size):
            model.publish(number, 2000, second)
        model.run(1.0)
    return model


@pytest.mark.slow
def test_with_a_fixed_demand_the_cost_of_a_node_does_not_grow_with_the_swarm() -> None:
    demand, seconds = 4.0, 40
    small, large = steady(24, demand, seconds), steady(72, demand, seconds)
    for model in (small, large):
        got = sum(map(Counter.total, model.delivered.values())) / model.size / seconds
        assert 0.8 * demand <= got <= 2.5 * demand  # and the burst
    told = [sum(model.announced.values()) / model.size / seconds for model in (small, large)]
    assert told[1] <= 1.5 * told[0]
    assert told[1] <= DEGREE * (demand + 2)


def test_no_publisher_is_starved_when_there_is_more_than_anybody_wants() -> None:
    model = steady(48, 2.0, 40)  # twice what a node makes itself is what `node.swarm.sharing` asks for
    heard = Counter(model.items[item].signer for got in model.delivered.values() for item in got)
    assert len(heard) == 48
    assert min(heard.values()) >= sum(heard.values()) / 48 / 4
    for got in model.delivered.values():  # of many more than a node's neighbours, and as much as was asked for
        assert len({model.items[item].signer for item in got}) >= 2 * DEGREE
        assert got.total() >= 0.9 * 2.0 * 40
