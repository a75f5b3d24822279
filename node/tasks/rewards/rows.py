"""Rows and reward functions in TRL's form: what `GRPOTrainer` trains on, as a task.

    [[tasks]]
    name = "rewards/maths"           # or "rewards": what follows the stroke is a name of yours
    [tasks.options]
    path = "rows.jsonl"              # rows as `node.tasks.dataset` reads them, from a file or with hub = "OWNER/NAME"
    functions = ["./rewards.py:accuracy", "trl:think_format_reward"]    # see `node.tasks.rewards.functions`
    weights = [1.0, 0.2]             # as TRL's reward_weights; without it, 1 for each
    range = [0.0, 1.2]               # the weighted sums that are rewards of 0 and 1; without it, a sum is the reward
    prompt = "prompt"                # the column that is asked: a text, or messages that end with the user's
    tokenizer = "tokenizer.json"     # for functions that count tokens; without it they count characters
    seconds = 4                      # for a text; one that takes longer earns 0
    # isolate = "text"               # "none": no function runs a text; "text": one does; without it, nobody knows
    judge = false                    # whether functions need the network or change files: such a task is not shared
    model = ""                       # a judge's, and its rubric
    rubric = ""

The configuration hash covers the rows, the bytes of each function's file and what it is made with, weights, range and
tokenizer. It covers neither paths nor formats, nor modules that a file imports.

A reward outside of 0 to 1 trains this node as it is, and its group stays at home.

Every group of a task stays at home (`Task.unshared`) if a function pays the same text differently in another process or
at another time, if one is a judge, or if a function might run a stranger's text and this machine has no whole cage for
it (`node.processes.cage`). Functions that pay differently are found when the task is loaded: a few texts are paid twice
in each of two processes, and one of these is a cage if strangers' texts are caged.

    isolate    own texts                              strangers' texts
    "none"     one call a round, confined             a call each, confined
    not said   one call a round, confined             a call each, in a cage
    "text"     a call each, in a cage                 a call each, in a cage
    (judge)    one call a round, neither              none

Messages become the node's own form: an instruction, earlier turns of user and assistant as examples, the question.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

import structlog
from pydantic import Field, ValidationError, field_validator, model_validator

from node.config import option_complaint
from node.errors import UserError, one_line
from node.processes.cage import lacking
from node.processes.worker_process import Message, WorkerError, WorkerTimeoutError
from node.tasks import (
    MAX_QUESTION_BYTES,
    UNIT,
    Item,
    TaskKey,
    config_hash,
    is_in_range,
    is_text,
    scaled,
    told_outside,
)
from node.tasks.dataset import MAX_BYTES, MAX_ROWS, RowsSource, check_source, read_rows
from node.tasks.questions import question_id
from node.tasks.rewards.functions import (
    JUDGE,
    TRL,
    Answered,
    Function,
    Functions,
    Prompt,
    Reward,
    RewardError,
    Spec,
    answer_of,
    load_function,
    parse_spec,
    same,
    tokens_of,
    trial_texts,
    weighted_sum,
)
from node.tasks.rewards.judge import RUBRIC
from node.tasks.scoring.verdicts import CAGE_S, LOAD_S, Answer, Scored, Submission, Verdict, Workers, score

VERSION = 1
TRIAL_ROWS = 2
FIRST_CALLS_S = 60.0  # beside each text's own time: a busy machine may need it for what functions import when called
NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # TRL itself passes these: no columns of a row
WORKER = "node.tasks.rewards.functions"

UNSHARED_HERE = "its functions are of this process alone: functions of a file, FILE.py:NAME, can be shared"
NONE_HERE: Mapping[str, Callable[..., Any]] = {}

Options = TypeVar("Options", bound=RowsSource)

log = structlog.get_logger()


class Prompts(RowsSource):
    """Where rows with prompts come from."""

    prompt: str = Field("prompt", min_length=1)


class Paid(Prompts):
    """Rows that functions pay for."""

    functions: list[str] = Field(default_factory=list)
    weights: list[float] | None = None
    range: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.functions):
            raise ValueError(f"weights has {len(self.weights)} numbers for {len(self.functions)} functions")
        low, high = self.bounds
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"range goes from {low:g} to {high:g}: set two numbers, the lower one first")
        return self

    @property
    def weighted(self) -> list[float]:
        """A weight for each function."""
        return self.weights or [1.0] * len(self.functions)

    @property
    def bounds(self) -> tuple[float, float]:
        """The weighted sums that are rewards of 0 and 1."""
        return self.range or UNIT


class RewardsOptions(Paid):
    """The options of the task."""

    functions: list[str] = Field(min_length=1)
    tokenizer: Path | None = None
    # Below the 5 and 10 s after which math-verify gives up and pays 0, which would be a matter of the machine's speed.
    seconds: float = Field(4.0, gt=0, le=600)
    isolate: Literal["none", "text"] | None = None
    judge: bool = False
    model: str = ""
    rubric: str = RUBRIC

    @field_validator("functions")
    @classmethod
    def _are_named(cls, functions: list[str]) -> list[str]:
        for function in functions:
            spec = parse_spec(function)
            if spec.where == JUDGE and not spec.name.startswith(("http://", "https://")):
                raise ValueError(f"a judge is named as judge:http://..., not {function!r}")
        return functions

    @model_validator(mode="after")
    def _fit(self) -> "RewardsOptions":
        if self.needs_network and self.isolate:
            raise ValueError("isolate: what a judge pays is not shared, and nothing is isolated: leave it out")
        if self.judged and not self.model:
            raise ValueError("model: name the judge's model")
        return self

    @property
    def judged(self) -> bool:
        """Whether one of the functions is a judge."""
        return any(spec.where == JUDGE for spec in self.specs)

    @property
    def needs_network(self) -> bool:
        """Whether the functions are neither confined nor shared."""
        return self.judge or self.judged

    @property
    def isolated(self) -> Literal["none", "text"] | None:
        """What is known of the functions: those of TRL run no text."""
        reads_only = self.needs_network or all(spec.where == TRL for spec in self.specs)
        return self.isolate or ("none" if reads_only else None)

    @property
    def judging(self) -> dict[str, Any]:
        """The arguments of a judge, beside its URL."""
        return {"model": self.model, "rubric": self.rubric, "seconds": self.seconds}

    @property
    def specs(self) -> list[Spec]:
        """The functions, as they are named."""
        return list(map(parse_spec, self.functions))


class PromptRow(NamedTuple):
    """A row: how it asks, and its columns."""

    prompt: Prompt
    columns: dict[str, object]


@dataclass(frozen=True, slots=True)
class _RowsTask:
    """Rows to be asked: `items` by row, `rows` by an item's content, and the `names` of the functions that pay."""

    key: TaskKey
    items: tuple[Item, ...]
    rows: Mapping[str, PromptRow]
    names: tuple[str, ...]
    unshared: str
    test_ids: frozenset[bytes] | None

    @property
    def size(self) -> int:
        """How many rows it has."""
        return len(self.items)

    def make(self, seed: int) -> Item:
        return self.items[seed % len(self.items)]


