"""Other people's tasks: a file or an entry point; what they return is checked and what they raise is named."""

import json
import re
from pathlib import Path

import pytest

from node.cli.app import run
from node.config import TaskConfig, load_config
from node.errors import UserError
from node.operations.given import task_config
from node.swarm.agreed_tasks import adopt_tasks, describe_tasks
from node.tasks import Item, TaskKey, load_tasks, task_names, task_set
from node.tasks.check import HASH_SEEDS, check, digest, digest_elsewhere
from node.tasks.prompting import prompted
from node.tasks.questions import question_id
from node.tasks.scoring.verdicts import isolated
from node.tasks.third_party import MAX_FILE_BYTES, TEMPLATE, TaskError, checked, load_file
from protocol.credentials.manifest import JoinPolicy, make_manifest
from protocol.identity import Identity

GOOD = """
from dataclasses import dataclass
from node.tasks import Item

@dataclass
class Riddle:
    number: int

def make(seed):
    riddle = Riddle(seed % 1000)
    return Item(f"{riddle.number} twice?", str(2 * riddle.number), system="Count.")
"""


def _file(tmp_path: Path, source: str, name: str = "riddles.py") -> Path:
    path = tmp_path / name
    path.write_text(source)
    return path


def _config(path: Path, **settings: object) -> TaskConfig:
    return TaskConfig(name="file/riddles", options={"path": str(path)}, **settings)


@pytest.mark.slow
def test_a_file_with_one_function_is_a_task_of_exact_matches(tmp_path: Path) -> None:
    (task,) = load_tasks([_config(_file(tmp_path, GOOD))]).tasks
    item = task.make(7)
    assert item == Item("7 twice?", "14", system="Count.")
    assert [task.verify(item, text) for text in (" 14\n", "14", "15", "14 14", "")] == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_a_file_may_pay_by_its_own_rule_and_say_where_it_looks(tmp_path: Path) -> None:
    source = GOOD + "\nanswer_mode = 'tags'\ndef verify(item, text):\n    return 0.5 * (item.answer in text)\n"
    task = load_file("file/riddles", {"path": str(_file(tmp_path, source))})
    assert task.verify(task.make(7), "<answer>14</answer>") == 0.5
    assert task.answer_mode == "tags"


def test_a_file_may_say_why_its_groups_stay_at_home(tmp_path: Path) -> None:
    tasks = load_tasks([_config(_file(tmp_path, GOOD + "\nunshared = 'it asks of my letters'\n"))])
    assert task_set.unshared(tasks.tasks[0]) == "it asks of my letters"
    assert tasks.shared(tasks.tasks[0].key) is None


