"""The weights that the trainer hands to another engine, and the folder that a person gets."""

from dataclasses import replace

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from node.policy import export
from node.policy.export import export_model, export_weights
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


def with_an_adapter_on_the_output_matrix(folder):
    policy = with_random_adapters(folder)
    base = policy.model.unload()
    adapters = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    return replace(policy, model=peft.get_peft_model(base, adapters))


@pytest.mark.parametrize("make", [tiny_policy, with_random_adapters, with_an_adapter_on_the_output_matrix])
def test_a_model_folder_is_an_ordinary_one_that_computes_what_the_policy_computes(make, tmp_path):
    policy = make(tmp_path / "policy")
    policy.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    export_model(policy, tmp_path / "new" / "out", "float32", "# a card\n")
    out = tmp_path / "new" / "out"
    loaded = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(loaded), logits(policy.model), atol=1e-5, rtol=1e-5)
    tied = make is not with_an_adapter_on_the_output_matrix
    with safe_open(out / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118  # no container: it has no `in`
        assert not any("lora" in name for name in file.keys())  # noqa: SIM118
    assert loaded.config.tie_word_embeddings == tied and loaded.config.use_cache
    assert loaded.generation_config.eos_token_id == list(policy.eos_token_ids)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("1+2=")["input_ids"] == policy.tokenizer("1+2=")["input_ids"]
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    assert (out / "README.md").read_text() == "# a card\n"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    policy = tiny_policy(tmp_path / "policy")
    monkeypatch.setattr(export, "sync_tree", full)
    with pytest.raises(OSError, match="No space left"):
        export_model(policy, tmp_path / "new" / "out", "float32", "")
    assert list((tmp_path / "new").iterdir()) == []