@dataclass(frozen=True, slots=True)
class LocalRewards(_RowsTask):
    """Rows with functions of this process, such as a notebook's: they are paid here, without a limit on time."""

    functions: Functions

    def verify(self, item: Item, text: str) -> Verdict:
        return self.verify_together([Submission(item, text)])[0]

    def verify_together(self, batch: Sequence[Submission]) -> list[Verdict]:
        """Score several texts, in one call of each function."""
        replies = self.functions.score([Answered(*self.rows[answer.item.content], answer.text) for answer in batch])
        return [Scored(reply["reward"], reply["parts"]) for reply in replies]


@dataclass(frozen=True, slots=True)
class RewardsTask(_RowsTask):
    """Rows with functions that are named: they are paid in worker processes, peers' texts by `apart`.

    `seconds` is what each function took for a text when the task was loaded.
    """

    workers: Workers
    apart: Workers
    together: bool
    seconds: tuple[float, ...]
    range: tuple[float, float]
    outside: str

    def verify(self, item: Item, text: str) -> Verdict:
        return score([Answer(self, item, text)], LOAD_S)[0]

    def submit(self, batch: Sequence[Submission], is_own: bool) -> "list[Future[Verdict]]":
        """Queue texts for worker processes: own ones for one call, as in TRL, a peer's for a call each."""
        requests = [
            {"call": "score", "answered": Answered(*self.rows[answer.item.content], answer.text)} for answer in batch
        ]
        if is_own and self.together:
            return self.workers.submit_together(requests)
        workers = self.workers if is_own else self.apart
        return [workers.submit(request, is_own, answer.quota) for request, answer in zip(requests, batch, strict=True)]


