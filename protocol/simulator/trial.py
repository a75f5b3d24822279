"""One swarm on trial: it settles, suffers faults, and is measured. The same plan gives the same result.

First, nodes start from one seed and find each other. Then the scenario does its part, while some items are published.
Afterwards each of a sample of nodes publishes one item at the same moment: who gets them, and when?
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from protocol.core import Core
from protocol.credentials.records import Address, PeerRecord
from protocol.identity import NodeId
from protocol.limits.limits import Limits
from protocol.limits.networks import netgroup
from protocol.limits.timing import LOCAL, Timing
from protocol.simulator.adversaries import (
    Dropper,
    EclipseAttack,
    Eclipser,
    FalseAnnouncer,
    Flooder,
    Forger,
    SimulatedIdentity,
)
from protocol.simulator.overlay import Graph, mutual
from protocol.simulator.simulation import MakeCore, SimulatedNode, Simulation
from protocol.transport.memory import Conditions
from protocol.wire.envelope import ItemId, Kind

# Far below the default, so that a flood is cheap to simulate; an honest node sends a few messages a second.
LIMITS = replace(Limits(), network_cores=0.01, network_burst_s=0.1)
SMALL_BYTES, LARGE_BYTES = 1_000, 100_000
LARGE_EVERY = 10  # one in ten of the fresh items is large enough to be announced and pulled
SEEDS = 3  # that each node has if any node, seeds included, may be hostile
VICTIMS = 8  # that are eclipsed at a time
VOICES = 16  # more eclipsers beside the plan's nodes, to dial the victims
START_S = 10.0  # in which the nodes start
STEP_S = 0.25  # the precision of most measured times


@dataclass(frozen=True, slots=True)
class SwarmPlan:
    """The plan of a simulation: sizes, and how the network is; `faults_s` is the scenario's part in virtual seconds."""

    nodes: int
    seed: int
    faults_s: float
    timing: Timing = LOCAL
    conditions: Conditions = field(default_factory=Conditions)
    limits: Limits = LIMITS
    publishers: int = 50
    items_during_faults: int = 10
    hostile: float = 0.0  # share of nodes
    skew_s: float = 0.0  # the most that a clock is off
    first: int | None = None  # how many nodes the settled swarm has, if not all


@dataclass(slots=True)
class Extremes:
    """The most that any honest node ever had."""

    peers: int = 0
    connections: int = 0
    records: int = 0
    held: int = 0  # bytes of items
    wanted: int = 0


@dataclass(slots=True)
class Usage:
    """The bytes sent by kind when the count began, and how many seconds nodes have lived since."""

    frames: Counter[int] = field(default_factory=Counter)
    bytes: Counter[int] = field(default_factory=Counter)
    node_seconds: float = 0.0


