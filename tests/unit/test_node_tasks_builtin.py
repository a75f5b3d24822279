"""The built-in families: pure, verifiable by an independent calculation, and safe to configure badly."""

import re
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from node.errors import UserError
from node.tasks.builtin.families import BY_NAME, FAMILIES, load_arithmetic

SEEDS = st.integers(0, 2**63 - 1)
DIFFICULTIES = st.integers(1, 10)
NAMES = st.sampled_from(sorted(FAMILIES))


def test_the_seven_families_have_distinct_keys() -> None:
    keys = {FAMILIES[name](difficulty=difficulty).key for name in FAMILIES for difficulty in (1, 2)}
    assert len(keys) == 14
    assert FAMILIES["sums"]().key == FAMILIES["sums"](difficulty=1).key


@given(NAMES, DIFFICULTIES, SEEDS)
def test_make_is_a_function_of_the_seed_and_its_answer_alone_passes(name: str, difficulty: int, seed: int) -> None:
    task = FAMILIES[name](difficulty=difficulty)
    item = task.make(seed)
    assert item == FAMILIES[name](difficulty=difficulty).make(seed)
    assert item.question.isascii() and item.question.isprintable() and item.question.endswith("=")
    assert item.answer == item.answer.strip() != ""
    assert task.verify(item, item.answer) == task.verify(item, f" {item.answer}\n") == 1.0
    for wrong in ("", item.answer + "0", item.answer[:-1], item.question + item.answer, f"{item.answer} {item.answer}"):
        assert task.verify(item, wrong) == 0.0


@given(NAMES, SEEDS)
def test_the_easiest_questions_are_short(name: str, seed: int) -> None:
    item = FAMILIES[name]().make(seed)
    assert len(item.question) <= 17
    assert len(item.answer) <= 13


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_neighbouring_seeds_and_difficulties_are_unrelated(name: str) -> None:
    task, harder = FAMILIES[name](), FAMILIES[name](difficulty=2)
    for hardness in (task, harder):
        assert len({hardness.make(seed).question for seed in range(200)}) > 170
    assert sum(task.make(seed) == harder.make(seed) for seed in range(200)) < 3


def _split(question: str) -> tuple[str, str, str]:
    """Split `LEFT+RIGHT=` or `LEFT-RIGHT=`; operands of the families carry no sign."""
    for sign in "+-":
        if sign in question:
            left, right = question.rstrip("=").split(sign)
            return left, sign, right
    raise AssertionError(question)


@given(DIFFICULTIES, SEEDS)
def test_sums(difficulty: int, seed: int) -> None:
    item = FAMILIES["sums"](difficulty=difficulty).make(seed)
    left, sign, right = _split(item.question)
    assert int(item.answer) - int(left) == int(f"{sign}{right}")
    assert str(int(item.answer)) == item.answer


@given(DIFFICULTIES, SEEDS)
def test_decimals(difficulty: int, seed: int) -> None:
    item = FAMILIES["decimals"](difficulty=difficulty).make(seed)
    left, sign, right = _split(item.question)
    assert Fraction(item.answer) - Fraction(left) == Fraction(f"{sign}{right}")
    assert item.answer != "-0.0" and item.answer[-2] == "."


@given(DIFFICULTIES, SEEDS)
def test_bases(difficulty: int, seed: int) -> None:
    item = FAMILIES["bases"](difficulty=difficulty).make(seed)
    number, given, wanted = re.fullmatch("([0-9a-f]+) ([0-9]+)>([0-9]+)=", item.question).groups()
    assert int(item.answer, int(wanted)) == int(number, int(given)) < 256 * 4**difficulty
    assert given != wanted and {given, wanted} <= {"2", "4", "16"}
    assert item.answer == "0" or not item.answer.startswith("0")


@given(DIFFICULTIES, SEEDS)
def test_fractions(difficulty: int, seed: int) -> None:
    item = FAMILIES["fractions"](difficulty=difficulty).make(seed)
    left, right = (Fraction(*map(int, part.split("/"))) for part in item.question.rstrip("=").split("*"))
    terms = list(map(int, re.findall("[0-9]+", item.question)))
    assert min(terms) >= 1 and max(terms) <= 4 + 5 * difficulty
    upper, lower = map(int, item.answer.split("/"))
    assert Fraction(upper, lower) == left * right
    assert lower == terms[1] * terms[3], "it is not reduced"


@given(DIFFICULTIES, SEEDS)
def test_matrices_grow_by_one_step_from_the_zeros(difficulty: int, seed: int) -> None:
    item = FAMILIES["matrices"](difficulty=difficulty).make(seed)
    assume(all(len(line) == 5 + difficulty for line in item.answer.split("/")))  # a step of 10 has two digits
    cells = [list(map(int, line)) for line in item.question.rstrip("=").split("/")]
    steps = [list(map(int, line)) for line in item.answer.split("/")]
    for row, line in enumerate(steps):
        for column, step in enumerate(line):
            around = [steps[1 - row][column]] + [line[x] for x in (column - 1, column + 1) if 0 <= x < len(line)]
            assert step == (0 if cells[row][column] == 0 else 1 + min(around))
    assert len(steps) == 2 and len(steps[0]) == 5 + difficulty


@given(DIFFICULTIES, SEEDS)
def test_weekdays(difficulty: int, seed: int) -> None:
    item = FAMILIES["weekdays"](difficulty=difficulty).make(seed)
    days = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]
    asked, sign, count = _split(item.question)
    walk = days if sign == "+" else days[::-1]
    starts = re.findall("...", asked)
    assert len(starts) == 2 + difficulty
    assert re.findall("...", item.answer) == [walk[(walk.index(start) + int(count)) % 7] for start in starts]


