"""Scoring a policy on questions that training never asks: once (`answer`, `score`), or as it trains (`Evaluations`).

The questions are held out from training (`node.tasks.questions`), and no two of a task are the same. Every task is
asked equally many, whatever its weight in training; a task with fewer different ones is asked all of these. A question
that another task trains on is left out, as far as that can be told (`node.tasks.task_set`). An answer that cannot be
scored here counts as wrong, and is counted. So evaluations ask the same questions, and accuracy never rises because
answers fail.

Nothing here draws from a random state that training uses, so a run has the same numbers with and without evaluations.
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import comb
from typing import Any, NamedTuple

import structlog

from node.config import EvalConfig
from node.engines import RolloutEngine, SamplingParams
from node.engines.episodes import EpisodeQuestion, Episodes, Played, play
from node.errors import UserError
from node.policy.load import Policy
from node.policy.model_card import card_doubts
from node.rollouts.rule import is_right
from node.tasks import Item, Task, derive_seed
from node.tasks.environments.episodes import start_of
from node.tasks.questions import DEFAULT_SPLIT, Split
from node.tasks.scoring.verdicts import Answer, Verdict
from node.tasks.scoring.verdicts import score as judge
from node.tasks.task_set import EVALUATION_SEED, TaskSet
from node.telemetry.evaluations import PASS, wilson_interval
from node.telemetry.metrics_file import MetricsLog, Row
from node.training.budget import RunProgress
from node.training.likelihood import entropies

# The parts of a run at which `eval.every = "marks"` has greedy accuracy: even steps on the logarithmic scale on which
# runs are compared by their compute. The last one is the end.
MARKS = tuple(2 ** (half / 2) for half in range(-8, 1))
HOUR_S = 3600.0  # between evaluations of `eval.every = "hour"`, or so many times what the last one took:
REST = 19  # a twentieth of the time is theirs
SAID_EVERY = 10.0  # seconds between lines of an evaluation that takes long
ROWS = 128  # completions generated at a time: more would be faster on a GPU only, and each has its own key-value cache

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Score:
    """A policy's scores on `questions` different questions of one task, or of all.

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
    unscorable: int  # completions that count as wrong though nobody knows


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
class ScoredQuestion:
    """One question, its completions and the verdict on each."""

    item: Item
    answers: Sequence[Played]
    verdicts: Sequence[Verdict]

    @property
    def rewards(self) -> list[float]:
        """The reward of each completion: 0 if it is unscorable."""
        return [0.0 if verdict is None else verdict for verdict in self.verdicts]

    @property
    def texts(self) -> list[str]:
        """The policy's text in each completion, without white space around it."""
        return ["\n".join(text.strip() for text in answer.texts[::2]) for answer in self.answers]


Answers = dict[str, list[ScoredQuestion]]  # by task


class Decided(NamedTuple):
    """What a program decides of evaluations.

    `when` tells after how many rounds to evaluate, if `eval.every` is set; without it, that decides. `describe` returns
    what is said of the sampled answers, which a row has as `described`; without it, the row is all that is said.
    """

    when: Callable[[int], bool] | None = None
    describe: Callable[[Policy, Answers], Row] | None = None


NOTHING_DECIDED = Decided()


