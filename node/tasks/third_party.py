"""Tasks of other people: a Python file of yours, or an entry point of a package that is installed.

    [[tasks]]
    name = "file/riddles"       # or "file": what follows the stroke is a name of yours
    options = { path = "riddles.py" }

The file has `make(seed) -> Item`, and `verify(item, text) -> float` where an exact match is not enough, or
`start(item)` where an answer takes several turns (`node.tasks.environments.episodes`). Its bytes are part of the
configuration hash; its path stays at home.

A package declares an entry point in the group `gossamer.tasks`: a function from the task's options to a `Task`. Its
name is none of our own kinds', such as `builtin/x`.

Their code is trusted as this program is. It makes questions in this process. It scores answers in worker processes
(`node.tasks.scoring.verdicts`), and each episode has a process of its own (`node.tasks.scoring.fork_server`). These run
on texts of models, so they get neither network nor files to write, where the machine can forbid it. Peers' texts are
scored in cages (`node.tasks.scoring.caged`), unless the file or the task says `isolate = "none"`. Nothing of this holds
if it says `judge = True`. What it returns is checked. What it raises is told in one line that names the task. Examples
of its own that are held-out questions are not shown.
"""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from importlib.abc import InspectLoader
from importlib.metadata import EntryPoint, entry_points
from numbers import Real
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NoReturn

from pydantic import ValidationError

from node.config import AnswerMode, Section, TaskConfig, option_complaint
from node.errors import UserError
from node.tasks import (
    MAX_QUESTION_BYTES,
    UNIT,
    Isolate,
    Item,
    TaskKey,
    Wrapper,
    config_hash,
    derive_seed,
    is_reward,
    is_text,
    kind_of,
    task_names,
)
from node.tasks.answers import READERS, same_output
from node.tasks.environments.episodes import Environment, StartEpisode, play_again, start_of
from node.tasks.questions import question_id

VERSION = 1
ENTRY_POINTS = "gossamer.tasks"
MAX_FILE_BYTES = 1 << 20
SEEDS_COMPARED, ROWS_COMPARED = 16, 1000  # whether two of their games ask the same question
UNNAMED = "two of its games ask the same question: let the question's text name the game"
QUOTED = 60  # characters of a text in an error

TEMPLATE = '''"""A task: `gossamer tasks check ./FILE` tries it, and `gossamer node --task ./FILE` trains on it."""

import random

from node.tasks import Item


def make(seed: int) -> Item:
    """Return the question that `seed` stands for: the same one in every process, whenever it is asked."""
    rng = random.Random(seed)
    word = "".join(rng.choice("abcdefgh") for _ in range(rng.randint(3, 5)))
    return Item(question=f"Write the word {word} backwards.", answer=word[::-1])


def verify(item: Item, text: str) -> float:
    """Return the reward of a completion: 1 is right, 0 is nothing. Anybody may have written `text`: never evaluate it.

    Without this function, the completion has to be the answer, white space around it aside.
    """
    return float(text.strip().lower() == item.answer)
'''


class TaskError(UserError):
    """A task of somebody else raised an exception or returned what no task returns; the line names it."""


@dataclass(frozen=True, slots=True)
class ThirdPartyTask(Wrapper):
    """A task that is not ours: what it makes and pays is checked. Raises `TaskError`, which names it."""

    key: TaskKey
    held_out: Callable[[str, str], bool] = lambda name, question: False  # such questions are no examples
    names_games: bool = True  # whether no two games ask the same question, as far as was seen

    @property
    def unshared(self) -> str:
        """Why its groups are not shared with peers; empty if they are."""
        return getattr(self.base, "unshared", "") or ("" if self.names_games else UNNAMED)

    @property
    def outside(self) -> str:
        """Nothing: what it pays is found when it pays it."""
        return ""

    def make(self, seed: int) -> Item:
        try:
            item: object = self.base.make(seed)
        except Exception as error:  # noqa: BLE001  # it may raise anything
            self._failed(f"make({seed})", error)
        if not isinstance(item, Item):
            self._complain(f"make({seed}) returned {_kind(item)}, not a node.tasks.Item")
        texts: tuple[object, ...] = (item.question, item.answer, item.system, item.solution, item.content, item.tools)
        if not all(map(is_text, texts)):
            self._complain(
                f"make({seed}): question, answer, system, solution, content and tools of "
                "an Item are texts that UTF-8 can hold"
            )
        if not _are_pairs_of_texts(item.examples):
            self._complain(f"make({seed}): examples of an Item are pairs of a question and its answer, both texts")
        if not item.question.strip() or len(item.question.encode()) > MAX_QUESTION_BYTES:
            self._complain(
                f"make({seed}): a question has 1 to {MAX_QUESTION_BYTES} bytes, this one {len(item.question)}"
            )
        shown = tuple(pair for pair in item.examples if not self.held_out(self.key.name, pair[0]))
        return item if shown == item.examples else replace(item, examples=shown)

    def verify(self, item: Item, text: str) -> float | None:
        try:
            reward: object = self.base.verify(item, text)
        except Exception as error:  # noqa: BLE001  # it may raise anything
            self._failed(f"verify of {text[:QUOTED]!r}", error)
        if reward is None:
            return None
        if not is_reward(reward):
            shown = repr(reward)[:QUOTED] if isinstance(reward, Real) else _kind(reward)
            self._complain(f"verify of {text[:QUOTED]!r} returned {shown}: a reward is a finite number, or None")
        return float(reward)  # type: ignore[arg-type]  # it is a number

    @property
    def start(self) -> StartEpisode | None:
        """Begins an episode; None if the task has no environment."""
        return None if start_of(self.base) is None else self._start

    def _start(self, item: Item) -> Environment:
        try:
            return start_of(self.base)(item)  # type: ignore[misc]  # `start` says that there is one
        except Exception as error:  # noqa: BLE001  # it may raise anything
            self._failed("start", error)

    def _failed(self, doing: str, error: Exception) -> NoReturn:
        raise TaskError(f"task {self.key.name!r}: {doing} {described(error)}") from error

    def _complain(self, what: str) -> NoReturn:
        raise TaskError(f"task {self.key.name!r}: {what}")


