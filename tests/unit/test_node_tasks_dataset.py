"""The data set task: what a file's lines become, and one clear line for a file that will not do."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from node.errors import UserError
from node.tasks import Item, dataset
from node.tasks.answers import MAX_ANSWER
from node.tasks.dataset import Dataset, load_dataset
from node.tasks.questions import question_id

ROWS = [{"question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(20)]


def _load(options: dict[str, object]) -> Dataset:
    return load_dataset("dataset/riddles", options)


def _write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_seeds_reach_every_line_and_only_its_answer_passes(tmp_path: Path) -> None:
    task = _load({"path": str(_write(tmp_path / "a.jsonl", ROWS)), "system": "Be brief."})
    items = [task.make(seed) for seed in range(400)]
    assert {item.question for item in items} == {row["question"] for row in ROWS}
    assert items == [task.make(seed) for seed in range(400)]
    for item in items[:20]:
        assert item.system == "Be brief."
        right = (item.answer, f" {item.answer}.0 ", f"I think 7, no: <answer>{item.answer}</answer>")
        assert [task.verify(item, text) for text in right] == [1.0] * 3
        wrong = ("", "-1", f"{item.answer}?", f"{item.answer} <answer>-1</answer>", "9" * 10**6, "<answer></answer>")
        assert [task.verify(item, text) for text in wrong] == [0.0] * 6


def test_a_seed_is_the_number_of_a_row_and_test_rows_come_after_the_others(tmp_path: Path) -> None:
    rows, test = _write(tmp_path / "a.jsonl", ROWS[:15]), _write(tmp_path / "b.jsonl", ROWS[15:])
    task = _load({"path": str(rows), "test": str(test)})
    assert task.size == 20
    assert [task.make(seed).question for seed in range(40)] == [row["question"] for row in ROWS] * 2
    assert task.test_ids == {question_id("dataset/riddles", row["question"]) for row in ROWS[15:]}
    assert _load({"path": str(rows)}).test_ids is None


def test_test_rows_are_part_of_the_key_and_are_read_as_the_others_are(tmp_path: Path) -> None:
    rows, test = _write(tmp_path / "a.jsonl", ROWS[:15]), _write(tmp_path / "b.jsonl", ROWS[15:])
    same, other = _write(tmp_path / "c.jsonl", ROWS[15:]), _write(tmp_path / "d.jsonl", ROWS[16:])
    keys = [_load({"path": str(rows), "test": str(path)}).key for path in (test, same, other)]
    assert keys[0] == keys[1] != keys[2]
    assert _load({"path": str(rows)}).key not in keys
    bad = _write(tmp_path / "e.jsonl", [{"question": "1?"}])
    with pytest.raises(UserError, match=r"e.jsonl:1 has no text or number in 'answer'"):
        _load({"path": str(rows), "test": str(bad)})


def test_rows_that_are_all_test_questions_are_one_clear_line(tmp_path: Path) -> None:
    rows, test = _write(tmp_path / "a.jsonl", ROWS[:5]), _write(tmp_path / "b.jsonl", ROWS)
    with pytest.raises(UserError, match="every row is a test question, too: nothing is left to train on"):
        _load({"path": str(rows), "test": str(test)})


def test_words_are_compared_without_case_and_spacing(tmp_path: Path) -> None:
    rows = [{"q": "Capital of Peru?", "a": "Lima  city"}]
    task = _load({"path": str(_write(tmp_path / "a.jsonl", rows)), "question": "q", "answer": "a"})
    item = task.make(0)
    assert task.verify(item, "LIMA city") == 1.0
    assert task.verify(item, "It is Lima city") == 0.0


def test_the_key_names_the_contents_and_not_the_path(tmp_path: Path) -> None:
    one, same = _write(tmp_path / "one.jsonl", ROWS), _write(tmp_path / "same.jsonl", ROWS)
    other = _write(tmp_path / "other.jsonl", [*ROWS[:-1], {"question": ROWS[-1]["question"], "answer": 0}])
    key = _load({"path": str(one)}).key
    assert _load({"path": str(same)}).key == key
    assert _load({"path": str(other)}).key != key
    assert _load({"path": str(one), "system": "Think."}).key != key


@pytest.mark.parametrize(
    ("contents", "complaint"),
    [
        (b"", "holds no questions"),
        (b"\n\n", "holds no questions"),
        (b'{"question": "a", "answer": "b"}\n[1]\n', ":2 is not a JSON object"),
        (b"{broken", ":1 is not a JSON object"),
        (b"\xff\xfe", ":1 is not a JSON object"),
        (b"[" * 100_000, ":1 is not a JSON object"),
        (rb'{"question": "a\ud800", "answer": "b"}', ":1 has half of a surrogate pair"),
        (rb'{"question": "a", "answer": "\udfff"}', "in 'answer': mend it"),
        (b'{"question": "a"}', "no text or number in 'answer'"),
        (b'{"question": "", "answer": "b"}', "no text or number in 'question'"),
        (b'{"question": "a", "answer": true}', "no text or number in 'answer'"),
        (b'{"question": "a", "answer": {"b": 1}}', "no text or number in 'answer'"),
        (b'{"question": "' + b"a" * 70_000 + b'", "answer": "b"}', "the question is longer"),
        (b'{"question": "a", "answer": "' + b"b" * (MAX_ANSWER + 1) + b'"}', "the answer is longer"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, contents: bytes, complaint: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(contents)
    with pytest.raises(UserError) as caught:
        _load({"path": str(path)})
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "'path' or the option 'hub'"),
        ({"path": "a.jsonl", "hub": "a/b"}, "'path' or the option 'hub'"),
        ({"path": "/nonexistent/file.jsonl"}, "cannot read"),
        ({"path": "/nonexistent/file.parquet"}, "cannot read"),
        ({"path": "/nonexistent/file.csv"}, "cannot read"),
        ({"path": "/"}, "of no known kind"),
        ({"path": "rows.xml"}, "of no known kind"),
        ({"path": 3}, "'path'"),
        ({"hub": "../up"}, "no OWNER/NAME"),
        ({"hub": "/etc"}, "no OWNER/NAME"),
        ({"hub": "json"}, "no OWNER/NAME"),
        ({"path": "a", "anwser": "b"}, "'anwser'"),
        ({"path": "a", "answer": ""}, "'answer'"),
        ({"path": "a.jsonl", "subset": "main"}, "'subset' is for 'hub' and not for 'path': leave it out"),
        ({"path": "a.jsonl", "split": "train"}, "'split' is for 'hub' and not for 'path': leave it out"),
        ({"path": "a.jsonl", "test_split": "test"}, "'test_split' is for 'hub' and not for 'path': use 'test'"),
        ({"hub": "a/b", "test": "a.jsonl"}, "'test' is for 'path' and not for 'hub': use 'test_split'"),
    ],
)
def test_a_bad_option_is_one_clear_line(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        _load(options)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_formats_are_no_part_of_the_key_and_columns_are_ours_to_map(tmp_path: Path) -> None:
    rows = [{"q": f"{n}?", "answer": f"Think. #### {n}", "extra": {"truth": n}} for n in range(30)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("q,answer\n" + "".join(f'{row["q"]},"{row["answer"]}"\n' for row in rows))
    plain = _write(tmp_path / "plain.jsonl", [{"question": f"{n}?", "answer": n} for n in range(30)])
    mapped = {"question": "q", "answer_after": "####"}
    key = _load({"path": str(plain)}).key
    assert _load({"path": str(tmp_path / "a.parquet"), **mapped}).key == key
    assert _load({"path": str(tmp_path / "a.csv"), **mapped}).key == key
    assert _load({"path": str(tmp_path / "a.parquet"), "question": "q", "answer": "extra.truth"}).key == key
    assert _load({"path": str(tmp_path / "a.parquet"), "question": "q"}).key != key


def test_what_is_missing_in_a_table_is_one_clear_line(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"q": "1?", "answer": None}]), tmp_path / "a.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    for options, complaint in [
        ({"path": "a.parquet"}, "row 1 has no text or number in 'question'; its columns are q, answer"),
        ({"path": "a.parquet", "question": "q"}, "no text or number in 'answer'"),
        ({"path": "a.parquet", "question": "q.r"}, "no text or number in 'q.r'"),
        ({"path": "bad.parquet"}, "cannot read"),
    ]:
        with pytest.raises(UserError) as caught:
            _load({**options, "path": str(tmp_path / options["path"])})
        assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_an_answer_without_its_marker_is_one_clear_line(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", [{"question": "1?", "answer": "1"}])
    with pytest.raises(UserError, match=r":1 has nothing after '####' in 'answer'"):
        _load({"path": str(path), "answer_after": "####"})


def test_a_set_on_the_hub_is_streamed_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stream(*arguments: object, **options: object) -> list[dict[str, object]]:
        asked.append((arguments, options))
        return [{"question": "1?", "answer": 1}]

    monkeypatch.setattr("datasets.load_dataset", stream)
    task = _load({"hub": "openai/gsm8k", "subset": "main", "split": "test"})
    assert task.make(5) == Item("1?", "1")
    assert asked == [(("openai/gsm8k",), {"name": "main", "split": "test", "streaming": True})]


def test_a_set_on_the_hub_has_its_own_part_for_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"train": [{"question": "1?", "answer": 1}], "test": [{"question": "2?", "answer": 2}]}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **options: parts[options["split"]])
    task = _load({"hub": "openai/gsm8k", "test_split": "test"})
    assert [task.make(seed).question for seed in range(task.size)] == ["1?", "2?"]
    assert task.test_ids == {question_id("dataset/riddles", "2?")}


def test_a_folder_here_is_no_set_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret" / "rows").mkdir(parents=True)
    _write(tmp_path / "secret" / "rows" / "a.jsonl", [{"question": "1?", "answer": 1}])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no OWNER/NAME on the hub"):
        _load({"hub": "secret/rows"})


def test_a_data_set_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "a.jsonl", ROWS)
    monkeypatch.setattr(dataset, "MAX_ROWS", len(ROWS))
    assert len(_load({"path": str(path)}).items) == len(ROWS)
    monkeypatch.setattr(dataset, "MAX_ROWS", len(ROWS) - 1)
    with pytest.raises(UserError, match="take a part of it"):
        _load({"path": str(path)})
