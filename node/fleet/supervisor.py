"""Keeps the nodes of a local swarm running: starts, watches, restarts, stops them.

The first node starts alone; each other starts as soon as a living node has written the
address to dial. A node that dies is started again from its checkpoint, with living
nodes as its seeds, until it has failed `MAX_FAILURES` times without finishing a round
in between. The others never wait for it. A node that is asked to stop and has not ended `END_S` after its own
`trainer.stop_grace` is killed.

    waiting -> starting -> running -> done
                  ^           |-> stopped      (asked to)
                  |           |-> failed       (bad configuration, or too many failures)
                  '-- restarting
                              |-> away         (killed, to come back later: a run with churn)
                  restarting <-'
"""

import math
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from multiprocessing.connection import wait
from pathlib import Path

import structlog

from node.config import NodeConfig
from node.fleet.child_process import EXIT_USER_ERROR, NOTHING_ELSE, Ending, Running
from node.fleet.progress import NodeProgress
from node.telemetry.metrics_file import MetricsTail
from node.training.budget import is_done

MAX_FAILURES = 4
MAX_SEEDS = 3
RESTART_DELAY = 1.0  # seconds, doubled with each failure in a row
END_S = 120.0  # seconds after a node's grace period: to write its last checkpoint, of a large model to a slow disk
TICK = 0.25  # seconds between looks at the children; a death is noticed at once

log = structlog.get_logger()


class NodeState(StrEnum):
    """Where a node is in its life; see the module's diagram."""

    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"
    AWAY = "away"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(slots=True)
class NodeProcess:
    """One node of the swarm, through all its processes."""

    name: str
    folder: Path
    config: NodeConfig
    progress: NodeProgress
    tail: MetricsTail
    environment: Mapping[str, str] = field(default_factory=dict)
    state: NodeState = NodeState.WAITING
    error: str = ""
    restarts: int = 0
    failures: int = 0  # in a row, without a new round between them
    started: Running | None = field(default=None, repr=False)
    start_at: float = 0.0
    best_round: int = 0

    @classmethod
    def create(cls, folder: Path, config: NodeConfig, environment: Mapping[str, str] = NOTHING_ELSE) -> "NodeProcess":
        """Return a node that has not been started; its folder may hold an earlier run's state."""
        tail = MetricsTail(folder / "metrics.jsonl")
        return cls(folder.name, folder, config, NodeProgress(config.rounds), tail, environment)

    @property
    def alive(self) -> bool:
        """Whether a process of this node exists."""
        return self.started is not None

    @property
    def address(self) -> str:
        """Where the living node can be dialled; empty before its network is up."""
        try:
            return (self.folder / "address").read_text().strip() if self.alive else ""
        except FileNotFoundError:
            return ""


Away = Callable[[Sequence[NodeProcess]], Collection[str]]
Start = Callable[[NodeConfig, Path, Mapping[str, str]], Running]
"""Starts a node's process of this configuration on its folder, with this over its environment."""


def nobody(children: Sequence[NodeProcess]) -> Collection[str]:
    """Return who is to be away where no node leaves."""
    return ()


@dataclass(frozen=True, slots=True)
class Supervisor:
    """The means to start a node, and the names of nodes to be away, which are asked for at every look."""

    start: Start
    restart_delay: float = RESTART_DELAY
    away: Away = nobody


def supervise(
    supervisor: Supervisor,
    children: Sequence[NodeProcess],
    stops_asked: Callable[[], int],
    show: Callable[[Sequence[NodeProcess]], object],
) -> None:
    """Run `children` to their ends.

    Args:
        supervisor: how a node is started.
        children: the nodes, in the order of their starts.
        stops_asked: how often a person has asked to stop. Once: each node finishes its
            round, or gives it up after its grace period, and leaves a checkpoint. Twice: each is killed.
        show: called about four times a second with the children.
    """
    obeyed = 0
    patience = max(child.config.trainer.stop_grace for child in children) + END_S
    deadline = math.inf
    try:
        while True:
            for child in children:
                _look(child, supervisor.restart_delay, stopping=obeyed > 0)
            _share_first_error(children)
            if (asked := stops_asked()) > obeyed:
                _stop(children, kill=asked > 1)
                deadline = min(deadline, time.monotonic() + patience)
                obeyed = asked
            elif time.monotonic() > deadline:
                log.warning("nodes did not end in time and are killed", seconds=patience)
                _stop(children, kill=True)
                deadline = math.inf
            away = supervisor.away(children)
            for child in children:
                _come_and_go(child, away=child.name in away)
            show(children)
            if all(child.state in (NodeState.DONE, NodeState.STOPPED, NodeState.FAILED) for child in children):
                return
            for child in children:
                if child.name not in away and _may_start(child, children):
                    _start(supervisor, child, children)
            living = [child.started.sentinel for child in children if child.started]
            wait(living, timeout=TICK) if living else time.sleep(TICK)
    finally:
        _stop(children, kill=True)


