"""Generation for many small policies at once: equal shapes, different weights, one batch.

A small model's round is mostly the cost of starting its operations, and N models that take turns pay it N times. Here
their weights are stacked, and each operation is done once for all. Only the built-in policy's architecture is
implemented: Llama (arXiv 2302.13971) with tied embeddings, full attention and plain rotary positions. A large model
would gain nothing: it, and any other architecture, is left to its own engine.

Completions are those of `node.engines.hf`: each row draws by random numbers of its own. So the tokens are the same
wherever rounding does not decide between two.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from node.engines import Generated, SamplingParams, seed_of_prompt, seeds_of_rows
from node.engines.hf import random_numbers, tokens_at
from node.errors import NonFiniteError
from node.policy.load import Policy


class Request(NamedTuple):
    """One node's call of `RolloutEngine.generate`."""

    policy: Policy
    prompts: Sequence[Sequence[int]]
    n: int
    sampling: SamplingParams
    seed: int


def kind_of(request: Request) -> Hashable | None:
    """Return what requests share that `generate` answers together; None for one that its own engine must answer."""
    model, config = request.policy.model, request.policy.model.config
    plain = (
        config.model_type == "llama"
        and config.tie_word_embeddings
        and config.num_key_value_heads == config.num_attention_heads
        and not config.attention_bias
        and not config.mlp_bias
        and config.hidden_act == "silu"
        and config.rope_parameters["rope_type"] == "default"
        and model.device.type == "cpu"
        and model.dtype == torch.float32
        and not request.policy.bf16
        and type(model).__name__ == "LlamaForCausalLM"
        and request.sampling.top_p == 1
    )
    if not plain:
        return None
    layers = (config.num_hidden_layers, config.num_attention_heads, config.head_dim)
    sizes = (config.hidden_size, config.intermediate_size, config.vocab_size, config.max_position_embeddings)
    rotary = (config.rope_parameters["rope_theta"], config.rms_norm_eps)
    return request.n, request.sampling, len(request.prompts), layers, sizes, rotary


@torch.no_grad()
def generate(requests: Sequence[Request]) -> list[list[list[Generated]]]:
    """Return what each request asks for: a list of `n` completions for each of its prompts. All are of one kind."""
    first = requests[0]
    sampling, pad = first.sampling, first.policy.pad_token_id
    rows, length = len(first.prompts) * first.n, sampling.max_completion_length
    model = _Stack([request.policy.model for request in requests])
    width = max(len(prompt) for request in requests for prompt in request.prompts)
    ids = torch.tensor([[[pad] * (width - len(p)) + list(p) for p in request.prompts] for request in requests])
    known = torch.tensor([[[0] * (width - len(p)) + [1] * len(p) for p in request.prompts] for request in requests])
    state = _CacheState(known.bool(), first.n, length)
    ends = torch.tensor(first.policy.eos_token_ids)
    numbers = torch.stack([random_numbers(_seeds(request), length) for request in requests], dim=1)  # (T, N, R)
    logits = model.prefill(state, ids)
    done = torch.zeros(len(requests), rows, dtype=torch.bool)
    written = torch.full((len(requests), rows, length), pad)
    for at in range(length):
        drawn = _draw(logits, sampling.temperature, numbers[at])
        drawn = torch.where(done, pad, drawn)
        written[:, :, at] = drawn
        done |= (drawn[..., None] == ends).any(-1)
        if at + 1 == length or bool(done.all()):
            break
        logits = model.step(state, drawn)
    return [
        _groups(request, tokens) for request, tokens in zip(requests, written[:, :, : at + 1].tolist(), strict=True)
    ]


def _seeds(request: Request) -> list[int]:
    return seeds_of_rows([seed_of_prompt(request.seed, at) for at in range(len(request.prompts))], request.n)


def _draw(logits: torch.Tensor, temperature: float, numbers: torch.Tensor) -> torch.Tensor:
    """Return a token for each row, (N, R), from logits (N, R, V) and its random number (N, R)."""
    if not logits.amax(-1).isfinite().all():
        raise NonFiniteError
    if temperature == 0:
        return logits.argmax(-1)
    return tokens_at(functional.softmax(logits / temperature, dim=-1), numbers)


def _groups(request: Request, rows: Sequence[Sequence[int]]) -> list[list[Generated]]:
    completions = [_completion(request.policy, tokens) for tokens in rows]
    return [completions[at : at + request.n] for at in range(0, len(completions), request.n)]


def _completion(policy: Policy, tokens: Sequence[int]) -> Generated:
    end = next((at for at, token in enumerate(tokens) if token in policy.eos_token_ids), None)
    kept = tuple(tokens if end is None else tokens[: end + 1])
    return Generated(token_ids=kept, text=policy.decode(kept), finished=end is not None)


class _CacheState:
    """Keys and values of all layers, (N, R, H, T, D), which of the T places hold a token, and how many of them."""

    def __init__(self, known: torch.Tensor, n: int, length: int) -> None:
        self.known = known
        self.n = n
        self.length = length
        self.filled = known.size(-1)
        self.mask = torch.zeros(0)
        self.next = torch.zeros(0)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []


