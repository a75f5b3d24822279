"""The tasks of a node: whose turn it is, epochs of rows, and that training and evaluation never meet."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from node.config import TaskConfig
from node.errors import UserError
from node.tasks import UNIT, Item, Task, TaskKey, load_tasks, task_set
from node.tasks.questions import DEFAULT_SPLIT, Split, question_id
from node.tasks.scoring.verdicts import Workers
from node.tasks.task_set import TRIES, TaskSet, turn_at
from node.tasks.verifiers.task_sets import VerifiersTask

SEEDS = st.integers(0, 2**63 - 1)
EVERY_TURN = 150


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """Weights of sum 1, some of them a hundred times others, and an offset for each."""
    raw = draw(st.lists(st.integers(1, 100), min_size=1, max_size=8))
    offset = st.sampled_from([0.0, 0.5]) | st.floats(0, 1, exclude_max=True)
    return [question / sum(raw) for question in raw], draw(st.lists(offset, min_size=len(raw), max_size=len(raw)))


@given(mixtures())
def test_every_task_has_its_share_at_any_moment_within_a_turn_for_each_task(
    mixture: tuple[list[float], list[float]],
) -> None:
    weights, offsets = mixture
    had: Counter[int] = Counter()
    for number in range(EVERY_TURN):
        task, _ = turn_at(weights, offsets, number)
        had[task] += 1
        for place, weight in enumerate(weights):
            assert abs(had[place] - weight * (number + 1)) < 1 + weight * len(weights) + 1e-6


@given(mixtures(), st.integers(0, 10**6))
def test_the_turns_of_a_task_come_one_after_the_other_wherever_one_begins_to_look(
    mixture: tuple[list[float], list[float]], begin: int
) -> None:
    """No turn of a task is left out and none comes twice, and they come in the order of the formula's times."""
    weights, offsets = mixture
    turns = [turn_at(weights, offsets, number) for number in range(begin, begin + 60)]
    for place in range(len(weights)):
        of_task = [turn for task, turn in turns if task == place]
        assert of_task == list(range(of_task[0], of_task[0] + len(of_task))) if of_task else True
        assert begin or not of_task or of_task[0] == 0
    times = [(turn + offsets[task]) / weights[task] for task, turn in turns]
    assert times == sorted(times)


def test_some_of_the_tasks_of_a_set_keep_their_weights_and_what_is_held_out() -> None:
    configs = [
        TaskConfig(name=f"builtin/{name}", weight=weight) for name, weight in (("sums", 3), ("logic", 1), ("bases", 4))
    ]
    tasks = load_tasks(configs, Split(0.5, 7))
    some = tasks.only(lambda task: task.key.name != "builtin/bases")
    asked = Counter(question.task.key.name for question in some.questions(0, 40))
    assert asked == {"builtin/sums": 30, "builtin/logic": 10} and some.split == Split(0.5, 7)
    assert tasks.only(lambda task: True) is tasks


def test_a_task_alone_has_every_turn() -> None:
    assert [turn_at([1.0], [0.25], number) for number in (0, 1, 2, 10**9)] == [(0, 0), (0, 1), (0, 2), (0, 10**9)]


def test_a_question_is_a_function_of_its_number_alone() -> None:
    configs = [TaskConfig(name="builtin"), TaskConfig(name="builtin/arithmetic", weight=0.3)]
    whole = list(load_tasks(configs).questions(5, 60))
    tasks = load_tasks(configs)
    assert [tasks.ask(5, number) for number in reversed(range(60))] == whole[::-1]


@dataclass(frozen=True)
class Rows:
    """`size` rows with a question each; `raises` tells which cannot be made, and `made` notes which were asked for."""

    size: int = 40
    raises: Callable[[int], bool] = lambda row: False
    made: list[int] = field(default_factory=list, compare=False)
    key = TaskKey("rows", 1, "aa")

    def make(self, seed: int) -> Item:
        self.made.append(seed)
        if self.raises(seed):
            raise ValueError(f"no row\n{seed}")
        return Item(f"Which is row {seed % self.size}?", str(seed % self.size))

    def verify(self, item: Item, text: str) -> float:
        return float(text == item.answer)


