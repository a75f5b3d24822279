"""A real model learns in a swarm of two, and the test would tell if it did not."""

import json
import sys
from pathlib import Path

import pytest

from examples.fetch_smollm2 import DEFAULT_FOLDER
from tests.swarms import ROOT, gossamer

ROUNDS = 40


def run(out: Path, rounds: int, **settings: object) -> dict[str, object]:
    """What `examples/real.toml` comes to after so many rounds, under these settings."""
    assert (ROOT / DEFAULT_FOLDER).is_dir(), "python examples/fetch_smollm2.py gets the model"
    shorter = {"eval.count": 64, "eval.completions": 0, **settings}
    changes = [word for key, value in shorter.items() for word in ("--set", f"{key}={value}")]
    swarm = gossamer(
        "swarm", "examples/real.toml", "-n", 2, "--rounds", rounds, "--seed", 1, "--out", out, "--no-table", *changes
    )
    said, complaints = swarm.communicate(timeout=800)
    sys.stdout.write(said + complaints)
    assert swarm.returncode == 0
    return json.loads((out / "summary.json").read_text())["swarm"]


def is_better(summary: dict[str, object]) -> bool:
    """Whether held-out accuracy rose by more than its 95 % intervals before and after allow for."""
    return summary["accuracy_last_interval"][0] > summary["accuracy_first_interval"][1]


@pytest.mark.slow
@pytest.mark.timeout(1700)
def test_a_real_model_answers_more_of_what_it_never_saw_and_one_that_does_not_train_does_not(tmp_path: Path) -> None:
    trained = run(tmp_path / "trained", ROUNDS)
    assert is_better(trained)
    assert trained["tokens_generated"] > 0 and trained["tokens_trained"] > 0
    idle = run(tmp_path / "idle", 2, **{"trainer.learning_rate": 1e-30})
    assert not is_better(idle)
    assert idle["accuracy_first"] == trained["accuracy_first"]
