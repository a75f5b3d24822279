"""What must hold of a swarm, whatever happened to it, each with what was measured."""

from collections.abc import Iterator
from dataclasses import dataclass

from protocol.config import Timing
from protocol.gossip.want_list import MAX_WANTS
from protocol.simulator.overlay import farthest, unreached
from protocol.simulator.scenarios import Scenario
from protocol.simulator.simulation import MIN_WAIT_S
from protocol.simulator.trial import Trial
from protocol.transport.memory import Conditions

SETTLE_S = 20.0  # from the seed to a settled overlay
DEATHS_PER_NODE_HOUR = 1 / 1000
MAX_FRAMES_PER_SECOND = 20.0  # that a node sends beside items, on average
MAX_BYTES_PER_SECOND = 20_000.0


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant: what it says, with the measured value in the text, and whether it holds."""

    holds: bool
    says: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.holds else 'FAIL'}  {self.says}"


def hop_bound(timing: Timing, conditions: Conditions) -> float:
    """Return in how many seconds an item crosses one link at the latest, if nothing is lost.

    It waits to be announced, is announced, may be on its way as a push, is pulled, and comes.
    """
    return timing.announce_interval + timing.pull_delay + 3 * (conditions.longest_delay + MIN_WAIT_S)


def spread_bound(timing: Timing, conditions: Conditions, hops: int, stalls: int) -> float:
    """Return in how many seconds an item is everywhere: `hops` links, and `stalls` holders that do not deliver."""
    return hops * hop_bound(timing, conditions) + stalls * timing.pull_patience


def catch_up_bound(timing: Timing) -> float:
    """Return in how many seconds an item comes whose every announcement to a node was lost: by the next syncs."""
    return 3 * 1.25 * timing.sync_interval + timing.pull_patience


def judge(trial: Trial, scenario: Scenario) -> Iterator[Check]:
    """Let a swarm settle, put it through the scenario, and yield each check as it is made."""
    trial.settle(SETTLE_S)
    trial.forget_usage()
    yield from suffer(trial, scenario)


def suffer(trial: Trial, scenario: Scenario) -> Iterator[Check]:
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
        yield Check(
            trial.ghosts() == 0,
            f"the {len(trial.dead)} dead are gone from every view"
            f" {trial.last_ghost - min(trial.dead.values()):.0f} s after the kill"
            f" (bound {patience:.0f} s = 3 x death bound), {trial.ghosts()} are not",
        )
    trial.pass_time(patience - (trial.simulation.network.now - since), lambda: unreached(trial.graph()) == 0)
    graph = trial.graph()
    yield Check(
        unreached(graph) == 0,
        f"the overlay of {len(graph)} honest nodes is connected {trial.simulation.network.now - since:.1f} s after"
        f" the faults (bound {patience:.0f} s), {unreached(graph)} nodes cut off",
    )
    yield from _spread(trial)
    yield from _bounds(trial, scenario)


def _spread(trial: Trial) -> Iterator[Check]:
    plan, timing = trial.plan, trial.plan.timing
    items = trial.publish_fresh()
    graph = trial.graph()
    hops = farthest(graph, items.values())
    # A hostile neighbour may announce what it never gives, once a link on the way.
    stalls = 1 + (hops if trial.hostile else 0)
    bound = spread_bound(timing, plan.conditions, hops, stalls)
    took = trial.pass_time(bound, lambda: trial.lacking(items) == 0)
    pairs = len(items) * (len(graph) - 1)
    yield Check(
        took is not None,
        f"{len(items)} fresh items reach all {len(graph)} honest nodes"
        + (f" in {took:.2f} s" if took is not None else f", but for {trial.lacking(items)} of {pairs} pairs,")
        + f" (bound {bound:.1f} s = {hops} links x {hop_bound(timing, plan.conditions):.2f} s"
        f" + {stalls} x pull patience)",
    )
    bound = catch_up_bound(timing)
    took = trial.pass_time(bound, lambda: trial.lacking(trial.published) == 0)
    yield Check(
        took is not None,
        f"{len(trial.published)} items published meanwhile are everywhere"
        + (f" {took:.2f} s later" if took is not None else f", but for {trial.lacking(trial.published)} pairs,")
        + f" (bound {bound:.1f} s = 3 syncs + pull patience)",
    )


def _bounds(trial: Trial, scenario: Scenario) -> Iterator[Check]:
    limits, extremes, usage = trial.plan.limits, trial.extremes, trial.usage
    yield Check(
        extremes.peers <= limits.max_peers,
        f"never more than {extremes.peers} live links a node (bound {limits.max_peers});"
        f" {extremes.connections} connections, handshakes and handovers included",
    )
    yield Check(
        extremes.records <= limits.max_known_peers,
        f"never more than {extremes.records} records in a book (bound {limits.max_known_peers})",
    )
    yield Check(
        extremes.held <= limits.held_bytes and extremes.wanted <= MAX_WANTS,
        f"never more than {extremes.held} bytes of items held and {extremes.wanted} wanted"
        f" (bounds {limits.held_bytes} and {MAX_WANTS})",
    )
    hours = usage.node_seconds / 3600
    deaths = trial.declared_dead()
    allowed = hours * DEATHS_PER_NODE_HOUR
    if scenario.undisturbed:
        yield Check(
            deaths <= allowed,
            f"{deaths} living nodes thought dead in {hours:.1f} node-hours (bound {allowed:.2f})",
        )
    internal = trial.rejected().get("internal", 0)
    yield Check(internal == 0, f"{internal} events ran into a defect")
    if trial.hostile:
        yield from _victim(trial)
        return  # what hostile nodes send is no measure of the protocol's cost
    frames, size = trial.sent()
    usual = scenario.undisturbed and trial.plan.first is None  # to come back and to join cost more, and end
    yield Check(
        not usual or (frames <= MAX_FRAMES_PER_SECOND and size <= MAX_BYTES_PER_SECOND),
        f"a node sends {frames:.2f} messages and {size:.0f} bytes a second beside items"
        + (
            f" (bounds {MAX_FRAMES_PER_SECOND:.0f} and {MAX_BYTES_PER_SECOND:.0f})"
            if usual
            else " (no bound meanwhile)"
        ),
    )


def _victim(trial: Trial) -> Iterator[Check]:
    assert trial.victim is not None
    links = trial.graph()[trial.victim]
    peers = trial.simulation.nodes[trial.victim].core.membership.peers
    yield Check(
        len(links) > 0,
        f"the eclipsed node {trial.victim} has {len(links)} honest peers of {len(peers)}",
    )