@dataclass(frozen=True)
class Seeds:
    """A task that makes a question of any seed, `different` ones in all."""

    different: int = 10**9
    raises: Callable[[int], bool] = lambda seed: False
    key = TaskKey("seeds", 1, "aa")

    def make(self, seed: int) -> Item:
        if self.raises(seed):
            raise ValueError("no such\nnumber")
        return Item(f"Which is number {seed % self.different}?", str(seed))

    def verify(self, item: Item, text: str) -> float:
        return float(text == item.answer)


def alone(task: Task, split: Split = DEFAULT_SPLIT) -> TaskSet:
    return TaskSet([(task, 1.0)], split)


def seeds_asked(tasks: TaskSet, seed: int, numbers: Sequence[int]) -> list[int]:
    found = [tasks.ask(seed, number) for number in numbers]
    return [question.seed for question in found if question is not None]


def test_training_goes_through_the_rows_by_epochs_each_in_an_order_of_its_own() -> None:
    tasks, rows = alone(Rows()), Rows()
    training = [row for row in range(40) if not tasks.is_held_out(rows, rows.make(row).question)]
    size = len(training)
    assert 25 < size < 40
    epochs = [seeds_asked(tasks, 3, range(epoch * size, (epoch + 1) * size)) for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [training] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert seeds_asked(tasks, 4, range(size)) != epochs[0], "another node has another order"


def test_epochs_of_rows_are_kept_beside_another_task() -> None:
    tasks = TaskSet([(Rows(), 1.0), (Seeds(), 3.0)])
    asked = [question.seed for question in tasks.questions(0, 500) if question.task.key.name == "rows"]
    size = len(set(asked))
    assert [len(set(asked[at : at + size])) for at in range(0, 3 * size, size)] == [size] * 3


def test_a_row_that_does_not_fit_gives_its_turn_to_another_row_of_training() -> None:
    tasks = alone(Rows())
    fitting = [tasks.ask(0, number, lambda item: int(item.answer) % 2 == 0) for number in range(60)]
    assert all(question is not None and question.seed % 2 == 0 for question in fitting)
    assert not any(
        tasks.is_held_out(question.task, question.item.question) for question in fitting if question is not None
    )
    assert tasks.ask(0, 0, lambda item: False) is None


def test_where_every_row_is_held_out_there_is_nothing_to_train_on_in_a_line() -> None:
    tasks = alone(Rows(), Split(1.0))
    assert tasks.ask(0, 0) is None
    with pytest.raises(UserError, match="no question for training is found") as caught:
        list(tasks.questions(0, 1))
    assert "\n" not in str(caught.value)


@settings(max_examples=50)
@given(SEEDS, SEEDS, st.integers(0, 2**32 - 1))
def test_no_question_of_training_is_held_out_and_every_one_of_an_evaluation_is(
    seed: int, other: int, salt: int
) -> None:
    split = Split(1 / 4, salt)
    for task in (Rows(), Seeds(different=60)):
        tasks = alone(task, split)
        trained = {question.item.question for question in tasks.questions(seed, 12)}
        asked = [item.question for item in tasks.evaluation(task, other, 12)]
        assert not any(split.holds_out(task.key.name, question) for question in trained)
        assert all(split.holds_out(task.key.name, question) for question in asked)
        assert len(set(asked)) == len(asked)


def test_an_evaluation_has_an_order_of_its_seed_and_is_made_once() -> None:
    rows = Rows(400)
    tasks = alone(rows)
    first, again, other = ([item.question for item in tasks.evaluation(rows, seed, 100)] for seed in (1, 1, 2))
    assert first == again != other and set(first) == set(other)
    made = len(rows.made)
    assert [item.question for item in islice(tasks.evaluation(rows, 1, 100), 10)] == first[:10]
    assert len(rows.made) == made, "as making a question may be dear"
    assert [item.question for item in alone(Rows(400)).evaluation(Rows(400), 1, 100)] == first


def test_a_small_family_gives_the_few_that_it_has() -> None:
    task = Seeds(different=40)
    held = {task.make(seed).question for seed in range(40) if alone(task).is_held_out(task, task.make(seed).question)}
    asked = [item.question for item in alone(task).evaluation(task, 0, 100)]
    assert len(asked) == len(held) and set(asked) == held and 1 < len(held) < 15


def dataset(folder: Path, name: str, numbers: Sequence[int]) -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"question": f"What is {n} + {n}?", "answer": 2 * n}) + "\n" for n in numbers))
    return str(path)


