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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.fetch_smollm2 import DEFAULT_FOLDER, fetch
from node.config import parse_config
from node.errors import UserError
from node.fleet.report import ALONE, write_report
from node.training.budget import is_done, spent_by

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
    """Yield a line for each of both runs: what it generated, and what it scored in the end."""
    for name, folder in (("swarm", swarm), (ALONE, alone)):
        summary = json.loads((folder / "summary.json").read_text())["swarm"]
        yield (
            f"{name:6} generated {summary['tokens_generated']} tokens, trained on {summary['tokens_trained']}: "
            f"greedy {summary['accuracy_first']:.2f} to {summary['accuracy_last']:.2f}, "
            f"pass@8 {summary['pass8_first']:.2f} to {summary['pass8_last']:.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
