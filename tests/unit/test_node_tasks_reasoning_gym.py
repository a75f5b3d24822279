"""The reasoning-gym adapter: pure, the same in every process, and paying for right answers only."""

import decimal
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.errors import UserError
from node.tasks import Item, Task
from node.tasks.reasoning_gym import SCORERS, GymTask, load_reasoning_gym

ROOT = Path(__file__).resolve().parents[2]
PAPER = (
    "base_conversion",
    "basic_arithmetic",
    "arc_1d",
    "bf",
    "propositional_logic",
    "fraction_simplification",
    "decimal_arithmetic",
    "calendar_arithmetic",
    "binary_matrix",
)
ITEMS = 60

PRINT_DIGESTS = """
import json
from tests.unit.test_node_tasks_reasoning_gym import digests
print(json.dumps(digests()))
"""


@pytest.fixture(scope="module")
def tasks() -> Mapping[str, GymTask]:
    return {name: load_reasoning_gym(name, {}) for name in SCORERS}


def digests() -> dict[str, str]:
    """Hash what every data set makes of some seeds."""
    tasks = {name: load_reasoning_gym(name, {}) for name in sorted(SCORERS)}
    made = {name: [task.key, *(task.make(seed) for seed in range(ITEMS))] for name, task in tasks.items()}
    return {name: hashlib.sha256(repr(items).encode()).hexdigest() for name, items in made.items()}


def _right(task: Task, item: Item) -> str:
    """An answer that deserves the reward: logic's ground truth opens with one, then lists the premises."""
    return item.answer.split("\n")[0] if task.key.name.endswith("propositional_logic") else item.answer


def test_the_nine_tasks_of_the_paper_are_there() -> None:
    assert set(PAPER) <= set(SCORERS)


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_right_answers_earn_one_and_wrong_ones_nothing(tasks: Mapping[str, GymTask], name: str) -> None:
    task = tasks[name]
    items = [task.make(seed) for seed in range(ITEMS)]
    assert items == [task.make(seed) for seed in range(ITEMS)]
    for item, other in zip(items, [*items[1:], items[0]], strict=True):
        right = _right(task, item)
        assert task.verify(item, f"Let me see: <answer>{right}</answer>") == 1.0
        assert task.verify(item, f"<answer>7</answer> no\n<answer>\n {right} \n</answer> done") == 1.0
        wrongs = ("", f"9{right}", f"{right}\n{right}", f"it is {right}", f"[{right}]", f"{right}; {other.answer}")
        for wrong in wrongs:
            assert task.verify(item, f"<answer>{wrong}</answer>") == 0.0, (wrong, item)
        for untagged in (right, f"<answer>{right}", f"answer: {right}", f"<answer>{right}</answer><answer></answer>"):
            assert task.verify(item, untagged) == 0.0, (untagged, item)


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_neighbouring_seeds_share_nothing(tasks: Mapping[str, GymTask], name: str) -> None:
    questions = [tasks[name].make(seed).question for seed in range(ITEMS)]
    assert len(set(questions)) > 0.8 * ITEMS


def test_another_process_with_another_hash_seed_makes_the_same() -> None:
    here = digests()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", PRINT_DIGESTS],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert json.loads(done.stdout) == here, done.stderr


def test_an_expression_that_divides_by_zero_is_drawn_again(tasks: Mapping[str, GymTask]) -> None:
    for seed in range(20_000):  # one in some thousands does
        item = tasks["basic_arithmetic"].make(seed)
        assert tasks["basic_arithmetic"].verify(item, f"<answer>{item.answer}</answer>") == 1.0


def test_no_number_to_convert_is_missing(tasks: Mapping[str, GymTask]) -> None:
    for seed in range(40_000):  # a few would be 0, which the data set writes as nothing
        item = tasks["base_conversion"].make(seed)
        assert item.answer and "number  to" not in item.question


