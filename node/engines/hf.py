"""Rollouts by transformers, in the trainer's process.

It calls `generate` of the very model that is being trained. On a GPU with FlashAttention it uses continuous batching
(`generate_batch`): keys and values in pages, CUDA graphs, and a next row as soon as one ends. Without FlashAttention
each row would look at the pages of all others. Continuous batching computes in the precision of the weights. Where the
policy's weights are float32 and its products bfloat16, a copy of the weights in bfloat16 generates. It takes 2 bytes a
weight and is brought up to date before each round.

If products are bfloat16 and weights float32, torch's autocast rounds a trained weight once a batch, and a frozen one
once a token. So the copy that generates ahead has its linear layers in bfloat16, and frozen weights pass for trained
ones while they generate.
"""

import copy
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
import torch
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils import is_flash_attn_2_available

from node.config import EngineConfig
from node.engines import EngineError, Generated, SamplingParams, seed_of_prompt, seeds_of_rows
from node.errors import NonFiniteError, UserError
from node.policy.detection import shape_of
from node.policy.load import LARGE, Policy
from node.policy.memory import cache_bytes, rows_at_once
from node.processes.machine import free_memory, is_out_of_memory

PAGE = 32  # tokens of a page of keys and values
CLOSE_S = 10.0  # seconds that a batch in work may take to end; it looks once a token
BATCH_TOKENS = 4096  # tokens of prompts and completions that go through the model at once
_REPEATABLE = (DynamicLayer, DynamicSlidingWindowLayer)

log = structlog.get_logger()


def make(config: EngineConfig, policy: Policy, folder: Path) -> "HfEngine":
    """Return the engine, which generates with what the trainer has."""
    paged = policy.model.device.type == "cuda" and is_flash_attn_2_available()
    return HfEngine(policy, paged=paged, ahead=config.ahead > 0)