class Evaluations:
    """Evaluates a policy while it trains, whenever the configuration says, and keeps the rows in `evaluations.jsonl`.

    Args:
        config: when, how many questions and how many completions.
        sampling: of pass@k; accuracy is of the likeliest tokens.
        policy: being trained.
        engine: given the policy's weights before each evaluation.
        tasks: whose questions are asked.
        longest: tokens that a prompt may have.
        rows: the file, rewound to the round that the node goes on from.
        decided: goes before `config`.

    `tell` is called with what is said of each evaluation.
    """

    def __init__(
        self,
        config: EvalConfig,
        sampling: SamplingParams,
        policy: Policy,
        engine: RolloutEngine,
        tasks: TaskSet,
        longest: int,
        rows: MetricsLog,
        decided: Decided = NOTHING_DECIDED,
    ) -> None:
        self.tell: Callable[[Row], object] = lambda row: None
        self._when, self._describe = decided
        self._config = config
        self._sampling = sampling
        self._policy = policy
        self._engine = engine
        self._tasks = tasks
        self._longest = longest
        self._rows = rows

    def after_round(self, progress: RunProgress) -> dict[str, float]:
        """Evaluate if it is time to; return figures for the round's metrics."""
        done = progress.rounds
        due = self._is_due(progress) if self._when is None else self._config.every and self._when(done)
        if not due or self._rows.last.get("round") == done:
            return {}
        began = time.perf_counter()
        is_greedy = self._config.every == "hour" or (self._config.every == "marks" and not progress.at_an_end)
        completions = 0 if is_greedy else self._config.completions
        log.info("evaluating", round=done, questions=self._config.count, completions=completions)
        self._engine.load(done)
        found = self._evaluate(completions)
        if not found:
            log.warning("not evaluated: no answer could be scored", round=done)
            return {}
        row = found | {"round": done, "compute": progress.compute, "time": time.time()}
        row["seconds"] = time.perf_counter() - began
        if row["unscorable"]:
            log.warning("answers could not be scored, and count as wrong", round=done, answers=row["unscorable"])
        self._rows.append(row)
        self.tell(row.get("described", row))
        figures = {f"eval/{key}": row[key] for key in ("accuracy", "reward", "pass@1", PASS) if key in row}
        log.info("evaluated", round=done, seconds=row["seconds"], **figures)
        return figures | {"time/eval": row["seconds"]}

    def _is_due(self, progress: RunProgress) -> bool:
        last = self._rows.last
        return is_due(self._config, progress, time.time() - last.get("time", 0.0), last.get("seconds", 0.0))

    def _evaluate(self, completions: int) -> Row:
        likeliest = self._ask(replace(self._sampling, temperature=0.0, top_p=1.0), 1)
        sampled = self._ask(self._sampling, completions) if completions else {}
        if any(is_unscorable(found) for found in (likeliest, sampled) if found):
            return {}
        greedy = score(EVALUATION_SEED, likeliest)
        if not sampled:
            return evaluation_row(greedy, None)
        entropy = mean_entropy(self._policy, sampled, self._sampling.temperature)
        also = {"entropy": entropy, "right_entropy": right_entropy(sampled)}
        row = evaluation_row(greedy, score(EVALUATION_SEED, sampled))
        row |= {name: nats for name, nats in also.items() if nats is not None}
        return row | ({"described": self._describe(self._policy, sampled)} if self._describe else {})

    def _ask(self, sampling: SamplingParams, completions: int) -> Answers:
        return answer(
            self._policy,
            self._engine,
            self._tasks,
            count=self._config.count,
            skip=self._config.skip,
            seed=EVALUATION_SEED,
            sampling=sampling,
            completions=completions,
            longest=self._longest,
        )


def is_due(config: EvalConfig, progress: RunProgress, since: float, took: float) -> bool:
    """Tell whether to evaluate at this place of a run, `since` seconds after an evaluation that `took` so many."""
    if config.every == 0 or progress.at_an_end:
        return config.every != 0
    if config.every == "marks":
        return any(progress.before < mark <= progress.part for mark in MARKS)
    if config.every == "hour":
        return since >= max(HOUR_S, REST * took)
    return config.every != "ends" and progress.rounds % config.every == 0


