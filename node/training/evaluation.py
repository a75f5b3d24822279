"""Scoring a policy on questions that training never asks.

The questions' seeds are derived by hash under a label of their own, so no training seed
can give them; a task with few distinct questions may still repeat one. Every task is
asked equally often, whatever its weight in training.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import comb, sqrt
from typing import Any

from node.engines import RolloutEngine, SamplingParams
from node.policy import Policy
from node.tasks import Item, Task, TaskSet, derive_seed

Z_95 = 1.959964
BATCH = 64
SOLVED = 1.0 - 1e-6


@dataclass(frozen=True, slots=True)
class Score:
    """What a policy did on one task, or on all.

    `accuracy` is the share of completions with full reward, within [`low`, `high`]: a Wilson
    interval at 95 % that counts questions, not completions, since completions of one
    question are not independent (with several it errs on the wide side). `pass_at`
    estimates, for each k, how often at least one of k completions earns full reward.
    """

    task: str
    questions: int
    completions: int
    accuracy: float
    low: float
    high: float
    reward: float
    pass_at: dict[int, float]
    finished: float
    mean_length: float


@dataclass(frozen=True, slots=True)
class EvalReport:
    """Scores by task, and over all of them together."""

    seed: int
    tasks: tuple[Score, ...]
    overall: Score

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, fit for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """One question: the reward, the end and the length in tokens of each completion."""

    rewards: tuple[float, ...]
    finished: tuple[bool, ...]
    lengths: tuple[int, ...]


def evaluate(
    policy: Policy,
    engine: RolloutEngine,
    tasks: TaskSet,
    *,
    count: int,
    seed: int,
    sampling: SamplingParams,
    completions: int = 1,
) -> EvalReport:
    """Ask `count` held-out questions of each task, `completions` times each, and score the answers.

    The same arguments give the same questions and, on an engine that is deterministic,
    the same report. Raises `ValueError` unless `count` and `completions` are positive.
    """
    if count < 1 or completions < 1:
        raise ValueError("count and completions must be at least 1")
    answered = [
        list(_ask(policy, engine, task, held_out(task, seed, count), seed, sampling, completions))
        for task in tasks.tasks
    ]
    scores = tuple(_score(task.key.name, one) for task, one in zip(tasks.tasks, answered, strict=True))
    return EvalReport(seed, scores, _score("all", [outcome for one in answered for outcome in one]))


def held_out(task: Task, seed: int, count: int) -> list[Item]:
    """Return the questions that evaluation `seed` asks of `task`."""
    return [task.make(derive_seed("eval", seed, *task.key, index)) for index in range(count)]


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a rate from `successes` in `trials` (Wilson, 1927)."""
    rate = successes / trials
    square = Z_95**2 / trials
    centre = (rate + square / 2) / (1 + square)
    margin = sqrt(square * (rate * (1 - rate) + square / 4)) / (1 + square)
    return max(0.0, centre - margin), min(1.0, centre + margin)


def pass_at_k(solved: int, completions: int, k: int) -> float:
    """Return the unbiased estimate that one of `k` completions solves a question (Chen et al., 2021, equation 1)."""
    return 1.0 - comb(completions - solved, k) / comb(completions, k)


def _ask(
    policy: Policy,
    engine: RolloutEngine,
    task: Task,
    items: Sequence[Item],
    seed: int,
    sampling: SamplingParams,
    completions: int,
) -> Iterator[_Outcome]:
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        prompts = [policy.encode_prompt(item) for item in batch]
        draw = derive_seed("eval-sampling", seed, *task.key, start)
        for item, answers in zip(batch, engine.generate(prompts, completions, sampling, draw), strict=True):
            yield _Outcome(
                rewards=tuple(task.verify(item, answer.text) for answer in answers),
                finished=tuple(answer.finished for answer in answers),
                lengths=tuple(len(answer.token_ids) for answer in answers),
            )


def _score(name: str, outcomes: Sequence[_Outcome]) -> Score:
    questions, completions = len(outcomes), len(outcomes[0].rewards)
    solved = [sum(reward >= SOLVED for reward in outcome.rewards) for outcome in outcomes]
    accuracy = sum(solved) / (questions * completions)
    low, high = wilson_interval(accuracy * questions, questions)
    ks = sorted({completions, *(2**power for power in range(completions.bit_length()))})
    return Score(
        task=name,
        questions=questions,
        completions=completions,
        accuracy=accuracy,
        low=low,
        high=high,
        reward=_mean([reward for outcome in outcomes for reward in outcome.rewards]),
        pass_at={k: _mean([pass_at_k(right, completions, k) for right in solved]) for k in ks},
        finished=_mean([end for outcome in outcomes for end in outcome.finished]),
        mean_length=_mean([length for outcome in outcomes for length in outcome.lengths]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
