"""A prompt computed once for its rows is the same computation: log-probabilities, entropies and gradients."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MistralConfig

from node.config import PolicyConfig
from node.policy.load import Policy, load_policy
from node.training.batch import make_batches
from node.training.shared_prefix import attention_window, blocks_of, lay_out, side_by_side
from node.training.trainer import SwarmTrainer
from tests.architectures import GROUPED, OTHERS, SHARING, policy_of
from tests.grpo_oracle import completion_logps, drawn, round_loss
from tests.policies import write_tiny_policy
from tests.training import FULL_WEIGHT, fixed_rounds, mixed_samples, node_config, playing_rounds, trainer_of


@pytest.fixture(autouse=True)
def small_models_share(monkeypatch):
    monkeypatch.setattr("node.training.trainer.LARGE", 0)


def trained_once(policy: Policy, folder: Path, **options: object) -> tuple[SwarmTrainer, dict, dict]:
    """Return the trainer, the gradients and the log of one round."""
    logged, gradients = [], {}
    config = node_config(rounds=1, temperature=0.8, **options)
    rounds = fixed_rounds(mixed_samples(policy))
    trainer = trainer_of(policy, config, folder, rounds, lambda _, logs: logged.append(logs))
    step = trainer.training_step

    def watched(*args, **kwargs):
        loss = step(*args, **kwargs)
        gradients.update({name: w.grad.clone() for name, w in policy.model.named_parameters() if w.grad is not None})
        return loss

    trainer.training_step = watched
    trainer.train()
    return trainer, gradients, logged[0]


def oracle(policy: Policy) -> tuple[float, dict, float]:
    """Loss, gradients and mean entropy of that round, a sequence at a time and without padding."""
    rows = mixed_samples(policy)
    logps = [completion_logps(policy.model, row, 0.8) for row in rows]
    loss = round_loss(logps, [logp.detach() for logp in logps], rows, FULL_WEIGHT, "dapo", 0.2, 0.28, 8)
    policy.model.zero_grad()
    loss.backward()
    gradients = {name: w.grad.clone() for name, w in policy.model.named_parameters() if w.grad is not None}
    entropies = []
    for row in rows:
        if row.advantage:
            logits = policy.model(input_ids=torch.tensor([[*row.prompt, *row.completion]])).logits / 0.8
            found = torch.distributions.Categorical(logits=logits[0, len(row.prompt) - 1 : -1]).entropy()
            entropies += found[drawn(row)].tolist()
    return loss.item(), gradients, sum(entropies) / len(entropies)


def assert_it_is_the_oracles(make_policy, tmp_path, **options):
    loss, expected, entropy = oracle(make_policy(tmp_path / "one"))
    trainer, found, logged = trained_once(make_policy(tmp_path / "two"), tmp_path / "b", **options)
    assert trainer._shares_prefixes
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) < 2e-5 * largest, name
    assert logged["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
    if not options:  # several micro-batches log the mean of their means
        assert logged["entropy"] == pytest.approx(entropy, rel=1e-4)


@pytest.mark.parametrize("name", SHARING)
def test_loss_entropy_and_gradients_are_those_of_a_row_a_sequence(name, tmp_path):
    assert_it_is_the_oracles(lambda folder: policy_of(SHARING[name], folder), tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_so_they_are_with_a_mask_that_is_added(name, tmp_path):
    assert_it_is_the_oracles(lambda folder: policy_of(SHARING[name], folder, attention="eager"), tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_so_they_are_with_adapters(name, tmp_path):
    assert_it_is_the_oracles(lambda folder: policy_of(SHARING[name], folder, lora=4), tmp_path)


def test_so_they_are_with_gradient_checkpointing_and_in_many_micro_batches(tmp_path):
    assert_it_is_the_oracles(
        lambda folder: policy_of(SHARING["llama"], folder), tmp_path, gradient_checkpointing=True, tokens_per_batch=20
    )


def test_a_small_model_with_learned_positions_shares_because_padding_would_shift_them(tmp_path, monkeypatch):
    monkeypatch.setattr("node.training.trainer.LARGE", 10**7)
    assert_it_is_the_oracles(lambda folder: policy_of(SHARING["gpt2"], folder), tmp_path)


def test_a_small_model_that_padding_does_not_shift_takes_the_plain_pass(tmp_path, monkeypatch):
    monkeypatch.setattr("node.training.trainer.LARGE", 10**7)
    trainer, _, _ = trained_once(policy_of(SHARING["llama"], tmp_path / "policy"), tmp_path)
    assert not trainer._shares_prefixes


@pytest.mark.parametrize("name", OTHERS)
def test_an_architecture_that_cannot_takes_the_plain_pass(name, tmp_path):
    policy = policy_of(OTHERS[name], tmp_path / "policy")
    trainer = trainer_of(policy, node_config(rounds=1), tmp_path, fixed_rounds(mixed_samples(policy)))
    assert not trainer._shares_prefixes
    trainer.train()


def test_a_sequence_beyond_the_window_takes_the_plain_pass(tmp_path, monkeypatch):
    policy = policy_of(MistralConfig(**GROUPED, sliding_window=9), tmp_path / "policy")
    trainer = trainer_of(policy, node_config(rounds=1), tmp_path, fixed_rounds())
    assert trainer._shares_prefixes
    (batch,) = make_batches(mixed_samples(policy), FULL_WEIGHT, 4096, "dapo", 0)
    lengths = (batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)).tolist()
    assert min(lengths) < 9 < max(lengths)
    short = {name: rows[torch.tensor(lengths) <= 9] for name, rows in batch.items() if rows.dim()}
    laid_out = []
    monkeypatch.setattr("node.training.trainer.lay_out", lambda *args: laid_out.append(args) or lay_out(*args))
    found, found_short = logps_of(trainer, batch), logps_of(trainer, short)
    assert len(laid_out) == 1
    trainer._shares_prefixes = False
    assert torch.equal(found, logps_of(trainer, batch))
    assert torch.allclose(found_short, logps_of(trainer, short), atol=1e-5)


def logps_of(trainer: SwarmTrainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return trainer._with_old_logps(batch)["old_per_token_logps"]


def test_the_window_is_the_narrowest_that_the_configuration_names():
    assert attention_window(SHARING["llama"]) == float("inf")
    assert attention_window(SHARING["gemma2"]) == 64


prompts = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)


@given(st.lists(st.tuples(prompts, st.integers(1, 6)), min_size=1, max_size=20), st.integers(1, 24))
def test_every_row_is_in_one_block_of_its_prompt_and_blocks_fill_rows_without_overlap(rows, width):
    prompts, lengths = [prompt for prompt, _ in rows], [length for _, length in rows]
    blocks = blocks_of(prompts, lengths, width)
    assert sorted(row for block in blocks for row in block.rows) == list(range(len(rows)))
    for block in blocks:
        assert {prompts[row] for row in block.rows} == {block.prompt}
        assert block.length == len(block.prompt) + sum(lengths[row] for row in block.rows)
        assert block.length <= width or len(block.rows) == 1
    lines = side_by_side(blocks)
    assert sorted(block.rows for line in lines for block in line) == sorted(block.rows for block in blocks)
    assert max(sum(block.length for block in line) for line in lines) == max(block.length for block in blocks)


def in_bfloat16(folder: Path) -> Policy:
    return replace(policy_of(SHARING["llama"], folder), bf16=True)


def test_in_bfloat16_generation_and_both_passes_are_of_one_precision_and_the_first_ratio_is_1(tmp_path):
    """The gradient of a round's first step is the same to the bit, whether or not old log-probabilities are kept."""
    _, once, _ = trained_once(in_bfloat16(tmp_path / "one"), tmp_path / "a")
    trainer, twice, _ = trained_once(
        in_bfloat16(tmp_path / "two"), tmp_path / "b", num_iterations=2, learning_rate=1e-30
    )
    assert trainer._shares_prefixes
    assert trainer.args.bf16
    assert all(torch.equal(once[name], twice[name]) for name in once)
    _, single, _ = trained_once(policy_of(SHARING["llama"], tmp_path / "three"), tmp_path / "c")
    assert any(not torch.equal(once[name], single[name]) for name in once)
    assert all(gradient.dtype == torch.float32 for gradient in once.values())


