"""The experiment's arithmetic, on made-up runs."""

import json
import math
from pathlib import Path

import pytest

from examples.experiment_analysis import Run, estimate, plot, read_run, smooth, tabulate, to_markdown


def run(arm: str, seed: int, cumulative: float) -> Run:
    return Run(arm, seed, cumulative, 0.1, 0.4, 1.0, 2.0, (0.0, 0.5, 1.0))


def test_students_interval_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(estimate([5.0]).half)


def test_ratios_are_paired_by_seed() -> None:
    runs = [run("8/0", 1, 10), run("8/0", 2, 20), run("4/4", 1, 20), run("4/4", 2, 60)]
    alone, shared = tabulate(runs)
    assert (alone.ratio.mean, alone.ratio.half) == (1.0, 0.0)
    assert shared.ratio.mean == 2.5  # (20/10 + 60/20) / 2, not 80/30
    assert shared.seeds == 2
    assert "| 4/4 | best | 40.00 ± " in to_markdown([shared], {"4/4": "best"})


def test_smoothing_looks_back_only() -> None:
    assert smooth([0, 2, 4, 6], window=2) == [0, 1, 3, 5]


def test_a_run_folder_is_averaged_over_its_nodes(tmp_path: Path) -> None:
    nodes = {}
    for name, rewards in {"n0": [0.0, 1.0], "n1": [0.5, 0.5]}.items():
        folder = tmp_path / "nodes" / name
        folder.mkdir(parents=True)
        lines = [json.dumps({"round": number, "reward": reward}) for number, reward in enumerate(rewards, 1)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        nodes[name] = {
            "rounds": 2,
            "reward_cumulative": sum(rewards),
            "reward_first": rewards[0],
            "reward_last": rewards[1],
            "groups_external": 4,
            "bytes_sent": 4096,
        }
    (tmp_path / "summary.json").write_text(json.dumps({"nodes": nodes}))
    found = read_run(tmp_path, "4/4", 1)
    assert found == Run("4/4", 1, 1.0, 0.25, 0.75, 2.0, 2.0, (0.25, 0.75))


def test_the_plot_is_drawn_and_names_every_arm(tmp_path: Path) -> None:
    plot([run("8/0", 1, 1), run("4/4", 1, 1), run("4/4", 2, 1)], tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "8/0" in drawn and "4/4" in drawn