def load_rewards(
    name: str, options: Mapping[str, object], here: Mapping[str, Callable[..., Any]] = NONE_HERE
) -> RewardsTask | LocalRewards:
    """Return the task `name` under `options`.

    Args:
        name: the task's.
        options: its options.
        here: functions of this process by what `options` names them by. If there are any, all functions run here, and
            the task is not shared.

    Raises:
        UserError: a bad option, file or row, or a function that is not there, raises, or pays no numbers.
    """
    parsed = read_options(name, options, RewardsOptions)
    tokenizer = _digest_of(name, parsed.tokenizer)
    rows, tests = read_prompts(name, parsed)
    functions = _load_here(name, parsed, rows, here) if here else None
    begun = _begin(name, parsed, rows) if functions is None else None
    reply: Message = {"code": "", "names": functions.names} if functions is not None else begun.reply  # type: ignore[union-attr]  # one of both
    asked = asked_by(name, rows, tests, item_of)
    config = {
        "functions": [[spec.name, spec.arguments] for spec in parsed.specs],
        "code": reply["code"],
        "weights": parsed.weighted,
        "range": list(parsed.bounds),
        "rows": digest_of(rows),
        "tests": digest_of(tests),
        "tokenizer": tokenizer,
    }
    key = TaskKey(name, VERSION, config_hash(config))
    common: dict[str, Any] = {"key": key, "names": tuple(reply["names"]), **asked._asdict()}
    if functions is not None:
        return LocalRewards(**common, unshared=UNSHARED_HERE, functions=functions)
    assert begun is not None
    return RewardsTask(
        **common,
        unshared=_unshared(parsed, begun),
        workers=begun.own,
        apart=begun.apart,
        together=parsed.isolated != "text",
        seconds=tuple(reply["seconds"]),
        range=parsed.bounds,
        outside=_outside(name, parsed, reply),
    )


class AskedRows(NamedTuple):
    """The questions of rows: items by row, rows by an item's content, and the ids of the test questions, if there are
    any.
    """

    items: tuple[Item, ...]
    rows: Mapping[str, PromptRow]
    test_ids: frozenset[bytes] | None


def read_options(name: str, options: Mapping[str, object], section: type[Options]) -> Options:
    """Return the options of the task `name`, with a source of rows that can be; `UserError` says what is wrong."""
    try:
        parsed = section.model_validate(dict(options))
    except ValidationError as error:
        raise UserError(f"task {name!r}: {option_complaint(error, section)}") from None
    except UserError as error:
        raise UserError(f"task {name!r}: {error}") from None
    check_source(name, parsed)
    return parsed


def functions_of(
    name: str, named: Sequence[str], here: Mapping[str, Callable[..., Any]], judging: Mapping[str, Any]
) -> list[Function]:
    """Return the functions that a task names, of this process (`here`) or loaded."""
    specs = zip(named, map(parse_spec, named), strict=True)
    return [
        Function(spec.name, here[text], "") if text in here else load_function(name, spec, judging)
        for text, spec in specs
    ]


def read_prompts(name: str, options: Prompts) -> tuple[list[PromptRow], list[PromptRow]]:
    """Return the rows to train on and the test rows, all with the same columns.

    Raises:
        UserError: a bad file or row.
    """
    rows = _read(name, options, options.path, options.split or "train")
    tests = _read(name, options, options.test, options.test_split) if options.test or options.test_split else []
    columns = sorted({column for row in rows + tests for column in row.columns})
    return [_whole(row, columns) for row in rows], [_whole(row, columns) for row in tests]


def asked_by(
    name: str, rows: Sequence[PromptRow], tests: Sequence[PromptRow], ask: Callable[[PromptRow], Item]
) -> AskedRows:
    """Return what rows and test rows ask by `ask`.

    Raises:
        UserError: every row is a test question.
    """
    items, held = list(map(ask, rows)), list(map(ask, tests))
    ids = frozenset(question_id(name, item.question) for item in held)
    both = sum(question_id(name, item.question) in ids for item in items)
    if both == len(items):
        raise UserError(f"task {name!r}: every row is a test question, too: nothing is left to train on")
    if both:
        log.warning("rows that are test questions are not trained on", task=name, rows=both)
    by_content = {item.content: row for item, row in zip((*items, *held), (*rows, *tests), strict=True)}
    return AskedRows((*items, *held), by_content, ids if tests else None)


