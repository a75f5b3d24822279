"""The JSONL task: what a file's lines become, and one clear line for a file that will not do."""

import json
from pathlib import Path

import pytest

from node.errors import UserError
from node.tasks.answers import MAX_ANSWER
from node.tasks.jsonl import load_jsonl

ROWS = [{"question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(20)]


def _write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_seeds_reach_every_line_and_only_its_answer_passes(tmp_path: Path) -> None:
    task = load_jsonl({"path": str(_write(tmp_path / "a.jsonl", ROWS)), "system": "Be brief."})
    items = [task.make(seed) for seed in range(400)]
    assert {item.question for item in items} == {row["question"] for row in ROWS}
    assert items == [task.make(seed) for seed in range(400)]
    for item in items[:20]:
        assert item.system == "Be brief."
        right = (item.answer, f" {item.answer}.0 ", f"I think 7, no: <answer>{item.answer}</answer>")
        assert [task.verify(item, text) for text in right] == [1.0] * 3
        wrong = ("", "-1", f"{item.answer}?", f"{item.answer} <answer>-1</answer>", "9" * 10**6, "<answer></answer>")
        assert [task.verify(item, text) for text in wrong] == [0.0] * 6


def test_words_are_compared_without_case_and_spacing(tmp_path: Path) -> None:
    rows = [{"q": "Capital of Peru?", "a": "Lima  city"}]
    task = load_jsonl({"path": str(_write(tmp_path / "a.jsonl", rows)), "question": "q", "answer": "a"})
    item = task.make(0)
    assert task.verify(item, "LIMA city") == 1.0
    assert task.verify(item, "It is Lima city") == 0.0


def test_the_key_names_the_contents_and_not_the_path(tmp_path: Path) -> None:
    one, same = _write(tmp_path / "one.jsonl", ROWS), _write(tmp_path / "same.jsonl", ROWS)
    other = _write(tmp_path / "other.jsonl", [*ROWS[:-1], {"question": ROWS[-1]["question"], "answer": 0}])
    key = load_jsonl({"path": str(one)}).key
    assert load_jsonl({"path": str(same)}).key == key
    assert load_jsonl({"path": str(other)}).key != key
    assert load_jsonl({"path": str(one), "system": "Think."}).key != key


@pytest.mark.parametrize(
    ("contents", "complaint"),
    [
        (b"", "holds no questions"),
        (b"\n\n", "holds no questions"),
        (b'{"question": "a", "answer": "b"}\n[1]\n', ":2 is not a JSON object"),
        (b"{broken", ":1 is not a JSON object"),
        (b"\xff\xfe", ":1 is not a JSON object"),
        (b"[" * 100_000, ":1 is not a JSON object"),
        (b'{"question": "a"}', "no text or number in its field 'answer'"),
        (b'{"question": "", "answer": "b"}', "no text or number in its field 'question'"),
        (b'{"question": "a", "answer": true}', "no text or number in its field 'answer'"),
        (b'{"question": "a", "answer": {"b": 1}}', "no text or number in its field 'answer'"),
        (b'{"question": "' + b"a" * 70_000 + b'", "answer": "b"}', "the question is longer"),
        (b'{"question": "a", "answer": "' + b"b" * (MAX_ANSWER + 1) + b'"}', "the answer is longer"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, contents: bytes, complaint: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(contents)
    with pytest.raises(UserError) as caught:
        load_jsonl({"path": str(path)})
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "'path'"),
        ({"path": "/nonexistent/file.jsonl"}, "cannot read"),
        ({"path": "/"}, "cannot read"),
        ({"path": 3}, "'path'"),
        ({"path": "a", "anwser": "b"}, "'anwser'"),
        ({"path": "a", "answer": ""}, "'answer'"),
    ],
)
def test_a_bad_option_is_one_clear_line(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        load_jsonl(options)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)
