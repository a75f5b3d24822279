"""The reasoning-gym adapter: pure, the same in every process, and paying for right answers only."""

import decimal
import hashlib
import inspect
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reasoning_gym.factory import DATASETS

from node.config import TaskConfig
from node.errors import UserError
from node.processes.cage import lacking
from node.processes.worker_process import children_of
from node.tasks import Item, Task, load_tasks
from node.tasks.answers import (
    same_close,
    same_complex,
    same_factors,
    same_hex,
    same_list,
    same_lists,
    same_number_grid,
    same_numbers,
    same_polynomial,
    same_words,
)
from node.tasks.check import peers_text
from node.tasks.prompting import solution
from node.tasks.reasoning_gym import data_sets
from node.tasks.reasoning_gym.data_sets import SCORERS, GymTask, load_reasoning_gym
from node.tasks.scoring.verdicts import Answer, Scoring
from node.tasks.task_set import unshared

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
FEW = 6  # of each of the others

PRINT_DIGESTS = """
import json
from tests.unit.test_node_tasks_reasoning_gym import digests, load_all
print(json.dumps(digests(load_all())))
"""


def load_all() -> Mapping[str, GymTask]:
    return {name: load_reasoning_gym(name, {}) for name in SCORERS}


@pytest.fixture(scope="module")
def tasks() -> Mapping[str, GymTask]:
    return load_all()


def digests(tasks: Mapping[str, GymTask]) -> dict[str, str]:
    """Hash what every data set makes of some seeds."""
    made = {name: [task.key, *(task.make(seed) for seed in range(2))] for name, task in tasks.items()}
    return {name: hashlib.sha256(repr(items).encode()).hexdigest() for name, items in made.items()}


def _right(task: Task, item: Item) -> str:
    """An answer that deserves the reward: logic's ground truth is none itself."""
    return solution(item)


def test_the_nine_tasks_of_the_paper_are_there() -> None:
    assert set(PAPER) <= set(SCORERS)


SLOW = {"figlet_font", "futoshiki", "group_anagrams", "zebra_puzzles"}  # a tenth of a second a question


def count(name: str) -> int:
    return ITEMS if name in PAPER else 2 if name in SLOW else FEW


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SCORERS))
def test_right_answers_earn_one_and_wrong_ones_nothing(tasks: Mapping[str, GymTask], name: str) -> None:
    task = tasks[name]
    items = [task.make(seed) for seed in range(count(name))]
    assert items == [task.make(seed) for seed in range(count(name))]
    assert len({item.question for item in items}) > 0.8 * len(items), "neighbouring seeds share nothing"
    for item in items:
        right = solution(item)
        assert task.verify(item, f"Let me see: <answer>{right}</answer>") == 1.0
        assert task.verify(item, f"<answer>7</answer> no\n<answer>\n {right} \n</answer> done") == 1.0
        for wrong in (
            "",
            f"9{right}9",
            f"{right}\n{right}",
            f"it is {right}",
            f"[[{right}]]",
            f"{right}; 7",
            "rubbish",
        ):
            assert task.verify(item, f"<answer>{wrong}</answer>") == 0.0, (wrong, item)
        for untagged in (right, f"<answer>{right}", f"answer: {right}", f"<answer>{right}</answer><answer></answer>"):
            assert task.verify(item, untagged) == 0.0, (untagged, item)


@pytest.mark.slow
def test_another_process_with_another_hash_seed_makes_the_same(tasks: Mapping[str, GymTask]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINT_DIGESTS],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert json.loads(done.stdout) == digests(tasks), done.stderr


@pytest.mark.slow
def test_an_expression_that_divides_by_zero_is_drawn_again(tasks: Mapping[str, GymTask]) -> None:
    for seed in range(20_000):  # one in some thousands does
        item = tasks["basic_arithmetic"].make(seed)
        assert tasks["basic_arithmetic"].verify(item, f"<answer>{item.answer}</answer>") == 1.0


@pytest.mark.slow
def test_no_number_to_convert_is_missing(tasks: Mapping[str, GymTask]) -> None:
    for seed in range(40_000):  # a few would be 0, which the data set writes as nothing
        item = tasks["base_conversion"].make(seed)
        assert item.answer and "number  to" not in item.question


@pytest.mark.slow
def test_making_leaves_the_process_as_it_was(tasks: Mapping[str, GymTask], capsys: pytest.CaptureFixture[str]) -> None:
    state = random.getstate()
    with decimal.localcontext() as context:
        context.prec = 5
        items = {name: task.make(11) for name, task in tasks.items()}
        assert context.prec == decimal.getcontext().prec == 5
    assert items == {name: task.make(11) for name, task in tasks.items()}, "the caller's precision must not matter"
    assert random.getstate() == state
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_fraction_must_be_in_lowest_terms(tasks: Mapping[str, GymTask]) -> None:
    task = tasks["fraction_simplification"]
    for seed in range(ITEMS):
        item = task.make(seed)
        asked = item.question.split("fraction ")[1].split(" to its")[0]
        digits = "".join(character if character.isdigit() else " " for character in asked).split()
        value = Fraction(int(digits[0]), int(digits[1]))
        assert task.verify(item, f"<answer>{value.numerator}/{value.denominator}</answer>") == 1.0
        assert task.verify(item, f"<answer>{2 * value.numerator}/{2 * value.denominator}</answer>") == 0.0


