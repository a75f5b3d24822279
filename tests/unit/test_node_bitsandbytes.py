"""Weights of 4 bits beneath adapters, and an optimiser whose moments have 8 bits: bitsandbytes, on the CPU."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from node.config import LoraConfig, PolicyConfig
from node.engines import SamplingParams, in_process
from node.errors import UserError
from node.policy.detection import measure_model
from node.policy.export import export_model
from node.policy.load import Policy, load_policy
from node.policy.memory import weight_bytes
from node.training.trainer import make_trainer
from tests.policies import write_tiny_policy
from tests.training import fixed_rounds, mixed_samples, node_config

pytestmark = pytest.mark.slow  # bitsandbytes takes seconds to import


def loaded(folder, **settings) -> Policy:
    if not folder.exists():
        write_tiny_policy(folder, width=64)
    return load_policy(PolicyConfig(model=str(folder), device="cpu", **settings))


def train(policy, folder, rounds, resume=None, **trainer):
    config = node_config(rounds=rounds, save_steps=2, learning_rate=0.01, **trainer)
    samples = fixed_rounds(*[mixed_samples(policy, seed=number) for number in range(4)])
    made = make_trainer(policy, config, folder, samples, lambda *_: None)
    made.train(resume_from_checkpoint=resume and str(resume))
    return made


def weights_of(policy):
    return {name: weight.detach().clone() for name, weight in policy.model.named_parameters() if weight.requires_grad}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


FOUR_BITS = {"dtype": "nf4", "lora": LoraConfig(r=4)}


def test_adapters_over_4_bits_train_go_on_from_a_checkpoint_and_are_merged_into_what_they_were_trained_on(tmp_path):
    source = tmp_path / "policy"
    policy = loaded(source, **FOUR_BITS)
    packed = [weight for weight in policy.model.parameters() if hasattr(weight, "quant_state")]
    assert len(packed) == 2 * 7 and {weight.element_size() for weight in packed} == {1}
    scales = sum(weight.quant_state.absmax.nbytes + weight.quant_state.state2.absmax.nbytes for weight in packed)
    rest = sum(
        parameter.nbytes for parameter in policy.model.parameters() if not parameter.requires_grad
    )  # and the packed ones
    assert weight_bytes(measure_model(str(source)), "nf4") == pytest.approx(scales + rest, rel=0.02)
    held = [weight.data_ptr() for weight in packed]
    groups = in_process(policy).generate([[1, 5, 6]], 2, SamplingParams(1.0, 1.0, 4), seed=0)
    assert len(groups[0]) == 2
    assert [weight.data_ptr() for weight in packed] == held, "bitsandbytes laid them out anew"
    before = weights_of(policy)
    train(policy, tmp_path / "whole", 4)
    after = weights_of(policy)
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert not any(torch.equal(before[name], after[name]) for name in before)

    train(loaded(source, **FOUR_BITS), tmp_path / "parts", 2)
    again = loaded(source, **FOUR_BITS)
    train(again, tmp_path / "parts", 4, resume=tmp_path / "parts/checkpoints/checkpoint-2")
    assert same(weights_of(again), after)

    export_model(policy, tmp_path / "exported", "float32", "a card")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    plain = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    with torch.no_grad():
        found, wanted, start = (model(ids).logits for model in (merged, policy.model, plain))
    assert (found - wanted).abs().mean() < 0.1 * (start - wanted).abs().mean()


def test_moments_of_8_bits_go_on_from_a_checkpoint_and_no_others_do(tmp_path):
    source, small = tmp_path / "policy", {"optim": "adamw_8bit"}
    policy = loaded(source)
    trainer = train(policy, tmp_path / "whole", 4, **small)
    kinds = {state["state1"].dtype for state in trainer.optimizer.state.values()}
    assert kinds == {torch.uint8, torch.float32}, "large matrices and small ones"

    train(loaded(source), tmp_path / "parts", 2, **small)
    checkpoint = tmp_path / "parts/checkpoints/checkpoint-2"
    again = loaded(source)
    train(again, tmp_path / "parts", 4, resume=checkpoint, **small)
    assert same(weights_of(again), weights_of(policy))

    with pytest.raises(UserError, match=r"not trained with trainer\.trl\.optim='adamw_torch_fused': set it as it was"):
        train(loaded(source), tmp_path / "other", 4, resume=checkpoint)
    train(loaded(source), tmp_path / "usual", 2)
    with pytest.raises(UserError, match=r"not trained with trainer\.trl\.optim='adamw_8bit': set it as it was"):
        train(loaded(source), tmp_path / "other", 4, resume=tmp_path / "usual/checkpoints/checkpoint-2", **small)