def test_test_questions_of_its_own_are_all_that_an_evaluation_asks(tmp_path: Path) -> None:
    options = {"path": dataset(tmp_path, "a.jsonl", range(60)), "test": dataset(tmp_path, "b.jsonl", [1, 2, 2, 70, 71])}
    with capture_logs() as logs:
        tasks = load_tasks([TaskConfig(name="dataset", options=options)])
    (task,) = tasks.tasks
    asked = [item.question for item in tasks.evaluation(task, 0, 100)]
    assert sorted(asked) == sorted(f"What is {n} + {n}?" for n in (1, 2, 70, 71))
    trained = Counter(question.item.question for question in tasks.questions(0, 58))
    assert trained == Counter(f"What is {n} + {n}?" for n in range(60) if n not in (1, 2)), "each once in an epoch"
    (told,) = [log for log in logs if log["log_level"] == "warning"]
    assert (told["task"], told["rows"], told["first"]) == ("dataset", 2, "What is 1 + 1?")
    assert list(tasks.small_tasks()) == ["dataset: 62 different questions: 4 are held out"]


@pytest.mark.parametrize("test", [[3, 4], None])
def test_what_one_task_of_a_name_holds_out_no_task_of_that_name_asks_or_shows(
    tmp_path: Path, test: list[int] | None
) -> None:
    path = dataset(tmp_path, "rows.jsonl", range(60))
    one = {"path": path, "test": dataset(tmp_path, "one.jsonl", [1, 2])}
    other = {"path": path, "system": "Add."} | ({"test": dataset(tmp_path, "other.jsonl", test)} if test else {})
    tasks = load_tasks([TaskConfig(name="dataset", options=options, examples=2) for options in (one, other)])
    held = {f"What is {n} + {n}?" for n in (1, 2, *(test or []))}
    if test is None:
        held |= {asked for n in range(60) if DEFAULT_SPLIT.holds_out("dataset", asked := f"What is {n} + {n}?")}
    trained = [question.item for question in tasks.questions(0, 130)]
    assert not held & {question for item in trained for question, _ in [(item.question, ""), *item.examples]}
    for task in tasks.tasks:
        assert {item.question for item in tasks.evaluation(task, 0, 60)} == held


def test_an_evaluation_leaves_out_what_is_trained_on_under_another_name_and_the_log_says_so(tmp_path: Path) -> None:
    trained, other = dataset(tmp_path, "a.jsonl", range(60)), dataset(tmp_path, "b.jsonl", range(40, 140))
    both = [TaskConfig(name=f"dataset/{name}", options={"path": path}) for name, path in (("a", trained), ("b", other))]
    a, b = load_tasks(both[:1]), load_tasks(both[1:])
    rows = {asked.item.question for asked in a.questions(0, 60)}
    alone = {item.question for item in b.evaluation(b.tasks[0], 0, 200)}
    assert alone & rows
    for tasks in (load_tasks(both[1:], DEFAULT_SPLIT, a), load_tasks(both)):
        with capture_logs() as logs:
            asked = {item.question for seed in (0, 1) for item in tasks.evaluation(tasks.tasks[-1], seed, 200)}
        assert asked == alone - rows
        (told,) = logs
        assert told["task"] == "dataset/b" and told["first"] in rows
    assert not any(a.trains_on("dataset/b", question) for question in asked)


