"""The tasks of a node: which question comes next in training, and which ones an evaluation asks.

**Turns.** Tasks take turns by their weights (stride scheduling; Waldspurger and Weihl, 1995). The weights w sum to 1,
and an offset u in [0, 1) is drawn for each task. Turn k of a task comes at time (k + u) / w. Question number g is the
g-th of all turns, in the order of their times. So each task has its share at any moment, and the turn at g is computed
without those before it.

**Rows.** A task with a fixed number of rows has an attribute `size`; its row i is `make(i)`. Training goes through the
rows by epochs: each row once, in an order drawn for each epoch, before any row comes again. Every other task draws a
new seed for each turn.

**Seeds that fail.** If `make` raises for a seed, the seed is skipped, and the log says so. If it raises for every seed
that is tried, the task makes no questions: that is a `UserError`, which says why.

**Held-out questions** (`node.tasks.questions`) are skipped in training. A task that brings test questions of its own
lists their ids in an attribute `test_ids`: then these are held out, and no others. If several tasks have one name, what
one of them holds out is held out of all.

**Trained on under another name.** The hash goes by the name of a task, so two data sets may hold out different ones of
the questions that they share. An evaluation leaves out a question that is a training row of another task, by its text.
Questions that are made from seeds cannot be looked through: there only the name tells.
"""

import itertools
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from heapq import heapify, heapreplace
from math import floor
from time import perf_counter
from typing import NamedTuple

import structlog

from node.errors import UserError, one_line
from node.tasks import Item, Task, TaskKey, derive_seed
from node.tasks.environments.episodes import start_of
from node.tasks.questions import DEFAULT_SPLIT, Split, question_id, text_id
from node.tasks.quotations import Quotations
from node.tasks.scoring.verdicts import submit_of

TRIES = 400  # seeds tried for one training question: a family in which so many fail counts as empty
SAMPLE = 256  # questions made to find out whether a family has few different ones
SAMPLE_S = 2.0  # seconds that making them may take
EVALUATION_SEED = 0  # chooses what evaluations ask: the same at all nodes of a swarm, whose scores are compared
MANY = 192  # a family with fewer different ones among them has few questions; one of some 350 has this many

log = structlog.get_logger()


class TrainingQuestion(NamedTuple):
    """A question that training may ask: its task, its seed, and what the task makes of it."""

    task: Task
    seed: int
    item: Item


class RowCounts(NamedTuple):
    """How many rows of a task training asks, how many are held out, and what some of the former, or all, ask."""

    task: Task
    training: int
    held_out: int
    asked: Iterator[Item]


def size_of(task: Task) -> int | None:
    """Return how many rows a task has; None for one that makes a question of any seed."""
    return getattr(task, "size", None)


def test_ids_of(task: Task) -> frozenset[bytes] | None:
    """Return the ids of a task's own test questions; None for one whose questions are split by the hash."""
    return getattr(task, "test_ids", None)


def unshared(task: Task) -> str:
    """Return why a task's groups are not shared with peers; nothing if they are."""
    if getattr(task, "unshared", ""):
        return str(task.unshared)  # type: ignore[attr-defined]
    if start_of(task) is not None and not getattr(task, "replayable", False):
        return "its environment does not say replayable = True, so no peer can check its rewards"
    return ""


def outside(task: Task) -> str:
    """Return what a task was found to pay outside of its range when it was loaded; nothing if nothing was."""
    return getattr(task, "outside", "")


def bare_of(task: Task) -> Task:
    """Return the task that makes the same questions without this node's examples (`node.tasks.prompting`)."""
    return getattr(task, "bare", task)


class HeldOut:
    """Tells which questions of a node's tasks are held out for evaluation. It never changes.

    Tasks of one name share their questions: what one of them holds out, all of them do.
    """

    def __init__(self, tasks: Iterable[Task], split: Split = DEFAULT_SPLIT) -> None:
        self.split = split
        self._tests: dict[str, frozenset[bytes]] = {}
        self._by_hash: set[str] = set()
        for task in tasks:
            name, tests = task.key.name, test_ids_of(task)
            if tests is None:
                self._by_hash.add(name)
            else:
                self._tests[name] = self._tests.get(name, frozenset()) | tests

    def __call__(self, name: str, question: str) -> bool:
        """Tell whether a question of the tasks named `name` is held out."""
        if name in self._tests and question_id(name, question) in self._tests[name]:
            return True
        return name in self._by_hash and self.split.holds_out(name, question)