class HfEngine:
    """Generates in the trainer's process.

    On a CPU each completion is a function of (weights, prompt, sampling, seed), up to rounding: it has random numbers
    of its own, whatever is generated beside it. Continuous batching draws all from one stream instead. If memory does
    not suffice for all rows at once, half as many are generated at once, for this engine's life.

    Args:
        policy: the model, its tokenizer and its end-of-text tokens.
        paged: generate by continuous batching, as far as the model can.
        ahead: the policy is trained while this generates: by a copy, and with log-probabilities.
    """

    def __init__(self, policy: Policy, *, paged: bool = False, ahead: bool = False) -> None:
        self._policy = policy
        self._paged = paged
        self._ahead = ahead
        self._most = sys.maxsize  # rows at once
        self._working = threading.Lock()  # held by a batch in work
        self._closed = False
        self._model: Any = policy.model
        narrow = policy.bf16 and policy.model.dtype == torch.float32
        if ahead or (paged and narrow):
            self._model = copy.deepcopy(policy.model).requires_grad_(False)
        if paged and narrow:
            self._model = self._model.to(torch.bfloat16)
        elif ahead and narrow:
            _round_linear_layers(self._model)

    def load(self, version: int) -> None:
        """Bring the copy up to date, if there is one: otherwise the trainer's weights are this engine's."""
        if self._model is not self._policy.model:
            ours, theirs = (list(_weights(model)) for model in (self._model, self._policy.model))
            with torch.no_grad():
                torch._foreach_copy_(ours, theirs)

    def rest(self) -> None:
        """Give the device's memory back that torch keeps for the next generation."""
        if self._paged and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self) -> None:
        """End a batch in work on another thread: a process whose thread is in torch's code when it ends is aborted."""
        self._closed = True
        if self._working.acquire(timeout=CLOSE_S):
            self._working.release()

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        """Return `n` completions for each prompt; see `RolloutEngine.generate`."""
        return self.generate_from([seed_of_prompt(seed, at) for at in range(len(prompts))], prompts, n, sampling)

    def generate_from(
        self, seeds: Sequence[int], prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams
    ) -> list[list[Generated]]:
        """Return `n` completions for each prompt: number i of one from its seed plus i."""
        if not prompts:
            return []
        with self._working, _evaluating(self._model):
            if self._paged and (made := self._by_pages([row for row in prompts for _ in range(n)], sampling, seeds[0])):
                return [made[at : at + n] for at in range(0, len(made), n)]
            self._most = min(self._most, self._rows_that_fit(prompts, sampling))
            # One context: weights are converted once.
            with self._policy.autocast(), _rounded_once(self._model), _rows_gathered(self._model):
                return self._in_parts(seeds, prompts, n, sampling)

    def _rows_that_fit(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> int:
        """Return for how many rows the keys and values fit their part of the GPU."""
        if self._model.device.type != "cuda":
            return sys.maxsize
        longest = max(map(len, prompts)) + sampling.max_completion_length
        total = torch.cuda.get_device_properties(self._model.device).total_memory
        narrow = 2 if self._policy.bf16 else self._model.dtype.itemsize
        return rows_at_once(longest * _token_bytes(self._model, narrow), total)

    def _in_parts(
        self, seeds: Sequence[int], prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams
    ) -> list[list[Generated]]:
        """Generate for all prompts at once, or in halves where the memory does not suffice for that.

        Raises:
            UserError: it does not suffice for one completion.
        """
        rows, half = [prompt for prompt in prompts for _ in range(n)], (len(prompts) + 1) // 2
        if len(rows) <= self._most:
            try:
                made = self._batch(seeds_of_rows(seeds, n), rows, n, sampling)
                return [made[at : at + n] for at in range(0, len(made), n)]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(rows) == 1:
                    raise UserError(
                        "out of memory for one completion: bound texts by engine.max_prompt_length and "
                        "engine.max_completion_length, or choose a smaller model"
                    ) from error
            free_memory()
            self._most = len(rows) // 2
            log.warning("out of memory: fewer completions are generated at once", rows=self._most)
        if len(prompts) > 1:
            parts = (slice(half), slice(half, None))
            return [group for part in parts for group in self._in_parts(seeds[part], prompts[part], n, sampling)]
        [first] = self._in_parts(seeds, prompts, n - n // 2, sampling)
        [second] = self._in_parts([seeds[0] + len(first)], prompts, n // 2, sampling)
        return [first + second]

    def _by_pages(self, rows: Sequence[Sequence[int]], sampling: SamplingParams, seed: int) -> list[Generated]:
        """Return a completion for each row by continuous batching; an empty list if the model cannot, now and later.

        Each row is a request of its own: children of one request (`num_return_sequences`) begin with the same tokens in
        transformers 5.24, so they are not drawn apart.
        """
        model = self._model
        pages = sum(math.ceil((len(row) + sampling.max_completion_length) / PAGE) + 1 for row in rows)
        batching = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=min(pages, _pages_that_fit(model)),
            max_batch_tokens=BATCH_TOKENS,
            seed=seed % 2**63,
            return_logprobs=self._ahead and sampling.top_p == 1,
        )
        attention = model.config._attn_implementation
        found: Mapping[str, Any] = {}
        reason = "some rows did not come back"
        try:
            with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
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
        if len(found) == len(rows) and all(output.error is None for output in found.values()):
            return [
                _completion(self._policy, list(output.generated_tokens), output.logprobs) for output in found.values()
            ]
        reason = next((output.error for output in found.values() if output.error), reason)
        log.warning("generates without continuous batching from here on", reason=reason)
        self._paged = False
        return []

    def _batch(
        self, seeds: Sequence[int], rows: Sequence[Sequence[int]], n: int, sampling: SamplingParams
    ) -> list[Generated]:
        policy, device = self._policy, self._model.device
        width = max(map(len, rows))
        pad = policy.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        draw = SeededTokens(
            seeds, sampling, device, lambda: self._closed, logprobs=self._ahead and sampling.temperature > 0
        )
        output = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=_generation_config(policy, replace(sampling, temperature=0)),  # the likeliest
            logits_processor=LogitsProcessorList([draw]),
            **self._prefilled(ids[::n], mask[::n], n),
        )
        found = draw.logprobs_of(output)
        return [
            _completion(policy, tokens, logprobs)
            for tokens, logprobs in zip(output[:, width:].tolist(), found, strict=True)
        ]

    @torch.no_grad()
    def _prefilled(self, ids: torch.Tensor, mask: torch.Tensor, n: int) -> dict[str, Cache]:
        """Return the cache of all but the last token of each prompt, computed once and repeated `n` times.

        Nothing for a small model, which saves no time by it, and for an architecture that keeps
        more than keys and values.
        """
        model, known = self._model, ids.size(1) - 1
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


def _weights(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield each layer's weights; those of tied layers as often as there are layers."""
    return (weight for layer in model.modules() for weight in layer.parameters(recurse=False))


def _round_linear_layers(model: torch.nn.Module) -> None:
    """Round the matrices of linear layers to bfloat16, as autocast does; embeddings and norms stay as they are."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):  # a head that is tied to embeddings has its own from here on
            layer.weight = torch.nn.Parameter(layer.weight.to(torch.bfloat16), requires_grad=False)


@contextmanager
def _rounded_once(model: torch.nn.Module) -> Iterator[None]:
    """Have autocast keep, within, what it rounds of frozen weights, too: it does so where a gradient is wanted."""
    frozen = [weight for weight in model.parameters() if not weight.requires_grad and weight.dtype == torch.float32]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def _pages_that_fit(model: Any) -> int:
    """Return how many pages of keys and values fit four fifths of the memory that is free on the model's device."""
    if model.device.type != "cuda":
        return 1 << 30
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, free * 4 // 5 // (_token_bytes(model, model.dtype.itemsize) * PAGE))


def _token_bytes(model: Any, width: int) -> int:
    """Return what the keys and values of a token take, in numbers of `width` bytes."""
    layers, *_, kv_width = shape_of(model.config.get_text_config())
    return cache_bytes(layers, kv_width, width)


def random_numbers(seeds: Sequence[int], steps: int) -> torch.Tensor:
    """Return the numbers from 0 to 1, (steps, rows), by which each row draws its tokens; each row has a seed."""
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(steps, generator=stream) for stream in streams], dim=1)