@pytest.mark.slow
def test_a_decimal_is_right_to_a_thousandth(tasks: Mapping[str, GymTask]) -> None:
    task = tasks["decimal_arithmetic"]
    for seed in range(ITEMS):
        item = task.make(seed)
        truth = decimal.Decimal(item.answer)
        assert task.verify(item, f"<answer>{truth + decimal.Decimal('0.0009'):f}</answer>") == 1.0
        assert task.verify(item, f"<answer>{truth + decimal.Decimal('0.0011'):f}</answer>") == 0.0


@pytest.mark.slow
def test_logic_wants_more_than_a_premise(tasks: Mapping[str, GymTask]) -> None:
    task = tasks["propositional_logic"]
    for seed in range(ITEMS):
        item = task.make(seed)
        premises = item.answer.split("\n")[1:]
        assert all(premise in item.question for premise in premises)
        weakened, listed = f"{premises[0]} ∨ {premises[1]}", " ∧ ".join(premises)
        for text in (*premises, weakened, listed, "P ∨ ¬P", "rubbish", item.answer):
            assert task.verify(item, f"<answer>{text}</answer>") == 0.0, (text, premises)


@pytest.fixture(scope="module")
def firsts(tasks: Mapping[str, GymTask]) -> Sequence[tuple[GymTask, Item]]:
    return [(task, task.make(0)) for task in tasks.values()]


@pytest.mark.slow
@given(st.text(st.characters(codec="utf-8") | st.sampled_from("0123456789.,-+*/^()[]\"'eijxC<> \n"), max_size=300))
def test_no_text_breaks_a_scorer(firsts: Sequence[tuple[GymTask, Item]], text: str) -> None:
    for task, item in firsts:
        if task.scorer.same is None:  # in a cage
            continue
        assert task.verify(item, text) == 0.0
        assert task.verify(item, f"<answer>{text}</answer>") in (0.0, 1.0)


CAGED = sorted(name for name, scorer in SCORERS.items() if scorer.same is None)


