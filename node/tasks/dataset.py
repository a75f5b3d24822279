"""A task from a data set of questions and answers: a file here, or a set on the Hugging Face hub.

    [[tasks]]
    name = "dataset/riddles"    # or "dataset": what follows the stroke is a name of yours
    [tasks.options]
    path = "riddles.jsonl"      # JSON lines, .csv or .parquet; relative to the file that says so
    test = "riddles-test.jsonl" # questions of its own for evaluation; without it, one in eight of the rows by a hash
    # hub = "openai/gsm8k"      # instead of path; with subset = "main", split = "train" and test_split = "test"
    question = "question"       # the column that holds the question; `a.b` for a field within one
    answer = "answer"           # likewise; text or a number
    answer_after = ""           # take what follows the last of these: "####" for GSM8K
    system = ""                 # an instruction before every question

The configuration hash covers the questions and answers in their order, and neither path nor format: nodes
that hold the same rows can verify each other's groups. The path stays at home.

A seed below the number of rows is the number of a row; test rows come after the others. A row whose question is also a
test question is never trained on, and the log says how many there are.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from pydantic import Field, ValidationError

from node.config import Section, option_complaint
from node.errors import UserError
from node.tasks import MAX_QUESTION_BYTES, Item, TaskKey, config_hash, is_text
from node.tasks.answers import MAX_ANSWER, MAX_TEXT, extract_answer, same_number, same_text
from node.tasks.questions import question_id

VERSION = 2
MAX_BYTES = 256 << 20  # of questions and answers, which are held in memory
MAX_ROWS = 2_000_000
FORMATS = {".jsonl": "", ".csv": "csv", ".parquet": "parquet"}  # ending to the name that `datasets` has for it
_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

log = structlog.get_logger()


class RowsSource(Section):
    """Where rows come from: options of every kind of task that has rows."""

    path: Path | None = None
    hub: str = ""
    subset: str = ""
    split: str = ""
    test: Path | None = None
    test_split: str = ""


class DatasetOptions(RowsSource):
    """The options of the task."""

    question: str = Field("question", min_length=1)
    answer: str = Field("answer", min_length=1)
    answer_after: str = ""
    system: str = ""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Questions from a data set: a seed stands for one row of it.

    A completion earns 1 when the answer in its last pair of answer tags, or all of it
    if it has none, is the right one: the same words, or the same number.
    """

    key: TaskKey
    items: tuple[Item, ...]
    test_ids: frozenset[bytes] | None = None

    @property
    def size(self) -> int:
        """How many rows it has."""
        return len(self.items)

    def make(self, seed: int) -> Item:
        return self.items[seed % len(self.items)]

    def verify(self, item: Item, text: str) -> float:
        answer = extract_answer(text)
        if answer is None:
            answer = text if len(text) <= MAX_TEXT else ""
        return float(same_text(answer, item.answer) or same_number(answer, item.answer))


def load_dataset(name: str, options: Mapping[str, object]) -> Dataset:
    """Read the data set that `options` name as task `name`; raise `UserError` for a bad option, file or row."""
    try:
        parsed = DatasetOptions.model_validate(dict(options))
    except ValidationError as error:
        raise UserError(f"task {name!r}: {option_complaint(error, DatasetOptions)}") from None
    check_source(name, parsed)
    items, digest = _read(name, parsed, parsed.path, parsed.split or "train")
    config = {"rows": digest, "system": parsed.system}
    if parsed.test is None and not parsed.test_split:
        return Dataset(TaskKey(name, VERSION, config_hash(config)), tuple(items))
    tests, digest = _read(name, parsed, parsed.test, parsed.test_split)
    ids = frozenset(question_id(name, item.question) for item in tests)
    both = [item.question for item in items if question_id(name, item.question) in ids]
    if len(both) == len(items):
        raise UserError(f"task {name!r}: every row is a test question, too: nothing is left to train on")
    if both:
        log.warning("rows that are test questions are not trained on", task=name, rows=len(both), first=both[0][:80])
    key = TaskKey(name, VERSION, config_hash({**config, "tests": digest}))
    return Dataset(key, (*items, *tests), ids)


def check_source(name: str, options: RowsSource) -> None:
    """Raise `UserError` unless the options name one source, and none of them is for the other source."""
    if (options.path is None) == (not options.hub):
        raise UserError(f"task {name!r}: set either the option 'path' or the option 'hub'")
    of_others = ("subset", "split", "test_split") if options.path is not None else ("test",)
    for option in of_others:
        if getattr(options, option):
            source, other = ("path", "hub") if options.path is not None else ("hub", "path")
            use = {"test_split": "test", "test": "test_split"}.get(option)
            hint = f"use {use!r}" if use else "leave it out"
            raise UserError(f"task {name!r}: the option {option!r} is for {other!r} and not for {source!r}: {hint}")


