"""Rollouts by transformers, in the trainer's process.

By `generate`, with the very model that is being trained. On a GPU with FlashAttention by continuous batching
(`generate_batch`): keys and values in pages, CUDA graphs, and the next row begins as soon as one ends. Without
FlashAttention each row would look at the pages of all others. The model computes in its own precision there: so a model
that trains in float32 and computes in bfloat16 has a copy in bfloat16 that generates. It takes 2 bytes a weight and is
brought up to date before each round.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
import torch
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils import is_flash_attn_2_available

from node.config import EngineConfig, NodeConfig
from node.engines import Beside, Generated, SamplingParams
from node.errors import NonFiniteError
from node.policy.detection import shape_of
from node.policy.footprint import Machine, ModelSize, Part
from node.policy.load import LARGE, Policy

SHARES_WEIGHTS = True
PAGE = 32  # tokens of a page of keys and values
BATCH_TOKENS = 4096  # tokens of prompts and completions that go through the model at once
_REPEATABLE = (DynamicLayer, DynamicSlidingWindowLayer)

log = structlog.get_logger()


def make(config: EngineConfig, policy: Policy, folder: Path) -> "HfEngine":  # others want it
    """Return the engine; see `node.engines.Kind`."""
    return HfEngine(policy, paged=policy.model.device.type == "cuda" and is_flash_attn_2_available())


def missing(config: EngineConfig) -> str:  # others want it
    """Return nothing: transformers is there."""
    return ""


def memory(size: ModelSize, config: NodeConfig, width: int, gpu_memory: int) -> list[Part]:
    """Return the keys and values of a round's completions, and the copy that generates; see `node.engines.Kind`."""
    rows, longest = config.sampling.questions_per_round * config.sampling.completions, config.engine.longest
    cache = rows * longest * size.layers * 2 * size.kv_width * width
    parts = [Part("key-value cache", cache, f"{rows} completions of up to {longest} tokens at once", when="generation")]
    if gpu_memory and width == 2 and config.policy.dtype == "float32":
        parts.append(Part("weights to generate", 2 * size.parameters, "a copy in bfloat16"))
    return parts


def beside(size: ModelSize, machine: Machine, config: EngineConfig) -> Beside:  # others want them
    """Return nothing: it generates with what the trainer has; see `node.engines.Kind`."""
    return Beside(0, 0)


def settings(
    size: ModelSize,  # others want them
    machine: Machine,
    config: EngineConfig,
    resident: int,
) -> dict[str, tuple[Any, str]]:
    """Return nothing: it wants no settings."""
    return {}


class HfEngine:
    """Generates in the trainer's process.

    On a CPU the completions are a function of (weights, prompts, n, sampling, seed). The
    batch takes part in that: prompts are padded to the longest, and one stream of random
    numbers serves all rows.

    Args:
        policy: the model, its tokenizer and its end-of-text tokens.
        paged: generate by continuous batching, as far as the model can.
    """

    def __init__(self, policy: Policy, *, paged: bool = False) -> None:
        self._policy = policy
        self._paged = paged
        self._copy: Any = None
        if paged and policy.bf16 and policy.model.dtype == torch.float32:
            self._copy = copy.deepcopy(policy.model).to(torch.bfloat16).requires_grad_(False)

    def load(self, version: int) -> None:  # the weights say it
        """Bring the copy up to date, if there is one: otherwise the trainer's weights are this engine's."""
        if self._copy is not None:
            with torch.no_grad():
                torch._foreach_copy_(list(self._copy.parameters()), list(self._policy.model.parameters()))

    def rest(self) -> None:
        """Give the device's memory back that torch keeps for the next generation."""
        if self._paged and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Do nothing: the model belongs to the trainer."""

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        """Return `n` completions for each prompt; see `RolloutEngine.generate`."""
        rows = [prompt for prompt in prompts for _ in range(n)]
        if not rows:
            return []
        with _random_stream(self._policy.model.device, seed), _evaluating(self._policy):
            made = (self._paged and self._by_pages(rows, sampling, seed)) or self._padded(rows, n, sampling)
        return [made[at : at + n] for at in range(0, len(made), n)]

    def _padded(self, rows: Sequence[Sequence[int]], n: int, sampling: SamplingParams) -> list[Generated]:
        with self._policy.autocast():  # one context: weights are converted once
            return self._batch(rows, n, sampling)

    def _by_pages(self, rows: Sequence[Sequence[int]], sampling: SamplingParams, seed: int) -> list[Generated]:
        """Return a completion for each row by continuous batching; nothing where the model cannot, from then on.

        Each row is a request of its own: children of one request (`num_return_sequences`) begin with the same tokens in
        transformers 5.24, so they are not drawn apart.
        """
        model = self._policy.model if self._copy is None else self._copy
        pages = sum(math.ceil((len(row) + sampling.max_completion_length) / PAGE) + 1 for row in rows)
        batching = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=min(pages, _pages_that_fit(model)),
            max_batch_tokens=BATCH_TOKENS,
            seed=seed % 2**63,
        )
        attention = model.config._attn_implementation
        found: Mapping[str, Any] = {}
        reason = "some rows did not come back"
        try:
            found = model.generate_batch(
                [list(row) for row in rows],
                generation_config=_generation_config(self._policy, sampling),
                continuous_batching_config=batching,
                warmup=False,
            )
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        finally:
            model.set_attn_implementation(attention)  # it was switched to FlashAttention; the update has a mask of ours
        if len(found) == len(rows) and all(one.error is None for one in found.values()):
            return [_completion(self._policy, list(one.generated_tokens)) for one in found.values()]
        reason = next((one.error for one in found.values() if one.error), reason)
        log.warning("generates without continuous batching from here on", reason=reason)
        self._paged = False
        return []

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


def _pages_that_fit(model: Any) -> int:
    """Return how many pages of keys and values fit four fifths of the memory that is free on the model's device."""
    if model.device.type != "cuda":
        return 1 << 30
    free, _ = torch.cuda.mem_get_info(model.device)
    layers, *_, kv_width = shape_of(model.config.get_text_config())
    return max(1, free * 4 // 5 // (layers * 2 * kv_width * model.dtype.itemsize * PAGE))


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
