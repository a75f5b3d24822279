"""One run in a process of its own: `python -m node.lab RUNNER CONFIG -n N --seed S --out FOLDER`.

If nodes differ, each kind has a `--part NAME NODES CONFIG`, in place of CONFIG and N.

It ends when its standard input does. That is a pipe from the laboratory, so kill -9 there leaves nothing behind.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from node.config import NodeConfig, is_set, load_config
from node.errors import NonFiniteError, UserError, one_line
from node.fleet.local_swarm import PlanPart, RunPlan, make_plan
from node.lab.controls import CONTROLS
from node.lab.plan import AttackConfig, ChurnConfig
from node.operations.presets import with_preset


def main() -> int:
    """Do the run; what a person can correct is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m node.lab", description="Do one run of an experiment.")
    parser.add_argument("runner", choices=["memory", "processes"])
    parser.add_argument("config", type=Path)
    parser.add_argument("-n", "--nodes", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--delay", type=int, default=0)
    parser.add_argument("--moments", default="kept")
    parser.add_argument("--tempo", type=json.loads, default={}, help="pace and begins of each node")
    parser.add_argument("--attack", type=AttackConfig.model_validate_json)
    parser.add_argument("--churn", type=ChurnConfig.model_validate_json)
    parser.add_argument("--control", choices=list(CONTROLS))
    parser.add_argument("--part", nargs=3, action="append", default=[], metavar=("NAME", "NODES", "CONFIG"))
    options = parser.parse_args()
    began = time.time()
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        if options.runner == "memory" and (options.out / "swarm.json").exists():
            shutil.rmtree(options.out)  # of a run that was cut off
        plan = _plan(options)
        if options.runner == "processes":
            return _in_processes(plan, options.churn, began)
        return _in_memory(plan, options, began)
    except UserError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 2


def _plan(options: argparse.Namespace) -> RunPlan:
    def settled(path: Path) -> NodeConfig:
        config = load_config(path, changes := [f"seed={options.seed}"])
        if options.runner == "memory" and not is_set(config, "policy.lora.r"):
            config = load_config(path, [*changes, "policy.lora.r=0"])  # not by this machine's memory
        return with_preset(config, options.nodes)[0]

    parts = {name: PlanPart(int(nodes), settled(Path(config))) for name, nodes, config in options.part}
    first = next(iter(parts.values())).config if parts else settled(options.config)
    also = {"churn": options.churn.model_dump()} if options.churn else {}
    return make_plan(options.out, options.nodes, first, parts, also)


def _in_memory(plan: RunPlan, options: argparse.Namespace, began: float) -> int:
    from node.lab.lockstep import run_in_memory

    try:
        run_in_memory(
            plan,
            options.delay,
            started=began,
            attack=options.attack,
            tempo=options.tempo,
            moments=options.moments,
            churn=options.churn,
            control=options.control,
        )
    except NonFiniteError:
        raise UserError("training diverged: a policy's logits are not finite: lower trainer.learning_rate") from None
    return 0


def _in_processes(plan: RunPlan, churn: ChurnConfig | None, began: float) -> int:
    from node.fleet.local_swarm import make_folders, run_swarm
    from node.fleet.supervisor import NodeState, nobody
    from node.lab.churn import attendance

    make_folders(plan)
    away = attendance(churn, plan.seed, plan.nodes).among if churn else nobody
    outcome = run_swarm(plan, lambda nodes: None, started=began, away=away)
    failed = [child for child in outcome.children if child.state is NodeState.FAILED]
    for child in failed:
        sys.stderr.write(f"error: {child.name} failed: {child.error}\n")
    return 128 + outcome.signal if outcome.signal else int(bool(failed))


def _end_with_input() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
