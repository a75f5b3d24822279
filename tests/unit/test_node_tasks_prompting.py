"""Examples, instructions and answer modes: one mechanism around every kind of task."""

import json
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.config import TaskConfig
from node.errors import UserError
from node.swarm.agreed_tasks import adopt_tasks, check_rules, describe_tasks
from node.tasks import Item, Task, TaskKey, config_hash, derive_seed, load_tasks
from node.tasks.answers import INSTRUCTIONS, MAX_TEXT, READERS, show
from node.tasks.builtin.families import FAMILIES
from node.tasks.prompting import DRAWS, prompted, takes_more
from node.tasks.questions import DEFAULT_SPLIT
from node.tasks.reasoning_gym.data_sets import SCORERS
from node.tasks.scoring.verdicts import Answer, Submission, Verdict, already, score, submit_of
from node.tasks.task_set import HeldOut
from protocol.credentials.manifest import JoinPolicy, make_manifest
from protocol.identity import Identity

SEEDS = st.integers(0, 2**63 - 1)
MODES = tuple(READERS)


def _one(name: str, **settings: object) -> Task:
    (task,) = load_tasks([TaskConfig(name=name, **settings)]).tasks
    return task


@pytest.fixture
def kinds(tmp_path: Path) -> dict[str, dict[str, object]]:
    """A configuration of every kind of task whose answers are numbers."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{n} and {n}?", "answer": 2 * n}) + "\n" for n in range(50)))
    return {
        "builtin/sums": {},
        "builtin/arithmetic": {"digits": 2, "operations": "+-"},
        "dataset": {"path": str(rows)},
        "reasoning-gym/chain_sum": {},
    }


def test_a_task_takes_more_than_its_answer_where_it_or_its_mode_reads_one_among_other_words(
    kinds: dict[str, dict[str, object]],
) -> None:
    def takes(name: str, **settings: object) -> bool:
        task = _one(name, options=kinds[name], **settings)
        return takes_more(task, task.make(3))

    assert {name: takes(name) for name in kinds} == {
        "builtin/sums": False,
        "builtin/arithmetic": False,
        "dataset": True,  # it looks for answer tags, and says so nowhere
        "reasoning-gym/chain_sum": True,
    }
    assert [takes("builtin/sums", answer=mode) for mode in MODES] == [mode != "whole" for mode in MODES]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_reads_every_kind_of_task(kinds: dict[str, dict[str, object]], mode: str) -> None:
    for name, options in kinds.items():
        task = _one(name, answer=mode, examples=2, options=options)
        for seed in range(20):
            item = task.make(seed)
            right = show(item.answer, mode)
            assert task.verify(item, right) == task.verify(item, f" {right} ") == 1.0, (name, right)
            assert task.verify(item, show(f"1{item.answer}", mode)) == 0.0
            assert task.verify(item, "") == task.verify(item, "9" * (MAX_TEXT + 1)) == 0.0
            for question, answer in item.examples:
                assert task.verify(Item(question, ""), answer) == 0.0  # shown is the form, the truth is the verifier's
                assert READERS[mode](answer) is not None


def test_a_task_for_which_nothing_is_set_stays_as_it_is(kinds: dict[str, dict[str, object]]) -> None:
    assert _one("builtin/sums") == FAMILIES["sums"]()
    for name, options in kinds.items():
        task, again = _one(name, options=options), _one(name, options=options, examples=0, answer=None)
        assert task.key == again.key and task.make(3) == again.make(3)


@given(SEEDS, st.integers(1, 16))
def test_examples_are_solved_questions_of_the_same_kind_and_never_the_question(seed: int, count: int) -> None:
    base, task = FAMILIES["weekdays"](), _one("builtin/weekdays", examples=count)
    item = task.make(seed)
    assert item == task.make(seed)
    assert item.question == base.make(seed).question and item.answer == base.make(seed).answer
    questions = [question for question, _ in item.examples]
    assert len(set(questions)) == len(questions) == count and item.question not in questions
    assert not any(DEFAULT_SPLIT.holds_out("builtin/weekdays", question) for question in questions)
    days = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
    for question, answer in item.examples:
        asked, step = re.fullmatch(r"((?:[A-Z][a-z]{2})+)([-+]\d)=", question).groups()
        moved = (days[(days.index(day) + int(step)) % 7] for day in re.findall("...", asked))
        assert answer == "".join(moved)


def test_neighbours_have_other_examples() -> None:
    task = _one("builtin/arithmetic", examples=3, options={"digits": 4})
    shown = [example for seed in range(200) for example in task.make(seed).examples]
    assert len(set(shown)) > 590


def test_where_the_answer_is_read_is_part_of_the_key_and_how_it_is_asked_is_not(
    kinds: dict[str, dict[str, object]],
) -> None:
    ways: list[dict[str, object]] = [{}, {"examples": 2}, {"instruction": ""}, {"examples": 1, "instruction": "Think."}]
    for name, options in kinds.items():
        keys = [{_one(name, options=options, answer=mode, **way).key for way in ways} for mode in (None, *MODES)]
        assert [len(of_a_mode) for of_a_mode in keys] == [1] * len(keys)
        assert len(set.union(*keys)) == len(keys)
        assert keys[0] == {_one(name, options=options).key}
        assert {key.name for of_a_mode in keys for key in of_a_mode} == {name}


def test_the_key_of_a_task_whose_answer_is_read_otherwise_stays_what_it_was() -> None:
    read = {"prompting": 1, "task": _one("builtin/sums").key.config, "answer": "boxed"}
    assert _one("builtin/sums", answer="boxed", examples=2).key.config == config_hash(read)


def test_one_task_that_is_asked_in_two_ways_is_listed_once() -> None:
    with pytest.raises(UserError, match="'builtin/sums' is listed twice with the same options: list it once, as it is"):
        load_tasks([TaskConfig(name="builtin/sums"), TaskConfig(name="builtin/sums", examples=3)])


def test_an_instruction_replaces_the_tasks_own() -> None:
    assert _one("reasoning-gym/gcd", instruction="Think.").make(1).system == "Think."
    assert _one("reasoning-gym/gcd", instruction="").make(1).system == ""
    assert _one("builtin/sums", instruction="Think.").make(1).system == "Think."


@pytest.mark.parametrize("mode", MODES)
def test_a_task_that_tells_its_form_tells_the_chosen_one(mode: str) -> None:
    item = _one("reasoning-gym/gcd", answer=mode).make(1)
    assert item.system == INSTRUCTIONS[mode]
    assert _one("builtin/sums", answer=mode).make(1).system == ""


def test_a_hint_stays_with_the_chosen_form() -> None:
    own, boxed = _one("reasoning-gym/propositional_logic"), _one("reasoning-gym/propositional_logic", answer="boxed")
    hint = own.make(1).system.removeprefix(INSTRUCTIONS["tags"])
    assert "Conclude something" in hint
    assert boxed.make(1).system == INSTRUCTIONS["boxed"] + hint


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SCORERS))
def test_every_data_set_has_examples_that_its_own_scorer_takes(name: str) -> None:
    task = _one(f"reasoning-gym/{name}", examples=1)
    for seed in range(2):
        (example,) = task.make(seed).examples
        asked = next(item for item in _bases(task, seed) if item.question == example[0])
        assert task.verify(asked, example[1]) == 1.0


def _bases(task: Task, seed: int) -> Iterator[Item]:
    """The items from which the examples of the question with this seed are chosen."""
    return (task.base.make(derive_seed("example", *task.key, seed, attempt)) for attempt in range(DRAWS))


@dataclass(frozen=True)
class Custom:
    """A third party's task: `count` questions, of which `answers` shows the answer or not."""

    count: int
    answers: bool = True

    @property
    def key(self) -> TaskKey:
        return TaskKey("custom", 1, "00")

    def make(self, seed: int) -> Item:
        return Item(f"Which is number {seed % self.count}?", f"number {seed % self.count}" if self.answers else "")

    def verify(self, item: Item, text: str) -> float:
        return float(text.split() == item.question[9:-1].split())


