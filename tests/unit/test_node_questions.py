"""Which questions are the same, and which are held out for evaluation."""

import json
import unicodedata
from math import sqrt
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.config import TaskConfig
from node.tasks import load_tasks
from node.tasks.questions import DEFAULT_SPLIT, Split, question_id

TEXTS = [f"What is {n} and {n * n}?" for n in range(4000)]
TEXT = st.text(st.characters(codec="utf-8"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 3 + 4?", "what IS 3 + 4?"),
        ("What is 3 + 4?", "  What\tis\n3  + 4?\u00a0\n"),
        ("Caf\u00e9?", "Cafe\u0301?"),
        ("\u0390?", "\u03aa\u0301?"),  # in capitals it has no letter of its own
        ("\u03b1\u0345\u0301?", "\u03ac\u0345?"),  # marks in another order, one of which folds to a letter
        ("Stra\u00dfe?", "STRASSE?"),
    ],
)
def test_case_space_and_the_form_of_an_accent_do_not_count(one: str, other: str) -> None:
    assert question_id("t", one) == question_id("t", other)
    assert all(Split(salt=salt).holds_out("t", one) == Split(salt=salt).holds_out("t", other) for salt in range(40))


@pytest.mark.parametrize("other", ["What is 3 + 5?", "What is 3 +4?", "What is 3 - 4?", "What is 3 + 4", ""])
def test_whatever_else_differs_makes_another_question(other: str) -> None:
    assert question_id("t", "What is 3 + 4?") != question_id("t", other)


@given(TEXT, st.sampled_from(["NFC", "NFD"]), st.sampled_from([" ", "\t", " \n "]))
def test_a_question_is_the_same_however_it_is_written(text: str, form: str, space: str) -> None:
    written = f"{space}{space.join(unicodedata.normalize(form, text).casefold().split())}{space}"
    assert question_id("t", written) == question_id("t", text)


def test_a_text_that_is_no_unicode_has_an_id_too() -> None:
    assert len(question_id("t", "\ud800?")) == 16


def test_the_name_of_the_task_is_part_of_a_question() -> None:
    assert question_id("a", "1?") != question_id("b", "1?")
    assert len({Split(salt=0).holds_out(f"task {n}", "1?") for n in range(100)}) == 2


def held(split: Split, task: str = "t") -> set[str]:
    return {text for text in TEXTS if split.holds_out(task, text)}


@pytest.mark.parametrize("share", [1 / 8, 1 / 3])
@pytest.mark.parametrize("salt", [0, 1, 2**32 - 1])
def test_as_many_are_held_out_as_the_share_says(share: float, salt: int) -> None:
    """Within four and a half deviations of the binomial: one in 150,000 such draws would be outside."""
    expected, deviation = len(TEXTS) * share, sqrt(len(TEXTS) * share * (1 - share))
    assert abs(len(held(Split(share, salt))) - expected) < 4.5 * deviation


def test_a_share_of_nothing_holds_out_nothing_a_whole_one_all_and_a_larger_one_what_a_smaller_one_does() -> None:
    assert held(Split(0.0)) == set()
    assert held(Split(1.0)) == set(TEXTS)
    assert held(Split(1 / 16)) < held(Split(1 / 8)) < held(Split(1 / 2))


def test_a_salt_and_a_task_have_a_part_of_their_own() -> None:
    """Two unrelated parts have one in eight of their questions in common."""
    part = held(Split(salt=0))
    assert held(Split(salt=0)) == part
    for other in (held(Split(salt=1)), held(Split(salt=0), "u")):
        assert len(other & part) < len(part) / 4


def test_one_question_in_eight_is_held_out_where_nobody_says_otherwise() -> None:
    assert DEFAULT_SPLIT == Split() == Split(1 / 8, 0)


def test_the_answer_the_instruction_and_the_examples_play_no_part(tmp_path: Path) -> None:
    def part(truth: int, **settings: object) -> set[str]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"question": text, "answer": truth}) + "\n" for text in TEXTS[:200]))
        tasks = load_tasks([TaskConfig(name="dataset", **{"options": {"path": str(path)}, **settings})])
        (task,) = tasks.tasks
        items = list(tasks.evaluation(task, 0, 200))
        assert all(tasks.is_held_out(task, item.question) for item in items)
        return {item.question for item in items}

    plain = part(7)
    assert plain == held(DEFAULT_SPLIT, "dataset") & set(TEXTS[:200])
    assert part(8) == plain
    assert part(7, instruction="Think.") == plain
    assert part(7, examples=2, answer="boxed") == plain
