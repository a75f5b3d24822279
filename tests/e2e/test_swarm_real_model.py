"""A real model learns in a swarm of two, and the test would tell if it did not. It reads a peer's answer as its own."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from examples.fetch_smollm2 import DEFAULT_FOLDER
from node.config import PolicyConfig, SamplingConfig
from node.engines import SamplingParams, in_process
from node.policy.load import load_policy
from node.rollouts.group import Tokens
from node.tasks import Item
from node.telemetry.evaluations import EVALUATIONS_FILE, mean_over_nodes
from node.telemetry.metrics_file import read_metrics
from node.training.likelihood import surprises
from tests.swarms import ROOT, gossamer

ROUNDS = 30


class Rate(NamedTuple):
    """How often a sampled answer to a held-out question is right, over a swarm's nodes, and its 95 % interval."""

    mean: float
    low: float
    high: float


class Outcome(NamedTuple):
    """A run's summary, and its nodes' rates before the first round and after the last."""

    summary: dict[str, int]
    before: Rate
    after: Rate

    @property
    def is_better(self) -> bool:
        """Whether the 95 % interval of the rate's gain lies above zero: Newcombe's of a difference (1998, method 10).

        It is on the wide side, as both rates are of the same questions.
        """
        return self.after.mean - self.before.mean > math.hypot(
            self.after.mean - self.after.low, self.before.high - self.before.mean
        )


def run(out: Path, rounds: int, **settings: object) -> Outcome:
    """What `examples/real.toml` comes to after so many rounds, under these settings."""
    assert (ROOT / DEFAULT_FOLDER).is_dir(), "python examples/fetch_smollm2.py gets the model"
    shorter = {"eval.count": 32, "eval.completions": 2, **settings}
    changes = [word for key, value in shorter.items() for word in ("--set", f"{key}={value}")]
    swarm = gossamer(
        "swarm", "examples/real.toml", "-n", 2, "--rounds", rounds, "--seed", 1, "--out", out, "--no-table", *changes
    )
    said, complaints = swarm.communicate(timeout=1200)
    sys.stdout.write(said + complaints)
    assert swarm.returncode == 0
    nodes = [read_metrics(out / "nodes" / name / EVALUATIONS_FILE) for name in ("n0", "n1")]
    before, after = (rate([rows[place] for rows in nodes]) for place in (0, -1))
    return Outcome(json.loads((out / "summary.json").read_text())["swarm"], before, after)


def rate(rows: list[dict[str, Any]]) -> Rate:
    mean, interval = mean_over_nodes(rows, "pass@1")
    assert mean is not None and interval is not None
    return Rate(mean, *interval)


@pytest.mark.long
@pytest.mark.timeout(2600)
def test_a_real_model_answers_more_of_what_it_never_saw_and_one_that_does_not_train_does_not(tmp_path: Path) -> None:
    trained = run(tmp_path / "trained", ROUNDS)
    assert trained.is_better, trained
    assert trained.summary["tokens_generated"] > 0 and trained.summary["tokens_trained"] > 0
    idle = run(tmp_path / "idle", 2, **{"trainer.learning_rate": 1e-30})
    assert not idle.is_better, idle
    assert idle.before == trained.before


def set_in(file: Path, key: str, value: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))


@pytest.mark.slow
def test_a_real_models_answer_comes_back_as_it_was_sampled_though_its_tokenizers_end_ends_no_turn(
    tmp_path: Path,
) -> None:
    assert (ROOT / DEFAULT_FOLDER).is_dir(), "python examples/fetch_smollm2.py gets the model"
    folder = tmp_path / "laid out like Phi"
    shutil.copytree(ROOT / DEFAULT_FOLDER, folder)
    set_in(folder / "tokenizer_config.json", "eos_token", "<|endoftext|>")
    set_in(folder / "generation_config.json", "eos_token_id", [0, 2])
    policy = load_policy(PolicyConfig(model=str(folder), device="cpu"), bf16=False)
    prompt = policy.encode_prompt(Item("What is the capital of France? Answer with one word.", ""))
    [[own]] = in_process(policy).generate([prompt], 1, SamplingParams(0.0, 1.0, 24), 0)
    assert own.finished
    assert tuple(policy.encode_completion(own.text, True)) == own.token_ids
    by_tokenizer = Tokens((*own.token_ids[:-1], policy.tokenizer.eos_token_id))
    likely, unlikely = surprises(policy, [(prompt, Tokens(own.token_ids)), (prompt, by_tokenizer)])
    assert likely < SamplingConfig().max_surprise < unlikely, "a peer's answer was left out for its last token"
