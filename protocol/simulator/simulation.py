"""Many nodes in one process on a virtual clock.

    simulation = Simulation(seed=1)
    names = simulation.start_many(30)
    simulation.run(10.0)

The same seed gives the same trace to the byte; `trace_hash` tells whether it did.
"""

import hashlib
import heapq
import random
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.config import Gate, Instant, Setup
from protocol.core import Core
from protocol.credentials.records import Address, Endpoint, PeerRecord, RecordReader
from protocol.driver import Driver
from protocol.events import Item, ItemVerdict, Judgement, Offer, Subscribe
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.limits.timing import LAN, Timing
from protocol.membership.address_book import Book
from protocol.transport.memory import Conditions, MemoryNetwork, MemoryTransport
from protocol.wire.envelope import HEADER_BYTES, ItemId, digest, item_id, kind_of
from protocol.wire.messages import NO_TOPIC

SWARM = b"simulated swarm!"
EPOCH = 1_700_000_000.0  # the unix time at which every simulation begins
MIN_WAIT_S = 0.001  # between two steps of a node: with less the clock would stand still
# One reader serves all nodes, so that a record exists once however many know it. Enough for
# ten thousand nodes with some renewals and restarts each.
SHARED_RECORDS = 1 << 16
TRACED_BYTES = 4 * HEADER_BYTES  # of each frame


MakeCore = Callable[[Setup, Book, random.Random, Instant], Core]


@dataclass(eq=False)
class SimulatedNode:
    """One node, as long as it lives: what the host would keep, without threads."""

    name: int
    identity: Identity
    core: Core
    driver: Driver
    transport: MemoryTransport
    address: Address | None
    received: list[Item] = field(default_factory=list)
    due: float = 0.0

    @property
    def ids(self) -> set[ItemId]:
        """The ids of all items that were delivered."""
        return {item.id for item in self.received}


