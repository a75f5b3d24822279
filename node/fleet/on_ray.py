"""A swarm on a Ray cluster: `gossamer swarm CONFIG -n N --on ray[=ADDRESS]`.

Each node is an actor, spread over the machines, with a processor, a GPU if it uses one, or a part of either where there
are more nodes. The actor starts the node's process, the same as on one machine, and hands parts of the node's folder
(`mirror`) to this program. So the supervisor, the table, the page and the report read folders of this machine, as they
always do. Nodes dial each other directly, at the addresses by which Ray knows their machines.

The life of a node's process:

    placed    Ray has found a machine with room; until then it waits, and its log says so
    given     the rows and the checkpoint that this program has of it, if it ran before
    begun     its process runs; it gets the signals of the supervisor
    ended     with the last parts of its folder, or without them: the actor or its machine died

A process that ended before its time is started again by the supervisor as a new actor, wherever there is room, in a new
folder and so with a new key: nobody can know that the old node is dead, and two of one key would push each other out.
A node that is started again asks for next to no processor, for which `SPARE` leaves room, so that it does not wait for
one. It does wait for a GPU.

When this program ends, however it does, Ray ends the actors, and a node's process ends with its actor.
"""

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from signal import SIGKILL, SIGUSR1, Signals
from threading import Thread
from typing import Any, NamedTuple

import structlog

from node.config import NodeConfig, PolicyConfig, fill, parse_config
from node.errors import UserError
from node.fleet.child_process import (
    EXIT_DEFECT,
    EXIT_USER_ERROR,
    Ending,
    Started,
    run_real_node,
    start_child,
    start_server,
)
from node.fleet.local_swarm import Machines
from node.fleet.mirror import CheckpointEnd, MirrorReceiver, MirrorSender, Part, parts_of
from node.fleet.ray_cluster import connected, memory_of, packed_files, relocated, unpack_files
from node.operations.preflight import check_means
from node.operations.presets import check_model, preset_of
from node.policy.detection import NODES_ON_GPU
from node.state_folder import exclusive, keep_config, make_folder
from node.telemetry.status_server import ask

SPARE = 0.1  # of each processor: room for nodes that are started again
AGAIN = 0.01  # processors that such a one asks for: Ray counts in ten thousandths
POLL_S = 0.25  # between looks at a node's files that found nothing new
WAITING_S = 10.0  # for a machine with room, and for Ray to start an actor, before the log says so
KILL_S = 5.0  # for an actor to end its node, before it is ended itself
END_S = 10.0  # for all threads, once their actors were ended
ASK_S = 1.0  # between questions for a node's state
PATIENCE_S = 2.0  # for the answer
PLACED_S = 600.0  # for a machine to look at the model
RESTART_DELAY = 5.0  # seconds, doubled each time: Ray notices after some 20 that a machine died, and places nodes there
PREFIX = "gossamer-swarm-"

log = structlog.get_logger()


class ClusterMachine(NamedTuple):
    """A machine as Ray counts it: processors, GPUs, and bytes of memory."""

    cpus: float
    gpus: float
    memory: float


class NodeShare(NamedTuple):
    """The resources that each node asks Ray for, and how many nodes may come to be beside each other on a GPU, or on a
    machine.
    """

    cpus: float
    gpus: float
    memory: int
    beside: int


class Fitted(NamedTuple):
    """The findings of a node's machine: a preset by dotted key, its reasons, and the bytes that a node takes."""

    values: Mapping[str, Any]
    reasons: Mapping[str, str]
    memory: int


class News(NamedTuple):
    """What is new of a node: parts of its files, its state if it was asked, and how it ended, which comes last."""

    parts: Sequence[Part]
    state: Mapping[str, Any] | None = None
    ending: Ending | None = None


