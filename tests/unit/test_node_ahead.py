"""The next round is generated while this one trains: whose weights make it, and what a resume takes up."""

import os
import shutil
import signal
import threading
from dataclasses import replace

import pytest
import torch

from node.config import parse_config
from node.engines import EngineError, Generated, SamplingParams, make_engine
from node.engines.ahead import Ahead
from node.engines.episodes import EpisodeQuestion, Episodes
from node.engines.hf import HfEngine
from node.rollouts.group import Tokens
from node.run import run_node
from node.tasks.builtin.families import FAMILIES
from node.training.likelihood import of_each_token
from node.training.trainer import importance_weights
from tests.policies import tiny_policy
from tests.swarms import GRADED, numbers, rows_of, small_config

SAMPLING = SamplingParams(temperature=0.7, top_p=1.0, max_completion_length=6)
PROMPTS = [[1, 5, 6, 7], [1, 8]]
ALONE = {"network": {"enabled": False}, "sampling": {"local": 4, "external": 0}, "eval": {"every": 0}}


def episodes(prompts, n, sampling, seed):
    task = FAMILIES["sums"]()
    return Episodes([EpisodeQuestion(task, task.make(0), prompt) for prompt in prompts], n, sampling, seed, 100, list)


class Slow:
    """An engine that waits to be let go, and says with which version it generated."""

    def __init__(self):
        self.version, self.goes, self.closed = -1, threading.Event(), False

    def load(self, version):
        self.version = version

    def generate(self, prompts, n, sampling, seed):
        version = self.version
        assert self.goes.wait(20)
        return [[Generated((seed,), str(version), True)] * n for _ in prompts]

    def rest(self):
        raise AssertionError("it does not rest")

    def close(self):
        self.closed = True


def test_a_batch_that_was_begun_is_of_the_weights_before_and_new_weights_wait_for_it():
    slow = Slow()
    engine = Ahead(slow)
    engine.load(3)
    engine.begin(episodes(PROMPTS, 2, SAMPLING, seed=1))
    threading.Timer(0, slow.goes.set).start()
    engine.load(4)
    assert engine.play(episodes(PROMPTS, 2, SAMPLING, seed=2))[0][0].text == "4", "another batch comes between"
    assert engine.play(episodes(PROMPTS, 2, SAMPLING, seed=1))[0][0].text == "3"
    assert engine.play(episodes(PROMPTS, 2, SAMPLING, seed=1))[0][0].text == "4", "it is answered once"


def test_a_batch_in_a_checkpoint_answers_for_nothing_else_than_what_it_was_asked_for(tmp_path):
    slow = Slow()
    slow.goes.set()
    engine = Ahead(slow)
    engine.begin(episodes(PROMPTS, 2, SAMPLING, seed=1))
    made = engine.play(episodes(PROMPTS, 2, SAMPLING, seed=1))
    engine.begin(episodes(PROMPTS, 2, SAMPLING, seed=1))
    engine.save(tmp_path)
    for prompts, n, sampling in (
        ([[1, 5, 6, 7], [1, 9]], 2, SAMPLING),  # other tasks, say
        (PROMPTS, 2, replace(SAMPLING, temperature=1.0)),
        (PROMPTS, 3, SAMPLING),
        (PROMPTS, 2, SAMPLING),
    ):
        resumed = Ahead(Slow())
        resumed._engine.goes.set()
        resumed._engine.version = 7
        resumed.resume(tmp_path)
        found = resumed.play(episodes(prompts, n, sampling, seed=1))
        assert found[0][0].text == ("-1" if (prompts, n, sampling) == (PROMPTS, 2, SAMPLING) else "7")
    assert found == made


def test_a_batch_that_failed_keeps_no_checkpoint_from_being_written(tmp_path):
    class Fails(Slow):
        def generate(self, *_):
            raise RuntimeError("out of luck")

    engine = Ahead(Fails())
    engine.begin(episodes(PROMPTS, 2, SAMPLING, seed=1))
    engine.save(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="out of luck"):
        engine.play(episodes(PROMPTS, 2, SAMPLING, seed=1))


def test_a_node_that_is_asked_to_stop_waits_for_a_batch_in_work_no_longer_than_its_grace_period(tmp_path, monkeypatch):
    config = small_config(9, **ALONE, engine={"ahead": 1}, tasks=GRADED, trainer={"stop_grace": 1.0, "save_steps": 50})
    hangs, waited, generate = threading.Event(), [], HfEngine.generate

    def hang_ahead(self, *asked):
        if threading.current_thread() is not threading.main_thread() and (tmp_path / "begun").exists():
            os.kill(os.getpid(), signal.SIGTERM)
            waited.append(hangs.wait(20))
        (tmp_path / "begun").touch()
        return generate(self, *asked)

    monkeypatch.setattr(HfEngine, "generate", hang_ahead)
    run_node(config, tmp_path / "node")
    assert not waited
    hangs.set()
    monkeypatch.undo()
    [checkpoint] = (tmp_path / "node" / "checkpoints").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-1" and not (checkpoint / "ahead.json").exists()
    run_node(config.model_copy(update={"rounds": 3}), tmp_path / "node")
    assert [row["round"] for row in rows_of(tmp_path / "node")] == [1, 2, 3]