class Simulation:
    """A swarm under a seed. Nodes are numbered from 0; node 0 is everybody's seed.

    `identity` makes a key from 32 bytes; `SimulatedIdentity` is 50 times as fast as the real one.
    """

    def __init__(
        self,
        seed: int,
        conditions: Conditions | None = None,
        limits: Limits | None = None,
        *,
        timing: Timing = LAN,
        identity: Callable[[bytes], Identity] = Identity,
    ) -> None:
        self._rng = random.Random(seed)
        self._make_identity = identity
        self._reader = RecordReader(SHARED_RECORDS)
        self.timing = timing
        self.limits = limits or Limits()
        self.network = MemoryNetwork(conditions or Conditions(), random.Random(self._rng.getrandbits(64)), self._sent)
        self.frames_sent: Counter[int] = Counter()  # by the frame's kind
        self.bytes_sent: Counter[int] = Counter()
        self.nodes: dict[int, SimulatedNode] = {}
        self.seeds: tuple[Address, ...] = ()
        self.hosts: dict[int, str] = {}  # of nodes for which `host_of` is to return another host
        self.seen_at: dict[int, str] = {}  # IP addresses at which peers see a node; peers see no address of other nodes
        self.in_vain: dict[int, tuple[str, ...]] = {}  # hosts at which a firewall drops what comes to a node
        self._by_transport: dict[MemoryTransport, SimulatedNode] = {}
        self._timers: list[tuple[float, int, SimulatedNode]] = []
        self._starts = 0
        self._order = 0
        self._trace = hashlib.sha256()

    @property
    def trace_hash(self) -> str:
        """A digest of all so far: which node ran when, every frame that was sent, every delivery."""
        return self._trace.hexdigest()

    def clock(self, skew: float = 0.0) -> Instant:
        """Return the virtual time on both clocks, for a node whose unix clock is `skew` seconds ahead."""
        return Instant(self.network.now, EPOCH + self.network.now + skew)

    def host_of(self, name: int) -> str:
        """Return where a node can be dialled: in a network of its own."""
        return self.hosts.get(name) or self.seen_at.get(name) or f"node{name}.invalid"

    def start(
        self,
        name: int,
        *,
        dialable: bool = True,
        known: tuple[PeerRecord, ...] = (),
        seeds: tuple[Address, ...] | None = None,
        skew: float = 0.0,
        core: MakeCore = Core,
        gate: Gate | None = None,
        twin_of: int | None = None,
    ) -> SimulatedNode:
        """Start a node, or restart one that was killed: the same key at a new port.

        `known` is what its peers file would hold; a node with such records gets no seed, unless
        `seeds` are given. `skew` is how far its unix clock is ahead, in seconds; `core` makes
        another core than an honest one; `gate` says who may be in the swarm. With `twin_of` it runs
        with the key of another node.
        """
        self._starts += 1
        identity = self._make_identity(
            hashlib.sha256(b"simulated node %d" % (name if twin_of is None else twin_of)).digest()
        )
        endpoint = Endpoint(self.host_of(name), self._starts) if dialable else None
        if seeds is None:
            seeds = () if known else self.seeds
        rng = random.Random(self._rng.getrandbits(64))
        book = Book(seeds, self.limits)
        book.load(known, self.clock(skew), rng)
        listen = str(endpoint) if endpoint else None
        transport = MemoryTransport(self.network, identity.curve_key, listen, host=self.seen_at.get(name, ""))
        closed = tuple(Endpoint(host, self._starts) for host in self.in_vain.get(name, ()))
        self.network.firewalled |= {str(name) for name in closed}
        setup = Setup(
            identity,
            SWARM,
            (endpoint,) if endpoint else closed,
            self.limits,
            self.timing,
            "simulated",
            reader=self._reader,
            gate=gate or Gate(),
        )
        made = core(setup, book, rng, self.clock(skew))
        received: list[Item] = []
        driver = Driver(made, transport, lambda: self.clock(skew), received.append)
        address = Address(endpoint, identity.curve_key) if endpoint else None
        self.seeds = self.seeds or ((address,) if address else ())
        node = SimulatedNode(name, identity, made, driver, transport, address, received)
        self.nodes[name] = self._by_transport[transport] = node
        self._schedule(node, self.network.now)
        return node

    def start_many(self, count: int) -> list[SimulatedNode]:
        """Start nodes 0 to count - 1."""
        return [self.start(name) for name in range(count)]

    def kill(self, name: int, *, silently: bool = False) -> tuple[PeerRecord, ...]:
        """End a node as SIGKILL does, or `silently` as a power cut does; return the records for its peers file."""
        node = self.nodes.pop(name)
        del self._by_transport[node.transport]
        if silently:
            node.transport.vanish()
        else:
            node.transport.close()
        return tuple(node.core.membership.saved_records)

    def pause(self, name: int, *, acknowledges: bool = False) -> None:
        """Stop a node as SIGSTOP does, or, if its kernel `acknowledges`, as a call that holds the interpreter does."""
        self.nodes[name].transport.pause(acknowledges=acknowledges)

    def resume(self, name: int) -> None:
        """Let a paused node go on: it reads what came meanwhile, and its unix clock has jumped."""
        node = self.nodes[name]
        node.transport.resume()
        self._schedule(node, self.network.now)

    def publish(self, name: int, body: bytes, topic: bytes = NO_TOPIC) -> ItemId:
        """Let a node publish."""
        node = self.nodes[name]
        self._feed(node, Offer(topic + body))
        return item_id(node.identity.public_key, digest(topic + body))

    def subscribe(
        self,
        name: int,
        demand: float,
        topics: frozenset[bytes] | None = None,
        beside: frozenset[bytes] = frozenset(),
    ) -> None:
        """Let a node want `demand` items a second, of these topics only if they are given."""
        self._feed(self.nodes[name], Subscribe(topics, demand, beside))

    def judge(self, name: int, item: ItemId, verdict: ItemVerdict, reason: str) -> None:
        """Let a node judge an item."""
        self._feed(self.nodes[name], Judgement(item, verdict, reason))

    def run(self, seconds: float) -> None:
        """Let `seconds` of virtual time pass."""
        network, timers = self.network, self._timers
        until = network.now + seconds
        while True:
            at = min(timers[0][0], network.next_time()) if timers else network.next_time()
            if at > until:
                network.now = until
                return
            network.now = max(network.now, at)
            for transport in network.deliver_due():
                self._step(self._by_transport[transport])
            while timers and timers[0][0] <= network.now:
                due, _, node = heapq.heappop(timers)
                if due == node.due and not (node.transport.closed or node.transport.paused):
                    self._step(node)

    def _feed(self, node: SimulatedNode, event: Offer | Judgement | Subscribe) -> None:
        node.driver.feed(event)
        self._schedule(node, self.network.now)

    def _schedule(self, node: SimulatedNode, due: float) -> None:
        if due != node.due or due <= self.network.now:
            node.due = due
            self._order += 1
            heapq.heappush(self._timers, (due, self._order, node))

    def _step(self, node: SimulatedNode) -> None:
        trace, now = self._trace, self.network.now
        trace.update(struct.pack("<dI", now, node.name))
        before = len(node.received)
        self._schedule(node, now + max(MIN_WAIT_S, node.driver.step(0.0)))
        for item in node.received[before:]:
            trace.update(item.id)

    def _sent(self, frame: bytes) -> None:
        self._trace.update(frame[:TRACED_BYTES])  # enough: a signature covers its frame, and a chunk's place names it
        kind = kind_of(frame) or 0
        self.frames_sent[kind] += 1
        self.bytes_sent[kind] += len(frame)
