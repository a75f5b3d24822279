"""Run a swarm of fake nodes as a process of its own: `python -m tests.fakes.run_swarm OUT NODES ROUNDS KIND`."""

import sys
import time
from pathlib import Path

from rich.console import Console

from node.config import NodeConfig
from node.fleet.live_table import progress_lines
from node.fleet.local_swarm import make_plan, run_swarm
from tests.fakes import nodes


def main() -> int:
    out, count, rounds, kind = sys.argv[1:]
    plan = make_plan(Path(out), int(count), NodeConfig(seed=1, rounds=int(rounds)))
    target, preload = getattr(nodes, kind), ["node.fleet.child_process", "node.telemetry.metrics_file"]
    with progress_lines(Console(), every=0.5) as show:
        outcome = run_swarm(plan, show, started=time.time(), target=target, preload=preload, restart_delay=0.05)
    return 128 + outcome.signal if outcome.signal else 0


if __name__ == "__main__":
    sys.exit(main())
