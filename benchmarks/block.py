"""Our side of the comparisons: some rounds of a node, timed one by one."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from node.config import NodeConfig
from node.engines.hf import HfEngine
from node.loop import Loop
from node.policy.load import Policy, load_policy
from node.rollouts.replay_buffer import ReplayBuffer
from node.swarm.sharing import Exchange
from node.tasks.task_set import TaskSet
from node.telemetry.metrics import MetricsLog
from node.training.trainer import make_trainer

SEED = 0
Stamp = tuple[float, float]


@dataclass(slots=True)
class Block:
    """Some rounds in a row: seconds of each on the clock and of all the process's threads, and the texts made."""

    seconds: list[float]
    cpu_seconds: list[float]
    texts: list[str]


def time_gossamer(config: NodeConfig, tasks: TaskSet, exchange: Exchange, warm: int = 1) -> Block:
    """Run the node's loop and trainer; every round but the first `warm` is timed."""
    with tempfile.TemporaryDirectory() as name, ReplayBuffer(Path(name, "pool.sqlite"), config.pool) as pool:
        folder = Path(name)
        policy = load_policy(config.policy, config.trainer.bf16)
        metrics = MetricsLog(folder / "metrics.jsonl")
        engine = _Listening(policy)
        loop = Loop(config, SEED, policy, engine, tasks, pool, exchange, metrics)
        stamps: list[Stamp] = []

        def on_update(number: int, logs: Any) -> None:
            loop.finish(number, logs)
            stamps.append(stamp())

        make_trainer(policy, config, folder, loop.rounds, on_update).train()
    return block(stamps[warm - 1 :], engine.texts)


def stamp() -> Stamp:
    """Return the clock's and the process's seconds now."""
    return time.perf_counter(), time.process_time()


def block(stamps: Sequence[Stamp], texts: list[str]) -> Block:
    """Return the block whose rounds end at `stamps`; the first only starts the clock."""
    pairs = list(pairwise(stamps))
    return Block([later[0] - one[0] for one, later in pairs], [later[1] - one[1] for one, later in pairs], texts)


class _Listening(HfEngine):
    """The hf engine, and what it said."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.texts: list[str] = []

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        made = super().generate(*args, **kwargs)
        self.texts += [one.text for of_prompt in made for one in of_prompt]
        return made
