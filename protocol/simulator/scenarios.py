"""Scenarios and invariants: what can happen to a swarm, and what must hold nevertheless.

Each scenario is a function that lets its faults happen; `judge` puts a swarm through one and checks the invariants.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from protocol.credentials.records import PeerRecord
from protocol.limits.timing import Timing
from protocol.simulator.overlay import farthest, unreached
from protocol.simulator.simulation import MIN_WAIT_S
from protocol.simulator.trial import SwarmPlan, SwarmTrial
from protocol.transport.memory import Conditions, NetworkCut

PAUSE_S = 30.0
RESTART_S = 2  # how long a node that is restarted is away
CROWD = 20  # one node in so many is there before the crowd

SETTLE_S = 20.0  # from the first start to a settled overlay
SPREAD_STEP_S = 0.02  # the precision of the time until items are everywhere
DEATHS_PER_NODE_HOUR = 1 / 1000  # living nodes that may be thought dead
MAX_FRAMES_PER_SECOND = 20.0  # that a node sends beside items, on average
MAX_BYTES_PER_SECOND = 20_000.0
# The hostile share of a victim's links, on average over the victims: the part that callers may have. A node chooses a
# third itself. Some of that third are hostile, too, but attackers cannot take all of the others.
MAX_HOSTILE_LINKS = 2 / 3
STUDENT_T = 2.365  # 7 degrees of freedom


def _steady(trial: SwarmTrial, seconds: float) -> None:
    trial.pass_time(seconds)


def _flash_crowd(trial: SwarmTrial, seconds: float) -> None:
    for name in range(trial.plan.nodes):
        if name not in trial.simulation.nodes:
            trial.start(name)
    trial.pass_time(seconds)


def _kill(trial: SwarmTrial, seconds: float) -> None:
    for place, name in enumerate(trial.choose(0.3)):
        trial.kill(name, silently=place % 2 == 0)
    trial.pass_time(seconds)


def _rolling_restarts(trial: SwarmTrial, seconds: float) -> None:
    """Every second kill some nodes, and start those that were killed `RESTART_S` ago, with their peers files."""
    names = trial.choose(1.0)
    batches = max(1, int(seconds) - RESTART_S)
    away: deque[dict[int, tuple[PeerRecord, ...]]] = deque()
    for batch in range(batches + RESTART_S):
        away.append({name: trial.stop(name) for name in names[batch::batches]} if batch < batches else {})
        if batch >= RESTART_S:
            for name, known in away.popleft().items():
                trial.start(name, known)
        trial.pass_time(1.0)


def _loss(trial: SwarmTrial, seconds: float) -> None:
    network = trial.simulation.network
    usual = network.conditions
    network.conditions = replace(usual, loss=0.1)
    trial.pass_time(seconds)
    network.conditions = usual


def _partition(trial: SwarmTrial, seconds: float) -> None:
    """Frames from a third of the nodes to the others vanish; the other way they arrive."""
    simulation = trial.simulation
    sides = {simulation.nodes[name].transport.key: 1 for name in trial.choose(1 / 3)}
    simulation.network.split(NetworkCut(sides, frozenset({(1, 0)})))
    trial.pass_time(seconds)
    simulation.network.heal()


def _pauses(trial: SwarmTrial, seconds: float) -> None:
    """Pause a tenth at a time: one half as by SIGSTOP, the other with a blocked interpreter."""
    left = seconds
    while left > 0:
        names = trial.choose(0.1)
        for place, name in enumerate(names):
            trial.simulation.pause(name, acknowledges=place % 2 == 0)
        trial.pass_time(PAUSE_S)
        for name in names:
            trial.simulation.resume(name)
        left -= PAUSE_S


def _hostile(trial: SwarmTrial, seconds: float) -> None:
    """Hostile nodes, some seeds among them, are there from the start. Then their victims join."""
    for name in trial.victims:
        trial.start(name)
    trial.attack.victims = trial.addresses(trial.victims)
    trial.attack.keys = frozenset(address.key for address in trial.attack.victims)
    for name in trial.voices:
        trial.start(name)
    trial.pass_time(seconds)


def _hostile_callers(trial: SwarmTrial, seconds: float) -> None:
    trial.attack.bystanders = trial.addresses(node.name for node in trial.honest)
    _hostile(trial, seconds)


def _as_it_is(plan: SwarmPlan) -> SwarmPlan:
    return plan


@dataclass(frozen=True, slots=True)
class Scenario:
    """A line on what happens, the faults, and how the plan differs.

    `undisturbed`: hardly any living node may be thought dead. `deadly`: some nodes die.
    """

    what: str
    faults: Callable[[SwarmTrial, float], None]
    adapt: Callable[[SwarmPlan], SwarmPlan] = _as_it_is
    undisturbed: bool = False
    deadly: bool = False


SCENARIOS = {
    "steady": Scenario("nothing happens", _steady, undisturbed=True),
    "flash-crowd": Scenario(
        "all but one in twenty join at once",
        _flash_crowd,
        lambda plan: replace(plan, first=max(1, plan.nodes // CROWD)),
        undisturbed=True,
    ),
    "kill": Scenario("30 % are killed at once, half of them without closing a connection", _kill, deadly=True),
    "rolling-restarts": Scenario("all but the seed restart, one after the other", _rolling_restarts, deadly=True),
    "loss": Scenario("10 % of all frames are lost", _loss),
    "partition": Scenario("what a third of the nodes send to the others vanishes, then the network heals", _partition),
    "pauses": Scenario("a tenth of the nodes at a time are stopped for 30 s", _pauses),
    "skew": Scenario(
        "clocks are off by up to four minutes either way",
        _steady,
        lambda plan: replace(plan, skew_s=240.0),
        undisturbed=True,
    ),
    "hostile": Scenario(
        "20 % are hostile, seeds too: drop, announce what is not, forge, flood, and eclipse newcomers",
        _hostile,
        lambda plan: replace(plan, hostile=0.2),
    ),
    "hostile-callers": Scenario(
        "the same, and who eclipses newcomers calls all others, too, for their places",
        _hostile_callers,
        lambda plan: replace(plan, hostile=0.2),
    ),
}


@dataclass(frozen=True, slots=True)
class Invariant:
    """An invariant that was checked: whether it holds, and a text with the measured value."""

    holds: bool
    says: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.holds else 'FAIL'}  {self.says}"


def hop_bound(timing: Timing, conditions: Conditions) -> float:
    """Return in how many seconds an item crosses one link at the latest, if nothing is lost.

    It waits to be announced, is announced, waits for the next draw, is asked for, and comes.
    """
    return 2 * timing.announce_interval + 3 * (conditions.longest_delay + MIN_WAIT_S)


def spread_bound(timing: Timing, conditions: Conditions, hops: int, stalls: int) -> float:
    """Return in how many seconds an item is everywhere: `hops` links, and `stalls` holders that do not deliver."""
    return hops * hop_bound(timing, conditions) + stalls * timing.pull_patience


def carry_bound(conditions: Conditions, size: int) -> float:
    """Return in how many seconds lines carry `size` bytes of items to everybody.

    Each node receives them once and sends them once on average; twice that, as some nodes are asked more often than
    others.
    """
    return 2 * 2 * size / conditions.line


def catch_up_bound(timing: Timing) -> float:
    """Return in how many seconds a sync brings an item to a node that lost every announcement of it."""
    return 3 * 1.25 * timing.sync_interval + timing.pull_patience


def judge(trial: SwarmTrial, scenario: Scenario) -> Iterator[Invariant]:
    """Let a swarm settle, put it through the scenario, and yield each check as it is made."""
    trial.settle(SETTLE_S)
    trial.forget_usage()
    yield from suffer(trial, scenario)


def suffer(trial: SwarmTrial, scenario: Scenario) -> Iterator[Invariant]:
    """Put a swarm that has settled through the scenario and yield each check as it is made."""
    plan, timing = trial.plan, trial.plan.timing
    patience = 3 * timing.death_bound
    trial.begin_faults()
    scenario.faults(trial, plan.faults_s)
    trial.end_faults()

    since = trial.simulation.network.now
    killed = min(trial.dead.values(), default=since)
    trial.pass_time(killed + patience - since, lambda: trial.ghosts() == 0)
    if trial.dead:
        yield Invariant(
            trial.ghosts() == 0,
            f"the {len(trial.dead)} dead are gone from every view"
            f" {trial.last_ghost - min(trial.dead.values()):.0f} s after the kill"
            f" (bound {patience:.0f} s = 3 x death bound), {trial.ghosts()} are not",
        )
    trial.pass_time(patience - (trial.simulation.network.now - since), lambda: unreached(trial.graph()) == 0)
    graph = trial.graph()
    yield Invariant(
        unreached(graph) == 0,
        f"the overlay of {len(graph)} honest nodes is connected {trial.simulation.network.now - since:.1f} s after"
        f" the faults (bound {patience:.0f} s), {unreached(graph)} nodes cut off",
    )
    yield from _spread(trial)
    yield from _bounds(trial, scenario)


def _spread(trial: SwarmTrial) -> Iterator[Invariant]:
    plan, timing = trial.plan, trial.plan.timing
    items = trial.publish_fresh()
    graph = trial.graph()
    hops = farthest(graph, items.values())
    # On each link of the way, a hostile neighbour may announce what it never gives.
    stalls = 1 + (hops if trial.hostile else 0)
    carry = carry_bound(plan.conditions, trial.fresh_bytes)
    bound = spread_bound(timing, plan.conditions, hops, stalls) + carry
    took = trial.spread_s = trial.pass_time(bound, lambda: trial.lacking(items) == 0, step=SPREAD_STEP_S)
    pairs = len(items) * (len(graph) - 1)
    yield Invariant(
        took is not None,
        f"{len(items)} fresh items reach all {len(graph)} honest nodes"
        + (f" in {took:.2f} s" if took is not None else f", but for {trial.lacking(items)} of {pairs} pairs,")
        + f" (bound {bound:.1f} s = {hops} links x {hop_bound(timing, plan.conditions):.2f} s"
        f" + {stalls} x pull patience" + (f" + {carry:.1f} s for the lines" if carry else "") + ")",
    )
    bound = catch_up_bound(timing)
    took = trial.pass_time(bound, lambda: trial.lacking(trial.published) == 0)
    yield Invariant(
        took is not None,
        f"{len(trial.published)} items published meanwhile are everywhere"
        + (f" {took:.2f} s later" if took is not None else f", but for {trial.lacking(trial.published)} pairs,")
        + f" (bound {bound:.1f} s = 3 syncs + pull patience)",
    )


def _bounds(trial: SwarmTrial, scenario: Scenario) -> Iterator[Invariant]:
    limits, extremes, usage = trial.plan.limits, trial.extremes, trial.usage
    links = statistics.fmean(len(node.core.membership.peers) for node in trial.honest)
    yield Invariant(
        extremes.peers <= limits.max_peers,
        f"never more than {extremes.peers} live links a node (bound {limits.max_peers}), {links:.1f} at the end;"
        f" {extremes.connections} connections, handshakes and handovers included",
    )
    yield Invariant(
        extremes.records <= limits.max_known_peers,
        f"never more than {extremes.records} records in a book (bound {limits.max_known_peers})",
    )
    yield Invariant(
        extremes.held <= limits.held_bytes and extremes.wanted <= limits.max_wants,
        f"never more than {extremes.held} bytes of items held and {extremes.wanted} wanted"
        f" (bounds {limits.held_bytes} and {limits.max_wants})",
    )
    hours = usage.node_seconds / 3600
    deaths = trial.declared_dead()
    allowed = hours * DEATHS_PER_NODE_HOUR
    least, most = (1000 * count / max(hours, 1e-9) for count in poisson_interval(deaths))
    if not scenario.deadly:
        bound = f"bound {allowed:.2f}" if scenario.undisturbed else "no bound meanwhile"
        yield Invariant(
            deaths <= allowed or not scenario.undisturbed,
            f"{deaths} living nodes thought dead in {hours:.1f} node-hours ({bound}),"
            f" {least:.3g} to {most:.3g} in 1,000 node-hours (95 %)",
        )
    internal = trial.rejected().get("internal", 0)
    yield Invariant(internal == 0, f"{internal} events ran into a defect")
    if trial.victims:
        yield from _victims(trial)
    if trial.hostile:
        return  # what hostile nodes send is no measure of the protocol's cost
    frames, size = trial.sent()
    usual = scenario.undisturbed and trial.plan.first is None  # nodes that come back or join send more for a while
    yield Invariant(
        not usual or (frames <= MAX_FRAMES_PER_SECOND and size <= MAX_BYTES_PER_SECOND),
        f"a node sends {frames:.2f} messages and {size:.0f} bytes a second beside items"
        + (
            f" (bounds {MAX_FRAMES_PER_SECOND:.0f} and {MAX_BYTES_PER_SECOND:.0f})"
            if usual
            else " (no bound meanwhile)"
        ),
    )


def _victims(trial: SwarmTrial) -> Iterator[Invariant]:
    graph = trial.graph()
    fewest = min(len(graph[name]) for name in trial.victims)
    yield Invariant(fewest > 0, f"each of the {len(trial.victims)} eclipsed nodes has {fewest} honest peers or more")
    share, margin = hostile_share(trial)
    yield Invariant(
        share <= MAX_HOSTILE_LINKS,
        f"of their links {share:.2f} +- {margin:.2f} (95 %) lead to hostile nodes (bound {MAX_HOSTILE_LINKS:.2f})",
    )


def hostile_share(trial: SwarmTrial) -> tuple[float, float]:
    """Return which share of the eclipsed nodes' links led to hostile ones, and half the width of its 95 % interval."""
    # A victim's links follow each other; the victims are what was drawn.
    return interval([sum(shares) / len(shares) for shares in trial.surrounded.values()])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval, by Student's t for `VICTIMS` values."""
    return statistics.fmean(values), STUDENT_T * statistics.stdev(values) / math.sqrt(len(values))


def poisson_interval(count: int) -> tuple[float, float]:
    """Return the 95 % interval of a Poisson mean of which `count` were seen (Wilson and Hilferty 1931)."""
    least = count * (1 - 1 / (9 * count) - 1.96 / (3 * math.sqrt(count))) ** 3 if count else 0.0
    more = count + 1
    return least, more * (1 - 1 / (9 * more) + 1.96 / (3 * math.sqrt(more))) ** 3
