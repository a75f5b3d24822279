"""What `make demo` shows, through the command line: a swarm gets visibly better, its nodes from each other's groups."""

import json
from pathlib import Path

import pytest

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