def ask_to_save(children: Sequence[NodeProcess]) -> None:
    """Ask each node that runs for a checkpoint after its round in progress."""
    for child in children:
        if child.started is not None:
            child.started.signal(signal.SIGUSR1)


def _look(child: NodeProcess, restart_delay: float, *, stopping: bool) -> None:
    """Read the node's new rows, and take note if its process has ended."""
    alive = child.started is not None and child.started.is_alive()
    rows = child.tail.poll()  # after the look at the process, so that the rows of one that ended are complete
    child.progress.update(rows)
    if child.started is None:
        return
    if rows and child.state is NodeState.STARTING:
        child.state = NodeState.RUNNING
    if not alive:
        how = child.started.ending()
        child.started = None
        _ended(child, how, restart_delay, stopping=stopping)


def _ended(child: NodeProcess, how: Ending, restart_delay: float, *, stopping: bool) -> None:
    progress = child.progress.round
    if stopping or how.code == 0:
        done = is_done(child.config, progress, child.progress.spent)
        child.state = NodeState.DONE if done else NodeState.STOPPED
        return
    if child.state is NodeState.AWAY:
        return
    child.error = how.reason
    child.failures = 1 if progress > child.best_round else child.failures + 1
    child.best_round = max(progress, child.best_round)
    if how.code == EXIT_USER_ERROR or child.failures >= MAX_FAILURES:
        child.state = NodeState.FAILED
    else:
        child.state = NodeState.RESTARTING
        child.start_at = time.monotonic() + restart_delay * 2 ** (child.failures - 1)


def _come_and_go(child: NodeProcess, *, away: bool) -> None:
    """Kill a node that is to be away; one that was and is to come back may start again."""
    if away and child.started is not None and child.state in (NodeState.STARTING, NodeState.RUNNING):
        child.started.signal(signal.SIGKILL)
        child.state = NodeState.AWAY
    elif not away and child.started is None and child.state is NodeState.AWAY:
        child.state, child.start_at = NodeState.RESTARTING, 0.0


def _share_first_error(children: Sequence[NodeProcess]) -> None:
    """A first node that cannot start because of its configuration speaks for all: none has begun."""
    first = children[0]
    if first.state is NodeState.FAILED and all(child.state is NodeState.WAITING for child in children[1:]):
        for child in children[1:]:
            child.state, child.error = NodeState.FAILED, first.error


def _may_start(child: NodeProcess, children: Sequence[NodeProcess]) -> bool:
    if child.state not in (NodeState.WAITING, NodeState.RESTARTING) or time.monotonic() < child.start_at:
        return False
    others = [other for other in children if other.alive]
    return not others or not child.config.network.enabled or any(other.address for other in others)


def _start(supervisor: Supervisor, child: NodeProcess, children: Sequence[NodeProcess]) -> None:
    addresses = [other.address for other in children if other is not child and other.address]
    network = child.config.network
    seeds = [*network.seeds, *addresses[:MAX_SEEDS]]
    config = child.config.model_copy(update={"network": network.model_copy(update={"seeds": seeds})})
    (child.folder / "address").unlink(missing_ok=True)  # of an earlier process, which nobody answers at now
    if child.state is NodeState.RESTARTING:
        child.restarts += 1
    child.started = supervisor.start(config, child.folder, child.environment)
    child.state = NodeState.STARTING


def _stop(children: Sequence[NodeProcess], *, kill: bool) -> None:
    for child in children:
        if child.started is not None:
            child.started.signal(signal.SIGKILL if kill else signal.SIGTERM)
        elif child.state in (NodeState.WAITING, NodeState.RESTARTING, NodeState.AWAY):
            child.state = NodeState.STOPPED
