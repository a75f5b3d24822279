"""The weights that the trainer hands to another engine."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from node.policy import export
from node.policy.export import export_weights
from tests.policies import tiny_policy

IDS = torch.tensor([[1, 20, 30, 40, 50]])


def logits(model):
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


def with_random_adapters(folder):
    policy = tiny_policy(folder, lora=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if ".lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    return policy


@pytest.mark.parametrize("make", [tiny_policy, with_random_adapters], ids=["plain", "lora"])
def test_an_export_computes_what_the_trainer_computes(make, tmp_path):
    model = make(tmp_path / "policy").model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    (tmp_path / "out").mkdir()
    export_weights(model, tmp_path / "out", "float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_tied_weights_are_written_apart(tmp_path):
    model = tiny_policy(tmp_path / "policy").model
    assert model.config.tie_word_embeddings
    (tmp_path / "out").mkdir()
    export_weights(model, tmp_path / "out", "bfloat16")
    with safe_open(tmp_path / "out" / "model-00000.safetensors", "pt") as file:
        head, embedding = file.get_tensor("lm_head.weight"), file.get_tensor("model.embed_tokens.weight")
    assert torch.equal(head, embedding)
    assert head.dtype == torch.bfloat16
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.tie_word_embeddings
    assert model.config.tie_word_embeddings, "the trainer's own configuration is left alone"


def test_a_large_model_is_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 4096)
    model = tiny_policy(tmp_path / "policy").model
    (tmp_path / "out").mkdir()
    export_weights(model, tmp_path / "out", "float32")
    names = []
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names += list(file.keys())
    assert sorted(names) == sorted(model.state_dict())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
