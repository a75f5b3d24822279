"""A batch spread over several engines: vLLM's child processes, or transformers in each process of a node.

- The prompts are cut into parts, whose number depends on the settings alone: at least one for each engine, of at most
  `PART` completions. An engine that is free takes the next part, so a slow one takes fewer.
- Each prompt has a seed of its own, whichever engine has it. If an engine fails, another generates its whole part
  again. So a batch depends on weights, prompts and seeds alone, as far as the engines do.
- An engine is late once a part has taken `PATIENCE` times as long as the slowest one that is done, and `GRACE_S` more.
  If another engine is idle then, the late one is ended, and counts as failed.

What a failure means beyond that is a subclass's matter.
"""

import math
import queue
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import pairwise
from typing import Any, Generic, Protocol, TypeVar

import structlog

from node.engines import EngineError, Generated, SamplingParams, seed_of_prompt
from node.policy.load import Policy
from node.processes.threads import on_daemon
from node.processes.worker_process import Message, WorkerError

PART = 256  # completions: vLLM computes about as many together, and more would wait for their turn
PATIENCE, GRACE_S = 3.0, 30.0

log = structlog.get_logger()


class Engine(Protocol):
    """An engine that is asked one thing at a time; `place` is what the log calls it."""

    place: Mapping[str, Any]

    @property
    def lives(self) -> bool:
        """Whether it has started, and has not failed since."""
        ...

    @property
    def starting(self) -> bool:
        """Whether it starts, and is not to be waited for."""
        ...

    def end(self) -> None:
        """End it, even while it is asked: that fails."""
        ...


E = TypeVar("E", bound=Engine)


class Spread(ABC, Generic[E]):
    """Several engines with the weights of one policy. A subclass says which there are, and what a failure means."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @abstractmethod
    def _left(self) -> Sequence[E]:
        """Return the engines that may be used; raise `EngineError` where there are none."""

    @abstractmethod
    def _ask(self, engine: E, part: Message) -> Message:
        """Return an engine's completions of a part; raise `WorkerError` or `EngineError` where it fails."""

    @abstractmethod
    def _note(self, engine: E, error: WorkerError | EngineError) -> None:
        """Have an engine that failed replaced or left out; raise where the batch cannot go on."""

    def _generate(
        self, engines: int, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        """Return `n` completions for each prompt, in parts for so many engines; see `RolloutEngine.generate`."""
        count = min(len(prompts), max(engines, math.ceil(len(prompts) * n / PART)))
        cuts = [at * len(prompts) // max(1, count) for at in range(count + 1)]
        parts: list[Message] = [
            {
                "call": "generate",
                "prompts": [list(prompt) for prompt in prompts[first:end]],
                "seeds": [seed_of_prompt(seed, at) for at in range(first, end)],
                "n": n,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_completion_length,
                "stop": list(self._policy.eos_token_ids),
                "logprobs": sampling.top_p == 1,  # else vLLM's are of the nucleus: another quantity than the trainer's
            }
            for first, end in pairwise(cuts)
        ]
        return [
            [self._read(*completion) for completion in group]
            for reply in self._spread(parts)
            for group in reply["completions"]
        ]

    def _spread(self, parts: Sequence[Message]) -> list[Message]:
        """Return the replies to these requests, each from an engine that was free for it."""
        replies: dict[int, Message] = {}
        waiting = list(range(len(parts)))
        busy: dict[E, tuple[int, float]] = {}  # its part, and when it began
        ended: queue.SimpleQueue[E] = queue.SimpleQueue()
        slowest = 0.0

        def work(engine: E, part: Message) -> Message:
            try:
                return self._ask(engine, part)
            finally:
                ended.put(engine)

        works: dict[E, Future[Message]] = {}
        while len(replies) < len(parts):
            idle = [engine for engine in self._left() if engine not in busy and not engine.starting]
            alive = [engine for engine in idle if engine.lives]
            ready = alive if alive or busy else self._left()  # one that failed is started anew where no other is left
            for engine in ready[: len(waiting)]:
                at = waiting.pop(0)
                busy[engine] = at, time.monotonic()
                works[engine] = on_daemon(partial(work, engine, parts[at]), "engine")
            begun = min(began for _, began in busy.values())
            is_watched = replies and any(engine not in busy for engine in alive)
            due = begun + PATIENCE * slowest + GRACE_S
            try:
                engine = ended.get(timeout=max(0.0, due - time.monotonic()) if is_watched else None)
            except queue.Empty:
                late = next(engine for engine, (_, began) in busy.items() if began == begun)
                log.warning("an engine is late", seconds=round(time.monotonic() - begun), **late.place)
                late.end()  # so that its call fails
                engine = ended.get()
            at, began = busy.pop(engine)
            done = works.pop(engine)
            if isinstance(error := done.exception(), WorkerError | EngineError):
                waiting.insert(0, at)
                self._note(engine, error)
            elif error is not None:
                raise error
            else:
                replies[at] = done.result()
                slowest = max(slowest, time.monotonic() - began)
        return [replies[at] for at in range(len(parts))]

    def _read(self, tokens: list[int], logprobs: list[float] | None) -> Generated:
        return Generated(
            token_ids=tuple(tokens),
            text=self._policy.decode(tokens),
            finished=bool(tokens) and tokens[-1] in self._policy.eos_token_ids,
            logprobs=None if logprobs is None else tuple(logprobs),
        )
