"""Does an archive help the next base? Runs the plan in examples/archive.toml, which says what is compared and claimed.

    python examples/archive_bar.py --results docs/results

    OUT/makers    n0, n1, ...: a swarm, and its archive        OUT/SEED/ARM    a node, or a model of SFT

What is there already is not run again. The table is printed; `--results` keeps its figures, too.
"""

import argparse
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from node.config import flatten, merge
from node.lab.statistics import estimate
from node.telemetry.evaluations import EVALUATIONS_FILE
from node.telemetry.metrics_file import iter_with_older
from node.training.budget import TRAINED_COST, spent_in

ROOT = Path(__file__).resolve().parents[1]
PLAN = ROOT / "examples" / "archive.toml"
WAIT_S = 120.0  # for a process to be ready
ALONE = {"network": {"enabled": False}}
LISTENS = {"network": {"listen": "tcp://127.0.0.1:0"}}
ROUNDS = {
    "archive": {"local": 2, "external": 16},
    "alone, half": {"local": 2, "external": 0},
    "alone": {"local": 2, "external": 0},
    "alone, 8": {"local": 8, "external": 0},
}
HALVES = ("archive", "alone, half")


class Figures(NamedTuple):
    """What a run came to: shares of held-out questions, groups that others had made, and its compute."""

    accuracy: float
    pass1: float
    others_groups: int
    compute: int


def main() -> None:
    """Run what the plan says."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("runs/archive"))
    parser.add_argument("--results", type=Path, help="folder for archive.json")
    given = parser.parse_args()
    out = given.out.absolute()
    plan = tomllib.loads(PLAN.read_text())
    rows = out / "export" / "rows.jsonl"
    makers = make_archive(plan, out / "makers")
    if not rows.exists():
        gossamer("archive", "export", out / "makers" / "archive", "--out", rows, "--plain")
    fresh = merged(plan["settings"], plan["fresh_settings"])
    half = fresh["budget"]["compute"] // 2
    runs: dict[str, list[Figures]] = {}
    for seed in plan["seeds"]:
        for arm, sampling in ROUNDS.items():
            budget = {"budget": {"compute": half}} if arm in HALVES else {}
            more = ["--backfill", out / "makers" / "archive"] if arm == "archive" else []
            settings = merged(fresh, ALONE, budget, {"sampling": sampling})
            runs.setdefault(arm, []).append(run_node(out / str(seed) / arm, settings, seed, more))
        for rate in plan["rates"]:
            folder = out / str(seed) / f"sft-{rate:g}"
            runs.setdefault(f"SFT, rate {rate:g}", []).append(tune(fresh, rows, folder, seed, rate, half))
    start = score(ROOT / fresh["policy"]["model"], fresh)
    print_table(runs, "archive", start)
    groups, right = count_rows(rows)
    told = {"makers": makers, "archived_groups": groups, "right_rows": right, "start": start._asdict()}
    print(json.dumps(told))
    if given.results:
        told["arms"] = {arm: [figures._asdict() for figures in figured] for arm, figured in runs.items()}
        (given.results / "archive.json").write_text(json.dumps(told, indent=1) + "\n")


@contextmanager
def archived_swarm(folder: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """A swarm of a relay and an archive, in a new `folder`, for a block; yield the file of an invite to it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    hub, invite = folder / "hub", folder / "invite.txt"
    gossamer("found", "bar", "--archive", *found_words(merged(settings, LISTENS)), "--state", hub, "--no-start")
    relays = [begin("node", "--state", hub, "--seed-only", log=folder / "hub.log")]
    try:
        wait_for((hub / "address").exists, "the swarm's first node")
        invite.write_text(gossamer("invite", hub))
        words = ("--out", folder / "archive", "--state", folder / "keeper")
        relays.append(begin("archive", "run", f"@{invite}", *words, log=folder / "keeper.log"))
        wait_for((folder / "archive").exists, "the archive")
        yield invite
        time.sleep(3)  # the keeper scores what came last
    finally:
        for relay in relays:
            relay.send_signal(signal.SIGINT)
            relay.wait()