class _Stack:
    """The weights of N models of one shape, one tensor for each of their matrices."""

    def __init__(self, models: Sequence[Any]) -> None:
        config = models[0].config
        self._layers = config.num_hidden_layers
        self._heads = config.num_attention_heads
        self._epsilon = config.rms_norm_eps
        inner = [dict(model.model.named_parameters()) for model in models]
        self._weights = {name: torch.stack([state[name].detach() for state in inner]) for name in inner[0]}
        for layer in range(self._layers):
            at = f"layers.{layer}."
            for name, parts in {
                "qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
                "gate_up": ("mlp.gate", "mlp.up"),
            }.items():
                joined = torch.cat([self._weights[f"{at}{part}_proj.weight"] for part in parts], dim=1)
                self._weights[at + name] = joined
        width = config.hidden_size // self._heads
        rates = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2) / width)
        angles = torch.arange(config.max_position_embeddings)[:, None] * torch.cat([rates, rates])[None]
        self._cos, self._sin = angles.cos(), angles.sin()

    def prefill(self, state: _CacheState, ids: torch.Tensor) -> torch.Tensor:
        """Compute each prompt once, repeat it for its completions, and return their first logits (N, R, V)."""
        count, questions, width = ids.shape
        positions = (state.known.cumsum(-1) - 1).clamp(min=0)
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        mask = (causal & state.known[..., None, :])[:, :, None]
        mask |= torch.eye(width, dtype=torch.bool)  # padding sees itself, so that no row of the softmax is empty
        hidden = self._embed(ids.flatten(1)).view(count, questions, width, -1)
        for layer in range(self._layers):
            query, key, value = self._attention_inputs(layer, hidden, positions)
            hidden = self._layer(layer, hidden, functional.scaled_dot_product_attention(query, key, value, mask))
            room = (0, 0, 0, state.length)
            state.keys.append(functional.pad(key.repeat_interleave(state.n, 1), room))
            state.values.append(functional.pad(value.repeat_interleave(state.n, 1), room))
        known = state.known.repeat_interleave(state.n, 1)
        state.mask = functional.pad(known, (0, state.length))
        state.next = known.sum(-1)
        return self._logits(hidden[:, :, -1]).repeat_interleave(state.n, 1)

    def step(self, state: _CacheState, tokens: torch.Tensor) -> torch.Tensor:
        """Take one more token of each row, (N, R), and return the logits of the next, (N, R, V)."""
        at = state.filled
        state.mask[:, :, at] = True
        mask = state.mask[:, :, None, None, : at + 1]
        hidden = self._embed(tokens)[:, :, None]
        for layer in range(self._layers):
            query, key, value = self._attention_inputs(layer, hidden, state.next[..., None])
            state.keys[layer][:, :, :, at] = key[:, :, :, 0]
            state.values[layer][:, :, :, at] = value[:, :, :, 0]
            keys, values = (kept[layer][:, :, :, : at + 1] for kept in (state.keys, state.values))
            hidden = self._layer(layer, hidden, functional.scaled_dot_product_attention(query, keys, values, mask))
        state.filled += 1
        state.next = state.next + 1
        return self._logits(hidden[:, :, 0])

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self._weights["embed_tokens.weight"][torch.arange(len(ids))[:, None], ids]

    def _attention_inputs(
        self, layer: int, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query, key and value (N, R, H, T, D) of hidden states (N, R, T, W) at positions (N, R, T)."""
        at = f"layers.{layer}."
        normed = self._norm(hidden, at + "input_layernorm.weight")
        count, rows, width, _ = hidden.shape
        query, key, value = (
            part.view(count, rows, width, self._heads, -1).transpose(2, 3)
            for part in self._linear(normed, at + "qkv").chunk(3, -1)
        )
        cos, sin = self._cos[positions][:, :, None], self._sin[positions][:, :, None]
        return query * cos + _turned(query) * sin, key * cos + _turned(key) * sin, value

    def _layer(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        at = f"layers.{layer}."
        hidden = hidden + self._linear(attended.transpose(2, 3).flatten(3), at + "self_attn.o_proj.weight")
        gate, up = self._linear(self._norm(hidden, at + "post_attention_layernorm.weight"), at + "gate_up").chunk(2, -1)
        return hidden + self._linear(functional.silu(gate) * up, at + "mlp.down_proj.weight")

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._linear(self._norm(hidden[:, :, None], "norm.weight"), "embed_tokens.weight")[:, :, 0]

    def _norm(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self._epsilon)
        return self._weights[name][:, None, None] * (hidden * scale)

    def _linear(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        """Multiply hidden states (N, R, T, W) by each model's matrix (N, out, W)."""
        rows = hidden.flatten(1, 2)
        return torch.bmm(rows, self._weights[name].transpose(1, 2)).view(*hidden.shape[:3], -1)


def _turned(states: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, -1)
    return torch.cat([-second, first], -1)
