"""Rows and an environment in TRL's form, what `GRPOTrainer` takes as `environment_factory`, as a task.

    [[tasks]]
    name = "environment/counter"    # or "environment": what follows the stroke is a name of yours
    [tasks.options]
    factory = "./env.py:CounterEnv" # a class of a file, or a function that returns an instance
    path = "rows.jsonl"             # as `node.tasks.rewards.rows` reads them, from a file or with hub = "OWNER/NAME"
    prompt = "prompt"               # the column that is asked
    max_turns = 32                  # of the policy; after the last one, the episode ends
    tell = true                     # whether the prompt tells the tools
    functions = []                  # reward functions that read `environments`, with weights
    range = [0.0, 1.0]              # the sums that are rewards of 0 and 1; without it, a sum is the reward
    judge = false                   # whether episodes get network and files to write: such a task is not shared

What TRL 1.16 does with the class:

    reset(**row)        begins an episode; a text that it returns is appended to the question. The row has its `prompt`
    public methods      are tools, by their signatures and docstrings; what one raises is told as an error
    get_reward()        ends it, with weight 1 beside the functions'. A method may be async

Unlike in TRL, each episode has an instance of its own, and `reset` is called for each row when the task is loaded: it
has to return the same text again in the episode. The reward is the sum of rewards, or follows from it by the range, as
in `node.tasks.rewards.functions`.

A turn that calls tools (`node.tasks.environments.tool_calls`) is answered by what they return, a turn without a call
ends the episode. A call that cannot be read, or is of no tool here, is answered by an error.

The class is code of this node's owner. `reset` is called in the node's process when the task is loaded. Each episode of
a class of a file has a process of its own (`node.tasks.scoring.fork_server`); a class of a notebook runs in the
notebook. A joiner of a swarm runs the class that its own configuration names (`node.swarm.agreed_tasks`). Groups stay
at home unless the class says `replayable = True` (`node.tasks.environments.episodes` lists what that promises) and
there are no functions. The configuration hash covers the bytes of the class's and functions' files, the rows and the
options, apart from `tell` and `judge`.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from node.config import FUNCTION_FILE
from node.errors import UserError, one_line
from node.processes.threads import awaited
from node.tasks import Isolate, Item, TaskKey, config_hash, is_text
from node.tasks.environments.episodes import MAX_TURNS, Done, Observation, play_again
from node.tasks.environments.tool_calls import CallError, SaidCall, Schema, check_call, read_calls, told
from node.tasks.rewards.functions import HERE, JUDGE, Answered, Function, Functions, parse_spec, tokens_of
from node.tasks.rewards.rows import (
    NONE_HERE,
    UNSHARED_HERE,
    Paid,
    PromptRow,
    asked_by,
    digest_of,
    functions_of,
    item_of,
    read_options,
    read_prompts,
)
from node.tasks.third_party import TaskError, ThirdPartyTask, checked, described, run_file

VERSION = 1
NO_TOOLS = ("reset", "get_reward")
FUNCTIONS_SEE_IT = "nobody else can check its reward functions, which read the environment: give the class get_reward"


class EnvironmentOptions(Paid):
    """The options of the task."""

    factory: str
    max_turns: int = Field(MAX_TURNS, ge=1, le=MAX_TURNS)
    tell: bool = True
    judge: bool = False

    @field_validator("factory")
    @classmethod
    def _is_of_a_file(cls, factory: str) -> str:
        match = FUNCTION_FILE.fullmatch(factory)
        if not factory.startswith(f"{HERE}:") and (match is None or not match[3].isidentifier()):
            raise ValueError(f"an environment is named as FILE.py:CLASS, not {factory!r}")
        return factory

    @field_validator("functions")
    @classmethod
    def _are_no_judges(cls, functions: list[str]) -> list[str]:
        for function in functions:
            if parse_spec(function).where == JUDGE:
                raise ValueError(f"{function!r} sees no environment: give functions that read environments")
        return functions


@dataclass(slots=True)
class ToolEpisode:
    """One episode in progress on `instance`; `tools` are its methods by their names, `schemas` their parameters."""

    instance: Any
    row: PromptRow
    tools: Mapping[str, Callable[..., Any]]
    schemas: Mapping[str, Schema]
    functions: Functions
    max_turns: int
    turns: int = 0

    def step(self, text: str) -> Observation | Done:
        """Carry out the policy's calls and return their results; without a call, or at the last turn, end."""
        self.turns += 1
        turn = read_calls(text)
        results = [self._result(call) for call in turn.calls]
        if not results or self.turns == self.max_turns:
            return Done(self._reward(text))
        return Observation(told(turn, results))

    def _result(self, call: SaidCall | CallError) -> str:
        try:
            if isinstance(call, CallError):
                raise call
            check_call(call, self.schemas)
            text = str(awaited(self.tools[call.name](**call.arguments)))
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001  # a tool may raise anything, and its policy is told so, as in TRL
            text = f"error: {error}"
        return text if is_text(text) else text.encode(errors="replace").decode()

    def _reward(self, text: str) -> float:
        prompt, columns = self.row
        (scored,) = self.functions.score([Answered(prompt, {**columns, "environments": self.instance}, text)])
        return float(scored["reward"])


