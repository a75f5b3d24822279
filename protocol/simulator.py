"""Many nodes in one process on a virtual clock: the cores that the host runs, under a seed.

    simulation = Simulation(seed=1)
    names = simulation.start_many(30)
    simulation.run(10.0)

The same seed gives the same trace to the byte; `trace_hash` tells whether it did.
"""

import hashlib
import random
from dataclasses import dataclass, field

from protocol.book import Book
from protocol.clock import Instant
from protocol.core import Core
from protocol.core_events import Offer, Received, Report, Verdict
from protocol.driver import Driver
from protocol.envelope import ItemId, item_id
from protocol.identity import Identity
from protocol.limits import Limits
from protocol.memory_transport import Conditions, MemoryNetwork, MemoryTransport
from protocol.messages import NO_TOPIC
from protocol.records import Address, Endpoint, PeerRecord
from protocol.setup import Setup

SWARM = b"simulated swarm!"
EPOCH = 1_700_000_000.0  # the unix time at which every simulation begins
MIN_WAIT_S = 0.001  # a driver that asks for less would stop the clock


@dataclass
class SimulatedNode:
    """One node, as long as it lives: what the host would keep, without threads."""

    name: int
    identity: Identity
    core: Core
    driver: Driver
    transport: MemoryTransport
    address: Address | None
    received: list[Received] = field(default_factory=list)
    due: float = 0.0

    @property
    def ids(self) -> set[ItemId]:
        """The ids of all items that were delivered."""
        return {item.id for item in self.received}


class Simulation:
    """A swarm under a seed. Nodes are numbered from 0; node 0 is everybody's seed."""

    def __init__(self, seed: int, conditions: Conditions | None = None, limits: Limits | None = None) -> None:
        self._rng = random.Random(seed)
        self._limits = limits or Limits()
        self.network = MemoryNetwork(conditions or Conditions(), random.Random(self._rng.getrandbits(64)))
        self.nodes: dict[int, SimulatedNode] = {}
        self._seed_address: Address | None = None
        self._starts = 0
        self._trace = hashlib.sha256()

    @property
    def trace_hash(self) -> str:
        """A digest of every delivery so far: when, to whom, and what."""
        return self._trace.hexdigest()

    def clock(self) -> Instant:
        """Return the virtual time on both clocks."""
        return Instant(self.network.now, EPOCH + self.network.now)

    def start(self, name: int, *, dialable: bool = True, known: tuple[PeerRecord, ...] = ()) -> SimulatedNode:
        """Start a node, or restart one that was killed: the same key at a new port.

        `known` is what its peers file would hold; a node with such records gets no seed.
        """
        self._starts += 1
        identity = Identity(hashlib.sha256(b"simulated node %d" % name).digest())
        endpoint = Endpoint(f"node{name}.invalid", self._starts) if dialable else None
        seeds = () if known or self._seed_address is None else (self._seed_address,)
        book = Book(seeds, self._limits.max_known_peers)
        for record in known:
            book.add(record)
        transport = MemoryTransport(self.network, identity.curve_key, str(endpoint) if endpoint else None)
        setup = Setup(identity, SWARM, (endpoint,) if endpoint else (), self._limits, agent="simulated")
        core = Core(setup, book, random.Random(self._rng.getrandbits(64)), self.clock())
        received: list[Received] = []
        driver = Driver(core, transport, self.clock, received.append)
        address = Address(endpoint, identity.curve_key) if endpoint else None
        self._seed_address = self._seed_address or address
        node = SimulatedNode(name, identity, core, driver, transport, address, received, self.network.now)
        self.nodes[name] = node
        return node

    def start_many(self, count: int) -> list[SimulatedNode]:
        """Start nodes 0 to count - 1."""
        return [self.start(name) for name in range(count)]

    def kill(self, name: int) -> tuple[PeerRecord, ...]:
        """End a node as SIGKILL does; return what its peers file would hold."""
        node = self.nodes.pop(name)
        node.transport.close()
        return tuple(node.core.membership.book.records())

    def publish(self, name: int, body: bytes) -> ItemId:
        """Let a node publish."""
        node = self.nodes[name]
        self._feed(node, Offer(body, NO_TOPIC))
        return item_id(node.identity.public_key, NO_TOPIC + body)

    def report(self, name: int, item: ItemId, verdict: Verdict, reason: str) -> None:
        """Let a node judge an item."""
        self._feed(self.nodes[name], Report(item, verdict, reason))

    def run(self, seconds: float) -> None:
        """Let `seconds` of virtual time pass."""
        until = self.network.now + seconds
        while True:
            due = min((node.due for node in self.nodes.values()), default=float("inf"))
            at = min(due, self.network.next_time())
            if at > until:
                self.network.now = until
                return
            self.network.now = max(self.network.now, at)
            reached = {transport.key for transport in self.network.deliver_due()}
            for node in list(self.nodes.values()):
                if node.transport.key in reached or node.due <= self.network.now:
                    self._step(node)

    def _feed(self, node: SimulatedNode, event: Offer | Report) -> None:
        node.driver.feed(event)
        node.due = self.network.now

    def _step(self, node: SimulatedNode) -> None:
        before = len(node.received)
        node.driver.step(0.0)
        node.due = self.network.now + max(MIN_WAIT_S, node.core.wait(self.clock()))
        for item in node.received[before:]:
            self._trace.update(b"%.6f %d %s\n" % (self.network.now, node.name, item.id.hex().encode()))
