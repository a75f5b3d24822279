"""What can happen to a swarm. Each scenario is a few lines that say what it does while its time lasts."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from protocol.credentials.records import PeerRecord
from protocol.simulator.trial import Plan, Trial
from protocol.transport.memory import Cut

PAUSE_S = 30.0
RESTART_S = 2  # how long a node that is restarted is away
CROWD = 20  # one node in so many is there before the crowd


def _steady(trial: Trial, seconds: float) -> None:
    trial.pass_time(seconds)


def _flash_crowd(trial: Trial, seconds: float) -> None:
    for name in range(trial.plan.nodes):
        if name not in trial.simulation.nodes:
            trial.start(name)
    trial.pass_time(seconds)


def _kill(trial: Trial, seconds: float) -> None:
    for place, name in enumerate(trial.choose(0.3)):
        trial.kill(name, silently=place % 2 == 0)
    trial.pass_time(seconds)


def _rolling_restarts(trial: Trial, seconds: float) -> None:
    """Every second some are killed, and those come back, with their peers files, that were killed `RESTART_S` ago."""
    names = trial.choose(1.0)
    batches = max(1, int(seconds) - RESTART_S)
    away: deque[dict[int, tuple[PeerRecord, ...]]] = deque()
    for batch in range(batches + RESTART_S):
        away.append({name: trial.stop(name) for name in names[batch::batches]} if batch < batches else {})
        if batch >= RESTART_S:
            for name, known in away.popleft().items():
                trial.start(name, known)
        trial.pass_time(1.0)


def _loss(trial: Trial, seconds: float) -> None:
    network = trial.simulation.network
    usual = network.conditions
    network.conditions = replace(usual, loss=0.1)
    trial.pass_time(seconds)
    network.conditions = usual


def _partition(trial: Trial, seconds: float) -> None:
    """What a third of the nodes send to the others vanishes; the other way it arrives."""
    simulation = trial.simulation
    sides = {simulation.nodes[name].transport.key: 1 for name in trial.choose(1 / 3)}
    simulation.network.split(Cut(sides, frozenset({(1, 0)})))
    trial.pass_time(seconds)
    simulation.network.heal()


def _pauses(trial: Trial, seconds: float) -> None:
    """A tenth at a time, every other one stopped as by SIGSTOP, the others with a blocked interpreter."""
    left = seconds
    while left > 0:
        names = trial.choose(0.1)
        for place, name in enumerate(names):
            trial.simulation.pause(name, heartbeats=place % 2 == 0)
        trial.pass_time(PAUSE_S)
        for name in names:
            trial.simulation.resume(name)
        left -= PAUSE_S


def _hostile(trial: Trial, seconds: float) -> None:
    """The hostile are there from the start. Their victim joins in their midst, with a peers file that they filled."""
    if trial.victim is not None:
        simulation = trial.simulation
        known = tuple(trial.attack.records[-trial.plan.limits.max_known_peers :])
        trial.attack.victim = simulation.start(trial.victim, known=known, seeds=simulation.seeds).address
    trial.pass_time(seconds)


def _as_it_is(plan: Plan) -> Plan:
    return plan


@dataclass(frozen=True, slots=True)
class Scenario:
    """What happens, in a line; how the plan differs; and whether any node may be thought dead that is not."""

    what: str
    faults: Callable[[Trial, float], None]
    adapt: Callable[[Plan], Plan] = _as_it_is
    undisturbed: bool = False


SCENARIOS = {
    "steady": Scenario("nothing happens", _steady, undisturbed=True),
    "flash-crowd": Scenario(
        "all but one in twenty join at once",
        _flash_crowd,
        lambda plan: replace(plan, first=max(1, plan.nodes // CROWD)),
        undisturbed=True,
    ),
    "kill": Scenario("30 % are killed at once, half of them without closing a connection", _kill),
    "rolling-restarts": Scenario("all but the seed restart, one after the other", _rolling_restarts),
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
        "20 % are hostile: they drop, announce what is not, forge, bury the living, flood, and eclipse a newcomer",
        _hostile,
        lambda plan: replace(plan, hostile=0.2),
    ),
}