def test_what_a_task_that_makes_questions_of_seeds_trains_on_is_told_by_its_name() -> None:
    trained = alone(Seeds())
    parts = {
        trained.is_held_out(Seeds(), question): question for question in (f"Which is number {n}?" for n in range(99))
    }
    assert trained.trains_on("seeds", parts[False]) and not trained.trains_on("seeds", parts[True])
    assert not trained.trains_on("another", parts[False])


class Fickle(Seeds):
    """Makes another question whenever it is asked again."""

    def make(self, seed: int) -> Item:
        return Item(f"Which is number {seed}, said {next(SAID)}?", str(seed))


SAID = count()


def test_a_task_that_makes_another_question_of_its_seed_is_asked_only_what_is_held_out() -> None:
    task = Fickle()
    asked = list(alone(task).evaluation(task, 0, 5))
    assert asked and all(DEFAULT_SPLIT.holds_out("seeds", item.question) for item in asked)


@pytest.mark.parametrize(
    ("task", "split", "lines"),
    [
        (Rows(10), Split(0.0), ["rows: 10 different questions: 0 are held out"]),
        (Rows(500), Split(), []),
        (Rows(500), Split(0.0), ["rows: 500 different questions: 0 are held out"]),
        (Rows(500), Split(1.0), ["rows: 500 different questions: 500 are held out"]),
        (Seeds(2), Split(1.0), ["seeds: 2 different questions among 256 tried: 2 are held out"]),
        (Seeds(), Split(), []),
        (Seeds(), Split(0.0), ["seeds: 256 different questions among 256 tried: 0 are held out"]),
    ],
)
def test_a_task_with_few_questions_or_of_one_part_alone_is_told(task: Task, split: Split, lines: list[str]) -> None:
    assert list(alone(task, split).small_tasks()) == lines


@pytest.mark.parametrize(("different", "lines"), [(10**9, 0), (2, 1)])
def test_a_task_that_takes_long_is_told_by_the_questions_that_there_was_time_for(
    monkeypatch: pytest.MonkeyPatch, different: int, lines: int
) -> None:
    clock: Iterator[float] = count(step=0.25)
    monkeypatch.setattr(task_set, "perf_counter", lambda: next(clock))
    found = list(alone(Seeds(different)).small_tasks())
    assert len(found) == lines and all("2 different questions among 9 tried" in line for line in found)


def test_a_seed_of_which_a_task_raises_is_passed_over_and_told() -> None:
    tasks = alone(Seeds(raises=lambda seed: seed % 2 == 0))
    with capture_logs() as logs:
        asked = list(tasks.questions(0, 30))
        held = list(tasks.evaluation(tasks.tasks[0], 0, 10))
        assert list(tasks.small_tasks()) == []
    assert len(asked) == 30 and len(held) >= 10 and all(question.seed % 2 for question in asked)
    assert {(log["event"], log["task"], log["reason"]) for log in logs} == {
        ("a question is passed over", "seeds", "ValueError: no such number")
    }
    assert 5 < len(logs) <= 32


def test_a_row_of_which_a_task_raises_is_in_neither_part() -> None:
    with capture_logs():
        tasks = alone(Rows(raises=lambda row: row % 2 == 0))
        trained = set(seeds_asked(tasks, 0, range(40)))
        asked = {int(item.answer) for item in tasks.evaluation(tasks.tasks[0], 0, 40)}
    assert trained | asked == set(range(1, 40, 2)) and not trained & asked


def always(seed: int) -> bool:
    return True