def _load_here(
    name: str, options: RewardsOptions, rows: Sequence[PromptRow], here: Mapping[str, Callable[..., Any]]
) -> Functions:
    loaded = functions_of(name, options.functions, here, options.judging)
    functions = Functions(loaded, options.weighted, *options.bounds, tokens_of(str(options.tokenizer or "")))
    answers = [Answered(*row, text) for row in rows[:TRIAL_ROWS] for text in trial_texts(*row)]
    try:
        functions.trial(answers)
    except RewardError as error:
        raise UserError(f"task {name!r}: {one_line(error)}") from error
    return functions


def _outside(name: str, options: RewardsOptions, reply: Message) -> str:
    """Return a line on the text that earned what is farthest from the range, of those that were tried; "" if none did.

    `reply` is what the workers say. A judge's task is not shared, so nothing is to be told of it.
    """
    if options.judged:
        return ""
    earned: list[tuple[float, dict[str, float]]] = []
    for of_text in zip(*reply["trial"], strict=True):
        total = weighted_sum(options.weighted, of_text)
        if total is not None:
            parts = {function: paid for function, paid in zip(reply["names"], of_text, strict=True) if paid is not None}
            earned.append((scaled(total, *options.bounds), parts))
    reward, parts = max(earned, key=lambda pair: abs(pair[0] - 0.5), default=(0.0, {}))
    return "" if is_in_range(reward) else told_outside(name, reward, parts, options.bounds)


class _Begun(NamedTuple):
    """Workers for own texts and for those of peers, and what they say: `names`, `code`, `unlike`, `trial`.

    `lacks` is what a cage lacks here, and `fails` why the functions do not pay in one; both empty if all is well.
    """

    own: Workers
    apart: Workers
    reply: Message
    lacks: str
    fails: str


def _begin(name: str, options: RewardsOptions, rows: Sequence[PromptRow]) -> _Begun:
    """Start workers with the functions.

    The functions pay some texts in two processes. Of these, one is a cage if peers' texts are caged.

    Raises:
        UserError: a function is not there, raises, pays no numbers, or takes too long.
    """
    direct: Message = {
        "call": "load",
        "task": name,
        "functions": options.functions,
        "weights": options.weighted,
        "range": options.bounds,
        "tokenizer": str(options.tokenizer or ""),
        "confine": not options.needs_network,
        "isolate": "none",
    }
    if options.judged:
        direct["judge"] = options.judging
    isolate = options.isolated
    lacks = "" if isolate == "none" else lacking()
    declared = {"whole": not lacks, "declared": isolate == "text", "seconds": options.seconds}
    caged = {**direct, "confine": False, "isolate": "text", **declared}
    seconds = options.seconds + 1.0 if options.judged else options.seconds  # a judge's own wait ends first
    texts = sum(len(trial_texts(*row)) for row in rows[:TRIAL_ROWS])
    limit = FIRST_CALLS_S + seconds * texts
    trial: Message = {"call": "trial", "rows": rows[:TRIAL_ROWS], "seconds": limit}

    def tried(workers: Workers) -> Message:
        reply = workers.begin()
        if "error" in reply:
            return reply
        return reply | workers.ask(trial, limit + reply.get("loads_for", 0.0) + CAGE_S)

    firsts = (direct, direct if isolate == "none" or lacks else caged)
    if isolate == "text":
        firsts = (caged, caged)
    own, apart = (Workers(name, WORKER, first, seconds) for first in firsts)
    with ThreadPoolExecutor(2) as pool:
        try:
            reply, other = pool.map(tried, (own, apart))
        except WorkerTimeoutError:
            raise UserError(
                f"task {name!r}: its functions did not pay {texts} texts, each a few times, in {limit:g} s: "
                f"make them faster, or set the option seconds, which a text may take"
            ) from None
        except (WorkerError, TypeError) as error:
            raise UserError(f"task {name!r} cannot be loaded: {one_line(error)}") from None
    if "error" in reply:
        raise UserError(f"task {name!r}: {str(reply['error']).removeprefix(f'task {name!r}: ')}")
    if not reply["unlike"] and "error" not in other:
        pairs: Iterator[tuple[str, list[Reward], list[Reward]]] = zip(
            reply["names"], reply["trial"], other["trial"], strict=True
        )
        reply["unlike"] = next((function for function, first, again in pairs if not same(first, again)), "")
    own_first = {**firsts[0], "confine": firsts[0]["confine"] and not reply["unconfined"], "code": reply["code"]}
    own.restart_with(own_first)
    if options.needs_network or lacks:
        apart = own  # no peer's text is scored
    elif firsts[1] is direct:
        apart = Workers(name, WORKER, own_first, seconds)  # its process starts when a peer's text comes
    else:
        apart.restart_with({**caged, "code": reply["code"]})
    return _Begun(own, apart, reply, lacks, str(other.get("error", "")))