class TaskSet:
    """The tasks of a node, each with the relative frequency of its questions. It never changes.

    Args:
        tasks: each with its weight.
        split: which questions are held out for evaluation.
        trained: the tasks that are trained on, if they are others: an evaluation leaves their questions out.

    Raises `UserError` when the set is empty or holds one task twice.
    """

    def __init__(
        self, tasks: Sequence[tuple[Task, float]], split: Split = DEFAULT_SPLIT, trained: "TaskSet | None" = None
    ) -> None:
        if not tasks:
            raise UserError("no tasks: list at least one under [[tasks]]")
        self.tasks: tuple[Task, ...] = tuple(task for task, _ in tasks)
        self._held_out = HeldOut(self.tasks, split)
        several = len({task.key.name for task in self.tasks}) > 1  # tasks of one name hold out the same
        self._trained = trained or (self if several else None)
        self._by_key: dict[TaskKey, Task] = {}
        for task in self.tasks:
            if task.key in self._by_key:
                raise UserError(
                    f"task {task.key.name!r} is listed twice with the same options: list it once, as it is to be asked"
                )
            self._by_key[task.key] = task
        total = sum(weight for _, weight in tasks)
        self._weights = [weight / total for _, weight in tasks]
        self._warned: set[TaskKey] = set()  # the log has said that another task trains on their questions
        self._evaluations: dict[tuple[TaskKey, int, int], tuple[list[Item], Iterator[Item]]] = {}
        self._rows = {
            task.key: _SplitRows(task, size, self._held_out)
            for task in self.tasks
            if (size := size_of(task)) is not None
        }

    def only(self, keep: Callable[[Task], bool]) -> "TaskSet":
        """Return the set of the tasks that `keep` tells to keep.

        Raises:
            UserError: it keeps none.
        """
        kept = [pair for pair in zip(self.tasks, self._weights, strict=True) if keep(pair[0])]
        return self if len(kept) == len(self.tasks) else TaskSet(kept, self.split)

    @property
    def split(self) -> Split:
        """Which questions are held out for evaluation, unless a task has test questions of its own."""
        return self._held_out.split

    @property
    def scores_in_workers(self) -> bool:
        """Whether a task here scores in worker processes, so that this process can generate meanwhile."""
        return any(submit_of(task) is not None for task in self.tasks)

    def get(self, key: TaskKey) -> Task | None:
        """Return the task of exactly this name, version and configuration."""
        return self._by_key.get(key)

    def shared(self, key: TaskKey) -> Task | None:
        """Return the task of exactly this key, if its groups are shared with peers."""
        task = self.get(key)
        return None if task is None or unshared(task) else task

    def is_held_out(self, task: Task, question: str) -> bool:
        """Tell whether a question of `task` is held out for evaluation."""
        return self._held_out(task.key.name, question)

    def trains_on(self, name: str, question: str) -> bool:
        """Tell whether training on these tasks may ask a question of a task named `name`, as far as that can be told.

        A question is looked for by its text among training rows, and by the split in tasks of its name without rows.
        """
        text = text_id(question)
        return any(
            text in self._rows[task.key].training_texts
            if task.key in self._rows
            else task.key.name == name and not self.is_held_out(task, question)
            for task in self.tasks
        )

    def ask(self, seed: int, number: int, fits: Callable[[Item], bool] = lambda item: True) -> TrainingQuestion | None:
        """Return training question `number` (from 0) of the node with this seed; None if none of `TRIES` fits.

        The same arguments give the same question. It is never a held-out one.

        Raises:
            UserError: the task whose turn it is raises for every seed.
        """
        place, turn = turn_at(self._weights, [_offset(seed, at) for at in range(len(self.tasks))], number)
        task = self.tasks[place]
        for question in _made(task, itertools.islice(self._seeds(task, derive_seed(seed, "task", place), turn), TRIES)):
            if not self.is_held_out(task, question.item.question) and fits(question.item):
                return question
        return None

    def questions(self, seed: int, count: int) -> Iterator[TrainingQuestion]:
        """Yield the first `count` training questions of the node with this seed.

        Raises:
            UserError: a task has none.
        """
        for number in range(count):
            question = self.ask(seed, number)
            if question is None:
                raise UserError(f"no question for training is found among {TRIES}: list a task with more questions")
            yield question

    def evaluation(self, task: Task, seed: int, count: int) -> Iterator[Item]:
        """Yield different held-out questions of `task`, in an order drawn by `seed`.

        If the task has no rows, the search for `count` questions ends after a bounded number of seeds, since a small
        family has fewer. The questions found are kept: a node asks them again in every evaluation.

        Raises:
            UserError: the task raises for every seed.
        """
        items, more = self._evaluations.setdefault((task.key, seed, count), ([], self._evaluation(task, seed, count)))
        for at in itertools.count():
            if at == len(items):
                item = next(more, None)
                if item is None:
                    return
                items.append(item)
            yield items[at]

    def quotations(self, count: int) -> Quotations:
        """Return what finds the questions of `listed_held_out` in texts."""
        return Quotations(self.listed_held_out(count))

    def listed_held_out(self, count: int) -> Iterator[Item]:
        """Yield the held-out questions that can be listed.

        These are all of a task that has rows, and of any other task the first `count` that an evaluation asks.

        Raises:
            UserError: a task raises for every seed.
        """
        for task in self.tasks:
            if task.key in self._rows:
                yield from (question.item for question in _made(bare_of(task), self._rows[task.key].evaluation))
            elif count:
                yield from itertools.islice(self.evaluation(task, EVALUATION_SEED, count), count)

    def _evaluation(self, task: Task, seed: int, count: int) -> Iterator[Item]:
        rows = self._rows.get(task.key)
        if rows is not None:
            order = random.Random(derive_seed("eval", seed, *task.key)).sample(rows.evaluation, len(rows.evaluation))
            seeds: Iterable[int] = order
        else:
            tries = TRIES + round(8 * count / max(self.split.share, 1e-3)) * (self.split.share > 0)
            seeds = (derive_seed("eval", seed, *task.key, index) for index in range(tries))
        for question in _made(task, self._different(bare_of(task), seeds)):
            if self._may_evaluate(task, question.item.question):  # a third party's task may make another one of a seed
                yield question.item

    def _different(self, task: Task, seeds: Iterable[int]) -> Iterator[int]:
        """Yield the seeds whose questions an evaluation may ask, one seed for each question."""
        seen: set[bytes] = set()
        for question in _made(task, seeds):
            key = question_id(task.key.name, question.item.question)
            if key not in seen and self._may_evaluate(task, question.item.question):
                seen.add(key)
                yield question.seed

    def _may_evaluate(self, task: Task, question: str) -> bool:
        if not self.is_held_out(task, question):
            return False
        if self._trained is None or not self._trained.trains_on(task.key.name, question):
            return True
        if task.key not in self._warned:
            self._warned.add(task.key)
            log.warning(
                "held-out questions that another task trains on are not asked", task=task.key.name, first=question[:80]
            )
        return False

    def rows(self, most: int) -> Iterator[RowCounts]:
        """Yield how the rows of each task that has rows are split, with `most` drawn items where training has more."""
        for task in self.tasks:
            if (rows := self._rows.get(task.key)) is not None:
                count = len(rows.training)
                drawn = random.Random(derive_seed("rows", *task.key)).sample(rows.training, min(most, count))
                yield RowCounts(task, count, len(rows.evaluation), (question.item for question in _made(task, drawn)))

    def small_tasks(self) -> Iterator[str]:
        """Yield a line for each task with few different questions, or with all or none of them held out.

        It says how many different questions there are, and how many of them are held out.

        Raises:
            UserError: a task raises for every seed.
        """
        for task in self.tasks:
            rows = self._rows.get(task.key)
            different, tried = _sampled(bare_of(task)) if rows is None else (rows.different, SAMPLE)
            held = sum(self.is_held_out(task, question) for question in different.values())
            is_one_part = held in (0, len(different)) if rows is None else not (rows.training and rows.evaluation)
            if len(different) * SAMPLE < MANY * tried or (is_one_part and len(different) >= MANY):
                among = f" among {tried} tried" if rows is None else ""
                yield f"{task.key.name}: {len(different)} different questions{among}: {held} are held out"

    def _seeds(self, task: Task, seed: int, turn: int) -> Iterator[int]:
        """Yield the seed of the question for turn `turn` of a task, then seeds of questions to ask in its place."""
        rows = self._rows.get(task.key)
        if rows is None:
            for attempt in range(TRIES):
                yield derive_seed("question", seed, turn, attempt)
        elif rows.training:
            epoch, at = divmod(turn, len(rows.training))
            yield rows.training[_order(seed, epoch, len(rows.training))[at]]
            rng = random.Random(derive_seed("instead", seed, turn))
            while True:
                yield rng.choice(rows.training)