@dataclass(frozen=True, slots=True)
class EnvironmentTask:
    """Rows with an environment: `items` by row, `rows` by an item's content, `schemas` by a tool's name."""

    key: TaskKey
    items: tuple[Item, ...]
    rows: Mapping[str, PromptRow]
    test_ids: frozenset[bytes] | None
    factory: Callable[[], Any]
    schemas: Mapping[str, Schema]
    functions: Functions
    max_turns: int
    replayable: bool
    unshared: str
    judge: bool
    isolate: Isolate
    range: tuple[float, float]

    @property
    def size(self) -> int:
        """How many rows it has."""
        return len(self.items)

    def make(self, seed: int) -> Item:
        return self.items[seed % len(self.items)]

    def start(self, item: Item) -> ToolEpisode:
        """Begin an episode; `ValueError` if `reset` returns another text than the question has."""
        instance, row = self.factory(), self.rows[item.content]
        if question_of(instance, row) != item.question:
            raise ValueError("reset returned another text than before: let it depend on its row alone")
        tools = {name: getattr(instance, name) for name in self.schemas}
        return ToolEpisode(instance, row, tools, self.schemas, self.functions, self.max_turns)

    def verify(self, item: Item, text: str) -> float | None:
        return play_again(self.start, item, [text])


def question_of(instance: Any, row: PromptRow) -> str:
    """Reset an environment with a row and return what the policy is asked."""
    text = awaited(instance.reset(**{**row.columns, "prompt": row.prompt}))
    if text is not None and not isinstance(text, str):
        raise TypeError(f"reset returned a {type(text).__name__}: return a text or None")
    return item_of(row).question + (text or "")


def load_environment(
    name: str, options: Mapping[str, object], here: Mapping[str, Callable[..., Any]] = NONE_HERE
) -> ThirdPartyTask:
    """Return the task `name` under `options`.

    Args:
        name: the task's.
        options: its options.
        here: a class and functions of this process by what `options` names them by. With any, the task is not shared.

    Raises:
        UserError: a bad option, file or row, or a class that is no environment or raises.
    """
    parsed = read_options(name, options, EnvironmentOptions)
    factory, called, digest = _factory(name, parsed.factory, here)
    rows, tests = read_prompts(name, parsed)
    functions = functions_of(name, parsed.functions, here, {})

    def ask(row: PromptRow) -> Item:
        return replace(item_of(row), question=question_of(factory(), row), tools=tools if parsed.tell else "")

    try:
        instance = factory()
        schemas, tools = _tools(name, instance)
        asked = asked_by(name, rows, tests, ask)
    except UserError:
        raise
    except Exception as error:  # it may raise anything
        raise TaskError(f"task {name!r}: {called} {described(error)}") from error
    paid = _paid(name, parsed, instance, functions)
    config = {
        "sha256": digest,
        "class": called,
        "functions": [[spec.name, spec.arguments] for spec in map(parse_spec, parsed.functions)],
        "code": [function.digest for function in functions],
        "weights": list(paid.weights),
        "range": [paid.low, paid.high],
        "max_turns": parsed.max_turns,
        "rows": digest_of(rows),
        "tests": digest_of(tests),
    }
    key = TaskKey(name, VERSION, config_hash(config))
    task = EnvironmentTask(
        key,
        *asked,
        factory=factory,
        schemas=schemas,
        functions=paid,
        max_turns=parsed.max_turns,
        replayable=getattr(type(instance), "replayable", False) is True,
        unshared=UNSHARED_HERE if here else FUNCTIONS_SEE_IT if functions else "",
        judge=parsed.judge,
        isolate=getattr(type(instance), "isolate", None),
        range=parsed.bounds,
    )
    return checked(name, task)


def _factory(name: str, named: str, here: Mapping[str, Callable[..., Any]]) -> tuple[Callable[[], Any], str, str]:
    """Return what makes an environment, what it is called, and the hash of its file, if it has one."""
    if named in here:
        return here[named], named.partition(":")[2], ""
    match = FUNCTION_FILE.fullmatch(named)
    if match is None:
        raise UserError(f"task {name!r}: its class {named.partition(':')[2]} was given in Python: start the node there")
    module, digest = run_file(name, Path(match[1]))
    factory = getattr(module, match[3], None)
    if not callable(factory):
        raise UserError(f"task {name!r}: {match[1]} has no class {match[3]!r}")
    return factory, match[3], digest


def _tools(name: str, instance: Any) -> tuple[dict[str, Schema], str]:
    """Return the schemas of an environment's tools by their names, and the tools as `Item.tools` has them."""
    from transformers.utils import get_json_schema  # as TRL does; it imports torch
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    methods = [method for method, _ in inspect.getmembers(type(instance), predicate=inspect.isfunction)]
    if "reset" not in methods:
        raise UserError(f"task {name!r}: {type(instance).__name__} has no method reset(self, **row)")
    schemas = []
    for method in methods:
        if not method.startswith("_") and method not in NO_TOOLS:
            try:
                schemas.append(get_json_schema(getattr(instance, method)))
            except (DocstringParsingException, TypeHintParsingException, TypeError, NameError) as error:
                # NameError: of a type hint
                raise UserError(f"task {name!r}: the tool {method} cannot be told: {one_line(error)}") from None
    if not schemas:
        raise UserError(f"task {name!r}: {type(instance).__name__} has no public method, which would be a tool")
    return {schema["function"]["name"]: schema["function"]["parameters"] for schema in schemas}, json.dumps(schemas)


def _paid(name: str, options: EnvironmentOptions, instance: Any, functions: list[Function]) -> Functions:
    """Return what pays an episode: the functions, then the environment's own `get_reward`, as in TRL."""
    paying, weights = list(functions), options.weighted
    if hasattr(type(instance), "get_reward"):
        paying.append(Function(type(instance).__name__, _own_reward, ""))
        weights = [*weights, 1.0]
    if not paying:
        raise UserError(
            f"task {name!r}: {type(instance).__name__} has no get_reward: set functions, which read environments"
        )
    return Functions(paying, weights, *options.bounds, tokens_of(""))


def _own_reward(environments: list[Any], **_: object) -> list[Any]:
    return [awaited(environment.get_reward()) for environment in environments]
