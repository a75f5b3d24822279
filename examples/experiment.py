"""Does sharing pay? The paper's four arms, two baselines of equal generation and one of replay, on real processes.

    python examples/experiment.py                  8 nodes, 300 rounds, 5 seeds, 7 arms
    python examples/experiment.py --arms 8/0 4/4 --seeds 1 --rounds 50

An arm I/J trains each round on I own and J external groups; "4/4 q8" makes 8 questions a
round, as many completions as 8/0, "4/0" makes as many as 4/4, and "4/4 self" replays its own earlier groups
where 4/4 trains on its peers'. Runs are done one at a
time; one that is complete is not done again, one that was cut off goes on. The results go
to docs/results/: a table, a CSV file and a plot.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.experiment_analysis import Run, plot, read_run, tabulate, to_markdown

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "examples" / "experiment.toml"


@dataclass(frozen=True)
class Arm:
    """One setting of the swarm."""

    local: int
    external: int
    questions: int
    note: str
    source: str = "peers"


ARMS = {
    "8/0": Arm(8, 0, 8, "alone"),
    "6/2": Arm(6, 2, 6, ""),
    "4/4": Arm(4, 4, 4, "the paper's best"),
    "2/6": Arm(2, 6, 2, ""),
    "4/0": Arm(4, 0, 4, "alone, as many completions as 4/4"),
    "4/4 q8": Arm(4, 4, 8, "as many completions as 8/0"),
    "4/4 self": Arm(4, 4, 4, "own past groups, no network", source="self"),
}


def main() -> int:
    """Run what is missing, then write the results of what is there."""
    options = _options()
    todo = [(arm, seed) for seed in range(1, options.seeds + 1) for arm in options.arms]
    began = time.monotonic()
    for number, (arm, seed) in enumerate(todo, 1):
        folder = options.out / f"{arm.replace('/', '-').replace(' ', '-')}-seed{seed}"
        print(
            f"[{number}/{len(todo)}] {arm}, seed {seed}: {folder} ({time.monotonic() - began:.0f} s so far)", flush=True
        )
        if not _is_complete(folder, options) and (status := _run(ARMS[arm], seed, folder, options)) != 0:
            print(f"the run ended with status {status}: see {folder}/nodes/n0/log.jsonl", file=sys.stderr)
            return 1
    runs = [
        read_run(options.out / f"{arm.replace('/', '-').replace(' ', '-')}-seed{seed}", arm, seed)
        for arm in options.arms
        for seed in range(1, options.seeds + 1)
    ]
    _write(runs, options.results)
    print((options.results / "experiment.md").read_text())
    print(f"written to {options.results}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare arms of own and external groups.")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 11), metavar="1..10")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "experiment", help="run folders")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    return parser.parse_args()


def _is_complete(folder: Path, options: argparse.Namespace) -> bool:
    try:
        nodes = json.loads((folder / "summary.json").read_text())["nodes"]
    except FileNotFoundError:
        return False
    return len(nodes) == options.nodes and all(node["rounds"] == options.rounds for node in nodes.values())


def _run(arm: Arm, seed: int, folder: Path, options: argparse.Namespace) -> int:
    settings = {
        "sampling.local": arm.local,
        "sampling.external": arm.external,
        "sampling.questions": arm.questions,
        "sampling.source": arm.source,
    }
    if arm.source == "self":
        settings["network.enabled"] = "false"
    command = [sys.executable, "-c", "import sys; from node.cli import main; sys.exit(main())", "swarm", str(CONFIG)]
    command += ["-n", str(options.nodes), "--rounds", str(options.rounds), "--seed", str(seed), "--out", str(folder)]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode


def _write(runs: list[Run], results: Path) -> None:
    results.mkdir(parents=True, exist_ok=True)
    fields = ["arm", "seed", "cumulative", "first", "last", "external", "kib_sent"]
    with (results / "experiment.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        writer.writerows(
            [value if isinstance(value, (str, int)) else round(value, 4) for value in (getattr(run, f) for f in fields)]
            for run in runs
        )
    table = to_markdown(tabulate(runs), {name: arm.note for name, arm in ARMS.items()})
    (results / "experiment.md").write_text(table)
    plot(runs, results / "experiment.svg")


if __name__ == "__main__":
    sys.exit(main())