class _SplitRows:
    """The rows of a task that has a fixed number of them, split into training and evaluation."""

    def __init__(self, task: Task, size: int, held_out: HeldOut) -> None:
        self._task = bare_of(task)
        self._size = size
        self._held_out = held_out

    @cached_property
    def _parts(self) -> "tuple[array[int], array[int]]":
        training, evaluation = array("Q"), array("Q")
        for question in _made(self._task, range(self._size)):
            held = self._held_out(self._task.key.name, question.item.question)
            (evaluation if held else training).append(question.seed)
        return training, evaluation

    @property
    def training(self) -> "array[int]":
        return self._parts[0]

    @cached_property
    def training_texts(self) -> frozenset[bytes]:
        """The ids of the texts of all training rows."""
        return frozenset(text_id(question.item.question) for question in _made(self._task, self.training))

    @property
    def evaluation(self) -> "array[int]":
        return self._parts[1]

    @property
    def different(self) -> dict[bytes, str]:
        """The texts of the different questions, by id; no more than `MANY` if both parts have rows."""
        texts: dict[bytes, str] = {}
        for question in _made(self._task, range(self._size)):
            texts[question_id(self._task.key.name, question.item.question)] = question.item.question
            if len(texts) == MANY and self.training and self.evaluation:
                break
        return texts


