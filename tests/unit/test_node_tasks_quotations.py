"""Held-out questions inside a peer's right answer to another question."""

import json
from pathlib import Path

import pytest

from node.config import TaskConfig
from node.tasks import Item, load_tasks
from node.tasks.quotations import LEAST, Quotations
from node.tasks.task_set import TaskSet

HELD, ANSWER = "What is 31 + 46?", "77"


@pytest.mark.parametrize(
    ("text", "quotes"),
    [
        ("What is 31 + 46? 77. What is 2 + 3? 5", True),
        ("First, what is 31+46?  It is\n77. Then 5", True),
        (" 5\n\nQuestion: What is 31 + 46?\nAnswer: 77\n\nQuestion: What is 2 + 3?\nAnswer: 5", True),
        ("WHAT IS 31 + 46: 77; 5", True),
        ("What is 31 + 46? I do not know. 5", False),  # it gives nothing away
        ("77. What is 31 + 46? 5", False),
        ("What is 31 + 46? 770 or 5", False),
        ("What is 131 + 46? 77 5", False),
        ("What is 31 + 4? 35", False),
        ("31 + 46 = 77 and 2 + 3 = 5", False),  # in other words: the page says that this is not found
        ("5", False),
        ("", False),
    ],
)
def test_a_text_quotes_a_question_by_its_words_and_its_answer_after_them(text: str, quotes: bool) -> None:
    assert Quotations([Item("Who wrote the play?", "Me"), Item(HELD, ANSWER)]).are_in(text) == quotes
    assert not Quotations([]).are_in(text)


def test_a_short_question_is_not_looked_for() -> None:
    assert len(["capital", "of", "France"]) < LEAST
    assert not Quotations([Item("Capital of France?", "Paris")]).are_in("The capital of France is Paris")


def test_questions_that_begin_alike_are_told_apart() -> None:
    found = Quotations([Item(f"What is the sum of {number} and {number}?", str(2 * number)) for number in range(50)])
    assert found.are_in("What is the sum of 7 and 7? 14")
    assert not found.are_in("What is the sum of 7 and 8? 15")


@pytest.mark.parametrize(
    "text",
    [
        "a" + "\u0316\u0301" * 64_000,
        "what is the sum " * 8_000,
        "what is the sum of 7 and " * 5_000,
        "\u00c5" * 120_000,
    ],
)
def test_the_longest_text_takes_no_time_that_grows_with_its_square(text: str) -> None:
    longest = " and ".join(["what is the sum of 7"] * 400)
    found = Quotations([Item(f"{longest[: 5 * end]} {end}", "7") for end in range(4, 400)])
    assert not found.are_in(text)


def rows_task(folder: Path) -> TaskSet:
    rows = [
        {"question": f"How many are {number} and one more apples?", "answer": str(number + 1)} for number in range(80)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_tasks([TaskConfig(name="dataset/rows", options={"path": str(folder / "rows.jsonl")})])


def test_all_held_out_rows_are_listed_and_no_other(tmp_path: Path) -> None:
    tasks = rows_task(tmp_path)
    (task,) = tasks.tasks
    listed = {item.question for item in tasks.listed_held_out(0)}
    assert listed == {one for row in range(80) if tasks.is_held_out(task, one := task.make(row).question)} != set()


def test_of_a_task_without_rows_those_are_listed_that_the_evaluation_asks() -> None:
    tasks = load_tasks([TaskConfig(name="builtin/arithmetic", options={"digits": 2, "operations": "+-"}, examples=3)])
    (task,) = tasks.tasks
    asked = [item for item, _ in zip(tasks.evaluation(task, 0, 32), range(32), strict=False)]
    assert [item.question for item in tasks.listed_held_out(32)] == [item.question for item in asked]
    assert list(tasks.listed_held_out(0)) == []
    held, training = asked[0], next(tasks.questions(1, 1)).item
    for form in ("{hq} {ha}. {q} {a}", "First, {hq} It is {ha}. Then, {q} It is {a}"):
        text = form.format(hq=held.question, ha=held.answer, q=training.question, a=training.answer)
        assert tasks.quotations(32).are_in(text)
    assert not tasks.quotations(32).are_in(f"{training.question} {training.answer}")