def test_the_bytes_of_the_file_are_its_key_and_the_path_is_not(tmp_path: Path) -> None:
    one, same = _file(tmp_path, GOOD), _file(tmp_path, GOOD, "same.py")
    other = _file(tmp_path, GOOD + "# changed\n", "other.py")
    key = load_file("file/riddles", {"path": str(one)}).key
    assert load_file("file/riddles", {"path": str(same)}).key == key
    assert load_file("file/riddles", {"path": str(other)}).key != key
    assert load_file("file/others", {"path": str(one)}).key != key


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("def make(", r"riddles.py raised SyntaxError: .* \(line 1\)"),
        (
            "import no_such_module",
            r"raised ModuleNotFoundError: No module named 'no_such_module' \(riddles.py, line 1\)",
        ),
        ("x = 1", r"has no function make\(seed\)"),
        ("make = 3", r"has no function make\(seed\)"),
        (
            "def make(seed):\n    return 1 / 0",
            r"make\(\d+\) raised ZeroDivisionError: division by zero \(riddles.py, line 2",
        ),
        ("def make():\n    pass", r"make\(\d+\) raised TypeError"),
        ("def make(seed):\n    return ('a', 'b')", r"make\(\d+\) returned a tuple, not a node.tasks.Item"),
        ("def make(seed):\n    pass", r"returned None, not a node.tasks.Item"),
        ("from node.tasks import Item\ndef make(seed):\n    return Item('a?', 7)", "answer, .* of an Item are texts"),
        (
            "from node.tasks import Item\ndef make(seed):\n    return Item('a?', '\\ud800')",
            "an Item are texts that UTF-8 can hold",
        ),
        ("from node.tasks import Item\ndef make(seed):\n    return Item(' ', '7')", "a question has 1 to 65536 bytes"),
        ("from node.tasks import Item\ndef make(seed):\n    return Item('a' * 70000, '7')", "a question has 1 to"),
        (
            GOOD + "def verify(item, text):\n    return 1e16",
            r"verify of '' returned 1e\+16: a reward is a finite number",
        ),
        (GOOD + "def verify(item, text):\n    return float('-inf')", r"returned -inf: a reward"),
        (GOOD + "def verify(item, text):\n    return float('nan')", r"returned nan: a reward"),
        (GOOD + "def verify(item, text):\n    return 'yes'", r"returned a str: a reward"),
        (GOOD + "def verify(item, text):\n    pass", r"verify of '' and of the answer returned None: a reward"),
        (
            "from node.tasks import Item\ndef make(seed):\n    return Item('a?', 'b', examples=(('a?', 7),))",
            "examples of an Item are pairs of a question and its answer, both texts",
        ),
        (
            "from node.tasks import Item\ndef make(seed):\n    return Item('a?', 'b', examples=(('a?', '\\ud800'),))",
            "examples of an Item are pairs of a question and its answer, both texts",
        ),
        ("from node.tasks import Item\ndef make(seed):\n    return Item('a?', 'b', content=7)", "an Item are texts"),
        (
            GOOD + "def verify(item, text):\n    return {}[text]",
            r"verify of '' raised KeyError: '' \(riddles.py, line 13\)",
        ),
        (GOOD + "answer_mode = 'eval'", "its answer_mode is none of tags, boxed"),
    ],
)
def test_what_a_file_does_wrong_is_one_clear_line_that_names_the_task(
    tmp_path: Path, source: str, complaint: str
) -> None:
    with pytest.raises(TaskError, match=complaint) as caught:
        load_file("file/riddles", {"path": str(_file(tmp_path, source))})
    assert str(caught.value).startswith("task 'file/riddles'") and "\n" not in str(caught.value)


def test_a_reward_may_be_any_number_from_0_to_1(tmp_path: Path) -> None:
    for value, reward in (("True", 1.0), ("0", 0.0), ("__import__('numpy').float32(0.5)", 0.5), ("0.25", 0.25)):
        path = _file(tmp_path, GOOD + f"def verify(item, text):\n    return {value}")
        task = load_file("file/riddles", {"path": str(path)})
        paid = task.verify(task.make(1), "x")
        assert paid == reward and type(paid) is float


def test_it_may_say_that_it_cannot_tell(tmp_path: Path) -> None:
    source = GOOD + "def verify(item, text):\n    return float(text == item.answer) if text else None"
    task = load_file("file/riddles", {"path": str(_file(tmp_path, source))})
    assert [task.verify(task.make(1), text) for text in ("", "2", "3")] == [None, 1.0, 0.0]


def test_an_exception_in_the_middle_of_a_run_names_the_task_and_the_text(tmp_path: Path) -> None:
    source = GOOD + "def verify(item, text):\n    return 1 / (text != 'bad')"
    task = load_file("file/riddles", {"path": str(_file(tmp_path, source))})
    with pytest.raises(TaskError, match=r"'file/riddles': verify of 'bad' raised ZeroDivisionError") as caught:
        task.verify(task.make(1), "bad")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "'path'"),
        ({"path": "/none.py"}, "cannot read"),
        ({"path": "/"}, "cannot read"),
        ({"path": "a", "b": 1}, "'b'"),
    ],
)
def test_a_bad_option_is_one_clear_line(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_file("file", options)


def test_a_file_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="larger than 1 MiB"):
        load_file("file", {"path": str(_file(tmp_path, GOOD + "#" * MAX_FILE_BYTES))})


RIDDLES = TaskKey("riddles", 1, "aa")


class Nothing:
    """No task at all."""