def evaluation_row(greedy: EvalReport, sampled: EvalReport | None) -> Row:
    """Return two reports on the same questions as a row of `evaluations.jsonl`, without when and how long."""
    overall = greedy.overall
    row: Row = {
        "questions": overall.questions,
        "completions": sampled.overall.completions if sampled else 0,
        "accuracy": overall.accuracy,
        "accuracy_low": overall.low,
        "accuracy_high": overall.high,
        "reward": overall.reward,
        "finished": overall.finished,
        "mean_length": overall.mean_length,
        "unscorable": overall.unscorable + (sampled.overall.unscorable if sampled else 0),
        "tasks": {task.task: {"questions": task.questions, "accuracy": task.accuracy} for task in greedy.tasks},
    }
    if sampled is not None:
        questions = sampled.overall.questions
        for k, rate in sampled.overall.pass_at.items():
            low, high = wilson_interval(rate * questions, questions)
            row |= {f"pass@{k}": rate, f"pass@{k}_low": low, f"pass@{k}_high": high}
        for task in sampled.tasks:
            row["tasks"][task.task] |= {f"pass@{k}": rate for k, rate in task.pass_at.items()}
    return row


def answer(  # noqa: PLR0913  # an evaluation has so many settings
    policy: Policy,
    engine: RolloutEngine,
    tasks: TaskSet,
    *,
    count: int,
    seed: int,
    sampling: SamplingParams,
    completions: int = 1,
    longest: int | None = None,
    skip: int = 0,
) -> Answers:
    """Ask `count` different held-out questions of each task, `completions` times each, and verify the answers.

    Those are asked that follow the first `skip`, or fewer where a task has no more of them. The same arguments give
    the same questions and, on an engine that is deterministic, the same answers. Questions of more than `longest`
    tokens are passed over, as in training. Raises `ValueError` unless `count` and `completions` are positive, and
    `UserError` if no held-out question of a task is short enough.
    """
    if count < 1 or completions < 1:
        raise ValueError("count and completions must be at least 1")

    def fits(item: Item) -> bool:
        return longest is None or len(policy.encode_prompt(item)) <= longest

    return {
        name: list(
            _ask(
                policy,
                engine,
                task,
                held_out(tasks, task, seed, skip + count, fits)[skip:],
                seed,
                sampling,
                completions,
                longest,
            )
        )
        for name, task in zip(_names(tasks.tasks), tasks.tasks, strict=True)
    }


def is_unscorable(answers: Answers) -> bool:
    """Tell whether no answer could be scored."""
    return all(verdict is None for outcomes in answers.values() for found in outcomes for verdict in found.verdicts)


def score(seed: int, answers: Answers) -> EvalReport:
    """Return the scores of what was answered to the questions of evaluation `seed`.

    Raises:
        UserError: no answer could be scored.
    """
    if is_unscorable(answers):
        raise UserError("no answer of the evaluation could be scored: the log says why")
    scores = tuple(_score(task, outcomes) for task, outcomes in answers.items())
    return EvalReport(seed, scores, _score("all", [outcome for outcomes in answers.values() for outcome in outcomes]))


def held_out(
    tasks: TaskSet, task: Task, seed: int, count: int, fits: Callable[[Item], bool] = lambda item: True
) -> list[Item]:
    """Return the questions that evaluation `seed` asks of `task`: the first `count` that fit, or fewer if it has fewer.

    Raises:
        UserError: none fits.
    """
    found = list(islice(filter(fits, tasks.evaluation(task, seed, count)), count))
    if not found:
        raise UserError(
            f"no question of {task.key.name} can be asked in an evaluation: those held out are too long "
            "(engine.max_prompt_length) or trained on by another task, or the task has so few that none is held out; "
            "set eval.tasks, or give a data set test questions of its own (the option test)"
        )
    return found


def doubts(model: str, split: Split) -> Iterator[str]:
    """Yield a line for each known reason for which a policy was taught some of the held-out questions.

    Args:
        model: what the training began from, as `policy.model`.
        split: which questions are held out.
    """
    if model == "builtin" and split != DEFAULT_SPLIT:
        yield (
            "the built-in policy was taught questions of the built-in tasks that this swarm holds out: it was made "
            "with the default split"
        )
    yield from card_doubts(model, split)


