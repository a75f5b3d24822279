"""Rollouts by `transformers.generate`, with the very model that is being trained."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from node.engines import Generated, SamplingParams
from node.errors import NonFiniteError
from node.policy.load import LARGE, Policy

_REPEATABLE = (DynamicLayer, DynamicSlidingWindowLayer)


class HfEngine:
    """Generates in the trainer's process and shares its weights: a new version costs nothing.

    On a CPU the completions are a function of (weights, prompts, n, sampling, seed). The
    batch takes part in that: prompts are padded to the longest, and one stream of random
    numbers serves all rows.

    Args:
        policy: the model, its tokenizer and its end-of-text tokens.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def load(self, version: int) -> None:
        """Do nothing: the trainer's weights are this engine's."""

    def close(self) -> None:
        """Do nothing: the model belongs to the trainer."""

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        """Return `n` completions for each prompt; see `RolloutEngine.generate`."""
        rows = [prompt for prompt in prompts for _ in range(n)]
        stream = _random_stream(self._policy.model.device, seed)
        with stream, _evaluating(self._policy), self._policy.autocast():  # one context: weights are converted once
            made = self._batch(rows, n, sampling) if rows else []
        return [made[at : at + n] for at in range(0, len(made), n)]

    def _batch(self, rows: Sequence[Sequence[int]], n: int, sampling: SamplingParams) -> list[Generated]:
        policy = self._policy
        width = max(map(len, rows))
        pad = policy.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=policy.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=policy.model.device)
        output = policy.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=_generation_config(policy, sampling),
            logits_processor=LogitsProcessorList([_Finite()]),
            **self._prefilled(ids[::n], mask[::n], n),
        )
        return [_completion(policy, tokens) for tokens in output[:, width:].tolist()]

    @torch.no_grad()
    def _prefilled(self, ids: torch.Tensor, mask: torch.Tensor, n: int) -> dict[str, Cache]:
        """Return the cache of all but the last token of each prompt, computed once and repeated `n` times.

        Nothing for a small model, which saves no time by it, and for an architecture that keeps
        more than keys and values.
        """
        model, known = self._policy.model, ids.size(1) - 1
        if n == 1 or known == 0 or model.num_parameters() <= LARGE:
            return {}
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = model(
            input_ids=ids[:, :known],
            attention_mask=mask[:, :known],
            position_ids=positions[:, :known],
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.get("cache")
        if not isinstance(cache, DynamicCache) or any(type(layer) not in _REPEATABLE for layer in cache.layers):
            return {}
        cache.batch_repeat_interleave(n)
        return {"cache": cache}


class _Finite(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Refuses logits (B, V) of which a row makes no distribution: the likeliest token of such a row is a wrong one."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.amax(-1).isfinite().all():
            raise NonFiniteError
        return scores


def _generation_config(policy: Policy, sampling: SamplingParams) -> GenerationConfig:
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        do_sample=sampling.temperature > 0,
        **(drawn if sampling.temperature > 0 else {}),
        max_new_tokens=sampling.max_completion_length,
        eos_token_id=list(policy.eos_token_ids),
        pad_token_id=policy.pad_token_id,
        use_cache=True,
    )


def _completion(policy: Policy, tokens: list[int]) -> Generated:
    end = next((at for at, token in enumerate(tokens) if token in policy.eos_token_ids), None)
    length = len(tokens) if end is None else end + 1
    return Generated(
        token_ids=tuple(tokens[:length]),
        text=policy.decode(tokens[:length]),
        finished=end is not None,
    )


@contextmanager
def _random_stream(device: torch.device, seed: int) -> Iterator[None]:
    """Draw from a stream of `seed` within; outside, all streams go on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        apple = torch.mps.get_rng_state() if device.type == "mps" else None  # fork_rng does not know how
        torch.manual_seed(seed)
        try:
            yield
        finally:
            if apple is not None:
                torch.mps.set_rng_state(apple)


@contextmanager
def _evaluating(policy: Policy) -> Iterator[None]:
    training = policy.model.training
    policy.model.eval()
    try:
        yield  # no inference mode: a model may keep tensors from here, and training could not use them
    finally:
        policy.model.train(training)