def _made(task: Task, seeds: Iterable[int]) -> Iterator[TrainingQuestion]:
    """Yield what a task makes of each seed, and skip the seeds for which it raises.

    Raises:
        UserError: it raises for every seed.
    """
    raised: list[str] = []
    count = 0
    for seed in seeds:
        try:
            item = task.make(seed)
        except Exception as error:  # noqa: BLE001  # a third party's task may raise anything
            reason = one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
            if not raised:  # one line for all: it may raise for hundreds of seeds
                log.warning("a question is passed over", task=task.key.name, seed=seed, reason=reason)
            raised.append(reason)
        else:
            count += 1
            yield TrainingQuestion(task, seed, item)
    if raised and not count:
        raise UserError(f"task {task.key.name!r} makes no question, of {len(raised)} seeds tried: {raised[0]}")


@lru_cache(maxsize=64)  # several data sets, and several nodes in one process
def _order(seed: int, epoch: int, size: int) -> "array[int]":
    """Return the order of `size` rows in an epoch."""
    order = array("Q", range(size))
    random.Random(derive_seed("epoch", seed, epoch)).shuffle(order)
    return order


def _sampled(task: Task) -> tuple[dict[bytes, str], int]:
    """Return the texts of the different questions of up to `SAMPLE` seeds, by id, and how many questions were made."""
    texts: dict[bytes, str] = {}
    until = perf_counter() + SAMPLE_S
    count = 0
    for question in _made(task, (derive_seed("few", *task.key, index) for index in range(SAMPLE))):
        count += 1
        texts[question_id(task.key.name, question.item.question)] = question.item.question
        if perf_counter() > until:
            break
    return texts, count


def turn_at(weights: Sequence[float], offsets: Sequence[float], number: int) -> tuple[int, int]:
    """Return which task has the turn of question `number`, and how many turns it had before.

    The module's formula says so.

    Args:
        weights: positive, of sum 1.
        offsets: in [0, 1), one for each weight.
        number: from 0.
    """
    # Up to a time T there were sum of floor(w T - u) + 1 turns. That is T, give or take one for each task. So the count
    # starts that much earlier, and by one more: rounding must not count a turn later than the one looked for.
    time = float(number - len(weights) - 1)
    had = [max(0, floor(weight * time - offset) + 1) for weight, offset in zip(weights, offsets, strict=True)]
    coming = [((had[at] + offsets[at]) / weights[at], at) for at in range(len(weights))]
    heapify(coming)
    for _ in range(number - sum(had)):
        at = coming[0][1]
        had[at] += 1
        heapreplace(coming, ((had[at] + offsets[at]) / weights[at], at))
    at = coming[0][1]
    return at, had[at]


@lru_cache(maxsize=1024)
def _offset(seed: int, place: int) -> float:
    return derive_seed(seed, "offset", place) / 2**63