def test_making_leaves_the_process_as_it_was(tasks: Mapping[str, GymTask], capsys: pytest.CaptureFixture[str]) -> None:
    state = random.getstate()
    with decimal.localcontext() as context:
        context.prec = 5
        items = {name: task.make(11) for name, task in tasks.items()}
        assert context.prec == decimal.getcontext().prec == 5
    assert items == {name: task.make(11) for name, task in tasks.items()}, "the caller's precision must not matter"
    assert random.getstate() == state
    assert capsys.readouterr().out == ""


def test_a_fraction_must_be_in_lowest_terms(tasks: Mapping[str, GymTask]) -> None:
    task = tasks["fraction_simplification"]
    for seed in range(ITEMS):
        item = task.make(seed)
        asked = item.question.split("fraction ")[1].split(" to its")[0]
        digits = "".join(character if character.isdigit() else " " for character in asked).split()
        value = Fraction(int(digits[0]), int(digits[1]))
        assert task.verify(item, f"<answer>{value.numerator}/{value.denominator}</answer>") == 1.0
        assert task.verify(item, f"<answer>{2 * value.numerator}/{2 * value.denominator}</answer>") == 0.0


def test_a_decimal_is_right_to_a_thousandth(tasks: Mapping[str, GymTask]) -> None:
    task = tasks["decimal_arithmetic"]
    for seed in range(ITEMS):
        item = task.make(seed)
        truth = decimal.Decimal(item.answer)
        assert task.verify(item, f"<answer>{truth + decimal.Decimal('0.0009'):f}</answer>") == 1.0
        assert task.verify(item, f"<answer>{truth + decimal.Decimal('0.0011'):f}</answer>") == 0.0


def test_logic_wants_more_than_a_premise(tasks: Mapping[str, GymTask]) -> None:
    task = tasks["propositional_logic"]
    for seed in range(ITEMS):
        item = task.make(seed)
        premises = item.answer.split("\n")[1:]
        assert all(premise in item.question for premise in premises)
        weakened, listed = f"{premises[0]} ∨ {premises[1]}", " ∧ ".join(premises)
        for text in (*premises, weakened, listed, "P ∨ ¬P", "rubbish", item.answer):
            assert task.verify(item, f"<answer>{text}</answer>") == 0.0, (text, premises)


@given(st.text(max_size=300))
def test_no_text_breaks_a_scorer(tasks: Mapping[str, GymTask], text: str) -> None:
    for task in tasks.values():
        item = task.make(0)
        assert task.verify(item, text) == 0.0
        assert task.verify(item, f"<answer>{text}</answer>") in (0.0, 1.0)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("bf", {"difficulty": 3}, "may never end"),
        ("bf", {"difficulty": 0}, "does not accept its options"),
        ("bf", {"level": 1}, "'level'"),
        ("bf", {"seed": 1}, "'seed'"),
        ("gcd", {"size": 10}, "'size'"),
        ("basic_arithmetic", {"max_digits": 4}, "may take hours"),
        ("basic_arithmetic", {"max_terms": 9, "max_digits": 1}, "may take hours"),
        ("base_conversion", {"min_base": "two"}, "does not accept its options"),
        ("calendar_arithmetic", {"tasks": ["moon_phase"]}, "moon_phase"),
        ("propositional_logic", {"min_statements": 1, "max_statements": 1}, "no question with an answer"),
        ("arc_agi", {}, "no safe scorer"),
    ],
)
def test_a_bad_option_is_one_clear_line(name: str, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        load_reasoning_gym(name, options)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_options_are_part_of_the_key() -> None:
    plain, harder = load_reasoning_gym("gcd", {}), load_reasoning_gym("gcd", {"max_value": 5000})
    assert plain.key == load_reasoning_gym("gcd", {}).key
    assert plain.key.name == harder.key.name and plain.key.config != harder.key.config


def test_another_version_of_the_package_is_another_task(monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_reasoning_gym("gcd", {}).key
    monkeypatch.setattr("node.tasks.reasoning_gym.version", lambda package: "0.0.1")
    assert load_reasoning_gym("gcd", {}).key != before
