"""A real model learns: a swarm, and beside it one node alone that may spend as much as each of the swarm's.

    make real                                                  SmolLM2-135M, two nodes, under ten minutes on two cores
    python examples/real.py --seed 2 --nodes 4 --out runs/real-2

    OUT          the swarm                 OUT/alone    the control: no network, nothing to draw but its own

Both are ordinary run folders with a summary.json and a report.html; the swarm's report compares them. A run that is
complete is not done again, one that was cut off goes on.
"""

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.fetch_smollm2 import DEFAULT_FOLDER, fetch
from node.config import parse_config
from node.errors import UserError
from node.fleet.report import ALONE, write_report
from node.training.budget import is_done, spent_by

SWARM = "swarm"
ROOT = Path(__file__).resolve().parents[1]
WITHOUT_PEERS = {"network.enabled": "false", "sampling.external": "0"}


def main() -> int:
    """Run what is missing, and end with what came of both."""
    options = _options()
    try:
        fetch(DEFAULT_FOLDER, "float32")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for folder, nodes, settings in ((options.out, options.nodes, {}), (options.out / ALONE, 1, WITHOUT_PEERS)):
        print(f"\n{folder}: {nodes} node{'s' if nodes > 1 else ''}", flush=True)
        if not _is_complete(folder) and (status := _run(options, folder, nodes, settings)) != 0:
            return status
    write_report(options.out)
    for line in _comparison(options.out, options.out / ALONE):
        print(line)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a swarm on a real model, and one node alone as its control.")
    parser.add_argument("config", nargs="?", type=Path, default=ROOT / "examples" / "real.toml")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="of each node; default: CONFIG's")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=_new_folder())
    return parser.parse_args()


def _new_folder() -> Path:
    return Path("runs") / datetime.datetime.now().astimezone().strftime("real-%Y%m%d-%H%M%S")


def _is_complete(folder: Path) -> bool:
    """Tell whether a run is there that has come to its end by its own settings."""
    try:
        config = parse_config(json.loads((folder / "swarm.json").read_text())["config"])
        nodes = json.loads((folder / "summary.json").read_text())["nodes"].values()
    except FileNotFoundError:
        return False
    return all(is_done(config, node["rounds"], spent_by(node)) for node in nodes)


def _run(options: argparse.Namespace, folder: Path, nodes: int, settings: dict[str, str]) -> int:
    command = [sys.executable, "-c", "import sys; from node.cli import main; sys.exit(main())", "swarm"]
    command += [str(options.config), "-n", str(nodes), "--seed", str(options.seed), "--out", str(folder)]
    command += ["--rounds", str(options.rounds)] if options.rounds else []
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode


def _comparison(swarm: Path, alone: Path) -> Iterator[str]:
    """Yield what the model scored before it was trained, and after each of both runs, with what these cost."""
    summaries = {
        name: json.loads((folder / "summary.json").read_text()) for name, folder in ((SWARM, swarm), (ALONE, alone))
    }
    yield "greedy accuracy on held-out questions (95 % intervals, which count questions, not runs)"
    yield f"  untrained  {_rate(summaries[SWARM], 'first')}"
    for name, summary in summaries.items():
        tokens = summary["swarm"]
        yield (
            f"  {name:9}  {_rate(summary, 'last')}  "
            f"a node generated {tokens['tokens_generated'] // len(summary['nodes'])} tokens, and trained on "
            f"{tokens['tokens_trained'] // len(summary['nodes'])}"
        )


def _rate(summary: dict[str, Any], when: str) -> str:
    low, high = summary["swarm"][f"accuracy_{when}_interval"]
    return f"{summary['swarm'][f'accuracy_{when}']:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    sys.exit(main())
