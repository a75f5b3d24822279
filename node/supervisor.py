"""Keeps the nodes of a local swarm running: starts, watches, restarts, stops them.

The first node starts alone; each other starts as soon as a living node has written the
address to dial. A node that dies is started again from its checkpoint, with living
nodes as its seeds, until it has failed `MAX_FAILURES` times without finishing a round
in between. The others never wait for it.

    waiting -> starting -> running -> done
                  ^           |-> stopped      (asked to)
                  |           |-> failed       (bad configuration, or too many failures)
                  '-- restarting
                              |-> away         (killed, to come back later: a run with churn)
                  restarting <-'

One supervised node process: how it is started, and what it does before the node runs.

Children are forked from a server that has imported the heavy libraries once, so N
nodes share the cost in time and in memory. The server is started with SIGINT, SIGTERM and
SIGHUP blocked, and its children inherit that: a Ctrl-C in the terminal, or its end, which
reaches the whole process group, is the supervisor's alone to hear, and it asks its children
to stop by SIGTERM, which each unblocks for itself.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import structlog

from node.budget import is_done
from node.config import NodeConfig
from node.errors import PassingError, UserError
from node.telemetry.logs import flush_logs, setup_logs
from node.telemetry.metrics import MetricsTail, Progress

MAX_FAILURES = 4
MAX_SEEDS = 3
RESTART_DELAY = 1.0  # seconds, doubled with each failure in a row
LOST = 255  # what multiprocessing reports when the fork server died, and its child perhaps lives on
TICK = 0.25  # seconds between looks at the children; a death is noticed at once
HEAVY = ("node.run",)  # imports torch, transformers and trl with it
# A thread does not survive a fork: keep OpenBLAS and Arrow (its allocator) from starting one while they are imported.
NO_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
# Nor does CUDA: a package that only asks whether there is a GPU would leave none to the children. NVML tells as well.
NO_CUDA = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
# It is started with `python -c`: a file of the user's called node.py, where the command is given, is none of ours.
NO_FOLDER_OF_THE_USER = {"PYTHONSAFEPATH": "1"}
EXIT_DEFECT = 1
EXIT_USER_ERROR = 2

Target = Callable[[NodeConfig, Path], None]
NOTHING_ELSE: Mapping[str, str] = MappingProxyType({})

log = structlog.get_logger()


class Started(NamedTuple):
    """A child process, and the pipe on which it says why it ends, if it can."""

    process: ForkServerProcess
    reason: Connection


def start_server(preload: Sequence[str] = HEAVY) -> ForkServerContext:
    """Start the fork server, which begins to import `preload` at once, and return its context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    resource_tracker.ensure_running()  # else the fork server starts it, which unblocks the other two
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    outside = dict(os.environ)
    os.environ.update(NO_THREADS | NO_CUDA | NO_FOLDER_OF_THE_USER)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(outside)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def start_child(
    context: ForkServerContext,
    target: Target,
    config: NodeConfig,
    folder: Path,
    *,
    environment: Mapping[str, str] = NOTHING_ELSE,
    debug: bool = False,
) -> Started:
    """Start one node process on `folder`; `target` must be picklable by reference.

    `environment` is set over that of the fork server before anything runs.
    """
    reading, writing = context.Pipe(duplex=False)
    given = (target, config, folder, dict(environment), debug, writing)
    process = context.Process(target=_main, args=given, name=folder.name)
    process.start()
    writing.close()
    return Started(process, reading)


def run_real_node(config: NodeConfig, folder: Path) -> None:
    """The target of a real swarm: run a node; its libraries are imported in the child alone."""
    from node.run import run_node

    run_node(config, folder)


