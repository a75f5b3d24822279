"""What `make demo` shows, through the command line: a swarm gets visibly better, its nodes from each other's groups."""

import json
import time
import tomllib
from pathlib import Path

import pytest

from node.cli.demo import CONFIG
from node.config import parse_config
from node.fleet.local_swarm import make_plan
from node.lab.lockstep import run_in_memory
from tests.swarms import gossamer

NODES = 4
SEED = 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_learns_and_every_node_trains_on_others_groups(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = gossamer("swarm", "examples/demo.toml", "-n", NODES, "--seed", SEED, "--out", out)
    output, errors = run.communicate(timeout=580)
    assert run.returncode == 0, errors
    summary = json.loads((out / "summary.json").read_text())
    swarm, nodes = summary["swarm"], summary["nodes"]
    assert [node["rounds"] for node in nodes.values()] == [300] * NODES
    assert swarm["reward_last"] >= 3 * swarm["reward_first"] > 0, swarm
    assert all(node["groups_external"] > 0 for node in nodes.values()), nodes
    assert f"mean reward {swarm['reward_first']:.3f} in the first tenth" in output
    assert swarm["accuracy_last_interval"][0] > swarm["accuracy_first_interval"][1], swarm
    assert f"{swarm['accuracy_last']:.3f} (" in output and "held-out pass@8" in output
    assert (out / "report.html").stat().st_size > 0


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_swarm_learns_a_game_of_several_turns_better_than_a_node_alone(tmp_path: Path) -> None:
    """What `gossamer demo --task builtin/guess` does, in one process; three guesses that heed nothing win 3 in 7."""
    tree = tomllib.loads(CONFIG.read_text()) | {
        "rounds": 100,
        "seed": 2,
        "tasks": [{"name": "builtin/guess"}],
        "eval": {"every": "ends", "count": 64, "completions": 0},
    }
    swarm, alone = (
        run_in_memory(make_plan(tmp_path / f"{nodes}", nodes, parse_config(tree)), 0, started=time.time())["swarm"]
        for nodes in (4, 1)
    )
    assert swarm["accuracy_first"] <= 0.1 and alone["accuracy_first"] <= 0.1
    assert swarm["accuracy_last"] >= 0.55 > alone["accuracy_last"]
