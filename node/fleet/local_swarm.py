"""A swarm on this machine: N real node processes on loopback, in one run folder.

    swarm.json    what runs: the swarm's id, the number of nodes, the seed, the configuration
    summary.json  what ran, when, and what came of it    report.html   the same as plots
    nodes/<name>  the nodes' state folders

The swarm's id is drawn at random for each run, so that nodes of different runs never
talk to each other; it is kept, so that a run that goes on is the same swarm.
"""

import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from node.config import NodeConfig, flatten, parse_config
from node.errors import UserError, for_shell
from node.fleet.child_process import HEAVY, Started, Target, run_real_node, start_child, start_server
from node.fleet.report import write_report
from node.fleet.supervisor import (
    RESTART_DELAY,
    Away,
    NodeProcess,
    NodeState,
    Start,
    Supervisor,
    ask_to_save,
    nobody,
    supervise,
)
from node.policy.detection import NODES_ON_GPU, visible_gpus
from node.processes.machine import usable_cores
from node.processes.signals import save_signal, stop_signals
from node.state_folder import make_folder
from node.swarm.peering import agent
from node.tasks import derive_seed
from node.telemetry.evaluations import EVALUATIONS_FILE
from node.telemetry.metrics_file import read_metrics
from node.telemetry.summary import Summary, summarise, write_summary
from protocol.storage import write_atomically

FORMAT = 1
LOOPBACK = "tcp://127.0.0.1:0"

RECORD = ("format", "swarm", "nodes", "seed", "config")  # what every swarm.json says
ENDS = ("rounds", "budget")  # the keys that say when a run is done

NOTHING: Mapping[str, object] = {}

Show = Callable[[Sequence[NodeProcess]], object]


class PlanPart(NamedTuple):
    """Nodes of a run that are alike: how many, and their configuration."""

    nodes: int
    config: NodeConfig


NO_PARTS: Mapping[str, PlanPart] = {}


class RunPlan(NamedTuple):
    """A run: what swarm.json says, and where it is.

    Where not all nodes are alike, it has parts, in their order. `also` is what else its records are to say of it.
    """

    out: Path
    swarm: str
    nodes: int
    seed: int
    config: NodeConfig
    parts: Mapping[str, PlanPart] = NO_PARTS
    also: Mapping[str, Any] = NOTHING

    def config_of(self, index: int) -> NodeConfig:
        """Return the configuration that node `index` goes by."""
        for part in self.parts.values():
            if index < part.nodes:
                return part.config
            index -= part.nodes
        return self.config


class Machines(NamedTuple):
    """Where the nodes of a run are started: how many processors there are, by what, and how soon after a death."""

    cores: int
    start: Start
    restart_delay: float  # seconds before the first restart


class RunOutcome(NamedTuple):
    """How a run ended: its summary, the nodes as they were left, the signal that ended it or 0."""

    summary: Summary
    children: Sequence[NodeProcess]
    signal: int


def make_plan(
    out: Path,
    nodes: int,
    config: NodeConfig,
    parts: Mapping[str, PlanPart] = NO_PARTS,
    also: Mapping[str, Any] = NOTHING,
) -> RunPlan:
    """Return the run of `config` in `out`: the one that is there already, or a new one. The rest is as in `RunPlan`.

    One that is there goes on with the same settings, but for its end, which may be further off. One of which no
    node has finished a round may be anything: it takes up what it is given now. Nothing is written.

    Raises:
        UserError: `out` holds something else.
    """
    record = out / "swarm.json"
    if not record.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and is no run of a swarm: choose another --out")
        seed = config.seed if config.seed is not None else secrets.randbits(31)
        return RunPlan(out, secrets.token_hex(16), nodes, seed, config.model_copy(update={"seed": seed}), parts, also)
    try:
        recorded = json.loads(record.read_text())
        swarm, seed = str(recorded["swarm"]), int(recorded["seed"])
        before = {"nodes": recorded["nodes"], **_with_defaults(recorded["config"])}
        before |= {key: value for key, value in recorded.items() if key not in RECORD}
        for part in before.get("parts", {}).values():
            part["config"] = _with_defaults(part["config"])
    except UserError as error:
        raise UserError(
            f"{record} is of another version ({error}): choose another --out, or go on with its nodes one by one: "
            f"gossamer node --state {for_shell(out / 'nodes' / 'n0')}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{record} cannot be read: choose another --out") from None
    resumed = config.model_copy(update={"seed": seed if config.seed is None else config.seed})
    now = {"nodes": nodes, **resumed.model_dump(mode="json"), **_more(parts, also)}
    if _ends_later(before, now):
        before |= {key: now[key] for key in ENDS}
    if (changed := _changed(before, now)) and _has_rounds(out):
        raise UserError(
            f"{out} holds a run with other settings ({', '.join(changed)}): repeat them, or choose another --out"
        )
    return RunPlan(out, swarm, nodes, resumed.seed or 0, resumed, parts, also)


