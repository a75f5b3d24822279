"""The laboratory's command on real processes: nodes that differ, and nodes that are killed and come back."""

import itertools
import json
from pathlib import Path

import pytest

from examples.make_builtin import Recipe, build_model, build_tokenizer
from node.lab.churn import stretches
from node.lab.plan import ChurnConfig, read_lab
from node.lab.runs import is_complete
from tests.swarms import events_of, gossamer, rows_of

LONGEST = [120, 100, 100]  # rounds of each node; a second and more is left of them after its first departure
FILE = """
seeds = [5]
runner = "RUNNER"
[settings]
rounds = 120
threads = 1
sampling = { local = 2, external = 4, completions = 4 }
tasks = [{ name = "builtin", options = { partial = true } }]
trainer.save_steps = 1
eval = { every = "ends", count = 2, completions = 0 }
[arms.mixed]
churn = { away = 0.5, rounds = 20 }
[arms.mixed.parts.small]
nodes = 1
note = "as it ships"
[arms.mixed.parts.large]
nodes = 2
settings = { rounds = 100, policy.model = "LARGE", sampling.local = 1 }
"""


def write_experiment(folder: Path, runner: str) -> Path:
    """An experiment of one run: the built-in policy and two nodes of a wider one, untrained, that come and go."""
    tokenizer = build_tokenizer()
    build_model(Recipe(width=64), tokenizer).save_pretrained(folder / "large")
    tokenizer.save_pretrained(folder / "large")
    path = folder / "mixed.toml"
    path.write_text(FILE.replace("RUNNER", runner).replace("LARGE", str(folder / "large")))
    return path


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("runner", ["memory", pytest.param("processes", marks=pytest.mark.long)])
def test_a_run_of_two_sizes_that_come_and_go_ends_with_figures_of_each(runner: str, tmp_path: Path) -> None:
    file = write_experiment(tmp_path, runner)
    process = gossamer("lab", "run", file, "--out", tmp_path / "out")
    said, failed = process.communicate(timeout=240)
    assert process.returncode == 0, said + failed
    (run,) = read_lab(file, tmp_path / "out").runs
    assert is_complete(run)
    nodes = [run.folder / "nodes" / f"n{index}" for index in range(3)]
    assert [[row["round"] for row in rows_of(node)] for node in nodes] == [list(range(1, 1 + last)) for last in LONGEST]
    assert [{row["groups_local"] for row in rows_of(node)} for node in nodes] == [{2}, {1}, {1}]
    widths = [
        {json.loads(path.read_text())["hidden_size"] for path in node.glob("checkpoints/*/config.json")}
        for node in nodes
    ]
    assert widths == [{Recipe().width}, {64}, {64}]
    assert all("accuracy" in line for line in said.splitlines() if line.startswith("| arm"))
    assert [line.split(" | ")[:2] for line in said.splitlines() if line.startswith("| mixed")] == [
        ["| mixed", ""],
        ["| mixed: small", "as it ships"],
        ["| mixed: large", ""],
    ]
    figures = json.loads((tmp_path / "out" / "mixed.json").read_text())["arms"]
    assert [figure.get("part") for figure in figures] == [None, "small", "large"]
    again = gossamer("lab", "run", file, "--out", tmp_path / "out").communicate(timeout=60)[0]
    assert again.startswith("1 runs, 1 of them done\n")
    if runner == "processes":
        were_killed_and_came_back(nodes)


def were_killed_and_came_back(nodes: list[Path]) -> None:
    """Each node was killed about as often as its schedule says, is the same one after it, and meanwhile did nothing."""
    churn = ChurnConfig(away=0.5, rounds=20)
    for index, node in enumerate(nodes):
        made = list(itertools.islice(stretches(churn, 5, index), 20))
        ends = [end for end in itertools.accumulate(plan.present for plan in made) if 0 < end < LONGEST[index]]
        starts = events_of(node, "listening")
        assert 1 < len(starts) <= 1 + len(ends)
        assert len({start["node"] for start in starts}) == 1