def _are_pairs_of_texts(examples: object) -> bool:
    return isinstance(examples, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and all(map(is_text, pair)) for pair in examples
    )


def checked(name: str, task: object) -> ThirdPartyTask:
    """Return `task`, which calls itself `name`, so that every use is checked; `TaskError` if it is no task."""
    missing = [part for part in ("key", "make", "verify") if not hasattr(task, part)]
    if missing:
        raise TaskError(f"task {name!r}: its factory returned {_kind(task)} without {missing[0]!r}: return a Task")
    key: Any = task.key  # type: ignore[attr-defined]
    if not isinstance(key, TaskKey) or list(map(type, key)) != [str, int, str]:
        raise TaskError(f"task {name!r}: its key is {_kind(key)}: return node.tasks.TaskKey(name, version, config)")
    if key.name != name:
        raise TaskError(f"task {name!r} calls itself {key.name!r} in its key: a task goes by one name")
    if getattr(task, "answer_mode", "whole") not in READERS:
        raise TaskError(f"task {name!r}: its answer_mode is none of {', '.join(READERS)}")
    size, test_ids = getattr(task, "size", None), getattr(task, "test_ids", None)
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise TaskError(f"task {name!r}: its size is {size!r:.{QUOTED}}: it is how many rows it has, 1 or more")
    if test_ids is not None and not (
        isinstance(test_ids, frozenset) and all(isinstance(test_id, bytes) for test_id in test_ids)
    ):
        raise TaskError(
            f"task {name!r}: its test_ids are {_kind(test_ids)}: return a frozenset of node.tasks.questions' ids"
        )
    if not _is_range(getattr(task, "range", UNIT)):
        raise TaskError(f"task {name!r}: its range is {task.range!r:.{QUOTED}}: it is two numbers, the lower one first")  # type: ignore[attr-defined]
    if not isinstance(getattr(task, "unshared", ""), str):
        raise TaskError(f"task {name!r}: its unshared is {_kind(task.unshared)}: say in a text why it is not shared")  # type: ignore[attr-defined]
    if getattr(task, "isolate", None) not in (None, "none", "text"):
        raise TaskError(f"task {name!r}: its isolate is {task.isolate!r:.{QUOTED}}: it is 'none' or 'text'")  # type: ignore[attr-defined]
    wrapped = ThirdPartyTask(task, key)  # type: ignore[arg-type]
    item = wrapped.make(derive_seed("trial", *key))
    if wrapped.verify(item, "") is None and wrapped.verify(item, item.solution or item.answer) is None:
        raise TaskError(f"task {name!r}: verify of '' and of the answer returned None: a reward is a number")
    return replace(wrapped, names_games=wrapped.start is None or _names_games(wrapped))


def _is_range(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(is_reward, value)) and value[0] < value[1]


def _names_games(task: ThirdPartyTask) -> bool:
    """Tell whether games that ask one question are one game, so that the question can stand for it."""
    seeds = range(SEEDS_COMPARED if task.size is None else min(task.size, ROWS_COMPARED))
    games: dict[bytes, Item] = {}
    for seed in seeds:
        item = replace(task.make(seed), system="", examples=())
        if games.setdefault(question_id(task.key.name, item.question), item) != item:
            return False
    return True


class FileOptions(Section):
    """The options of a file task."""

    path: Path