@pytest.mark.slow
def test_where_several_answers_are_right_the_data_set_itself_judges_in_a_cage(
    tasks: Mapping[str, GymTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CAGED:
        task, item = tasks[name], tasks[name].make(1)
        right, *wrong = (
            f"<answer>{solution(item)}</answer>",
            "<answer>[</answer>",
            f"<answer>{'[' * 4000}</answer>",
            "7",
        )
        asked = [Answer(task, item, text) for text in (right, *wrong)]
        assert Scoring(asked, is_own=False).wait(60) == [1.0, 0.0, 0.0, 0.0]
    [jugs] = load_tasks([TaskConfig(name="reasoning-gym/jugs")]).tasks
    assert bool(unshared(jugs)) == bool(lacking())
    assert [said.line.endswith("in a cage") for said in peers_text(jugs, jugs.make(1))] == [True] * (not lacking())
    monkeypatch.setattr(data_sets, "lacking", lambda: "no Landlock")
    at_home = load_tasks([TaskConfig(name="reasoning-gym/jugs")])
    assert unshared(at_home.tasks[0]) == "a stranger's text cannot be caged here (no Landlock)"
    assert at_home.shared(jugs.key) is None


def test_no_scorer_that_is_called_evaluates_what_it_reads() -> None:
    for name in CAGED:
        source = Path(inspect.getfile(DATASETS[name][0])).read_text()
        assert not re.search(r"\b(eval|exec|compile|parse_expr|sympify|pickle|subprocess)\b", source), name


@pytest.mark.slow
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
        pytest.param("base_conversion", {"min_base": "two"}, "does not accept its options", marks=pytest.mark.slow),
        pytest.param("calendar_arithmetic", {"tasks": ["moon_phase"]}, "moon_phase", marks=pytest.mark.slow),
        ("propositional_logic", {"min_statements": 1, "max_statements": 1}, "no question with an answer"),
        ("arc_agi", {}, "no safe scorer"),
        ("countdown", {}, "no safe scorer"),
        ("codeio", {}, "no safe scorer"),
        ("count_primes", {"max_n": 10**12}, "takes more than 4 GiB"),
        pytest.param("spell_backward", {"min_word_len": "a"}, "does not accept its options", marks=pytest.mark.slow),
        pytest.param(
            "caesar_cipher",
            {"min_words": 20000, "max_words": 20001},
            "does not accept its options",
            marks=pytest.mark.slow,
        ),
        ("binary_alternation", {"min_n": 40000, "max_n": 50000}, "32768 are allowed"),
    ],
)
def test_a_bad_option_is_one_clear_line(name: str, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        load_reasoning_gym(name, options)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_options_whose_questions_take_too_long_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.tasks.reasoning_gym.data_sets.TRIAL_CPU_S", 1)
    with pytest.raises(UserError, match=r"^[^\n]* take more than 1 s[^\n]*$"):
        load_reasoning_gym("gcd", {"min_numbers": 10**7, "max_numbers": 10**7})


@pytest.mark.slow
def test_options_are_part_of_the_key() -> None:
    plain, harder = load_reasoning_gym("gcd", {}), load_reasoning_gym("gcd", {"max_value": 5000})
    assert plain.key == load_reasoning_gym("gcd", {}).key
    assert plain.key.name == harder.key.name and plain.key.config != harder.key.config


def test_another_version_of_the_package_is_another_task(monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_reasoning_gym("gcd", {}).key
    monkeypatch.setattr("node.tasks.reasoning_gym.data_sets.version", lambda package: "0.0.1")
    assert load_reasoning_gym("gcd", {}).key != before


FIRST, *OTHERS = sorted(name for name, scorer in SCORERS.items() if scorer.hashes)


@pytest.mark.slow
@pytest.mark.parametrize("name", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_where_questions_depend_on_the_hash_seed_another_process_makes_them(tasks, name: str) -> None:
    task = load_reasoning_gym(name, {})
    item = task.make(3)
    assert item == tasks[name].make(3)
    (worker,) = children_of(task.draw.__self__._worker.pid)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="its process failed"):
        task.make(4)
    assert task.make(3) == item, "a process that died is replaced"


@pytest.mark.parametrize(
    ("same", "answer", "truth", "expected"),
    [
        (same_words, "Zoey is a sage, and Bob is a fool", "Zoey is a sage, and Bob is a fool.", True),
        (same_words, "Zoey is a fool, and Bob is a fool", "Zoey is a sage, and Bob is a fool.", False),
        (same_list, "['3', '1.5']", "['3', '1.5']", True),
        (same_list, '["3","1.5"]', "['3', '1.5']", True),
        (same_list, "['1.5', '3']", "['3', '1.5']", False),
        (partial(same_lists, ordered=False), '[["b","a"],["c"]]', '[["c"], ["a", "b"]]', True),
        (partial(same_lists, ordered=True), '[["b","a"],["c"]]', '[["c"], ["a", "b"]]', False),
        (partial(same_lists, ordered=True), '[["c"],["c"]]', '[["c"]]', False),
        (partial(same_lists, ordered=True), "[" * 4000, '[["c"]]', False),
        (same_factors, "71 × 3 × 3", "3 × 3 × 71", True),
        (same_factors, "9 × 71", "3 × 3 × 71", False),
        (same_hex, "0xA0", "0xa0", True),
        (same_hex, "160", "0xa0", False),
        (same_hex, "-0xa0", "0xa0", False),
        (partial(same_close, relative=Decimal("0.005")), "8.97e+11", "897303639322.6414", True),
        (partial(same_close, relative=Decimal("0.005")), "8.97e+12", "897303639322.6414", False),
        (partial(same_close, relative=Decimal("0.005")), "1.70e-3", "0.0017045061346880293", True),
        (partial(same_close, relative=Decimal(0)), "741,787,256.323", "741787256.323", True),
        (partial(same_numbers, tolerance=Decimal("0.01"), ordered=True), "16.91", "16.91°", True),
        (partial(same_numbers, tolerance=Decimal("0.01"), ordered=True), "(1.5, -2.005)", "(1.500, -2.000)", True),
        (partial(same_numbers, tolerance=Decimal("0.01"), ordered=True), "(-2, 1.5)", "(1.500, -2.000)", False),
        (partial(same_numbers, tolerance=Decimal("0.01"), ordered=False), "0, -0.04", "-0.04, 0.0", True),
        (partial(same_numbers, tolerance=Decimal("0.01"), ordered=False), "-0.04", "-0.04, 0.0", False),
        (same_complex, "-5 + 20i", "-5.0 + 20.0i", True),
        (same_complex, "20i", "-5.0 + 20.0i", False),
        (same_complex, "i", "0.0 + 1.0i", True),
        (same_polynomial, "-24897*z**3 + 2451", "2451 - 24897*z**3", True),
        (same_polynomial, "z*(1+z)", "z + z**2", False),
        (same_polynomial, "z + z**2 + 0*z", "z**2 + z", True),
        (partial(same_polynomial, constant=False), "-1*X**5/7 - X**3/2 + 4", "-X**5/7 - X**3/2 + C", True),
        (partial(same_polynomial, constant=False), "X**5/7 - X**3/2 + C", "-X**5/7 - X**3/2 + C", False),
        (partial(same_number_grid, tolerance=Decimal("0.01")), "3 5.22\n4.67 3", "3.0 5.22\n4.67 3.0", True),
        (partial(same_number_grid, tolerance=Decimal("0.01")), "3 5.22 4.67 3", "3.0 5.22\n4.67 3.0", False),
    ],
)
def test_comparisons(same, answer: str, truth: str, expected: bool) -> None:
    assert same(answer, truth) is expected