def make_archive(plan: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """Run the makers with a relay that archives; return their tokens."""
    settings = merged(plan["settings"], plan["makers_settings"])
    nodes = [folder / f"n{number}" for number in range(plan["makers"])]
    if not (folder / "done").exists():
        with archived_swarm(folder, settings) as invite:
            changes = set_words(without_tasks(merged(settings, LISTENS)))
            for number, node in enumerate(nodes):
                gossamer("join", f"@{invite}", "--state", node, *changes, "--seed", number + 1, "--no-start")
            running = [begin("node", "--state", node, log=folder / f"{node.name}.log") for node in nodes]
            for process in running:
                process.wait()
        (folder / "done").touch()
    spent = [spent_in(iter_with_older(node / "metrics.jsonl")) for node in nodes]
    return {
        "compute": sum(total.compute for total in spent),
        "generated": sum(total.generated for total in spent),
        "trained": sum(total.trained for total in spent),
    }


def run_node(folder: Path, settings: Mapping[str, Any], seed: int, more: Sequence[Path | str] = ()) -> Figures:
    """Run a node to its end, unless it has ended; return what it came to."""
    done = folder / "figures.json"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        gossamer("node", "--state", folder, "--seed", seed, *set_words(settings), *more)
        done.write_text(json.dumps(figures_of(folder)._asdict()))
    return Figures(**json.loads(done.read_text()))


def figures_of(node: Path) -> Figures:
    """Return what a node that has ended came to."""
    last = json.loads((node / EVALUATIONS_FILE).read_text().splitlines()[-1])
    metrics = list(iter_with_older(node / "metrics.jsonl"))
    others = sum(row.get("groups_archived", 0) + row.get("groups_external", 0) for row in metrics)
    return Figures(last["accuracy"], last["pass@1"], others, spent_in(metrics).compute)


def tune(  # each is a thing of its own
    settings: Mapping[str, Any], rows: Path, folder: Path, seed: int, rate: float, compute: int
) -> Figures:
    """Train the base on an export's right answers by TRL's SFTTrainer, until `compute` is spent."""
    done = folder / "figures.json"
    if not done.exists():
        spent = sft(ROOT / settings["policy"]["model"], rows, folder / "model", seed, rate, compute)
        figures = score(folder / "model", settings)._replace(compute=spent, others_groups=count_rows(rows)[0])
        done.write_text(json.dumps(figures._asdict()))
    return Figures(**json.loads(done.read_text()))


def sft(model: Path, rows: Path, folder: Path, seed: int, rate: float, compute: int) -> int:
    """Train and save a model; return the compute, which counts the tokens of answers as a node does."""
    from datasets import load_dataset  # these take seconds to import
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    every = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(folder.parent / "cache"))
    right = every.filter(lambda row: row["reward"] == 1.0 and row["finished"]).select_columns(["prompt", "completion"])
    lengths = [len(tokenizer(row["completion"], add_special_tokens=False).input_ids) + 1 for row in right]
    batch = 32
    of_a_step = TRAINED_COST * batch * sum(lengths) / len(lengths)
    steps = max(1, round(compute / of_a_step))
    config = SFTConfig(
        str(folder.parent / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        seed=seed,
        max_length=128,
    )
    trainer = SFTTrainer(str(model), args=config, train_dataset=right, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(folder)
    return round(steps * of_a_step)


def score(model: Path, settings: Mapping[str, Any]) -> Figures:
    """Return what `gossamer eval` says of a model, on the questions of the other arms."""
    names = [word for task in settings["tasks"] for word in ("--task", task["name"])]
    asked = settings["eval"]
    said = gossamer("eval", model, *names, "--count", asked["count"], "--completions", asked["completions"], "--json")
    report = json.loads(said)
    return Figures(report["greedy"]["overall"]["accuracy"], report["sampled"]["overall"]["accuracy"], 0, 0)


def count_rows(rows: Path) -> tuple[int, int]:
    """Return how many groups an export has, and how many right and finished answers."""
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    return len({row["group"] for row in found}), sum(row["reward"] == 1.0 and row["finished"] for row in found)


def print_table(runs: Mapping[str, Sequence[Figures]], of: str, start: Figures) -> None:
    """Print the arms, with `of` less each of them."""
    print(f"| arm | accuracy | {of} less it | pass@1 | {of} less it | others' groups | compute |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print(f"| untrained | {start.accuracy:.3f} |  | {start.pass1:.3f} |  | 0 | 0 |")
    for arm, figured in runs.items():
        cells = []
        for name in ("accuracy", "pass1"):
            values = [getattr(figures, name) for figures in figured]
            others = [getattr(figures, name) for figures in runs[of]]
            less = [mine - other for mine, other in zip(others, values, strict=True)]
            cells += [str(estimate(values)), "" if arm == of else str(estimate(less))]
        means = [
            sum(getattr(figures, name) for figures in figured) / len(figured) for name in ("others_groups", "compute")
        ]
        print(f"| {arm} | {' | '.join(cells)} | {means[0]:,.0f} | {means[1]:,.0f} |")


def merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with later ones over earlier ones."""
    return functools.reduce(merge, trees, {})


def set_words(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as the command line takes them."""
    words = [word for task in settings.get("tasks", ()) for word in ("--task", task["name"])]
    for key, value in flatten(without_tasks(settings)).items():
        words += ["--set", f"{key}={str(value).lower() if isinstance(value, bool) else value}"]
    return words


def found_words(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as `gossamer found` takes them."""
    return ["--tasks", ",".join(task["name"] for task in settings["tasks"]), *set_words(without_tasks(settings))]


def without_tasks(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all other settings."""
    return {key: value for key, value in settings.items() if key != "tasks"}


COMMAND = (sys.executable, "-c", "import sys; from node.cli import main; sys.exit(main())")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def gossamer(*words: object) -> str:
    """Run a command to its end; return what it prints."""
    command = [*COMMAND, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"gossamer {' '.join(command[3:])}\n{done.stdout}{done.stderr}")
    return done.stdout


def begin(*words: object, log: Path) -> "subprocess.Popen[bytes]":
    """Start a command, which writes to `log`."""
    with log.open("wb") as file:
        return subprocess.Popen([*COMMAND, *map(str, words)], cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file)


def wait_for(is_there: Callable[[], object], what: str) -> None:
    """Wait until something is there."""
    began = time.monotonic()
    while not is_there():
        if time.monotonic() - began > WAIT_S:
            sys.exit(f"{what} did not come in {WAIT_S:g} s")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