def _with_defaults(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration with the settings that there were not yet when it was written."""
    return parse_config(recorded).model_dump(mode="json")


def _more(parts: Mapping[str, PlanPart], also: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of swarm.json that most runs lack: parts, and what `also` says."""
    tree = {name: {"nodes": part.nodes, "config": part.config.model_dump(mode="json")} for name, part in parts.items()}
    return {"parts": tree, **also} if tree else dict(also)


def node_folders(plan: RunPlan) -> dict[str, Path]:
    """Return the nodes' folders by their names."""
    return {f"n{index}": plan.out / "nodes" / f"n{index}" for index in range(plan.nodes)}


def make_folders(plan: RunPlan) -> None:
    """Make the folders of the run and of its nodes; `UserError` where that cannot be."""
    try:
        (plan.out / "nodes").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {plan.out} as a run's folder: {error.strerror}: name another with --out") from None
    for folder in node_folders(plan).values():
        make_folder(folder)


def node_config(plan: RunPlan, index: int, cores: int) -> NodeConfig:
    """Return the configuration of node `index`: a seed of its own, its part of the cores, loopback only.

    Of nodes that are alike the first alone is evaluated at marks: their curves are alike.
    """
    config = plan.config_of(index)
    alone = {"listen": LOOPBACK, "advertise": [], "seeds": [], "swarm": plan.swarm}
    network = config.network.model_copy(update=alone)
    weights = config.weights.model_copy(update={"listen": LOOPBACK})
    observe = config.observe.model_copy(update={"host": "127.0.0.1", "port": 0})  # the page is the swarm's
    changes: dict[str, Any] = {
        "seed": derive_seed(plan.seed, "node", index),
        "network": network,
        "weights": weights,
        "observe": observe,
    }
    if config.eval.every == "marks" and index and plan.config_of(index - 1) is config:
        changes["eval"] = config.eval.model_copy(update={"every": "ends"})
    if config.threads == 0:
        changes["threads"] = max(1, cores // plan.nodes)
    return config.model_copy(update=changes)


def gpu_of(plan: RunPlan, index: int) -> dict[str, str]:
    """Return what in its environment lets node `index` see one GPU of several, and know how many nodes are on it."""
    gpus = visible_gpus(plan.config_of(index).policy)
    if not gpus:
        return {}
    seen = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if len(gpus) > 1 else {}
    return {NODES_ON_GPU: str(math.ceil(plan.nodes / len(gpus))), **seen}


def gpus_of(plan: RunPlan) -> str:
    """Return a line that says which node trains on which GPU, and how one is shared; empty where none is used."""
    nodes: dict[str, list[str]] = {}
    for index, name in enumerate(node_folders(plan)):
        if gpus := visible_gpus(plan.config_of(index).policy):
            nodes.setdefault(gpus[index % len(gpus)], []).append(name)
    if not nodes:
        return ""
    line = "GPUs: " + "; ".join(f"{gpu} for {', '.join(names)}" for gpu, names in nodes.items())
    most = max(map(len, nodes.values()))
    if most == 1:
        return line
    return f"{line} (nodes on one GPU take turns at it; presets give each 1/{most} of its memory)"


def run_swarm(  # noqa: PLR0913  # each is one thing that the laboratory, a cluster or tests have otherwise
    plan: RunPlan,
    show: Show,
    *,
    started: float,
    debug: bool = False,
    target: Target = run_real_node,
    preload: Sequence[str] = HEAVY,
    restart_delay: float = RESTART_DELAY,
    machines: Machines | None = None,
    away: Away = nobody,
) -> RunOutcome:
    """Run `plan` to its end, or until a signal to stop; leave summary and report. SIGUSR1 is passed on to the nodes.

    Args:
        plan: from `make_plan`.
        show: called a few times a second with the nodes, to display them.
        started: when the command was given, Unix seconds.
        debug: log debug events too.
        target: what a node process runs.
        preload: modules that the fork server imports once for all nodes.
        restart_delay: seconds before the first restart of a node that died.
        machines: where nodes are started; None for processes of this machine, as the three above say.
        away: asked at every look at the nodes for the names of those that are to be away: killed, and started later.
    """
    children: list[NodeProcess] = []
    with stop_signals() as received, save_signal(lambda: ask_to_save(children)):
        where = machines or _this_machine(target, preload, restart_delay, debug=debug)
        make_folders(plan)
        children += [
            NodeProcess.create(folder, node_config(plan, index, where.cores), {} if machines else gpu_of(plan, index))
            for index, folder in enumerate(node_folders(plan).values())
        ]
        record_plan(plan)
        supervise(Supervisor(where.start, where.restart_delay, away), children, lambda: len(received), show)
        _raise_common_error(children)
        summary = write_run_summary(plan, started)
        write_report(plan.out)
        return RunOutcome(summary, children, received[0] if received else 0)


def _this_machine(target: Target, preload: Sequence[str], restart_delay: float, *, debug: bool) -> Machines:
    context = start_server(preload)

    def start(config: NodeConfig, folder: Path, environment: Mapping[str, str]) -> Started:
        return start_child(context, target, config, folder, environment=environment, debug=debug)

    return Machines(usable_cores(), start, restart_delay)


def write_run_summary(plan: RunPlan, started: float, **also: object) -> Summary:
    """Write `summary.json` of what the nodes of `plan` have left, and return it.

    `started` is as in `run_swarm`; `also` is to be said of the run too.
    """
    folders = node_folders(plan)
    rows = {name: read_metrics(folder / "metrics.jsonl") for name, folder in folders.items()}
    evaluated = {name: read_metrics(folder / EVALUATIONS_FILE) for name, folder in folders.items()}
    summary = {"run": _run(plan, started) | also, **summarise(rows, evaluated, started)}
    write_summary(summary, plan.out / "summary.json")
    return summary


def _run(plan: RunPlan, started: float) -> dict[str, Any]:
    """Return what ran and when, for those who compare runs: times in UTC, every setting, who made the program."""
    times = {"started": started, "ended": time.time()}
    return {
        "agent": agent(),
        **{name: datetime.fromtimestamp(value, UTC).isoformat(timespec="seconds") for name, value in times.items()},
        "swarm": plan.swarm,
        "nodes": plan.nodes,
        "seed": plan.seed,
        "config": plan.config.model_dump(mode="json"),
        **_more(plan.parts, plan.also),
    }


def _has_rounds(out: Path) -> bool:
    return any(read_metrics(path, ["round"]) for path in out.glob("nodes/*/metrics.jsonl"))


def _ends_later(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Tell whether no end of a run is nearer in the configuration `now`; None is the furthest."""
    old, new = (flatten({key: config.get(key) for key in ENDS}) for config in (before, now))
    return all(value is None or (old.get(key) is not None and value >= old[key]) for key, value in new.items())


def record_plan(plan: RunPlan) -> None:
    """Write `swarm.json`."""
    record = {
        "format": FORMAT,
        "swarm": plan.swarm,
        "nodes": plan.nodes,
        "seed": plan.seed,
        "config": plan.config.model_dump(mode="json"),
        **_more(plan.parts, plan.also),
    }
    write_atomically(plan.out / "swarm.json", (json.dumps(record, indent=1) + "\n").encode())


def _changed(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys whose values differ, in the order of `now`."""
    changed = []
    for key in dict.fromkeys([*now, *before]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += _changed(old, new, f"{prefix}{key}.")
        elif old != new:
            changed.append(prefix + key)
    return changed


def _raise_common_error(children: Sequence[NodeProcess]) -> None:
    """When no node ever ran a round and all give one reason, that reason is what the person needs."""
    reasons = {child.error for child in children}
    if len(reasons) == 1 and all(child.state is NodeState.FAILED and not child.progress.points for child in children):
        raise UserError(f"no node could start: {reasons.pop()} (see {children[0].folder / 'log.jsonl'})")