class Silent(Custom):
    """A task to which every answer is unscorable."""

    def verify(self, item: Item, text: str) -> None:
        return None


def test_a_third_partys_task_is_given_the_bare_answer() -> None:
    task = prompted(Custom(50), TaskConfig(name="custom", answer="boxed", examples=1))
    item = task.make(3)
    assert task.verify(item, "I say \\boxed{number 3}.") == 1.0
    assert task.verify(item, "number 3") == 0.0
    assert item.examples[0][1].startswith("\\boxed{number ")


@pytest.mark.parametrize(
    ("task", "settings", "complaint"),
    [
        (Custom(3), {"examples": 3}, "too few different questions for 3 examples"),
        (Custom(50, answers=False), {"examples": 1}, "shows no answers to its questions"),
        (Silent(50), {"answer": "boxed"}, "could not score an answer of its own: the log says why"),
        (Custom(50), {"answer": "last_number"}, "answers that answer='last_number' does not read"),
        (FAMILIES["weekdays"](), {"answer": "last_number"}, "answers that answer='last_number' does not read"),
        (_one("reasoning-gym/rotate_matrix"), {"answer": "first_line"}, "answers that answer='first_line' does not"),
    ],
)
def test_settings_that_do_not_fit_a_task_are_one_clear_line(task: Task, settings: dict, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        prompted(task, TaskConfig(name=task.key.name, **settings))
    assert complaint in str(caught.value) and "\n" not in str(caught.value) and repr(task.key.name) in str(caught.value)


def test_as_many_examples_as_there_are_other_questions_can_be_shown() -> None:
    task = prompted(Custom(2), TaskConfig(name="custom", examples=1), HeldOut([]))
    assert all(len(task.make(seed).examples) <= 1 for seed in range(500))


@dataclass(frozen=True)
class Beside(Custom):
    """A task that scores in other processes; it notes what these are given, and an answer to number 0 is unscorable."""

    given: list[str] = field(default_factory=list)

    def submit(self, batch: Sequence[Submission], is_own: bool) -> "list[Future[Verdict]]":
        self.given.extend(answer.text for answer in batch)
        return [
            already(None if answer.text == "number 0" else self.verify(answer.item, answer.text)) for answer in batch
        ]


def test_what_is_scored_elsewhere_is_the_answer_that_is_read_and_a_text_without_one_earns_nothing() -> None:
    base = Beside(50)
    task = prompted(base, TaskConfig(name="custom", answer="boxed"))
    texts = ["so \\boxed{number 3}", "number 3", "\\boxed{number 0}", "\\boxed{number 4}", ""]
    assert score([Answer(task, task.make(3), text) for text in texts]) == [1.0, 0.0, None, 0.0, 0.0]
    assert base.given == ["number 3", "number 0", "number 4"]
    plain = prompted(base, TaskConfig(name="custom", examples=1))
    assert score([Answer(plain, task.make(3), "number 3")]) == [1.0]
    assert submit_of(prompted(Custom(50), TaskConfig(name="custom", answer="boxed"))) is None


def _joined(founder: TaskConfig, *own: TaskConfig) -> list[Task]:
    manifest = make_manifest(Identity(bytes(32)), "s", 1, JoinPolicy.OPEN, describe_tasks([founder]))
    adopted = load_tasks(adopt_tasks(manifest, own))
    check_rules(manifest, adopted, 8)
    return list(adopted.tasks)


def test_a_joiner_that_says_nothing_asks_and_reads_as_the_founder_does() -> None:
    founder = TaskConfig(
        name="builtin", examples=2, answer="boxed", instruction="Think, please.", options={"difficulty": 2}
    )
    theirs = load_tasks([founder]).tasks
    for mine, other in zip(_joined(founder, TaskConfig(name="builtin/sums", weight=3.0)), theirs, strict=True):
        assert mine.key == other.key and mine.make(5) == other.make(5)


@pytest.mark.parametrize(
    ("own", "examples", "system"),
    [
        ({"examples": 1}, 1, "Think."),
        ({"examples": 0}, 0, "Think."),
        ({"instruction": ""}, 2, ""),
        ({"examples": 3, "instruction": "Now:", "answer": "whole"}, 3, "Now:"),
    ],
)
def test_a_joiner_asks_its_own_model_as_it_says_and_reads_as_the_founder_does(
    own: dict, examples: int, system: str
) -> None:
    founder = TaskConfig(name="builtin/sums", examples=2, answer="boxed", instruction="Think.")
    (mine,) = _joined(founder, TaskConfig(name="builtin/sums", **own))
    (theirs,) = load_tasks([founder]).tasks
    item = mine.make(5)
    assert (len(item.examples), item.system) == (examples, system)
    assert (item.question, item.answer) == (theirs.make(5).question, theirs.make(5).answer)
    assert mine.key == theirs.key and mine.verify(item, f"\\boxed{{{item.answer}}}") == 1.0


@pytest.mark.parametrize(
    "prompting",
    [
        3,
        [],
        {"examples": 99},
        {"examples": -1},
        {"answer": "eval"},
        {"weight": 0},
        {"weight": 2},
        {"x": 1},
        {"name": 5},
    ],
)
def test_a_manifest_with_settings_that_cannot_be_is_refused(prompting: object) -> None:
    (task,) = describe_tasks([TaskConfig(name="builtin/sums")])
    hostile = task._replace(options=json.dumps({"prompting": prompting}))
    with pytest.raises(UserError, match="options that cannot be read"):
        adopt_tasks(make_manifest(Identity(bytes(32)), "s", 1, JoinPolicy.OPEN, [hostile]), [])


def test_a_manifest_has_no_other_task_built_than_the_one_that_it_names(tmp_path: Path) -> None:
    code, ran = tmp_path / "x.py", tmp_path / "ran"
    code.write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    (task,) = describe_tasks([TaskConfig(name="builtin/sums")])
    hostile = task._replace(options=json.dumps({"prompting": {"name": "file/x"}, "path": str(code)}))
    with pytest.raises(UserError, match="options that cannot be read"):
        adopt_tasks(make_manifest(Identity(bytes(32)), "s", 1, JoinPolicy.OPEN, [hostile]), [])
    assert not ran.exists()


@pytest.mark.parametrize(
    ("mode", "text", "answer"),
    [
        ("boxed", r"so \boxed{7}", "7"),
        ("boxed", r"\boxed{1} no \boxed{ \frac{3}{4} } yes", r"\frac{3}{4}"),
        ("boxed", r"\boxed{1} and \boxed{2", "1"),
        ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"}}\boxed {5}}", "5"),
        ("boxed", r"\boxed{\boxed{8}}", "8"),
        ("boxed", r"boxed{7}", None),
        ("boxed", "7", None),
        ("last_number", "12 + 7 = 19.", "19"),
        ("last_number", "3-8=-5", "-5"),
        ("last_number", "13 - 8", "8"),
        ("last_number", "5-3", "3"),
        ("last_number", "about +1,234,567.50 in all", "1234567.50"),
        ("last_number", "1, 2,3", "3"),
        ("last_number", " 7", "7"),
        ("last_number", "none", None),
        ("first_line", " 7\nQuestion: What is 3 + 4?\nAnswer: 8", "7"),
        ("first_line", "\n\n  7  \n8", "7"),
        ("first_line", " \n ", None),
        ("whole", " 7\n8 ", "7\n8"),
    ],
)
def test_where_the_modes_look(mode: str, text: str, answer: str | None) -> None:
    assert READERS[mode](text) == answer


@given(st.sampled_from(MODES), st.text(st.characters(codec="utf-8") | st.sampled_from("\\boxed{}<answer>/0123,.-+ \n")))
def test_no_text_breaks_a_reader(mode: str, text: str) -> None:
    answer = READERS[mode](text)
    assert answer is None or (answer == answer.strip() and len(answer) <= len(text))


HOSTILE = ("\\boxed{", "{", "}", "1,", "123,", "1,234", "9", "<answer>", "</answer>", "\\", " ", "-", ".", "1.", "\n")


@pytest.mark.parametrize("mode", MODES)
def test_readers_take_linear_time(mode: str) -> None:
    started = time.process_time()
    for piece in HOSTILE:
        for tail in ("", "x", "}" * 1000):
            READERS[mode]((piece * MAX_TEXT)[: MAX_TEXT - len(tail)] + tail)
            assert READERS[mode](piece * MAX_TEXT + "}" * MAX_TEXT) is None
    assert time.process_time() - started < 5.0
