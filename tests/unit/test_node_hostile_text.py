"""No text of a peer, or of a model, is ever run.

Every payload here creates a file called `planted` in the working directory if the thing
it is made for happens to it: evaluation, execution, unpickling, formatting, a shell, a
YAML loader. They reach every scorer, and every other field that a peer can write.
"""

import base64
import json
import pickle
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgpack
import pytest

from node.config import TaskConfig
from node.errors import UserError
from node.rollouts.group import MAX_TEXT_BYTES, Group, encode, one_turn
from node.rollouts.screening import BLAMELESS, check
from node.tasks import Item, TaskKey, load_tasks
from node.tasks.reasoning_gym.data_sets import SCORERS, GymTask
from node.tasks.scoring.verdicts import submit_of
from node.tasks.task_set import TaskSet, TrainingQuestion


class _Planter:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("planted", "w")


PICKLE = pickle.dumps(_Planter(), protocol=0).decode("ascii")
EVALUATED = [
    "__import__('os').system('touch planted')",
    "[open('planted', 'w')]",
    "[[open('planted','w').write('1')]]",
    "(lambda: open('planted', 'w'))()",
    "[x for x in [open('planted', 'w')]]",
    "open('planted', 'w') and 1",
    "1 if open('planted', 'w') else 2",
    "''.__class__.__base__.__subclasses__() and open('planted', 'w')",
]
PAYLOADS = [
    *EVALUATED,
    "import os; os.system('touch planted')",
    "@__import__('os').system('touch planted')",
    "{0.__class__.__init__.__globals__[os].system('touch planted')}",
    "{open('planted', 'w')}",
    "%(__import__('os').system('touch planted'))s",
    "$(touch planted)",
    "`touch planted`",
    "; touch planted #",
    "| touch planted",
    "../planted",
    "!!python/object/apply:os.system ['touch planted']",
    "!!python/object/new:open [planted, w]",
    "Symbol('x').subs('x', open('planted', 'w'))",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}{% import os %}",
    '{"__reduce__": ["os.system", "touch planted"]}',
    PICKLE,
    base64.b64encode(pickle.dumps(_Planter())).decode(),
    "\x00planted",
    "<answer>[open('planted', 'w')]</answer>",
]
WRAPPINGS = [
    "{payload}",
    "<answer>{payload}</answer>",
    "<answer>{answer}{payload}</answer>",
    "<answer>{payload}\n{answer}</answer>",
    "<answer>{answer}</answer><answer>{payload}</answer>",
]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an empty folder that must still be empty at the end."""
    empty = tmp_path / "workplace"
    empty.mkdir()
    monkeypatch.chdir(empty)
    yield empty
    assert list(empty.iterdir()) == []


@pytest.fixture(scope="module")
def every_task(tmp_path_factory: pytest.TempPathFactory) -> TaskSet:
    """All that `load_tasks` knows. Each question of reasoning-gym is drawn once: that takes longer than checking it."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    path.write_text('{"question": "2 + 2?", "answer": 4}\n{"question": "Capital of Peru?", "answer": "Lima"}\n')
    gym = [TaskConfig(name=f"reasoning-gym/{name}") for name in SCORERS]
    loaded = load_tasks([TaskConfig(name="builtin"), TaskConfig(name="dataset", options={"path": str(path)}), *gym])
    tasks = [replace(task, draw=cache(task.draw)) if isinstance(task, GymTask) else task for task in loaded.tasks]
    return TaskSet([(task, 1.0) for task in tasks])


@pytest.fixture(scope="module")
def questions(every_task: TaskSet) -> list[TrainingQuestion]:
    """A question of each task that training may ask."""
    return [asked for task in every_task.tasks for asked in TaskSet([(task, 1.0)]).questions(7, 1)]


def _wrapped(payload: str, answer: str) -> list[str]:
    return [wrapping.replace("{payload}", payload).replace("{answer}", answer) for wrapping in WRAPPINGS]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_payloads_are_live(workplace: Path) -> None:
    """A payload that would not fire proves nothing: each kind does, where it is let."""
    planted = workplace / "planted"

    def fires() -> bool:
        fired = planted.exists()
        planted.unlink(missing_ok=True)
        return fired

    for payload in EVALUATED:
        eval(payload)
        assert fires(), payload
    pickle.loads(PICKLE.encode("ascii"))
    assert fires()
    subprocess.run("echo $(touch planted)", shell=True, check=True)
    assert fires()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_scorer_of_reasoning_gym_itself_would_fall_for_them(workplace: Path) -> None:
    from reasoning_gym.factory import create_dataset

    data = create_dataset("binary_matrix", size=1, seed=1)
    data.score_answer("[[open('planted', 'w')]]", data[0])
    assert (workplace / "planted").exists(), "then why have scorers of our own?"
    (workplace / "planted").unlink()


