"""Tiny random policies of several architectures."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from node.config import LoraConfig, PolicyConfig
from node.policy.load import Policy, load_policy
from tests.policies import character_tokenizer

SMALL = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 4}
GROUPED = SMALL | LAYERS | {"num_key_value_heads": 2, "max_position_embeddings": 128}
SHARING: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=64),
    "gemma2": Gemma2Config(**GROUPED, sliding_window=64, final_logit_softcapping=5.0, query_pre_attn_scalar=4),
    "gpt2": GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=128),
}
OTHERS: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(**SMALL, hidden_size=16, n_layer=2, n_head=2),  # positions by the mask (ALiBi)
    "mamba": MambaConfig(**SMALL, hidden_size=16, num_hidden_layers=2, state_size=4),  # no attention
}


def policy_of(config: PreTrainedConfig, folder: Path, lora: int = 0, attention: str = "") -> Policy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    policy = load_policy(PolicyConfig(model=str(folder), device="cpu", lora=LoraConfig(r=lora)), bf16=False)
    if attention:
        policy.model.set_attn_implementation(attention)
    return policy
