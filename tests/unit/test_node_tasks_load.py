"""From configuration to tasks: names, options, weights, and errors that say what to do."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.config import TaskConfig
from node.errors import UserError
from node.tasks import KINDS, TaskKey, load_tasks
from node.tasks.builtin.families import FAMILIES
from node.tasks.task_set import TaskSet

ROOT = Path(__file__).resolve().parents[2]
SEEDS = st.integers(0, 2**63 - 1)

PLUGIN = """
from node.tasks import Item, TaskKey

class Riddle:
    key = TaskKey("riddles", 1, "plain")
    def make(self, seed):
        return Item(str(seed), str(seed))
    def verify(self, item, text):
        return float(text == item.answer)

def make(options):
    if options:
        raise ValueError("it has none")
    return Riddle()
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a third-party package with good and broken tasks, as far as the interpreter can tell."""
    (tmp_path / "gossamer_riddles.py").write_text(PLUGIN)
    info = tmp_path / "gossamer_riddles-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gossamer-riddles\nVersion: 1.0\n")
    targets = {
        "riddles": "gossamer_riddles:make",
        "lost": "gossamer_riddles:nothing",
        "missing": "no_such_module:make",
        "builtin": "no_such_module:make",
    }
    points = "".join(f"{name} = {target}\n" for name, target in targets.items())
    (info / "entry_points.txt").write_text(f"[gossamer.tasks]\n{points}")
    monkeypatch.syspath_prepend(str(tmp_path))


def _load(name: str, **options: object) -> TaskSet:
    return load_tasks([TaskConfig(name=name, options=options)])


def test_builtin_is_the_seven_families_at_equal_weight() -> None:
    tasks = load_tasks([TaskConfig(name="builtin", options={"difficulty": 2})])
    assert [task.key for task in tasks.tasks] == [FAMILIES[name](difficulty=2).key for name in FAMILIES]
    drawn = Counter(question.task.key.name for question in tasks.questions(3, 700))
    assert len(drawn) == 7 and all(99 <= count <= 101 for count in drawn.values())


def test_each_kind_is_in_the_table_of_the_page_on_tasks() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text()
    assert [kind for kind in KINDS if f"\n| `{kind}" not in page] == []


def test_weights_are_relative_frequencies() -> None:
    often = TaskConfig(name="builtin", weight=3)
    seldom = TaskConfig(name="builtin/sums", weight=1, options={"difficulty": 9})
    drawn = Counter(question.task.key.config for question in load_tasks([often, seldom]).questions(0, 400))
    assert 99 <= drawn[FAMILIES["sums"](difficulty=9).key.config] <= 101


@given(SEEDS, st.integers(0, 20), st.integers(0, 20))
def test_questions_are_a_function_of_the_nodes_seed(seed: int, few: int, more: int) -> None:
    tasks = _load("builtin")
    long, short = list(tasks.questions(seed, few + more)), list(tasks.questions(seed, few))
    assert long[:few] == short == list(_load("builtin").questions(seed, few))
    assert all(0 <= question.seed < 2**63 and question.item == question.task.make(question.seed) for question in long)
    others = {question.seed for question in tasks.questions(seed ^ 1, few)}
    assert len({question.seed for question in long} | others) == few + more + few


def test_get_wants_the_exact_key() -> None:
    tasks = _load("builtin/sums")
    key = tasks.tasks[0].key
    assert tasks.get(key) is tasks.tasks[0]
    for other in (
        key._replace(version=key.version + 1),
        key._replace(config="0" * 16),
        key._replace(name="builtin/bases"),
        TaskKey("__import__('os').system('touch planted')", 1, key.config),
    ):
        assert tasks.get(other) is None


@pytest.mark.slow
def test_a_third_party_task_comes_from_its_entry_point(plugin: None) -> None:
    tasks = _load("riddles")
    (task,) = tasks.tasks
    assert task.verify(task.make(5), "5") == 1.0
    assert _load("builtin").tasks[0].key.name == "builtin/sums", "an entry point cannot take a name of ours"


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("bultin", {}, "unknown task 'bultin': did you mean 'builtin'"),
        ("builtin/", {}, "unknown task"),
        ("builtin/summs", {}, "unknown task 'builtin/summs': did you mean 'builtin/sums'"),
        ("builtin/sums", {"dificulty": 2}, "'dificulty'"),
        ("builtin/sums", {"difficulty": "hard"}, "difficulty"),
        ("builtin", {"difficulty": 0}, "difficulty"),
        ("dataset", {}, "'path'"),
        ("file", {}, "'path'"),
        ("reasoning-gym", {}, "unknown task"),
        ("reasoning-gym/", {}, "unknown task"),
        ("reasoning-gym/countdown", {}, "no safe scorer"),
        ("reasoning-gym/__init__", {}, "no safe scorer"),
        ("lost", {}, "cannot be loaded"),
        ("missing", {}, "cannot be loaded"),
        ("riddles", {"a": 1}, "does not accept its options: it has none"),
        ("nobody", {}, "`gossamer tasks list` prints those that there are"),
        ("ridles", {}, "did you mean 'riddles'"),
    ],
)
def test_a_wrong_name_or_option_is_one_clear_line(
    plugin: None, name: str, options: dict[str, object], complaint: str
) -> None:
    with pytest.raises(UserError) as caught:
        _load(name, **options)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_a_set_is_neither_empty_nor_has_one_task_twice() -> None:
    with pytest.raises(UserError, match="no tasks"):
        TaskSet([])
    with pytest.raises(UserError, match="'builtin/sums' is listed twice"):
        load_tasks([TaskConfig(name="builtin"), TaskConfig(name="builtin/sums")])


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("reasoning_gym", "reasoning_gym.factory"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'gossamer\[reasoning-gym\]'"):
        _load("reasoning-gym/bf")


@pytest.mark.slow
def test_loading_tasks_imports_nothing_heavy() -> None:
    code = (
        "import sys; from node.config import TaskConfig; from node.tasks import load_tasks\n"
        "load_tasks([TaskConfig(name='builtin')])\n"
        "print(sorted({'reasoning_gym', 'torch', 'transformers', 'numpy', 'sympy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stdout + done.stderr