@dataclass(frozen=True, slots=True)
class FileTask:
    """A task whose functions come from a file."""

    key: TaskKey
    maker: Callable[[int], Item]
    verifier: Callable[[Item, str], float | None]
    answer_mode: AnswerMode = "whole"
    start: StartEpisode | None = None
    replayable: bool = False
    unshared: str = ""
    judge: bool = False
    isolate: Isolate = None

    def make(self, seed: int) -> Item:
        return self.maker(seed)

    def verify(self, item: Item, text: str) -> float | None:
        return self.verifier(item, text)


def load_file(name: str, options: Mapping[str, object]) -> ThirdPartyTask:
    """Return the task `name` of the file that `options` name; `UserError` for a bad option or file."""
    try:
        path = FileOptions.model_validate(dict(options)).path
    except ValidationError as error:
        raise UserError(f"task {name!r}: {option_complaint(error, FileOptions)}") from None
    module, digest = run_file(name, path)
    if not callable(getattr(module, "make", None)):
        raise TaskError(f"task {name!r}: {path} has no function make(seed): see `gossamer tasks template`")
    start: Any = getattr(module, "start", None)
    verifier = getattr(module, "verify", _exact if start is None else partial(_played, start))
    mode: Any = getattr(module, "answer_mode", "whole")
    key = TaskKey(name, VERSION, config_hash({"sha256": digest}))
    replayable = getattr(module, "replayable", False) is True
    unshared = getattr(module, "unshared", "")
    judge, isolate = getattr(module, "judge", False) is True, getattr(module, "isolate", None)
    return checked(name, FileTask(key, module.make, verifier, mode, start, replayable, unshared, judge, isolate))


def _exact(item: Item, text: str) -> float:
    return float(same_output(text, item.answer))


def _played(start: StartEpisode, item: Item, text: str) -> float | None:
    return play_again(start, item, [text])


class _Source(InspectLoader):
    """Loads a module from the very bytes that were hashed."""

    def __init__(self, source: bytes, path: Path) -> None:
        self._source, self._path = source, path

    def get_source(self, fullname: str) -> str:
        return self._source.decode()

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._source, str(self._path))


def run_file(name: str, path: Path) -> tuple[ModuleType, str]:
    """Run a Python file of task `name`; return it as a module, and the hash of its bytes.

    Raises:
        UserError: the file cannot be read, is too large, or raises.
    """
    try:
        with path.open("rb") as file:
            source = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"task {name!r}: cannot read {path}: {error.strerror}") from None
    if len(source) > MAX_FILE_BYTES:
        raise UserError(f"task {name!r}: {path} is larger than {MAX_FILE_BYTES >> 20} MiB")
    digest = hashlib.sha256(source).hexdigest()
    module_name = f"gossamer_task_{digest[:16]}"
    spec = importlib.util.spec_from_loader(module_name, _Source(source, path), origin=str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[module_name] = module  # data classes and pickles look for the module of their class there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it may raise anything
        del sys.modules[module_name]
        raise TaskError(f"task {name!r}: {path} {described(error)}") from error
    return module, digest


def load_entry_point(config: TaskConfig) -> ThirdPartyTask:
    """Return the task that an installed package provides under `config.name`; `UserError` where none does."""
    points = installed()
    if config.name not in points:
        near = get_close_matches(config.name, task_names(), 1)
        hint = f"did you mean {near[0]!r}" if near else "`gossamer tasks list` prints those that there are"
        other = "if a package provides it, install that package here"
        if kind_of(config.name):
            other = f"no package provides a name of the kind {config.name.partition('/')[0]!r}"
        raise UserError(f"unknown task {config.name!r}: {hint}; {other}")
    point = points[config.name]
    try:
        factory = point.load()
    except Exception as error:  # noqa: BLE001  # importing a package may raise anything
        raise TaskError(f"task {config.name!r} cannot be loaded from {point.value}: {error}") from None
    try:
        task = factory(dict(config.options))
    except (TypeError, ValueError) as error:
        raise TaskError(f"task {config.name!r} does not accept its options: {error}") from error
    except UserError:
        raise
    except Exception as error:  # it may raise anything
        raise TaskError(f"task {config.name!r}: {point.value} {described(error)}") from error
    return checked(config.name, task)


def installed() -> dict[str, EntryPoint]:
    """Return the entry points of installed packages, by the task's name.

    Names of our own kinds are left out, since a manifest may name those without the joiner's word.
    """
    return {point.name: point for point in entry_points(group=ENTRY_POINTS) if kind_of(point.name) is None}


def described(error: Exception) -> str:
    """Return what an exception of somebody's code says, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        where = f" (line {error.lineno})"
    return f"raised {type(error).__name__}: {error}{where}"


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