@given(DIFFICULTIES, SEEDS)
def test_logic(difficulty: int, seed: int) -> None:
    item = FAMILIES["logic"](difficulty=difficulty).make(seed)
    formula = item.question.rstrip("=")
    assert sum(formula.count(sign) for sign in "&|^>") == 2 + difficulty
    assert item.answer == "".join(str(int(_truth(formula, p, q))) for p in (0, 1) for q in (0, 1))


def _truth(formula: str, p: int, q: int) -> bool:
    """Evaluate from the right: the last operator outside brackets splits the formula."""
    depth = 0
    for place in range(len(formula) - 1, -1, -1):
        sign = formula[place]
        depth += (sign == ")") - (sign == "(")
        if depth == 0 and sign in "&|^>":
            left, right = _truth(formula[:place], p, q), _truth(formula[place + 1 :], p, q)
            return {"&": left and right, "|": left or right, "^": left ^ right, ">": right or not left}[sign]
    if formula.startswith("("):
        return _truth(formula[1:-1], p, q)
    if formula.startswith("~"):
        return not _truth(formula[1:], p, q)
    return bool({"p": p, "q": q}[formula])


@pytest.mark.parametrize("difficulty", [0, 11, -1, 1.0, "1", True, None])
def test_a_bad_difficulty_is_refused(difficulty: object) -> None:
    with pytest.raises(UserError, match="difficulty must be a whole number from 1 to 10"):
        FAMILIES["logic"](difficulty=difficulty)


@pytest.mark.parametrize("option", ["hardness", "name", "maker"])
def test_an_unknown_option_is_named(option: str) -> None:
    with pytest.raises(UserError, match=f"'builtin/sums' has no option '{option}'"):
        FAMILIES["sums"](**{option: 2})


@given(SEEDS, st.integers(1, 9), st.sampled_from(["+", "-*", "+-", "*-+"]))
def test_arithmetic_asks_in_words_and_takes_only_the_right_number(seed: int, digits: int, operations: str) -> None:
    task = load_arithmetic({"digits": digits, "operations": operations})
    item = task.make(seed)
    asked = re.fullmatch(r"What is (\d+) ([-+*]) (\d+)\?", item.question)
    assert asked is not None and len(asked[1]) == len(asked[3]) == digits and asked[2] in operations
    left, right = int(asked[1]), int(asked[3])
    result = {"+": left + right, "-": left - right, "*": left * right}[asked[2]]
    assert task.verify(item, f" {result}") == task.verify(item, f"{result}.0") == 1.0
    for wrong in ("", str(result + 1), f"it is {result}", f"{result} {result}", f"{left} {asked[2]} {right}"):
        assert task.verify(item, wrong) == 0.0


@given(SEEDS, st.integers(3, 6))
def test_arithmetic_of_several_terms_takes_products_first(seed: int, terms: int) -> None:
    item = load_arithmetic({"digits": 2, "terms": terms}).make(seed)
    asked = re.fullmatch(r"What is (\d+(?: [-+*] \d+)+)\?", item.question)
    assert asked is not None and len(re.findall(r"\d+", asked[1])) == terms
    assert int(item.answer) == eval(asked[1])


@given(SEEDS, DIFFICULTIES, st.data())
def test_summands_takes_any_two_numbers_that_make_the_one_asked_for(
    seed: int, difficulty: int, data: st.DataObject
) -> None:
    task = BY_NAME["summands"](difficulty=difficulty)
    item = task.make(seed)
    total = int(item.question.removesuffix("="))
    assert total < 1000 * 2**difficulty and task.verify(item, item.answer) == 1.0
    left = data.draw(st.integers(0, total))
    assert task.verify(item, f" {left}+{total - left}\n") == 1.0
    for wrong in (f"{left}+{total - left + 1}", f"{total}", f"{left}+{total - left}+0", f"-1+{total + 1}", "", "+"):
        assert task.verify(item, wrong) == 0.0
    assert task.verify(item, "\u0661+\u0661".replace("\u0661", chr(0x660 + total % 10))) == 0.0


def test_what_one_question_of_summands_shows_differs_and_it_is_none_of_the_seven() -> None:
    task = BY_NAME["summands"]()
    shown: dict[str, list[str]] = {}
    for item in map(task.make, range(8000)):
        shown.setdefault(item.question, []).append(item.answer)
    often = [answers for question, answers in shown.items() if len(question) > 3 and len(answers) > 4]
    assert "summands" not in FAMILIES and len(often) > 100
    assert all(len(set(answers)) > 1 for answers in often)


def test_arithmetic_is_apart_from_the_seven_and_its_options_make_its_key() -> None:
    assert "arithmetic" not in FAMILIES
    assert load_arithmetic({}).key == load_arithmetic({"digits": 1, "operations": "*-+"}).key
    assert load_arithmetic({}).key != load_arithmetic({"operations": "+"}).key
    assert load_arithmetic({}).key != load_arithmetic({"digits": 2}).key


@pytest.mark.parametrize(
    "options", [{"digits": 0}, {"digits": 10}, {"digits": "a"}, {"operations": ""}, {"operations": "+/"}, {"level": 1}]
)
def test_a_bad_option_of_arithmetic_is_one_clear_line(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=rf"'builtin/arithmetic': option '{next(iter(options))}'") as caught:
        load_arithmetic(options)
    assert "\n" not in str(caught.value)