@pytest.mark.parametrize(("task", "tried"), [(Seeds(raises=always), TRIES), (Rows(raises=always), 40)])
def test_a_task_that_raises_of_every_seed_is_one_line_that_names_it_and_says_why(task: Task, tried: int) -> None:
    uses: list[Callable[[TaskSet], object]] = [
        lambda tasks: tasks.ask(0, 0),
        lambda tasks: list(tasks.questions(0, 3)),
        lambda tasks: list(tasks.evaluation(task, 0, 3)),
        lambda tasks: list(tasks.small_tasks()),
    ]
    for use in uses:
        with capture_logs() as logs, pytest.raises(UserError) as caught:
            use(alone(task))
        said = str(caught.value)
        assert said.startswith(f"task '{task.key.name}' makes no question, of ")
        assert "seeds tried: ValueError: no " in said and "\n" not in said
        assert len(logs) == 1, "one line, however many seeds"
    with capture_logs(), pytest.raises(UserError, match=f"of {tried} seeds tried"):
        alone(task).ask(0, 0)


RIDDLES = """
from node.tasks import Item

def make(seed):
    solved = tuple((f"Riddle {n % 500}?", str(n % 500)) for n in range(seed + 1, seed + 30))
    return Item(f"Riddle {seed % 500}?", str(seed % 500), examples=solved)
"""


def kinds(folder: Path) -> dict[str, TaskConfig]:
    """A configuration of every kind of task that a configuration can name."""
    (folder / "riddles.py").write_text(RIDDLES)
    rows, test = dataset(folder, "rows.jsonl", range(80)), dataset(folder, "test.jsonl", range(70, 100))
    tests = {"path": rows, "test": test}
    return {
        "builtin": TaskConfig(name="builtin", examples=1),
        "arithmetic": TaskConfig(name="builtin/arithmetic", examples=2),
        "summands": TaskConfig(name="builtin/summands", examples=2),
        "dataset": TaskConfig(name="dataset", options={"path": rows}, examples=2),
        "dataset with test": TaskConfig(name="dataset", options=tests, examples=2),
        "file": TaskConfig(name="file", options={"path": str(folder / "riddles.py")}, examples=2),
        "file with examples of its own": TaskConfig(name="file", options={"path": str(folder / "riddles.py")}),
        "reasoning-gym": TaskConfig(name="reasoning-gym/chain_sum", examples=2),
    }


def assert_parts_are_apart(tasks: TaskSet, task: Task) -> None:
    """An evaluation asks nothing that training asks or shows."""

    def ids(questions: Iterator[str]) -> set[bytes]:
        return {question_id(task.key.name, question) for question in questions}

    trained = list(TaskSet([(task, 1.0)], tasks.split).questions(0, 40))
    asked = ids(item.question for item in tasks.evaluation(task, 0, 10))
    shown = [question for one in trained for question, _ in one.item.examples]
    assert asked and not asked & ids(question.item.question for question in trained)
    assert not any(tasks.is_held_out(task, question) for question in shown)
    assert all(tasks.is_held_out(task, item.question) for item in tasks.evaluation(task, 1, 10))


@pytest.mark.parametrize(
    "kind",
    [
        "builtin",
        "arithmetic",
        "summands",
        "dataset",
        "dataset with test",
        "file",
        "file with examples of its own",
        "reasoning-gym",
    ],
)
def test_the_training_part_and_the_evaluation_part_are_apart_in_every_kind_of_task(tmp_path: Path, kind: str) -> None:
    config = kinds(tmp_path)[kind]
    tasks = load_tasks([config])
    assert len(tasks.tasks) == (7 if kind == "builtin" else 1)
    for task in tasks.tasks:
        assert_parts_are_apart(tasks, task)
        assert len(task.make(5).examples) == config.examples or kind == "file with examples of its own"


def test_they_are_apart_in_a_task_set_of_verifiers() -> None:
    items = tuple(Item(f"{n} + {n}?", "", content=str(n)) for n in range(80))
    workers = Workers("verifiers/sums", "no.such.module", {})
    task = VerifiersTask(TaskKey("verifiers/sums", 2, "aa"), items, workers, workers, None, UNIT, "")
    assert_parts_are_apart(alone(task), task)