def tokens_at(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Look up one token a row, (...), for its number (...) in the sums of its probabilities (..., V)."""
    wide = torch.float32 if probabilities.device.type == "mps" else torch.float64  # Apple's have no float64
    sums = probabilities.cumsum(-1, dtype=wide)
    wanted = numbers.to(wide)[..., None] * sums[..., -1:]
    return torch.searchsorted(sums, wanted, right=True).clamp(max=sums.size(-1) - 1).squeeze(-1)


class SeededTokens(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Draws the token of each row from its logits (B, V), and leaves no other possible.

    Each row has a random number of its own for each step. So its tokens depend on neither the rows beside it nor the
    device.

    It refuses logits with a NaN or infinite row, whose likeliest token would be a wrong one. With
    `logprobs` it notes how likely each sampled token was, one step later, when the token is known. It ends the batch of
    an engine that is closed.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        sampling: SamplingParams,
        device: torch.device,
        closed: Callable[[], bool],
        *,
        logprobs: bool,
    ) -> None:
        self._temperature = sampling.temperature
        self._nucleus = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        self._numbers = iter(random_numbers(seeds, sampling.max_completion_length).to(device))
        self._closed = closed
        self._notes = logprobs
        self._before: torch.Tensor | None = None  # the last step's distribution
        self._found: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._closed():
            raise EngineError("the engine was closed")
        if not scores.amax(-1).isfinite().all():
            raise NonFiniteError
        self._note(input_ids)
        if self._temperature == 0:
            return scores
        scaled = scores.float() / self._temperature
        if self._notes:
            self._before = scaled.log_softmax(-1)
        if self._nucleus is not None:
            scaled = self._nucleus(input_ids, scaled)
        tokens = tokens_at(scaled.softmax(-1), next(self._numbers))
        return torch.full_like(scores, -math.inf).scatter(1, tokens[:, None], 0.0)

    def _note(self, input_ids: torch.Tensor) -> None:
        if self._before is not None:
            self._found.append(self._before.gather(1, input_ids[:, -1:]).squeeze(1))

    def logprobs_of(self, output: torch.Tensor) -> list[list[float]] | list[None]:
        """Return the log-probabilities of each row of `output` (B, T), in nats; None for each without `logprobs`."""
        self._note(output)
        return torch.stack(self._found, dim=1).tolist() if self._found else [None] * len(output)


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


def _completion(policy: Policy, tokens: list[int], logprobs: Sequence[float] | None) -> Generated:
    end = next((at for at, token in enumerate(tokens) if token in policy.eos_token_ids), None)
    length = len(tokens) if end is None else end + 1
    return Generated(
        token_ids=tuple(tokens[:length]),
        text=policy.decode(tokens[:length]),
        finished=end is not None,
        logprobs=tuple(logprobs[:length]) if logprobs else None,
    )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield  # no inference mode: a model may keep tensors from here, and training could not use them
    finally:
        model.train(training)


def _rows_gathered(model: Any) -> AbstractContextManager[Any]:
    """Hand the head, within, rows that lie one after another.

    After a prompt only the last place of each row is asked for, so there are gaps between rows. On a CPU torch then
    copies frozen weights of the head once a row.
    """
    head = model.get_output_embeddings()
    if head is None:
        return nullcontext()
    handle: AbstractContextManager[Any] = head.register_forward_pre_hook(
        lambda layer, inputs: (inputs[0].contiguous(), *inputs[1:])
    )
    return handle