def pass_at_k(solved: int, completions: int, k: int) -> float:
    """Return the unbiased estimate that one of `k` completions solves a question (Chen et al., 2021, equation 1)."""
    return 1.0 - comb(completions - solved, k) / comb(completions, k)


def mean_entropy(policy: Policy, answers: Answers, temperature: float) -> float:
    """Return the mean entropy, in nats, of the distributions that the tokens of the first completions were drawn from.

    Of each question one completion is taken: they are alike in distribution, and one costs one pass.
    """
    outcomes = [outcome for found in answers.values() for outcome in found]
    rows = [(policy.encode_prompt(outcome.item), outcome.answers[0].tokens) for outcome in outcomes]
    found = entropies(policy, rows, temperature)
    return sum(float(logprobs.sum()) for logprobs in found) / max(sum(map(len, found)), 1)


def right_entropy(answers: Answers) -> float | None:
    """Return how unlike the right answers to a question are: their collision entropy, in nats (Renyi's, of order 2).

    It is -ln of the chance that two right completions are the same, in the mean over questions, which their pairs
    estimate without bias. It is 0 if each question has one right answer, ln k if each has k that are equally likely. If
    no pair is the same, it is computed as if one were, of the question with the most pairs. None if no question has a
    pair.
    """
    found = [
        Counter(text for text, reward in zip(outcome.texts, outcome.rewards, strict=True) if is_right(reward))
        for outcomes in answers.values()
        for outcome in outcomes
    ]
    counts = [count for count in found if count.total() > 1]
    if not counts:
        return None
    same = _mean([sum(n * (n - 1) for n in count.values()) / (count.total() * (count.total() - 1)) for count in counts])
    least = 1 / (len(counts) * max(comb(count.total(), 2) for count in counts))
    return -math.log(same or least) or 0.0  # not -0


def _ask(
    policy: Policy,
    engine: RolloutEngine,
    task: Task,
    items: Sequence[Item],
    seed: int,
    sampling: SamplingParams,
    completions: int,
    longest: int | None,
) -> Iterator[ScoredQuestion]:
    plays = start_of(task) is not None
    encode = policy.observations(chats=plays)
    size = max(ROWS // completions, 1)
    said = time.monotonic()
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        if time.monotonic() - said > SAID_EVERY:
            said = time.monotonic()
            log.info("evaluating", task=task.key.name, asked=start, questions=len(items))
        asked = [EpisodeQuestion(task, item, policy.encode_prompt(item)) for item in batch]
        draw = derive_seed("eval-sampling", seed, *task.key, start)
        made = play(engine, Episodes(asked, completions, sampling, draw, longest or sys.maxsize, encode))
        pairs = [] if plays else zip(batch, made, strict=True)
        verdicts = iter(judge([Answer(task, item, answer.text) for item, answers in pairs for answer in answers]))
        for item, answers in zip(batch, made, strict=True):
            yield ScoredQuestion(item, answers, [answer.reward if plays else next(verdicts) for answer in answers])


def _score(name: str, outcomes: Sequence[ScoredQuestion]) -> Score:
    questions, completions = len(outcomes), len(outcomes[0].rewards)
    solved = [sum(is_right(reward) for reward in outcome.rewards) for outcome in outcomes]
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
        finished=_mean([answer.finished for outcome in outcomes for answer in outcome.answers]),
        mean_length=_mean([answer.sampled for outcome in outcomes for answer in outcome.answers]),
        unscorable=sum(verdict is None for outcome in outcomes for verdict in outcome.verdicts),
    )


def _names(tasks: Sequence[Task]) -> list[str]:
    """Return the tasks' names, told apart by their configuration where two have the same."""
    names = [task.key.name for task in tasks]
    return [
        name if names.count(name) == 1 else f"{name} {task.key.config[:6]}"
        for name, task in zip(names, tasks, strict=True)
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