def _main(
    target: Target, config: NodeConfig, folder: Path, environment: dict[str, str], debug: bool, reason: Connection
) -> None:
    os.environ.update(environment)
    threading.Thread(target=_die_with_supervisor, name="supervisor-watch", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _redirect_output(folder / "output.log")
    setup_logs(folder, stderr=False, debug=debug)
    try:
        target(config, folder)
    except UserError as error:
        log.exception("stopped")
        reason.send(str(error))
        sys.exit(EXIT_DEFECT if isinstance(error, PassingError) else EXIT_USER_ERROR)
    except Exception as error:  # whatever it was, the supervisor decides what comes next
        log.exception("failed")
        reason.send(f"{type(error).__name__}: {error}")
        sys.exit(EXIT_DEFECT)
    finally:
        flush_logs()


def _die_with_supervisor() -> None:
    """Wait for the supervisor's end of the pipe to close, as it does even on kill -9, and end at once."""
    supervisor = multiprocessing.parent_process()
    assert supervisor is not None
    wait([supervisor.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _redirect_output(path: Path) -> None:
    """Send what libraries print to a file, so that N nodes do not write over the live table."""
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


class State(StrEnum):
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
    progress: Progress
    tail: MetricsTail
    environment: Mapping[str, str] = field(default_factory=dict)
    state: State = State.WAITING
    error: str = ""
    restarts: int = 0
    failures: int = 0  # in a row, without a new round between them
    started: Started | None = field(default=None, repr=False)
    start_at: float = 0.0
    best_round: int = 0

    @classmethod
    def create(cls, folder: Path, config: NodeConfig, environment: Mapping[str, str] = NOTHING_ELSE) -> "NodeProcess":
        """Return a node that has not been started; its folder may hold an earlier run's state."""
        tail = MetricsTail(folder / "metrics.jsonl")
        return cls(folder.name, folder, config, Progress(config.rounds), tail, environment)

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


def nobody(children: Sequence[NodeProcess]) -> Collection[str]:
    """Return who is to be away where no node leaves."""
    return ()


@dataclass(frozen=True, slots=True)
class Supervisor:
    """What `supervise` needs to start a node, and who is to be away: asked at every look, for names."""

    context: ForkServerContext
    target: Target
    debug: bool = False
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
            round and leaves a checkpoint. Twice: each is killed.
        show: called about four times a second with the children.
    """
    obeyed = 0
    try:
        while True:
            for child in children:
                _look(child, supervisor.restart_delay, stopping=obeyed > 0)
            _share_first_error(children)
            if (asked := stops_asked()) > obeyed:
                _stop(children, kill=asked > 1)
                obeyed = asked
            away = supervisor.away(children)
            for child in children:
                _come_and_go(child, away=child.name in away)
            show(children)
            if all(child.state in (State.DONE, State.STOPPED, State.FAILED) for child in children):
                return
            for child in children:
                if child.name not in away and _may_start(child, children):
                    _start(supervisor, child, children)
            living = [child.started.process.sentinel for child in children if child.started]
            wait(living, timeout=TICK) if living else time.sleep(TICK)
    finally:
        _stop(children, kill=True)
        for child in children:
            child.tail.close()


def _look(child: NodeProcess, restart_delay: float, *, stopping: bool) -> None:
    """Read the node's new rows, and take note if its process has ended."""
    alive = child.started is not None and child.started.process.is_alive()
    rows = child.tail.poll()  # after the look at the process, so that the rows of one that ended are complete
    child.progress.update(rows)
    if child.started is None:
        return
    if rows and child.state is State.STARTING:
        child.state = State.RUNNING
    if not alive:
        code, reason = _collect(child.started)
        child.started = None
        _ended(child, code, reason, restart_delay, stopping=stopping)


def _ended(child: NodeProcess, code: int, reason: str, restart_delay: float, *, stopping: bool) -> None:
    progress = child.progress.round
    if stopping or code == 0:
        done = is_done(child.config, progress, child.progress.spent)
        child.state = State.DONE if done else State.STOPPED
        return
    if child.state is State.AWAY:
        return
    child.error = reason
    child.failures = 1 if progress > child.best_round else child.failures + 1
    child.best_round = max(progress, child.best_round)
    if code == EXIT_USER_ERROR or child.failures >= MAX_FAILURES:
        child.state = State.FAILED
    else:
        child.state = State.RESTARTING
        child.start_at = time.monotonic() + restart_delay * 2 ** (child.failures - 1)


def _come_and_go(child: NodeProcess, *, away: bool) -> None:
    """Kill a node that is to be away; one that was and is to come back may start again."""
    if away and child.started is not None and child.state in (State.STARTING, State.RUNNING):
        child.started.process.kill()
        child.state = State.AWAY
    elif not away and child.started is None and child.state is State.AWAY:
        child.state, child.start_at = State.RESTARTING, 0.0


def _collect(started: Started) -> tuple[int, str]:
    started.process.join()
    code = started.process.exitcode or 0
    if code == LOST and started.process.pid:
        with suppress(ProcessLookupError):
            os.kill(started.process.pid, signal.SIGKILL)
    reason = f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    with started.reason, suppress(EOFError):  # a killed process says nothing
        reason = started.reason.recv()
    return code, reason


def _share_first_error(children: Sequence[NodeProcess]) -> None:
    """A first node that cannot start because of its configuration speaks for all: none has begun."""
    first = children[0]
    if first.state is State.FAILED and all(child.state is State.WAITING for child in children[1:]):
        for child in children[1:]:
            child.state, child.error = State.FAILED, first.error


def _may_start(child: NodeProcess, children: Sequence[NodeProcess]) -> bool:
    if child.state not in (State.WAITING, State.RESTARTING) or time.monotonic() < child.start_at:
        return False
    others = [other for other in children if other.alive]
    return not others or not child.config.network.enabled or any(other.address for other in others)


def _start(supervisor: Supervisor, child: NodeProcess, children: Sequence[NodeProcess]) -> None:
    addresses = [other.address for other in children if other is not child and other.address]
    network = child.config.network
    seeds = [*network.seeds, *addresses[:MAX_SEEDS]]
    config = child.config.model_copy(update={"network": network.model_copy(update={"seeds": seeds})})
    (child.folder / "address").unlink(missing_ok=True)  # of an earlier process, which nobody answers at now
    if child.state is State.RESTARTING:
        child.restarts += 1
    child.started = start_child(
        supervisor.context,
        supervisor.target,
        config,
        child.folder,
        environment=child.environment,
        debug=supervisor.debug,
    )
    child.state = State.STARTING


def _stop(children: Sequence[NodeProcess], *, kill: bool) -> None:
    for child in children:
        if child.started is not None:
            if kill:
                child.started.process.kill()
            else:
                child.started.process.terminate()
        elif child.state in (State.WAITING, State.RESTARTING, State.AWAY):
            child.state = State.STOPPED
