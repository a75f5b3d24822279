"""Our side of the comparisons: some rounds of a node, timed one by one."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

from node.config import NodeConfig
from node.engines import Generated, RolloutEngine, SamplingParams, make_engine
from node.engines.hf import HfEngine
from node.loop import Loop
from node.policy.load import Policy, load_policy
from node.rollouts.group_buffer import GroupBuffer
from node.rollouts.rule import Sample
from node.swarm.sharing import GroupExchange
from node.tasks.task_set import TaskSet
from node.telemetry.metrics_file import MetricsLog
from node.training.trainer import make_trainer

SEED = 0
Engine = Literal["generate", "paged", "vllm"]
Stamp = tuple[float, float]


@dataclass(slots=True)
class Block:
    """Some rounds in a row.

    Seconds of each on the clock and of all the process's threads, the texts made, the tokens made in each, and the most
    bytes of a GPU that torch held (0 on a processor).
    """

    seconds: list[float]
    cpu_seconds: list[float]
    texts: list[str]
    tokens: list[int]
    peak_bytes: int


def time_gossamer(
    config: NodeConfig, tasks: TaskSet, exchange: GroupExchange, warm: int = 1, engine_name: Engine = "generate"
) -> Block:
    """Run the node's loop and trainer on its own samples; every round but the first `warm` is timed."""
    forget_peak()
    with tempfile.TemporaryDirectory() as name, GroupBuffer(Path(name, "pool.sqlite"), config.buffer) as buffer:
        folder = Path(name)
        policy = load_policy(config.policy, config.trainer.bf16)
        metrics = MetricsLog(folder / "metrics.jsonl")
        engine = _Listening(_engine(config, policy, folder, engine_name))
        loop = Loop(config, SEED, policy, engine, tasks, buffer, exchange, metrics)
        stamps: list[Stamp] = []
        # What a sample counts is its part of a full round of own groups.
        alone = config.model_copy(update={"sampling": config.sampling.model_copy(update={"external": 0})})

        def own_samples(first: int) -> Iterator[Sequence[Sample]]:
            for samples in loop.rounds(first):
                yield [sample for sample in samples if not sample.external]

        def on_update(number: int, logs: Any) -> None:
            loop.finish(number, logs)
            stamps.append(stamp())

        with closing(engine):
            make_trainer(policy, alone, folder, own_samples, on_update).train()
    return block(stamps[warm - 1 :], engine.texts, engine.tokens[warm:])


def _engine(config: NodeConfig, policy: Policy, folder: Path, name: Engine) -> RolloutEngine:
    if name == "vllm":
        return make_engine(config.engine, policy, folder)
    return HfEngine(policy, paged=name == "paged")


def forget_peak() -> None:
    """Begin to count anew what torch holds of a GPU at most."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def stamp() -> Stamp:
    """Return the clock's and the process's seconds now."""
    return time.perf_counter(), time.process_time()


def block(stamps: Sequence[Stamp], texts: list[str], tokens: list[int]) -> Block:
    """Return the block whose rounds end at `stamps`; the first only starts the clock."""
    pairs = list(pairwise(stamps))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return Block(
        [later[0] - earlier[0] for earlier, later in pairs],
        [later[1] - earlier[1] for earlier, later in pairs],
        texts,
        tokens,
        peak,
    )


class _Listening:
    """An engine, and what it said."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self.texts: list[str] = []
        self.tokens: list[int] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        made = self._engine.generate(prompts, n, sampling, seed)
        self.texts += [completion.text for of_prompt in made for completion in of_prompt]
        self.tokens.append(sum(len(completion.token_ids) for of_prompt in made for completion in of_prompt))
        return made

    def load(self, version: int) -> None:
        self._engine.load(version)

    def rest(self) -> None:
        self._engine.rest()

    def close(self) -> None:
        self._engine.close()
