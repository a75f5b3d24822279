"""Reading answers: exact where it says so, and unmoved by whatever the text holds."""

import gc
import time
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from node.tasks.answers import (
    MAX_ANSWER,
    MAX_DIGITS,
    MAX_TEXT,
    extract_answer,
    parse_fraction,
    parse_number,
    same_fraction,
    same_grid,
    same_number,
    same_output,
    same_text,
)

TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from("0123456789.,-+/${}\\ \n"))
COMPARISONS = (same_fraction, same_grid, same_number, same_output, same_text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so <answer>12</answer>", "12"),
        ("<answer> 1 </answer> no, <answer>\n2\n</answer> yes", "2"),
        ("<answer>1</answer> and <answer>2", "1"),
        ("<answer>a <answer>b</answer></answer>", "b</answer>"),
        ("<answer></answer>", ""),
    ],
)
def test_the_last_closed_pair_of_tags_holds_the_answer(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize("text", ["", "12", "<answer>12", "12</answer>", "</answer>12<answer>", "<ANSWER>12</ANSWER>"])
def test_without_a_closed_pair_there_is_no_answer(text: str) -> None:
    assert extract_answer(text) is None


def test_a_text_over_the_bound_has_no_answer() -> None:
    tagged = "<answer>1</answer>"
    assert extract_answer(" " * (MAX_TEXT - len(tagged)) + tagged) == "1"
    assert extract_answer(" " * (MAX_TEXT - len(tagged) + 1) + tagged) is None


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**12), max_value=10**12))
def test_numbers_are_read_exactly(number: Decimal) -> None:
    for text in (f"{number:f}", f"{number:,f}", f" {number:f}000\n", f"{number:+f}"):
        assert parse_number(text) == number
    assert same_number(f"{number:f}", f"{number:.8f}")
    assert not same_number(f"{number + Decimal('0.000001'):f}", f"{number:f}")


@pytest.mark.parametrize(
    "text",
    [
        *("", "-", ".", ".5", "1e5", "1E999999999", "inf", "nan", "0x10", "1_000", "1,0", "1,,000", "--1", "1 2", "١٢"),
        *("1/2", "9" * (MAX_DIGITS + 1), "1." + "9" * (MAX_DIGITS + 1), "1" * 10**6, "__import__('os')"),
    ],
)
def test_what_is_not_a_plain_decimal_number_is_none(text: str) -> None:
    assert parse_number(text) is None
    assert not same_number(text, text)


def test_a_tolerance_is_inclusive() -> None:
    assert same_number("1.001", "1", Decimal("0.001"))
    assert not same_number("1.0010001", "1", Decimal("0.001"))


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(2, 50))
def test_a_fraction_counts_only_in_lowest_terms(numerator: int, denominator: int, factor: int) -> None:
    lowest = Fraction(numerator, denominator)
    plain = f"{lowest.numerator}/{lowest.denominator}"
    latex = f"$\\frac{{{lowest.numerator}}}{{ {lowest.denominator} }}$"
    truth = f"$\\dfrac{{{numerator}}}{{{denominator}}}$"
    assert same_fraction(plain, truth) and same_fraction(f"${plain}$", truth) and same_fraction(latex, truth)
    assert not same_fraction(f"{lowest.numerator * factor}/{lowest.denominator * factor}", truth)
    assert not same_fraction(f"{lowest.numerator + 1}/{lowest.denominator}", truth)
    assert same_fraction(str(lowest.numerator), truth) == (lowest.denominator == 1)


@pytest.mark.parametrize(
    "text", ["1/0", "1/-2", "-1/2", "1//2", "1/2/3", "1.0/2", "", "/", "\\frac{1}", "9" * (MAX_DIGITS + 1) + "/1"]
)
def test_what_is_no_fraction_equals_none(text: str) -> None:
    assert not same_fraction(text, text)
    assert text == "1/0" or parse_fraction(text) is None


def test_a_grid_is_its_cells() -> None:
    truth = "0 1 2\n1 0 1"
    assert same_grid("\n 0  1 2 \n\n1 0\t1\n", truth)
    for wrong in ("0 1 2 1 0 1", "0 1 2\n1 0", "[[0, 1, 2], [1, 0, 1]]", "", "1 0 1\n0 1 2"):
        assert not same_grid(wrong, truth)


def test_text_ignores_case_and_output_does_not() -> None:
    assert same_text("  MONDAY ", "Monday") and not same_text("Mon day", "Monday")
    assert same_output(" abc\n", "abc") and not same_output("Abc", "abc")


@given(TEXT, TEXT)
@example("{0.__class__.__init__.__globals__}", "%s%n")
def test_no_text_raises_and_equality_is_of_meaning(answer: str, truth: str) -> None:
    for same in COMPARISONS:
        if same(answer, truth):
            assert same(truth, answer) or same is same_fraction
    extract_answer(answer)


UNITS = ("9", " ", "1,", "1,000", "9.", "<answer>", "</answer>", "\\frac{", "{", "1/", "$", "a\n", "\u0130", "¬", "(")


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.disable()  # what others left in this process would be looked through
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_long_hostile_text_costs_little(unit: str) -> None:
    text = unit * (MAX_TEXT // len(unit))
    began = time.thread_time()  # others' threads run on in this process
    for body in (text, text[:MAX_ANSWER], f"{text[: MAX_TEXT - 20]}<answer>1</answer>"):
        extract_answer(body)
        for same in COMPARISONS:
            same(body, "1/2")
    assert time.thread_time() - began < 0.5
