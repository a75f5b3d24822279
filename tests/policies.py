"""Tiny random policies for tests: a Llama of a few thousand weights over printable ASCII."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from node.config import LoraConfig, PolicyConfig
from node.policy.load import Policy, load_policy

CHARACTERS = "".join(map(chr, range(32, 127)))


def tiny_policy(folder: Path, seed: int = 0, width: int = 16, lora: int = 0, dtype: str = "float32") -> Policy:
    """Write a random policy to `folder` and load it on the CPU."""
    write_tiny_policy(folder, seed, width)
    return load_policy(PolicyConfig(model=str(folder), device="cpu", dtype=dtype, lora=LoraConfig(r=lora)))


def write_tiny_policy(folder: Path, seed: int = 0, width: int = 16, marks: Sequence[str] = ()) -> None:
    """Save a random model with sharp enough logits that probabilities differ, and a tokenizer with special `marks`."""
    tokenizer = character_tokenizer(marks)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=128,
                tie_word_embeddings=True,
                initializer_range=0.3,
                attention_dropout=0.1,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


CHAT_MODELS = {
    "Gemma": (
        "<end_of_turn>",
        "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}:{{ m.content }}"
        "<end_of_turn> {% endfor %}{% if add_generation_prompt %}<start_of_turn>model:{% endif %}",
    ),
    "Phi": (
        "<|end|>",
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|> {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}<eos>{% endif %}",
    ),
}
"""What ends a turn, and a chat template, as two families of models have them. Their `<eos>` ends no turn."""


def write_chat_policy(folder: Path, end: str, template: str | None) -> int:
    """Save a tiny policy that stops at `<eos>` and at `end`; return the token of `end`."""
    write_tiny_policy(folder, marks=[end, "<start_of_turn>", "<|user|>", "<|assistant|>"])
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    ends = [2, len(character_tokenizer())]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return ends[1]


def write_mixture(folder: Path) -> None:
    """Save a random mixture of experts, a small Qwen3-MoE, and its tokenizer."""
    tokenizer = character_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                moe_intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=64,
                num_experts=4,
                num_experts_per_tok=2,
                max_position_embeddings=256,
                initializer_range=0.2,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_diverged_policy(folder: Path) -> None:
    """Save a tiny policy whose logits are not finite."""
    write_tiny_policy(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def character_tokenizer(marks: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token a character, `<bos>` before a text, and special `marks`."""
    vocabulary = {token: at for at, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