def _read(name: str, options: DatasetOptions, path: Path | None, split: str) -> tuple[list[Item], str]:
    """Return the items of a file, or of a part of a set on the hub, and a hash of their questions and answers."""
    items: list[Item] = []
    digest, size = hashlib.sha256(), 0
    for row, where in read_rows(name, options, path, split):
        item = _item(name, row, options, where)
        line = json.dumps([item.question, item.answer]).encode()
        digest.update(line + b"\n")
        size += len(line)
        if size > MAX_BYTES or len(items) >= MAX_ROWS:
            raise UserError(f"task {name!r}: more than {MAX_BYTES >> 20} MiB or {MAX_ROWS} rows: take a part of it")
        items.append(item)
    if not items:
        raise UserError(f"task {name!r}: {path or options.hub} holds no questions")
    return items, digest.hexdigest()


def read_rows(name: str, options: RowsSource, path: Path | None, split: str) -> Iterator[tuple[object, str]]:
    """Yield each row of a file, or without one of a part of a set on the hub, with a name that helps to find it.

    Raises:
        UserError: task `name` cannot read it.
    """
    if path is None:
        yield from _hub_rows(name, options, split)
    elif path.suffix not in FORMATS:
        raise UserError(f"task {name!r}: {path} is of no known kind: it must end in {', '.join(FORMATS)}")
    elif path.suffix == ".jsonl":
        yield from _lines(name, path)
    else:
        try:
            path.open("rb").close()  # what `datasets` says of a missing file is no line for a person
        except OSError as error:
            raise UserError(f"task {name!r}: cannot read {path}: {error.strerror}") from None
        yield from _streamed(name, str(path), FORMATS[path.suffix], data_files=str(path), split="train")


def _lines(name: str, path: Path) -> Iterator[tuple[object, str]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse(name, line, f"{path}:{number}"), f"{path}:{number}"
    except OSError as error:
        raise UserError(f"task {name!r}: cannot read {path}: {error.strerror}") from None


def _parse(name: str, line: bytes, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"task {name!r}: {where} is not a JSON object") from None


def _hub_rows(name: str, options: RowsSource, split: str) -> Iterator[tuple[object, str]]:
    # `datasets` takes a folder of that name, where there is one, for the set: no founder chooses our files.
    if not _HUB.fullmatch(options.hub) or Path(options.hub).exists():
        raise UserError(f"task {name!r}: hub={options.hub!r} is no OWNER/NAME on the hub: use path for what is here")
    yield from _streamed(name, options.hub, options.hub, name=options.subset or None, split=split)


def _streamed(task: str, source: str, *arguments: str, **options: str | None) -> Iterator[tuple[object, str]]:
    import datasets

    try:
        rows = datasets.load_dataset(*arguments, **options, streaming=True)
        for number, row in enumerate(rows, 1):
            yield row, f"{source}, row {number}"
    except (OSError, ValueError, RuntimeError) as error:  # those of datasets, pyarrow and the hub's client are such
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"task {task!r}: cannot read {source}: {reason}") from None


def _item(name: str, row: object, options: DatasetOptions, where: str) -> Item:
    if not isinstance(row, dict):
        raise UserError(f"task {name!r}: {where} is not a JSON object")
    question = _text(name, row, options.question, where)
    answer = _text(name, row, options.answer, where)
    if options.answer_after:
        _, marker, answer = answer.rpartition(options.answer_after)
        if not marker or not answer.strip():
            raise UserError(f"task {name!r}: {where} has nothing after {options.answer_after!r} in {options.answer!r}")
        answer = answer.strip()
    if len(question.encode()) > MAX_QUESTION_BYTES:
        raise UserError(f"task {name!r}: {where}: the question is longer than {MAX_QUESTION_BYTES >> 10} KiB")
    if len(answer) > MAX_ANSWER:
        raise UserError(f"task {name!r}: {where}: the answer is longer than {MAX_ANSWER} characters")
    return Item(question, answer, options.system)


def _text(name: str, row: dict[str, Any], column: str, where: str) -> str:
    value: object = row
    for part in [column] if column in row else column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        columns = ", ".join(list(map(str, row))[:8])
        raise UserError(f"task {name!r}: {where} has no text or number in {column!r}; its columns are {columns}")
    if not is_text(value):
        raise UserError(
            f"task {name!r}: {where} has half of a surrogate pair (\\ud800 to \\udfff) in {column!r}: mend it"
        )
    return value