class Task:
    """A task under a key of the test's choice, and with what else it says of itself."""

    def __init__(self, key: object, **says: object) -> None:
        self.key = key
        vars(self).update(says)

    def make(self, seed: int) -> Item:
        return Item("a?", "b")

    def verify(self, item: Item, text: str) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        (None, "its factory returned None without 'key': return a Task"),
        (Nothing(), "its factory returned a Nothing without 'key'"),
        (Task("riddles"), "its key is a str: return node.tasks.TaskKey"),
        (Task(TaskKey("riddles", 1.5, "aa")), "its key is a TaskKey"),
        (Task(TaskKey("others", 1, "aa")), "task 'riddles' calls itself 'others'"),
        (Task(RIDDLES, size=0), "its size is 0: it is how many rows it has"),
        (Task(RIDDLES, size="small"), "its size is 'small'"),
        (Task(RIDDLES, range=5), "its range is 5: it is two numbers, the lower one first"),
        (Task(RIDDLES, range=(1, 0)), r"its range is \(1, 0\)"),
        (Task(RIDDLES, unshared=True), "its unshared is a bool: say in a text why it is not shared"),
        (Task(RIDDLES, test_ids=["a?"]), "its test_ids are a list: return a frozenset"),
    ],
)
def test_a_factory_that_returns_something_else_is_one_clear_line(task: object, complaint: str) -> None:
    with pytest.raises(TaskError, match=complaint):
        checked("riddles", task)


def test_rows_and_test_questions_of_its_own_are_known_however_it_is_wrapped() -> None:
    tests = frozenset({question_id("riddles", "a?")})
    task = isolated(checked("riddles", Task(RIDDLES, size=3, test_ids=tests)), TaskConfig(name="riddles"))
    assert (task.size, task.test_ids) == (3, tests)
    shown = prompted(task, TaskConfig(name="riddles", instruction="Now:"))
    assert (task_set.size_of(shown), task_set.test_ids_of(shown)) == (3, tests)


def test_a_joiner_needs_the_same_bytes_and_the_path_stays_at_home(tmp_path: Path) -> None:
    theirs, mine = _file(tmp_path, GOOD, "theirs.py"), _file(tmp_path, GOOD, "mine.py")
    other = _file(tmp_path, GOOD + "#", "other.py")
    described = describe_tasks([_config(theirs, examples=2)])
    assert described[0].options == '{"prompting":{"examples":2}}'
    swarm = make_manifest(Identity(bytes(32)), "s", 1, JoinPolicy.OPEN, described)
    (adopted,) = adopt_tasks(swarm, [_config(other), _config(mine, weight=3.0)])
    assert adopted == _config(mine, weight=3.0, examples=2)
    with pytest.raises(UserError, match="needs a file of yours"):
        adopt_tasks(swarm, [])
    with pytest.raises(UserError, match="another configuration"):
        adopt_tasks(swarm, [_config(other)])
    hostile = described[0]._replace(options=json.dumps({"path": str(theirs)}))
    with pytest.raises(UserError, match="needs a file of yours"):
        adopt_tasks(make_manifest(Identity(bytes(32)), "s", 1, JoinPolicy.OPEN, [hostile]), [])


def test_a_path_is_relative_to_the_file_that_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _file(tmp_path, GOOD)
    (tmp_path / "rows.jsonl").write_text('{"question": "a?", "answer": "b"}')
    (tmp_path / "more.jsonl").write_text('{"question": "c?", "answer": "d"}')
    (tmp_path / "config.toml").write_text(
        '[[tasks]]\nname = "file/riddles"\noptions = { path = "riddles.py" }\n'
        '[[tasks]]\nname = "dataset"\noptions = { path = "./rows.jsonl", test = "more.jsonl" }\n'
    )
    monkeypatch.chdir("/")
    config = load_config(tmp_path / "config.toml")
    assert len(load_tasks(config.tasks).tasks) == 2
    monkeypatch.chdir(tmp_path)
    overridden = load_config(None, ['tasks=[{name="file", options={path="riddles.py"}}]'])
    assert overridden.tasks[0].options == {"path": str(tmp_path / "riddles.py")}
    assert load_config(Path("config.toml")).tasks[0].options == {"path": str(tmp_path / "riddles.py")}


def test_the_command_line_takes_files_by_their_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert task_config("./my riddles.py") == {
        "name": "file/my_riddles",
        "options": {"path": str(tmp_path / "my riddles.py")},
    }
    assert task_config("rows.parquet")["name"] == "dataset/rows"
    assert task_config("builtin/sums", ["difficulty=3"]) == {
        "name": "builtin/sums",
        "options": {"difficulty": 3},
    }
    with pytest.raises(UserError, match="--option wants KEY=VALUE"):
        task_config("builtin/sums", ["difficulty"])


