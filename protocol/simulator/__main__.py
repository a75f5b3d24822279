"""`python -m protocol.simulator`: a swarm through a scenario, checked.

Standard output is the same to the byte for the same arguments. Progress and cost go to standard error. Exit status 1:
an invariant does not hold.
"""

import argparse
import gc
import math
import resource
import sys
import time
from dataclasses import replace

import structlog

from protocol.limits.timing import PRESETS
from protocol.simulator.matrices import MATRICES
from protocol.simulator.scenarios import SCENARIOS, judge
from protocol.simulator.trial import LIMITS, SwarmPlan, SwarmTrial
from protocol.transport.memory import Conditions
from protocol.wire.envelope import Kind

# The networks that the presets are meant for. `wan` has four regions that are 100 ms apart.
CONDITIONS = {
    "local": Conditions(min_delay=0.001, max_delay=0.01),
    "lan": Conditions(min_delay=0.002, max_delay=0.02),
    "wan": Conditions(min_delay=0.005, max_delay=0.05, regions=4, far_delay=0.1),
}

NODES = 1000
FEWEST = 24  # nodes where a fifth is hostile: fewer do not have `VICTIMS` victims and as many others


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = _parse(arguments)
    if options.list:
        whats = {name: scenario.what for name, scenario in SCENARIOS.items()} | {
            name: matrix.what for name, matrix in MATRICES.items()
        }
        for name, what in whats.items():
            print(f"{name:18} {what}")
        return 0
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    if options.scenario in MATRICES:
        return _matrix(options)
    scenario, nodes = SCENARIOS[options.scenario], options.nodes or NODES
    plan = scenario.adapt(
        SwarmPlan(
            nodes=nodes,
            seed=options.seed,
            faults_s=60.0 * options.minutes,
            timing=PRESETS[options.timing],
            conditions=replace(CONDITIONS[options.timing], line=options.line * 1000 or math.inf),
            limits=replace(LIMITS, max_known_peers=options.book),
            publishers=options.publishers,
        )
    )
    if plan.hostile and plan.nodes < FEWEST:
        print(f"error: --scenario {options.scenario} wants --nodes {FEWEST} or more", file=sys.stderr)
        return 2
    print(f"{options.scenario}: {scenario.what}")
    print(f"{plan.nodes} nodes, {plan.faults_s:.0f} s of it, {options.timing} timing, seed {plan.seed}", flush=True)
    gc.disable()  # of millions of objects hardly any is in a cycle; to look for these takes a third of the time
    trial = SwarmTrial(plan, _progress)
    failed = 0
    for check in judge(trial, scenario):
        failed += not check.holds
        print(check, flush=True)
    sent = trial.simulation.frames_sent
    print("sent: " + ", ".join(f"{sent[kind]} {kind.name.lower()}" for kind in Kind if sent[kind]))
    print("refused: " + (", ".join(f"{count} {reason}" for reason, count in trial.rejected().items()) or "nothing"))
    print(f"trace {trial.simulation.trace_hash} at t = {trial.simulation.network.now:.2f} s")
    if failed:
        print(
            f"{failed} invariants do not hold; once more: python -m protocol.simulator --nodes {nodes}"
            f" --seed {options.seed} --scenario {options.scenario} --minutes {options.minutes}"
            f" --timing {options.timing} --publishers {options.publishers}"
            f" --book {options.book} --line {options.line}"
        )
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _progress(f"{usage.ru_utime + usage.ru_stime:.1f} s of CPU, {usage.ru_maxrss / 1024:.0f} MiB")
    return 1 if failed else 0


def _matrix(options: argparse.Namespace) -> int:
    matrix = MATRICES[options.scenario]
    rows = [row for row in matrix.rows if options.nodes in (None, row.nodes)]
    if not rows:
        sizes = ", ".join(str(size) for size in sorted({row.nodes for row in matrix.rows}))
        print(
            f"error: --scenario {options.scenario} has rows of {sizes} nodes, and all without --nodes", file=sys.stderr
        )
        return 2
    failed = 0
    for row in rows:
        for check in matrix.checks(options.seed, row, 60.0 * options.minutes):
            failed += not check.holds
            print(check, flush=True)
            _progress("")
    return 1 if failed else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m protocol.simulator",
        description="Put a simulated swarm through a scenario and check what must hold.",
        epilog="example: python -m protocol.simulator --nodes 1000 --seed 7 --scenario kill",
    )
    parser.add_argument(
        "--nodes", type=_count, help=f"how many (default {NODES}); of a matrix only its rows of so many (default all)"
    )
    parser.add_argument("--seed", type=int, default=1, help="what all chance is drawn from (default 1)")
    parser.add_argument(
        "--scenario", choices=[*SCENARIOS, *MATRICES], default="steady", help="what happens (default steady)"
    )
    parser.add_argument("--minutes", type=_minutes, default=1.0, help="how long, in virtual time (default 1)")
    parser.add_argument("--timing", choices=PRESETS, default="lan", help="preset and network (default lan)")
    parser.add_argument("--publishers", type=_count, default=50, help="how many publish afterwards (default 50)")
    parser.add_argument("--book", type=_count, default=512, help="how many records a node keeps (default 512)")
    parser.add_argument("--line", type=int, default=0, help="kB a second of each node's line (default 0: no limit)")
    parser.add_argument("--list", action="store_true", help="list the scenarios and exit")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes <= 24 * 60:
        raise argparse.ArgumentTypeError("must be more than 0, and a day at most")
    return minutes


def _progress(text: str) -> None:
    print(f"  [{time.process_time():6.1f} s of CPU] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