def test_in_bfloat16_with_shared_prompts_a_run_goes_on_from_a_checkpoint_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("node.engines.hf.LARGE", 0)

    def run(folder: Path, rounds: int, checkpoint: str | None = None) -> list[tuple[str, str]]:
        config, seen = node_config(rounds=rounds, learning_rate=0.01, save_steps=2), []
        policy = in_bfloat16(tmp_path / "policy")
        trainer = trainer_of(policy, config, folder, playing_rounds(policy, config), lambda _, logs: seen.append(logs))
        trainer.train(resume_from_checkpoint=checkpoint)
        return [(logs["loss"].hex(), float(logs["grad_norm"]).hex()) for logs in seen]

    whole = run(tmp_path / "whole", 4)
    assert len(set(whole)) == 4
    begun = run(tmp_path / "parts", 2)
    assert begun + run(tmp_path / "parts", 4, str(tmp_path / "parts/checkpoints/checkpoint-2")) == whole


@pytest.mark.parametrize(
    ("capabilities", "weights", "expected"),
    [
        ({"avx512_bf16": True}, 0, True),
        ({"amx_bf16": True}, 0, True),
        ({}, 0, False),
        ({"amx_bf16": True}, 10**7, False),
    ],
)
def test_bfloat16_is_chosen_for_a_large_model_on_a_processor_that_has_it(
    capabilities, weights, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr("node.policy.load.LARGE", weights)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    write_tiny_policy(tmp_path)
    config = PolicyConfig(model=str(tmp_path), device="cpu")
    assert load_policy(config).bf16 is expected
    assert load_policy(config, bf16=True).bf16
    assert not load_policy(config, bf16=False).bf16
