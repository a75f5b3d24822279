"""Several processes that train one node: the weights that one process gives, whatever the loss and the cut."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from node.config import LoraConfig, PolicyConfig, parse_config
from node.errors import UserError
from node.policy.load import Policy, load_policy
from node.processes.signals import GivenUp
from node.training.checkpoint import latest_checkpoint
from node.training.ranks import Ranks, is_broken
from node.training.trainer import make_trainer
from tests.policies import write_tiny_policy
from tests.ranks import in_ranks
from tests.training import fixed_rounds, mixed_samples, node_config

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
OTHER_LOSSES = [
    ("grpo", "token"),
    ("bnpo", "token"),
    ("dr_grpo", "token"),
    ("luspo", "sequence"),
    ("vespo", "token"),
    ("cispo", "token"),
]


def train(
    folder: Path, results: Path, lora: int, options: dict, resume: bool = False, meets_peers: bool = False
) -> None:
    """Train on `rounds_of`, from the checkpoint of the second round if asked to; number 0 keeps what came of it."""
    ranks = Ranks.join()
    policy = load_policy(PolicyConfig(model=str(folder.parent / "policy"), device="cpu", lora=LoraConfig(r=lora)))
    config = node_config(rounds=5, learning_rate=0.01, save_steps=2, save_total_limit=9, save_full=9, **options)
    logged = []

    def on_update(number: int, logs: dict[str, float]) -> None:
        logged.append(dict(logs))
        if meets_peers and ranks.number == 0:  # whose weights change those of the node, after a round
            with torch.no_grad():
                for weight in policy.model.parameters():
                    weight.mul_(0.9)

    if meets_peers:
        config = config.model_copy(update={"weights": config.weights.model_copy(update={"mode": "average"})})
    trainer = make_trainer(policy, config, folder, rounds_of(policy), on_update, ranks=ranks)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoints/checkpoint-2") if resume else None)
    parts = sum(isinstance(weight, DTensor) for weight in trainer.model.parameters())
    assert bool(parts) == ("FSDP_VERSION" in os.environ)
    if ranks.number == 0:
        save_file({name: weight.clone() for name, weight in policy.model.named_parameters()}, results)
        results.with_suffix(".json").write_text(json.dumps(logged))


def rounds_of(policy: Policy):
    """Five rounds: the second has no signal, the third a row for one rank alone, the fourth is infinite on one rank."""
    rows = mixed_samples(policy)
    idle = [row for row in rows if not row.advantage]
    single = [row for row in rows if row.advantage][:1]
    infinite = [replace(rows[0], advantage=math.inf), *rows[1:]]
    return fixed_rounds(rows, idle, single, infinite, mixed_samples(policy, seed=1))


def compare_weights(one: Path, other: Path) -> None:
    found, expected = load_file(one), load_file(other)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=2e-5), f"{name} is off by {(found[name] - weight).abs().max()}"


def compare(one: Path, other: Path) -> None:
    compare_weights(one, other)
    found, expected = (json.loads(path.with_suffix(".json").read_text()) for path in (one, other))
    for mine, theirs in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm", "swarm/surprise", "learning_rate", "nonfinite"):
            assert mine.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=1e-3, abs=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "losses",
    [[("dapo", "token")], pytest.param(OTHER_LOSSES, marks=pytest.mark.slow)],
    ids=["dapo", "others"],
)
def test_two_processes_give_the_weights_of_one(tmp_path, losses):
    def train_each(count: int) -> None:
        for loss_type, level in losses:
            options = {"loss_type": loss_type, "importance_sampling_level": level, "tokens_per_batch": 60}
            train(tmp_path / f"{count}-{loss_type}", tmp_path / f"{count}-{loss_type}.safetensors", 0, options)

    write_tiny_policy(tmp_path / "policy")
    for count in (1, 2):
        in_ranks(count, train_each, count)
    for loss_type, _ in losses:
        compare(tmp_path / f"2-{loss_type}.safetensors", tmp_path / f"1-{loss_type}.safetensors")


def test_weights_of_4_bits_are_not_shared_out(tmp_path):
    config = parse_config({"policy": {"dtype": "nf4", "lora": {"r": 4}}})
    with pytest.raises(UserError, match=r"FSDP2 shares out neither policy\.dtype='nf4' nor"):
        make_trainer(None, config, tmp_path, rounds_of, lambda *_: None, ranks=Ranks(sharded=True))


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, FSDP2], ids=["data parallel", "FSDP2"])
def test_a_head_that_each_process_computes_in_parts_gives_the_weights_of_one(tmp_path, monkeypatch, variables):
    write_tiny_policy(tmp_path / "policy")
    in_ranks(1, train, tmp_path / "one", tmp_path / "one.safetensors", 0, {"num_iterations": 2})
    monkeypatch.setattr("node.training.trainer.positions_at_once", lambda model: 3)
    in_ranks(2, train, tmp_path / "two", tmp_path / "two.safetensors", 0, {"num_iterations": 2}, **variables)
    compare(tmp_path / "two.safetensors", tmp_path / "one.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "lora"),
    [
        pytest.param({}, 0, id="data parallel"),
        pytest.param({}, 4, id="data parallel, adapters", marks=pytest.mark.long),
        pytest.param(FSDP2, 0, id="FSDP2", marks=pytest.mark.long),
        pytest.param(FSDP2, 4, id="FSDP2, adapters"),
    ],
)
def test_a_checkpoint_of_one_way_is_gone_on_from_in_another(tmp_path, variables, lora):
    write_tiny_policy(tmp_path / "policy")
    options = {"num_iterations": 2, "tokens_per_batch": 60}
    in_ranks(1, train, tmp_path / "one", tmp_path / "one.safetensors", lora, options)
    in_ranks(2, train, tmp_path / "two", tmp_path / "two.safetensors", lora, options, **variables)
    compare(tmp_path / "two.safetensors", tmp_path / "one.safetensors")
    for folder, count, others in (("one", 2, variables), ("two", 1, {}), ("two", 2, variables)):
        in_ranks(count, train, tmp_path / folder, tmp_path / "again.safetensors", lora, options, True, **others)
        compare_weights(tmp_path / "again.safetensors", tmp_path / "one.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, FSDP2], ids=["data parallel", "FSDP2"])
def test_what_peers_weights_change_on_number_0_holds_for_all(tmp_path, variables):
    write_tiny_policy(tmp_path / "policy")
    in_ranks(1, train, tmp_path / "one", tmp_path / "one.safetensors", 0, {}, False, True)
    in_ranks(2, train, tmp_path / "two", tmp_path / "two.safetensors", 0, {}, False, True, **variables)
    compare(tmp_path / "two.safetensors", tmp_path / "one.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, FSDP2], ids=["data parallel", "FSDP2"])
def test_after_an_abandoned_round_number_0_saves_the_round_before_if_it_can_do_so_alone(tmp_path, variables):
    def abandon_the_second_round() -> None:
        ranks = Ranks.join()
        policy = load_policy(PolicyConfig(model=str(tmp_path / "policy"), device="cpu"))

        def rounds(done: int):
            yield mixed_samples(policy)
            raise GivenUp

        trainer = make_trainer(policy, node_config(rounds=5), tmp_path, rounds, lambda *_: None, ranks=ranks)
        if ranks.number:
            with pytest.raises(RuntimeError) as caught:
                trainer.train()
            assert is_broken(caught.value)
            return
        with pytest.raises(GivenUp):
            trainer.train()
        trainer.save_whole_round()
        newest = latest_checkpoint(tmp_path / "checkpoints")
        assert newest is None if ranks.sharded else newest is not None and newest.round == 1

    write_tiny_policy(tmp_path / "policy")
    in_ranks(2, abandon_the_second_round, **variables)


class EndsAfterItsFirstRound(TrainerCallback):
    def on_log(self, args, state, control, **_: object) -> None:
        control.should_training_stop = control.should_save = True


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, FSDP2], ids=["data parallel", "FSDP2"])
def test_all_end_and_save_when_number_0_says_so_at_the_end_of_a_round(tmp_path, variables):
    def end_early() -> None:
        ranks = Ranks.join()
        policy = load_policy(PolicyConfig(model=str(tmp_path / "policy"), device="cpu"))
        rounds = fixed_rounds(*[mixed_samples(policy)] * 3)
        trainer = make_trainer(policy, node_config(rounds=3), tmp_path, rounds, lambda *_: None, ranks=ranks)
        if ranks.number == 0:
            trainer.add_callback(EndsAfterItsFirstRound)
        trainer.train()
        assert trainer.rounds_done == 1
        if ranks.number == 0:
            newest = latest_checkpoint(tmp_path / "checkpoints")
            assert newest is not None and newest.round == 1

    write_tiny_policy(tmp_path / "policy")
    in_ranks(2, end_early, **variables)


@pytest.mark.slow
def test_a_process_without_memory_for_a_micro_batch_ends_with_a_line(tmp_path):
    def run_out_of_memory() -> None:
        ranks = Ranks.join()
        policy = load_policy(PolicyConfig(model=str(tmp_path / "policy"), device="cpu"))
        rounds = fixed_rounds(mixed_samples(policy))
        trainer = make_trainer(policy, node_config(rounds=1), tmp_path, rounds, lambda *_: None, ranks=ranks)
        if ranks.number:
            trainer.compute_loss = raise_out_of_memory
            with pytest.raises(UserError, match=r"one of several processes: set trainer.tokens_per_batch=\d+"):
                trainer.train()
        else:
            with pytest.raises(RuntimeError) as caught:
                trainer.train()
            assert is_broken(caught.value)

    def raise_out_of_memory(*args: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    write_tiny_policy(tmp_path / "policy")
    in_ranks(2, run_out_of_memory)


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, FSDP2], ids=["data parallel", "FSDP2"])
def test_a_loss_that_is_infinite_on_one_rank_alone_is_no_step_on_any(tmp_path, variables):
    def train_one_round() -> None:
        ranks = Ranks.join()
        policy = load_policy(PolicyConfig(model=str(tmp_path / "policy"), device="cpu"))
        before = [weight.detach().clone() for weight in policy.model.parameters()]
        logged = []
        rounds = fixed_rounds(mixed_samples(policy))
        trainer = make_trainer(
            policy, node_config(rounds=1), tmp_path, rounds, lambda _, logs: logged.append(logs), ranks=ranks
        )
        compute_loss = trainer.compute_loss
        trainer.compute_loss = lambda *args, **named: compute_loss(*args, **named) + (math.inf if ranks.number else 0.0)
        trainer.train()
        assert logged[0]["nonfinite"] == 1
        if ranks.number == 0:
            assert all(map(torch.equal, policy.model.parameters(), before))

    write_tiny_policy(tmp_path / "policy")
    in_ranks(2, train_one_round, **variables)
