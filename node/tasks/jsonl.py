"""A task from a file of questions and answers, one JSON object a line.

    [[tasks]]
    name = "jsonl"
    [tasks.options]
    path = "riddles.jsonl"      # {"question": "...", "answer": "..."} on each line
    question = "question"       # the field that holds the question; likewise answer
    system = ""                 # an instruction before every question

The configuration hash covers the file's bytes: only nodes that hold the same file can
verify each other's groups. The path stays at home.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from node.config import Section, option_complaint
from node.errors import UserError
from node.rollouts.group import MAX_TEXT_BYTES
from node.tasks import Item, TaskKey, config_hash, derive_seed
from node.tasks.answers import MAX_ANSWER, MAX_TEXT, extract_answer, same_number, same_text

NAME = "jsonl"
VERSION = 1
MAX_FILE_BYTES = 256 << 20


class JsonlOptions(Section):
    """The options of the task."""

    path: Path
    question: str = Field("question", min_length=1)
    answer: str = Field("answer", min_length=1)
    system: str = ""


@dataclass(frozen=True, slots=True)
class Jsonl:
    """Questions from a file: a seed stands for one line of it.

    A completion earns 1 when the answer in its last pair of answer tags, or all of it
    if it has none, is the right one: the same words, or the same number.
    """

    key: TaskKey
    items: tuple[Item, ...]

    def make(self, seed: int) -> Item:
        return self.items[derive_seed(NAME, VERSION, seed) % len(self.items)]

    def verify(self, item: Item, text: str) -> float:
        answer = extract_answer(text)
        if answer is None:
            answer = text if len(text) <= MAX_TEXT else ""
        return float(same_text(answer, item.answer) or same_number(answer, item.answer))


def load_jsonl(options: Mapping[str, object]) -> Jsonl:
    """Read the file that `options` name; raise `UserError` for a bad option, file or line."""
    try:
        parsed = JsonlOptions.model_validate(dict(options))
    except ValidationError as error:
        raise UserError(f"task 'jsonl': {option_complaint(error, JsonlOptions)}") from None
    try:
        if parsed.path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"task 'jsonl': {parsed.path} is larger than {MAX_FILE_BYTES >> 20} MiB: split it")
        data = parsed.path.read_bytes()
    except OSError as error:
        raise UserError(f"task 'jsonl': cannot read {parsed.path}: {error.strerror}") from None
    items = tuple(
        _parse(line, parsed, f"{parsed.path}:{number}")
        for number, line in enumerate(data.splitlines(), 1)
        if line.strip()
    )
    if not items:
        raise UserError(f"task 'jsonl': {parsed.path} holds no questions")
    config = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "question": parsed.question,
        "answer": parsed.answer,
        "system": parsed.system,
    }
    return Jsonl(TaskKey(NAME, VERSION, config_hash(config)), items)


def _parse(line: bytes, options: JsonlOptions, where: str) -> Item:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"task 'jsonl': {where} is not a JSON object") from None
    if not isinstance(row, dict):
        raise UserError(f"task 'jsonl': {where} is not a JSON object")
    question = _text(row, options.question, where)
    answer = _text(row, options.answer, where)
    if len(question.encode()) > MAX_TEXT_BYTES:
        raise UserError(f"task 'jsonl': {where}: the question is longer than {MAX_TEXT_BYTES >> 10} KiB")
    if len(answer) > MAX_ANSWER:
        raise UserError(f"task 'jsonl': {where}: the answer is longer than {MAX_ANSWER} characters")
    return Item(question, answer, options.system)


def _text(row: dict[str, object], field: str, where: str) -> str:
    value = row.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"task 'jsonl': {where} has no text or number in its field {field!r}")
    return value