def _unshared(options: RewardsOptions, begun: _Begun) -> str:
    """Return why groups of the task stay at home; empty if they need not."""
    if options.judged:
        return "nobody else can check what a judge pays"
    if options.judge:
        return "its functions may use the network (judge = true), so nobody else can check what they pay"
    if begun.lacks:
        but = "" if options.isolate else ': isolate = "none" shares it if no function runs a text'
        return f"a stranger's text cannot be caged here ({begun.lacks}){but}"
    if begun.fails:
        return f"its functions do not pay in a cage ({begun.fails})"
    if begun.reply["unlike"]:
        return f"the function {begun.reply['unlike']} does not pay the same text the same again"
    return ""


def _read(name: str, options: Prompts, path: Path | None, split: str) -> list[PromptRow]:
    rows: list[PromptRow] = []
    size = 0
    for row, where in read_rows(name, options, path, split):
        rows.append(_row(name, row, options.prompt, where))
        size += len(json.dumps(rows[-1]))
        if size > MAX_BYTES or len(rows) > MAX_ROWS:
            raise UserError(f"task {name!r}: more than {MAX_BYTES >> 20} MiB or {MAX_ROWS} rows: take a part of it")
    if not rows:
        raise UserError(f"task {name!r}: {path or options.hub} holds no rows")
    return rows


def _row(name: str, row: object, column: str, where: str) -> PromptRow:
    if not isinstance(row, dict):
        raise UserError(f"task {name!r}: {where} is not a JSON object")
    prompt: Any = row.get(column)
    if not _is_prompt(prompt):
        named = ", ".join(list(map(str, row))[:8])
        raise UserError(
            f"task {name!r}: {where} has in {column!r} neither a text nor messages (system, then user and assistant in "
            f"turn, the last one the user's); its columns are {named}: the option prompt names another"
        )
    columns = {str(key): value for key, value in row.items() if key not in NOT_COLUMNS and key != column}
    prompt_row = PromptRow(prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt], columns)
    try:
        json.dumps(prompt_row)
    except (TypeError, ValueError):
        raise UserError(f"task {name!r}: {where} has a column that is no text, number, list or table") from None
    item = item_of(prompt_row)
    if not item.question.strip() or len(item.question.encode()) > MAX_QUESTION_BYTES:
        raise UserError(f"task {name!r}: {where}: a question has 1 to {MAX_QUESTION_BYTES >> 10} KiB")
    return prompt_row


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return is_text(prompt)
    if not isinstance(prompt, list) or not all(
        isinstance(turn, dict) and is_text(turn.get("content")) for turn in prompt
    ):
        return False
    roles = [turn.get("role") for turn in prompt]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    return len(turns) % 2 == 1 and turns == (["user", "assistant"] * len(turns))[: len(turns)]


def item_of(row: PromptRow) -> Item:
    """Return a row as a question, with its answer to be shown, and earlier turns as solved examples."""
    content = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]
    answer = answer_of(row.columns)
    if isinstance(row.prompt, str):
        return Item(row.prompt, answer, content=content)
    system = row.prompt[0]["content"] if row.prompt[0]["role"] == "system" else ""
    *before, question = [turn["content"] for turn in row.prompt if turn["role"] != "system"]
    return Item(question, answer, system, tuple(zip(before[::2], before[1::2], strict=True)), content=content)


def _whole(row: PromptRow, columns: Sequence[str]) -> PromptRow:
    """Return a row with all of `columns`, None where it has nothing, as `datasets` does."""
    return PromptRow(row.prompt, {column: row.columns.get(column) for column in columns})


def _digest_of(name: str, file: Path | None) -> str:
    try:
        return "" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"task {name!r}: cannot read {file}: {error.strerror}") from None


def digest_of(rows: Sequence[PromptRow]) -> str:
    """Return what names rows in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