def share_of(machines: Sequence[ClusterMachine], nodes: int, memory: int = 0, *, gpu: bool) -> NodeShare:
    """Return an equal share for each of `nodes` nodes, with which Ray can place them all.

    Args:
        machines: of the cluster, of which each may have a node (`able`).
        nodes: how many there are to be.
        memory: bytes that each takes, where it uses no GPU.
        gpu: whether each wants a GPU.

    Raises:
        UserError: the machines have too little memory.
    """
    if gpu:
        beside = math.ceil(nodes / sum(int(machine.gpus) for machine in machines))
        cpus = min(min(1.0, machine.cpus / (int(machine.gpus) * beside)) for machine in machines)
        return NodeShare(_part(cpus * (1 - SPARE)), _part(1 / beside), 0, beside)
    room = [int(machine.memory // memory) if memory else nodes for machine in machines]
    if sum(room) < nodes:
        raise UserError(
            f"a node takes some {memory / 1e9:.1f} GB, and the cluster's machines have room for {sum(room)}, "
            f"not {nodes}: use a smaller model, or fewer nodes"
        )
    on_each = 1  # processor
    while sum(min(int(machine.cpus * on_each), most) for machine, most in zip(machines, room, strict=True)) < nodes:
        on_each += 1
    return NodeShare(_part((1 - SPARE) / on_each), 0.0, memory, math.ceil(nodes / len(machines)))


def _part(value: float) -> float:
    """Return `value` as Ray counts, rounded down to ten thousandths."""
    return max(1, math.floor(value * 10_000 + 1e-6)) / 10_000


def wants_gpu(policy: PolicyConfig, machines: Sequence[ClusterMachine]) -> bool:
    """Tell whether nodes of this policy use a GPU each on these machines; the built-in one does if it is told to.

    Raises:
        UserError: it is told to, and there is none.
    """
    any_gpu = any(machine.gpus >= 1 for machine in machines)
    if policy.device == "cuda" and not any_gpu:
        raise UserError("policy.device is 'cuda', and no machine of the cluster has a GPU: use 'auto' or 'cpu'")
    return any_gpu and (policy.device == "cuda" or (policy.device == "auto" and policy.model != "builtin"))


def able(machines: Sequence[ClusterMachine], *, gpu: bool) -> list[ClusterMachine]:
    """Return the machines that may have a node: a head without processors does no work.

    Raises:
        UserError: there is none.
    """
    chosen = [machine for machine in machines if machine.cpus > 0 and (machine.gpus >= 1 or not gpu)]
    if not chosen:
        raise UserError(f"no machine of the cluster has a processor{' and a GPU' if gpu else ''}: see `ray status`")
    return chosen


class RaySwarm:
    """The nodes of a run on a cluster.

    `config` is what they run, with its presets for the `reasons`; `machines` starts them, and `line` tells a person.
    """

    def __init__(self, ray: Any, given: NodeConfig, nodes: int, *, debug: bool) -> None:
        self._ray = ray
        self._debug = debug
        self._nodes: dict[Path, RayNode] = {}
        counted = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        known = [
            ClusterMachine(*(resources.get(key, 0.0) for key in ("CPU", "GPU", "memory"))) for resources in counted
        ]
        gpu = wants_gpu(given.policy, known)
        machines = able(known, gpu=gpu)
        files = packed_files([given.model_dump(mode="json", exclude_unset=True)], "the swarm")
        self._files = ray.put(files)
        settled = self._settle(given, share_of(machines, nodes, gpu=gpu))
        self.config, self.reasons = fill(given, settled.values), settled.reasons
        self._share = share_of(machines, nodes, settled.memory, gpu=gpu)
        self.machines = Machines(int(sum(machine.cpus for machine in machines)), self._start, RESTART_DELAY)
        self.line = (
            f"Ray: {len(machines)} machine{'s' if len(machines) > 1 else ''}; a node asks for "
            f"{self._share.cpus:g} processors, "
            + (f"{self._share.gpus:g} GPUs" if gpu else f"{self._share.memory / 1e9:.2f} GB of memory")
        )

    def _settle(self, given: NodeConfig, share: NodeShare) -> Fitted:
        look = self._ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=1)(_settle_there)
        settled = look.remote(given.model_dump(mode="json", exclude_unset=True), self._files, share.beside)
        try:
            return self._ray.get(settled, timeout=PLACED_S)
        except self._ray.exceptions.GetTimeoutError:
            raise UserError(
                f"no machine of the cluster had room for a node within {PLACED_S:.0f} s: see `ray status`"
            ) from None
        except self._ray.exceptions.RayError as error:
            raise UserError(_reason(self._ray, error)) from None

    def _start(self, config: NodeConfig, folder: Path, environment: Mapping[str, str]) -> "RayNode":
        """Start a node as a new actor, from what `folder` has of it; Ray sets its environment."""
        share = self._share
        actor = self._ray.remote(_NodeActor).options(
            num_cpus=AGAIN if folder in self._nodes else share.cpus,
            num_gpus=share.gpus,
            memory=share.memory or None,
            scheduling_strategy="SPREAD",
        )
        gpus = {NODES_ON_GPU: str(share.beside)} if share.gpus else {"CUDA_VISIBLE_DEVICES": ""}
        given = {"files": self._files, "debug": self._debug, "environment": gpus}
        self._nodes[folder] = RayNode(self._ray, lambda: actor.remote(folder.name), config, folder, given)
        return self._nodes[folder]

    def ask(self, folder: Path, timeout: float) -> dict[str, Any]:
        """Return what a node's page would say, as its machine has told lately; raises `UserError` if it has not."""
        node = self._nodes.get(folder)
        if node is None or not node.state:
            raise UserError(f"nothing is known yet of the node of {folder}")
        return dict(node.state)

    def close(self) -> None:
        """End what still runs."""
        living = [node for node in self._nodes.values() if node.is_alive()]
        for node in living:
            node.signal(SIGKILL)
        deadline = time.monotonic() + END_S
        for node in living:
            node.join(max(0.0, deadline - time.monotonic()))


@contextmanager
def ray_swarm(on: str, given: NodeConfig, nodes: int, *, debug: bool = False) -> Iterator[RaySwarm]:
    """Connect to a cluster for `nodes` nodes that are `given` this configuration; nothing of them outlasts the block.

    Raises:
        UserError: Ray is not installed, no cluster answers, or it cannot run such nodes.
    """
    ray = connected(on)
    try:
        swarm = RaySwarm(ray, given, nodes, debug=debug)
        try:
            yield swarm
        finally:
            swarm.close()
    finally:
        ray.shutdown()


class RayNode:
    """A node's process at another machine: `Running` of `child_process`. A thread talks to its actor."""

    def __init__(
        self, ray: Any, place: Callable[[], Any], config: NodeConfig, folder: Path, given: Mapping[str, Any]
    ) -> None:
        self._ray = ray
        self._config = config
        self._folder = folder
        self._given = given
        self._signals: SimpleQueue[Signals] = SimpleQueue()
        self._begun = False
        self._kill_at = math.inf
        self._ending = Ending(EXIT_DEFECT, "this program lost sight of it")
        self.state: Mapping[str, Any] | None = None
        self._reading, self._writing = os.pipe()
        self._actor = place()
        self._thread = Thread(target=self._follow, name=f"ray-{folder.name}", daemon=True)
        self._thread.start()

    @property
    def sentinel(self) -> int:
        """As `Running` has it."""
        return self._reading

    def is_alive(self) -> bool:
        """As `Running` has it."""
        return self._thread.is_alive()

    def signal(self, number: Signals) -> None:
        """As `Running` has it; one that has not begun yet is ended by any signal that does not ask to save."""
        self._signals.put(number)  # which may be interrupted by a signal's handler, as Ray may not

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end, so many seconds at most."""
        self._thread.join(timeout)

    def ending(self) -> Ending:
        """As `Running` has it."""
        self._thread.join()
        os.close(self._reading)
        return self._ending

    def _follow(self) -> None:
        """Give the node what it needs, begin it, and take what comes of it, to its end."""
        try:
            with exclusive(self._folder):
                self._ending = self._run()
        except self._ray.exceptions.RayError as error:
            code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_DEFECT
            self._ending = Ending(code, _reason(self._ray, error))
        except (UserError, OSError) as error:  # this machine's disk
            self._ending = Ending(EXIT_USER_ERROR, str(error))
        finally:
            with suppress(Exception):
                self._ray.kill(self._actor)
            os.close(self._writing)

    def _run(self) -> Ending:
        receiver = MirrorReceiver(self._folder)
        self._wait_for_room(self._actor.place.remote())
        for part in parts_of(self._folder):
            self._get(self._actor.receive.remote([part]))
        tree = self._config.model_dump(mode="json")
        self._get(
            self._actor.begin.remote(tree, self._given["files"], self._given["environment"], self._given["debug"])
        )
        self._begun = True
        while True:
            news = self._get(self._actor.news.remote())
            receiver.put(news.parts)
            if any(isinstance(part, CheckpointEnd) for part in news.parts):
                keep_config(self._config, self._config.seed or 0, self._folder)  # for those who use the checkpoint
            self.state = news.state or self.state
            if news.ending is not None:
                return news.ending

    def _wait_for_room(self, answer: Any) -> None:
        since = time.monotonic()
        while not self._ray.wait([answer], timeout=POLL_S)[0]:
            self._pass_signals()
            if time.monotonic() - since > WAITING_S:
                since = math.inf
                self._say("waiting for a place on the cluster")
        where = self._get(answer)
        self._say("placed on a machine of the cluster", machine=where)

    def _get(self, answer: Any) -> Any:
        """Wait for an answer of the actor, and pass signals on meanwhile."""
        self._pass_signals()
        while not self._ray.wait([answer], timeout=POLL_S)[0]:
            self._pass_signals()
        return self._ray.get(answer)

    def _pass_signals(self) -> None:
        with suppress(Empty):
            while True:
                number = self._signals.get_nowait()
                if self._begun:
                    self._actor.signal.remote(int(number))
                if number == SIGKILL or (not self._begun and number != SIGUSR1):
                    self._kill_at = time.monotonic() + (KILL_S if self._begun else 0.0)
        if time.monotonic() >= self._kill_at:
            self._ray.kill(self._actor)

    def _say(self, event: str, **more: str) -> None:
        """Add a line to the node's log."""
        line = {"event": event, "level": "info", "timestamp": datetime.now(UTC).isoformat(), **more}
        with (self._folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def _reason(ray: Any, error: Exception) -> str:
    """Return in a line why Ray could not do something."""
    if isinstance(error, UserError):  # of the machine there
        return str(getattr(error, "cause", error))
    *_, last = ["", *(line.strip() for line in str(error).splitlines() if line.strip())]
    if isinstance(error, ray.exceptions.RayActorError):
        return f"its machine or its actor died: {last}"
    return last or type(error).__name__


# --- at the machine of a node -------------------------------------------------------------------------


def _settle_there(tree: Mapping[str, Any], files: Mapping[str, bytes], beside: int) -> Fitted:
    """Look at the model and at this machine, for one of `beside` nodes on its GPU or on all of it."""
    with tempfile.TemporaryDirectory(prefix=PREFIX) as temporary:
        given = parse_config(relocated(tree, unpack_files(files, Path(temporary))))
        check_means(given)
        values, reasons = preset_of(given, beside)
        config = fill(given, values)
        check_model(config)
        return Fitted(values, reasons, memory_of(config))


class _NodeActor:
    """A node's process on this machine, for a `RayNode`. Calls come one after another, and none waits for long."""

    def __init__(self, name: str) -> None:
        self._place = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._folder = self._place / name
        make_folder(self._folder)
        self._receiver = MirrorReceiver(self._folder)
        self._child: Started | None = None
        self._sender: MirrorSender | None = None
        self._asked_at = -math.inf

    def place(self) -> str:
        """Return where this is."""
        import ray

        return str(ray.util.get_node_ip_address())

    def receive(self, parts: Sequence[Part]) -> None:
        """Take parts of what the node is to go on from."""
        self._receiver.put(parts)

    def begin(
        self, tree: Mapping[str, Any], files: Mapping[str, bytes], environment: Mapping[str, str], debug: bool
    ) -> None:
        """Start the node, which listens where other machines can dial it."""
        given = parse_config(relocated(tree, unpack_files(files, self._place)))
        address = self.place()
        host = f"tcp://[{address}]:0" if ":" in address else f"tcp://{address}:0"
        config = given.model_copy(
            update={
                "network": given.network.model_copy(update={"listen": host, "local": "off"}),
                "weights": given.weights.model_copy(update={"listen": host}),
            }
        )
        self._sender = MirrorSender(self._folder, self._place / "sending")
        self._child = start_child(
            start_server(), run_real_node, config, self._folder, environment=environment, debug=debug
        )
        self._observed = config.network.enabled and bool(config.observe.enabled)

    def news(self) -> News:
        """Return what is new, after a moment where nothing is; the node's folder is gone after its ending was told."""
        assert self._child is not None and self._sender is not None
        ended = not self._child.is_alive()
        parts = self._sender.take()  # after the look at the process, so that its last rows are among them
        if ended and not parts:
            ending = self._child.ending()
            self._sender.close()
            shutil.rmtree(self._place, ignore_errors=True)
            return News((), None, ending)
        if not parts:
            time.sleep(POLL_S)
        return News(parts, self._state())

    def signal(self, number: int) -> None:
        """Send the node a signal."""
        if self._child is not None:
            self._child.signal(Signals(number))

    def _state(self) -> Mapping[str, Any] | None:
        if not self._observed or time.monotonic() - self._asked_at < ASK_S:
            return None
        self._asked_at = time.monotonic()
        with suppress(UserError):  # it starts, ends or is busy
            return ask(self._folder, PATIENCE_S)
        return None
