"""Conclusions from premises: checked against an independent truth table."""

from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from node.tasks.reasoning_gym.propositional_logic import MAX_SYMBOLS, Formula, find_conclusion, is_conclusion, parse

VARIABLES = ("P", "Q", "R")
FORMULAS = st.recursive(
    st.sampled_from(VARIABLES).map(Formula),
    lambda parts: (
        st.builds(lambda part: Formula("¬", (part,)), parts)
        | st.builds(lambda symbol, *both: Formula(symbol, both), st.sampled_from("∧∨→↔"), parts, parts)
    ),
    max_leaves=6,
)


def _holds(formula: Formula, world: dict[str, bool]) -> bool:
    """The oracle: one assignment at a time."""
    parts = [_holds(part, world) for part in formula.parts]
    meanings = {
        "¬": lambda: not parts[0],
        "∧": lambda: parts[0] and parts[1],
        "∨": lambda: parts[0] or parts[1],
        "→": lambda: not parts[0] or parts[1],
        "↔": lambda: parts[0] == parts[1],
    }
    return meanings[formula.symbol]() if parts else world[formula.symbol]


def _entails(premises: list[Formula], conclusion: Formula) -> bool:
    worlds = (dict(zip(VARIABLES, values, strict=True)) for values in product([False, True], repeat=3))
    return all(_holds(conclusion, world) for world in worlds if all(_holds(premise, world) for premise in premises))


@given(FORMULAS)
def test_what_is_written_is_read_back(formula: Formula) -> None:
    assert parse(str(formula), VARIABLES) == formula
    assert parse(f" ( {formula} ) ", VARIABLES) == formula


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("P ∧ Q ∨ R", "((P ∧ Q) ∨ R)"),
        ("P ∨ Q ∧ R", "(P ∨ (Q ∧ R))"),
        ("P → Q → R", "(P → (Q → R))"),
        ("P ∨ Q ∨ R", "((P ∨ Q) ∨ R)"),
        ("¬P ∧ Q ↔ R", "((¬P ∧ Q) ↔ R)"),
        ("~P & Q | !R -> P <-> Q", "((((¬P ∧ Q) ∨ ¬R) → P) ↔ Q)"),
    ],
)
def test_precedence(text: str, meaning: str) -> None:
    assert str(parse(text, VARIABLES)) == meaning


@pytest.mark.parametrize(
    "text",
    [
        *("", "()", "P Q", "PQ", "(P", "P)", "P ∧", "∧ P", "¬", "S", "p", "P == Q", "P and Q", "{P}", "P()", "1"),
        *("¬" * MAX_SYMBOLS + "P", "(" * 10**6, "P" + "∧P" * MAX_SYMBOLS),
    ],
)
def test_anything_else_is_no_formula(text: str) -> None:
    assert parse(text, VARIABLES) is None
    assert not is_conclusion(text, ["P", "(P → Q)", "R"])


@given(st.lists(FORMULAS, min_size=1, max_size=3), FORMULAS)
def test_a_conclusion_follows_from_the_premises_together_and_from_none_alone(
    premises: list[Formula], conclusion: Formula
) -> None:
    assume(all(len(str(premise)) < MAX_SYMBOLS for premise in (*premises, conclusion)))
    if is_conclusion(str(conclusion), [str(premise) for premise in premises]):
        assert _entails(premises, conclusion)
        assert not _entails([], conclusion)
        assert not any(_entails([premise], conclusion) for premise in premises)
        assert conclusion.symbol != "∧"
    else:
        used = {name for premise in premises for name in str(premise)}
        assert (
            not _entails(premises, conclusion)
            or any(_entails([premise], conclusion) for premise in premises)
            or conclusion.symbol in "∧¬∨→"  # a conjunction, possibly under negations
            or not set(str(conclusion)) - set("¬∧∨→↔() ") <= used
        )


@given(st.lists(FORMULAS, min_size=1, max_size=3))
def test_a_found_conclusion_is_one(premises: list[Formula]) -> None:
    texts = [str(premise) for premise in premises]
    assume(all(len(text) < MAX_SYMBOLS for text in texts))
    found = find_conclusion(texts)
    assert found is None or is_conclusion(found, texts)


def test_what_earns_nothing() -> None:
    premises = ["P", "(P → Q)", "(Q ∨ R)"]
    assert find_conclusion(premises) == "Q"
    assert is_conclusion("Q", premises) and is_conclusion("Q ↔ P", premises)
    rubbish, tautology, repeated, reworded, weakened = "R", "P ∨ ¬P", "P → Q", "¬P ∨ Q", "P ∨ R"
    for text in (rubbish, tautology, repeated, reworded, weakened):
        assert not is_conclusion(text, premises), text
    for conjunction in ("P ∧ Q", "¬¬(P ∧ Q)", "¬(¬P ∨ ¬Q)", "¬(P → ¬Q)"):
        assert not is_conclusion(conjunction, premises), conjunction


def test_contradictory_premises_have_no_conclusion() -> None:
    assert find_conclusion(["P", "¬P", "Q"]) is None


def test_premises_that_are_no_formulas_are_a_defect() -> None:
    with pytest.raises(ValueError, match="premises"):
        is_conclusion("P", ["P ∧"])
