"""The head over some positions at a time is the same computation, and holds no more logits than a chunk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CohereConfig, GraniteConfig, LlamaConfig

from node.config import LoraConfig, PolicyConfig
from node.errors import UserError
from node.policy.load import Policy, load_policy
from node.rollouts.rule import Sample
from node.training import head
from node.training.batch import make_batches
from node.training.head import logps_and_entropies
from node.training.trainer import SwarmTrainer
from tests.architectures import GROUPED, OTHERS, SHARING, policy_of
from tests.grpo_oracle import completion_logps
from tests.training import FULL_WEIGHT, fixed_rounds, mixed_samples, node_config, trainer_of

MODELS = {
    **SHARING,
    "bloom": OTHERS["bloom"],
    "mamba": OTHERS["mamba"],
    "cohere": CohereConfig(**GROUPED, logit_scale=0.25),
    "granite": GraniteConfig(**GROUPED, logits_scaling=4.0),
    "tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
}


@pytest.fixture(autouse=True)
def chunks_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "logits_at_once", lambda memory: 3 * GROUPED["vocab_size"])


def passed(trainer: SwarmTrainer, rows: list[Sample], chunk: int | None) -> dict[str, torch.Tensor]:
    """Return log-probabilities, entropies and gradients of a micro-batch whose logits are held in chunks."""
    trainer._chunk, model = chunk, trainer.model
    (batch,) = make_batches(rows, FULL_WEIGHT, 4096, "dapo", 0)
    ids, mask = ([batch[f"{part}_{what}"] for part in ("prompt", "completion")] for what in ("ids", "mask"))
    model.zero_grad()
    logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
        model, torch.cat(ids, dim=1), torch.cat(mask, dim=1), ids[1].size(1)
    )
    assert not entropies.requires_grad
    (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps)).sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"logps": logps.detach(), "entropies": entropies, **gradients}


def chunked_trainer(policy: Policy, folder: Path, **options: Any) -> SwarmTrainer:
    trainer = trainer_of(policy, node_config(rounds=1, temperature=0.8, **options), folder, fixed_rounds())
    assert trainer._chunk == 3, "nothing is wrong with chunks in this model"
    policy.model.train()
    return trainer


def assert_chunks_change_nothing(policy: Policy, folder: Path, tolerance: float = 2e-5, **options: Any) -> None:
    trainer = chunked_trainer(policy, folder, **options)
    expected, found = (passed(trainer, mixed_samples(policy), chunk) for chunk in (None, 3))
    assert found.keys() == expected.keys()
    assert len(expected) > 2 and expected["logps"].count_nonzero() > 9
    largest = max(float(tensor.abs().max()) for name, tensor in expected.items() if name not in ("logps", "entropies"))
    for name, tensor in expected.items():
        scale = 1.0 if name in ("logps", "entropies") else largest
        assert found[name].dtype == tensor.dtype
        assert float((found[name] - tensor).abs().max()) < tolerance * scale, name


@pytest.mark.parametrize(("name", "large"), [*((name, 0) for name in MODELS), ("llama", 10**7)])
def test_chunks_change_neither_values_nor_gradients(name, large, tmp_path, monkeypatch):
    monkeypatch.setattr("node.training.trainer.LARGE", large)
    assert_chunks_change_nothing(policy_of(MODELS[name], tmp_path / "policy"), tmp_path)


def test_nor_do_they_with_gradient_checkpointing(tmp_path):
    policy = policy_of(MODELS["llama"], tmp_path / "policy")
    assert_chunks_change_nothing(policy, tmp_path, gradient_checkpointing=True)


def test_nor_do_they_in_bfloat16(tmp_path):
    policy_of(MODELS["llama"], tmp_path / "policy")
    policy = load_policy(PolicyConfig(model=str(tmp_path / "policy"), device="cpu"), bf16=True)
    assert_chunks_change_nothing(policy, tmp_path, tolerance=2e-2)


def test_an_adapter_on_the_output_matrix_takes_part(tmp_path):
    policy_of(MODELS["llama"], tmp_path)
    lora = LoraConfig(r=4, target_modules=".*(q_proj|lm_head)")
    policy = load_policy(PolicyConfig(model=str(tmp_path), device="cpu", lora=lora), bf16=False)
    with torch.no_grad():  # adapters begin as nothing
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    row = mixed_samples(policy)[0]
    ids, tokens = torch.tensor([[*row.prompt, *row.completion]]), torch.tensor(row.completion)
    places = torch.arange(len(row.prompt) - 1, ids.size(1) - 1)
    found, _ = logps_and_entropies(policy.model, policy.model, {"input_ids": ids}, places, tokens, 0.8, 2)
    expected = completion_logps(policy.model, row, 0.8)
    assert len(tokens) > 2 and not row.given and torch.allclose(found, expected, atol=1e-5)
    adapters = [weight for name, weight in policy.model.named_parameters() if "lm_head.lora" in name]
    gradients = [torch.autograd.grad(logps[1], adapters) for logps in (found, expected)]
    assert all(
        torch.allclose(gradient, other, atol=1e-5) and gradient.any()
        for gradient, other in zip(*gradients, strict=True)
    )


def test_trl_trains_none_and_the_line_says_so(tmp_path):
    policy_of(MODELS["llama"], tmp_path)
    lora = LoraConfig(r=4, target_modules=".*(q_proj|lm_head)")
    policy = load_policy(PolicyConfig(model=str(tmp_path), device="cpu", lora=lora), bf16=False)
    with pytest.raises(UserError, match=r"^policy\.lora\.target_modules: .*adapter to `lm_head` is not supported"):
        trainer_of(policy, node_config(rounds=1), tmp_path, fixed_rounds())


def test_a_model_whose_chunks_are_wrong_holds_all_logits_and_says_so(tmp_path, monkeypatch):
    policy = policy_of(MODELS["llama"], tmp_path / "policy")
    left_out = head._layers_left_out
    monkeypatch.setattr(head, "_layers_left_out", lambda model, output: left_out(model, _doubled(output)))
    with capture_logs() as logs:
        trainer = trainer_of(policy, node_config(rounds=1), tmp_path, fixed_rounds())
    assert trainer._chunk is None
    assert [(line["event"], line["log_level"]) for line in logs] == [
        ("all logits of a micro-batch are held at once", "warning")
    ]


def _doubled(output: Any) -> Any:
    return type(output)(**{**output, "last_hidden_state": 2 * output.last_hidden_state})


class Largest(TorchDispatchMode):
    """Notes the most numbers that a tensor has which is made within, but for views."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize(("large", "lora"), [(0, 0), (10**7, 4)])
def test_no_tensor_of_a_step_is_larger_than_a_chunk_of_logits_or_the_output_matrix(large, lora, tmp_path, monkeypatch):
    """Forward and backward; all logits of the completions would be nine times as many numbers."""
    monkeypatch.setattr("node.training.trainer.LARGE", large)
    vocabulary = 5000
    monkeypatch.setattr(head, "logits_at_once", lambda memory: 20 * vocabulary)
    policy = policy_of(LlamaConfig(**GROUPED | {"vocab_size": vocabulary}), tmp_path / "policy", lora=lora)
    config = node_config(rounds=1)
    rows = mixed_samples(policy, groups=20)
    tokens = sum(len(row.completion) for row in rows if row.advantage)
    trainer = trainer_of(policy, config, tmp_path, fixed_rounds(rows))
    with Largest() as largest:
        trainer.train()
    assert tokens > 180 and largest.numbers == 20 * vocabulary