@pytest.mark.parametrize("verb", ["node", "swarm"])
def test_a_dry_run_shows_the_tasks_and_refuses_unknown_ones(tmp_path: Path, verb: str, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    _file(tmp_path, GOOD)
    assert run([verb, "--task", "riddles.py", "--task", "builtin/arithmetic", "--dry-run"], debug=False) == 0
    shown = capsys.readouterr().out
    assert (
        'name = "file/riddles"' in shown and 'name = "builtin/arithmetic"' in shown and 'name = "builtin"' not in shown
    )
    assert run([verb, "--task", "builtin/summs", "--dry-run"], debug=False) == 2
    assert "did you mean 'builtin/sums'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_template_is_a_task_that_passes_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "words.py"
    assert run(["tasks", "template", str(path)], debug=False) == 0
    assert path.read_text() == TEMPLATE.replace("FILE", "words.py")
    assert run(["tasks", "check", str(path), "--examples", "2"], debug=False) == 0
    said = capsys.readouterr().out
    assert "FAILS" not in said and said.count("  ok  ") == 7 and "backwards" in said
    assert run(["tasks", "template", str(path)], debug=False) == 2
    for wrong in (tmp_path / "words.txt", "", tmp_path / "nowhere" / "words.py"):
        assert run(["tasks", "template", str(wrong)], debug=False) == 2
    for hiding in ("node.py", "gossamer.py", "protocol.py", "collectives.py"):
        assert run(["tasks", "template", str(tmp_path / hiding)], debug=False) == 2
        assert f"{hiding} would hide Gossamer's package" in capsys.readouterr().err
        assert not (tmp_path / hiding).exists()


HASHED = """
from node.tasks import Item
def make(seed):
    return Item(min({f"riddle {seed} {n}" for n in range(9)}, key=hash), "x")
"""
CLOCK = """
import itertools
from node.tasks import Item
count = itertools.count()
def make(seed):
    return Item(f"{seed} {next(count)}", "x")
"""
ONE = "from node.tasks import Item\ndef make(seed):\n    return Item('the riddle', 'x')"
GENEROUS = GOOD + "def verify(item, text):\n    return 1.0"
STINGY = GOOD + "def verify(item, text):\n    return 0.0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "line"),
    [
        (HASHED, "and in other processes"),
        (CLOCK, "the same seeds give the same questions again"),
        (ONE, "64 questions, 1 of them different"),
        (GENEROUS, "rubbish earns 1 at most"),
        (STINGY, "does not earn 1"),
    ],
)
def test_the_check_finds_what_a_swarm_could_not_rely_on(tmp_path: Path, source: str, line: str, capsys) -> None:
    assert run(["tasks", "check", str(_file(tmp_path, source))], debug=False) == 1
    said = capsys.readouterr().out
    assert re.search(f"FAILS.*{re.escape(line)}", said), said


@pytest.mark.slow
@pytest.mark.parametrize("answers", [("7", "8"), ("8", "7")])
def test_rubbish_that_is_right_by_chance_is_no_fault(tmp_path: Path, answers: tuple[str, str]) -> None:
    source = f"from node.tasks import Item\ndef make(seed):\n    return Item(str(seed), {answers}[seed % 2])"
    assert run(["tasks", "check", str(_file(tmp_path, source))], debug=False) == 0


@pytest.mark.slow
def test_the_check_takes_names_options_and_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _file(tmp_path, GOOD)
    (tmp_path / "c.toml").write_text('[[tasks]]\nname = "file"\noptions = { path = "riddles.py" }\n')
    assert run(["tasks", "check", str(tmp_path / "c.toml")], debug=False) == 0
    assert run(["tasks", "check", "builtin/arithmetic", "-o", "digits=3", "--answer", "boxed"], debug=False) == 0
    assert "What is" in capsys.readouterr().out
    assert run(["tasks", "check", "nothing"], debug=False) == 2


@pytest.mark.slow
def test_another_process_finds_the_same_tasks(tmp_path: Path) -> None:
    config = _config(_file(tmp_path, GOOD))
    assert {digest_elsewhere(config, seed) for seed in HASH_SEEDS} == {digest([config])}
    (task,) = load_tasks([config]).tasks
    assert all(finding.holds for finding in check(config, task))


def test_the_list_names_what_can_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tasks", "list"], debug=False) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed == task_names()
    assert {"builtin", "builtin/sums", "builtin/arithmetic", "dataset", "file", "reasoning-gym/gcd"} <= set(listed)