class SwarmTrial:
    """The swarm and what is known of it; `progress` is called with a line now and then."""

    def __init__(self, plan: SwarmPlan, progress: Callable[[str], None]) -> None:
        self.plan = plan
        self.rng = random.Random(plan.seed)
        self.simulation = Simulation(
            plan.seed, plan.conditions, plan.limits, timing=plan.timing, identity=SimulatedIdentity
        )
        self.hostile: dict[int, MakeCore] = {}
        self.seeds: tuple[int, ...] = (0,)
        self.victims: tuple[int, ...] = ()
        self.surrounded: dict[int, list[float]] = {}  # victim -> the hostile share of its links, each second
        self.voices: tuple[int, ...] = ()
        self.attack = EclipseAttack()
        self.dead: dict[NodeId, float] = {}  # killed for good, and when
        self.extremes = Extremes()
        self.usage = Usage()
        self.last_ghost = 0.0  # when a dead node was last seen in a view
        self.deaths_declared = 0  # by nodes that are gone or restarted since
        self.published: dict[ItemId, int] = {}  # items of the time of the faults, and their publishers
        self.fresh_bytes = 0  # of the items of the last `publish_fresh`
        self.spread_s: float | None = None  # after how long these were everywhere
        self._next_item = float("inf")
        self._progress = progress
        self._assign_hostile()

    def _assign_hostile(self) -> None:
        plan = self.plan
        names = self.rng.sample(range(plan.nodes), int(plan.hostile * plan.nodes))
        eclipser = partial(Eclipser, self.attack)
        kinds: list[MakeCore] = [Dropper, FalseAnnouncer, Forger, Flooder, *(3 * [eclipser])]
        self.hostile |= {name: kinds[place % len(kinds)] for place, name in enumerate(names)}
        if not names:
            return
        self.seeds = ()
        while set(self.seeds) <= set(names):  # a node with hostile seeds only would be in a swarm of theirs
            self.seeds = tuple(self.rng.sample(range(plan.nodes), SEEDS))
        bystanders = [name for name in range(plan.nodes) if name not in self.hostile and name not in self.seeds]
        self.victims = tuple(self.rng.sample(bystanders, min(VICTIMS, len(bystanders) // 2)))
        self.surrounded = {name: [] for name in self.victims}
        simulation, attack = self.simulation, self.attack
        attack.networks = tuple(netgroup(simulation.host_of(name)) for name in self.victims)
        self.voices = tuple(range(plan.nodes, plan.nodes + VOICES))
        simulation.hosts |= {name: attack.rent(name, simulation.clock()) for name in self.voices}
        self.hostile |= dict.fromkeys(self.voices, eclipser)

    @property
    def honest(self) -> Iterator[SimulatedNode]:
        """The honest nodes that live."""
        return (node for name, node in self.simulation.nodes.items() if name not in self.hostile)

    @property
    def healthy(self) -> list[int]:
        """Names of the honest nodes that live and are not paused."""
        return [node.name for node in self.honest if not node.transport.paused]

    def addresses(self, names: Iterable[int]) -> tuple[Address, ...]:
        """Return where live nodes can be dialled."""
        return tuple(address for name in names if (address := self.simulation.nodes[name].address))

    def graph(self) -> Graph:
        """Return the overlay of live links among honest nodes."""
        names = {node.identity.node_id: node.name for node in self.honest}
        return mutual(
            {node.name: [names[peer] for peer in node.core.membership.peers if peer in names] for node in self.honest}
        )

    def choose(self, share: float) -> list[int]:
        """Choose a share of the healthy nodes, never the seed."""
        names = [name for name in self.healthy if name]
        return self.rng.sample(names, int(share * len(names)))

    def start(self, name: int, known: tuple[PeerRecord, ...] = ()) -> None:
        """Start a node by the plan: honest or hostile, with a clock that may be off, and `known` in its peers file."""
        skew = self.rng.uniform(-1.0, 1.0) * self.plan.skew_s
        self.simulation.start(name, known=known, skew=skew, core=self.hostile.get(name, Core))

    def stop(self, name: int, *, silently: bool = False) -> tuple[PeerRecord, ...]:
        """Kill a node that may come back; return the records of its peers file."""
        self.deaths_declared += self.simulation.nodes[name].core.membership.deaths
        return self.simulation.kill(name, silently=silently)

    def kill(self, name: int, *, silently: bool = False) -> None:
        """Kill a node for good."""
        self.dead[self.simulation.nodes[name].identity.node_id] = self.simulation.network.now
        self.stop(name, silently=silently)

    def settle(self, seconds: float) -> None:
        """Start the swarm and let it find itself."""
        first = self.plan.nodes if self.plan.first is None else self.plan.first
        for name in self.seeds:
            self.start(name)
        simulation = self.simulation
        simulation.seeds = self.addresses(self.seeds)
        names = [name for name in range(first) if name not in (*self.seeds, *self.victims)]
        steps = int(START_S / STEP_S)
        for step in range(steps):
            for name in names[step * len(names) // steps : (step + 1) * len(names) // steps]:
                self.start(name)
            self.pass_time(STEP_S)
        self.pass_time(seconds - START_S)

    def forget_usage(self) -> None:
        """Begin to count what is sent, once the nodes have found each other."""
        simulation = self.simulation
        self.usage = Usage(Counter(simulation.frames_sent), Counter(simulation.bytes_sent))

    def sent(self) -> tuple[float, float]:
        """Return the frames and the bytes that a node sent a second, beside items."""
        simulation, usage = self.simulation, self.usage
        frames, size = simulation.frames_sent - usage.frames, simulation.bytes_sent - usage.bytes
        seconds = max(1.0, usage.node_seconds)
        return (frames.total() - frames[Kind.ITEM]) / seconds, (size.total() - size[Kind.ITEM]) / seconds

    def begin_faults(self) -> None:
        """From now on items are published now and then."""
        if self.plan.items_during_faults:
            self._next_item = self.simulation.network.now

    def end_faults(self) -> None:
        """Publish no more."""
        self._next_item = float("inf")

    def pass_time(
        self, seconds: float, until: Callable[[], bool] | None = None, *, step: float = STEP_S
    ) -> float | None:
        """Let time pass; end once `until` is true, asked every `step`. Return after how long, None if it never was."""
        network = self.simulation.network
        start = network.now
        while network.now < start + seconds - 1e-9:
            if until is not None and until():
                return network.now - start
            second = int(network.now)
            self.simulation.run(min(step, start + seconds - network.now))
            if int(network.now) != second:
                self._observe()
        return network.now - start if until is None or until() else None

    def _observe(self) -> None:
        now = self.simulation.network.now
        extremes, usage = self.extremes, self.usage
        for node in self.honest:
            membership = node.core.membership
            extremes.peers = max(extremes.peers, len(membership.peers))
            extremes.connections = max(extremes.connections, node.transport.links)
            extremes.records = max(extremes.records, len(membership.book))
            extremes.held = max(extremes.held, node.core.gossip.held_bytes)
            extremes.wanted = max(extremes.wanted, node.core.gossip.wanted)
        for name, shares in self.surrounded.items():
            shares += self._hostile_share(name)
        if self.dead and self.ghosts():
            self.last_ghost = now
        usage.node_seconds += len(self.simulation.nodes)
        if now >= self._next_item:
            self._next_item += self.plan.faults_s / self.plan.items_during_faults
            self._publish_one()
        if int(now) % 10 == 0:
            links = sum(len(node.core.membership.peers) for node in self.honest)
            alive = sum(1 for _ in self.honest)
            self._progress(f"t = {now:4.0f} s  {alive} honest nodes, {links / max(1, alive):.1f} live links each")

    def _hostile_share(self, name: int) -> list[float]:
        """Return the hostile share of a victim's links, if it lives and has any."""
        node = self.simulation.nodes.get(name)
        peers = node.core.membership.peers if node else []
        honest = {other.identity.node_id for other in self.honest}
        return [sum(peer not in honest for peer in peers) / len(peers)] if peers else []

    def _publish_one(self) -> None:
        name = self.rng.choice(self.healthy)
        self.published[self.publish(name)] = name

    def publish(self, name: int) -> ItemId:
        """Let a node publish a small item, one a second at most."""
        text = f"{self.simulation.network.now:.0f} s, node {name}"
        return self.simulation.publish(name, text.encode().ljust(SMALL_BYTES))

    def publish_fresh(self) -> dict[ItemId, int]:
        """Let a sample of nodes publish one item each; return the items, and whose they are."""
        healthy = self.healthy
        names = self.rng.sample(healthy, min(self.plan.publishers, len(healthy)))
        items: dict[ItemId, int] = {}
        self.fresh_bytes = 0
        for place, name in enumerate(names):
            text = f"fresh of {name} at {self.simulation.network.now:.2f} s"
            size = SMALL_BYTES if place % LARGE_EVERY else LARGE_BYTES
            self.fresh_bytes += size
            items[self.simulation.publish(name, text.encode().ljust(size))] = name
        return items

    def lacking(self, items: dict[ItemId, int]) -> int:
        """Count the pairs of an honest live node and an item of another node that it did not get."""
        return sum(
            sum(item not in ids for item, signer in items.items() if signer != node.name)
            for node in self.honest
            for ids in (node.ids,)
        )

    def ghosts(self) -> int:
        """Count the dead that honest live nodes still have in view or suspect."""
        return sum(
            node_id in self.dead
            for node in self.honest
            for node_id in (*node.core.membership.peers, *node.core.membership.detector.suspects)
        )

    def declared_dead(self) -> int:
        """Count the peers that honest nodes declared dead because they were silent."""
        return self.deaths_declared + sum(node.core.membership.deaths for node in self.honest)

    def rejected(self) -> dict[str, int]:
        """Return what honest nodes refused, by reason."""
        total: dict[str, int] = {}
        for node in self.honest:
            for reason, count in node.core.scores.rejected.items():
                total[reason] = total.get(reason, 0) + count
        return dict(sorted(total.items()))