@pytest.mark.slow
def test_no_scorer_runs_a_completion(every_task: TaskSet) -> None:
    assert len(every_task.tasks) == 8 + len(SCORERS)
    for task in every_task.tasks:
        for seed in range(3 if submit_of(task) is None else 1):  # a cage takes longer
            item = task.make(seed)
            answer = item.answer.split("\n")[0] if "propositional" in task.key.name else item.answer
            for payload in PAYLOADS:
                for text in _wrapped(payload, answer):
                    assert task.verify(item, text) == 0.0, (task.key.name, text)


@pytest.mark.slow
def test_no_scorer_runs_its_own_ground_truth(every_task: TaskSet) -> None:
    """Some scorers evaluate a field of the entry: a data set from elsewhere must not reach that either."""
    for task in every_task.tasks:
        if "propositional" in task.key.name:
            continue  # its ground truth is premises, which it refuses to read as anything else
        for payload in PAYLOADS:
            item = Item(payload, payload, payload)
            assert task.verify(item, "<answer>0</answer>") == 0.0


def test_a_question_of_a_file_is_only_text(tmp_path: Path) -> None:
    path = tmp_path / "hostile.jsonl"
    rows = [payload for payload in PAYLOADS if payload.strip()]
    path.write_text("".join(json.dumps({"question": text, "answer": text}) + "\n" for text in rows))
    (task,) = load_tasks([TaskConfig(name="dataset", options={"path": str(path)})]).tasks
    assert {task.make(seed).question for seed in range(600)} == set(rows)
    for seed in range(50):
        assert task.verify(task.make(seed), "no") == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_no_field_of_a_group_is_run(every_task: TaskSet, questions: list[TrainingQuestion], payload: str) -> None:
    for task, seed, item in questions:
        completions = (one_turn(payload, True, 0.0), one_turn(f"<answer>{payload}</answer>", True, 0.0))
        honest = Group(task.key, seed, item.question, completions, payload, 1)
        taken, reason = check(encode(honest), every_task, 8)
        assert taken == honest and reason == ""

        fields = msgpack.unpackb(encode(honest))
        outcomes = {1: "unknown_task", 2: "malformed", 3: "unknown_task", 4: "malformed"}
        outcomes |= {5: "held_out" if every_task.is_held_out(task, payload) else "false_question"}
        outcomes |= {0: "malformed", 6: "malformed", 8: "malformed"}
        for place, expected in outcomes.items():
            group, reason = check(msgpack.packb([*fields[:place], payload, *fields[place + 1 :]]), every_task, 8)
            assert group is None and reason == expected, (place, reason)
    assert every_task.get(TaskKey(payload, 1, payload)) is None
    assert "malformed" not in BLAMELESS


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_no_name_or_option_is_run(payload: str) -> None:
    for name in (payload, f"builtin/{payload}", f"reasoning-gym/{payload}"):
        with pytest.raises(UserError):
            load_tasks([TaskConfig(name=name)])
    for name in ("builtin", "builtin/sums", "dataset", "reasoning-gym/gcd"):
        with pytest.raises(UserError):
            load_tasks([TaskConfig(name=name, options={payload: payload})])
    with pytest.raises(UserError):
        load_tasks([TaskConfig(name="builtin/sums", options={"difficulty": payload})])


@pytest.mark.slow
@pytest.mark.parametrize("payload", [EVALUATED[0], "$(touch planted)", PICKLE], ids=["Python", "a shell", "a pickle"])
def test_no_value_that_another_package_reads_is_run(payload: str) -> None:
    with pytest.raises(UserError):
        load_tasks([TaskConfig(name="reasoning-gym/gcd", options={"max_value": payload})])


LONG = ["9", " ", "(", "¬", "P∧", "<answer>", "</answer>", "\\frac{", "1,", "0 ", "a\n", "\u0130", "[", "{", "\x00"]


@pytest.mark.slow
@pytest.mark.parametrize("unit", LONG, ids=repr)
def test_the_longest_text_costs_little(every_task: TaskSet, unit: str) -> None:
    text = unit * (MAX_TEXT_BYTES // len(unit.encode()))
    for task in every_task.tasks:
        item = task.make(1)
        task.verify(item, "0")  # some load what they need when they first check something
        began = time.thread_time()  # others' threads run on in this process
        for body in (text, f"<answer>{text[:60_000]}</answer>", f"<answer>{text[:4000]}</answer>"):
            assert task.verify(item, body) == 0.0
        assert time.thread_time() - began < 1.0, task.key.name  # what looks at each pair of 60,000 takes many seconds