def test_closing_ends_a_batch_that_transformers_generate(tmp_path):
    policy = tiny_policy(tmp_path)
    engine = Ahead(HfEngine(replace(policy, eos_token_ids=(10**6,)), ahead=True))
    endless = replace(SAMPLING, max_completion_length=10**6)
    engine.begin(episodes(PROMPTS, 2, endless, seed=1))
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.play(episodes(PROMPTS, 2, endless, seed=1))


def test_a_failure_is_raised_where_the_batch_is_asked_for_and_closing_waits_for_nothing():
    class Fails(Slow):
        def generate(self, *_):
            raise RuntimeError("out of luck")

    engine = Ahead(Fails())
    engine.begin(episodes(PROMPTS, 2, SAMPLING, seed=1))
    with pytest.raises(RuntimeError, match="out of luck"):
        engine.play(episodes(PROMPTS, 2, SAMPLING, seed=1))
    busy = Slow()
    engine = Ahead(busy)
    engine.begin(episodes(PROMPTS, 2, SAMPLING, seed=1))
    engine.rest()
    engine.close()
    assert busy.closed


@pytest.mark.parametrize("paged", [False, True])
def test_tokens_come_with_their_log_probabilities_under_the_copy_that_made_them(tmp_path, paged):
    policy = tiny_policy(tmp_path)
    engine = HfEngine(policy, paged=paged, ahead=True)
    engine.load(0)
    made = engine.generate(PROMPTS, 4, SAMPLING, seed=1)
    expected = log_probabilities(policy, made)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(1.5)
    again = engine.generate(PROMPTS, 4, SAMPLING, seed=1)
    assert again == made, "what is trained now does not matter to it"
    for completion, logprobs in zip((completion for group in made for completion in group), expected, strict=True):
        assert completion.logprobs == pytest.approx(logprobs.tolist(), abs=1e-4)
    engine.load(1)
    assert engine.generate(PROMPTS, 4, SAMPLING, seed=1) != made


def log_probabilities(policy, made):
    rows = [
        (prompt, Tokens(completion.token_ids))
        for prompt, group in zip(PROMPTS, made, strict=True)
        for completion in group
    ]
    chosen = lambda logps, tokens: logps.gather(-1, tokens[:, None]).squeeze(-1)  # noqa: E731
    return list(of_each_token(policy, rows, chosen, SAMPLING.temperature))


def test_a_node_that_is_ahead_says_by_which_weights_and_goes_on_from_a_checkpoint_with_the_same_numbers(tmp_path):
    config = small_config(12, **ALONE, engine={"ahead": 1}, tasks=GRADED)
    run_node(config, tmp_path / "node")
    whole = rows_of(tmp_path / "node")
    for later in (10, 12):  # as if the node had been killed before it wrote them
        shutil.rmtree(tmp_path / "node" / "checkpoints" / f"checkpoint-{later}")
    run_node(config, tmp_path / "node")
    assert numbers(rows_of(tmp_path / "node")) == numbers(whole)
    assert whole[0]["sampling/sampling_logp_difference/max"] < 1e-4, "the first round is made by its own weights"
    assert max(row.get("sampling/sampling_logp_difference/max", 0) for row in whole[1:]) > 1e-3


def test_only_an_engine_that_is_ahead_has_a_copy(tmp_path):
    policy = tiny_policy(tmp_path / "policy")
    for ahead, kind in ((0, HfEngine), (1, Ahead)):
        made = make_engine(parse_config({"engine": {"ahead": ahead}}).engine, policy, tmp_path)
        assert type(made) is kind


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [[0.5, 2.0, 1.0], [2.0, 2.0, 1.0]]),
        ("token_mask", [[0.5, 2.0, 1.0], [0.0, 2.0, 1.0]]),
        ("sequence_truncate", [[1.0], [2.0]]),
        ("sequence_mask", [[1.0], [0.0]]),
    ],
)
def test_importance_weights_are_of_a_token_or_of_a_sequence_and_bounded(mode, expected):
    ratios = torch.tensor([[0.5, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert importance_weights(ratios.log(), mode, 2.0).tolist() == [pytest.approx(row) for row in expected]
