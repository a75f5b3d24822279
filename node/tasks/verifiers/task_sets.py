"""Task sets of `verifiers` (0.4): questions, rewards, tools and environments, without containers, judges and network.

    [[tasks]]
    name = "verifiers/my-taskset"    # an installed package that exports a Taskset
    [tasks.options]
    rows = 1000                      # how many of its questions are used
    low = 0.0                        # the sums that are rewards of 0
    high = 1.0                       # and of 1: a group with a sum outside of them is not shared
    # isolate = "none"               # "none": its rewards run no text; "text": one does; without it, nobody knows
    config = {}                      # the task set's own configuration

A task set with tools, or with an environment of its own, is played in episodes (`node.tasks.verifiers.episodes`). They
train their maker, and are not shared. A question of any other is answered by one text, as follows.

A question cannot be made again from a seed alone: a seed stands for a row of what is installed here. So a group
carries the row's hash, and a receiver whose row has another one sets the group aside (`node.rollouts.screening`).

The task set is other people's code. A worker process loads it and computes rewards, with limits on time and memory.
Once it is loaded, it is confined (`node.processes.confinement`); where a machine cannot do that, Python's own network
is denied. A peer's text is scored in a cage (`node.tasks.scoring.caged`), unless `isolate` is "none"; where there is no
whole cage, or its rewards fail in one, groups stay at home. If `isolate` is "text", own texts have cages, too. A joiner
loads a task set only by its own word (`node.tasks.choices`), and no founder says what `isolate` is at a joiner's. A
completion whose reward fails or takes too long is unscorable (`node.tasks.scoring.verdicts`).

`python -m node.tasks.verifiers.task_sets CHANNEL LIFE` is that process (`node.processes.worker_process`).
"""

import asyncio
import importlib.metadata
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator

from node.config import Section, option_complaint
from node.errors import UserError, how_to_install
from node.processes.cage import lacking
from node.processes.confinement import ConfinementError, confine
from node.processes.worker_process import Message, WorkerError
from node.tasks import MAX_QUESTION_BYTES, Item, TaskKey, config_hash, is_reward, scaled
from node.tasks.environments.episodes import MAX_TURNS, Done, Environment, play_again, step
from node.tasks.scoring.caged import CageWork, serve_in_cages
from node.tasks.scoring.fork_server import ForkServer, adopt_from_here, fork_episode
from node.tasks.scoring.verdicts import (
    CAGE_S,
    LOAD_S,
    SCORE_S,
    Answer,
    Submission,
    Verdict,
    Workers,
    begin_worker,
    score,
)

KIND = "verifiers"
VERSION = 2
MODULE = "node.tasks.verifiers.task_sets"
RUBBISH = "rubbish"
IN_CAGE = '(in a cage: say isolate = "none" if its rewards only read texts) '
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class VerifiersOptions(Section):
    """The options of the task."""

    rows: int = Field(1000, ge=1, le=100_000)
    low: float = 0.0
    high: float = 1.0
    isolate: Literal["none", "text"] | None = None
    config: dict[str, Any] = Field({})

    @model_validator(mode="after")
    def _a_range(self) -> "VerifiersOptions":
        if not self.low < self.high:
            raise ValueError("low must be less than high")
        return self


@dataclass(frozen=True, slots=True)
class VerifiersTask:
    """One task set: `items` by row, the processes that score, and what begins an episode, if it has episodes.

    Peers' texts go to `apart`. `unshared` says why its groups stay at home; empty if they do not.
    """

    key: TaskKey
    items: tuple[Item, ...]
    workers: Workers
    apart: Workers
    start: ForkServer | None
    range: tuple[float, float]
    unshared: str

    @property
    def size(self) -> int:
        """How many rows it has."""
        return len(self.items)

    def make(self, seed: int) -> Item:
        return self.items[seed % len(self.items)]

    def verify(self, item: Item, text: str) -> Verdict:
        if self.start is not None:
            return play_again(self.start, item, [text])
        return score([Answer(self, item, text)], LOAD_S)[0]

    def submit(self, batch: Sequence[Submission], is_own: bool) -> "list[Future[Verdict]]":
        """Queue texts for worker processes."""
        workers = self.workers if is_own else self.apart
        return [
            workers.submit({"call": "score", "row": answer.item.content, "text": answer.text}, is_own, answer.quota)
            for answer in batch
        ]


def load_verifiers(name: str, options: Mapping[str, object]) -> VerifiersTask:
    """Return the task set `name` under `options`.

    Raises `UserError` for a bad option, if verifiers or the task set is missing, or if it needs what there is not here.
    """
    task = f"{KIND}/{name}"
    try:
        parsed = VerifiersOptions.model_validate(dict(options))
    except ValidationError as error:
        raise UserError(f"task {task!r}: {option_complaint(error, VerifiersOptions)}") from None
    if _NAME.fullmatch(name) is None:
        raise UserError(f"task {task!r}: {name!r} is no name of a task set: it has letters, digits, - and _")
    if importlib.util.find_spec("verifiers") is None:
        raise UserError(f"task {task!r}: run {how_to_install('verifiers')}")
    first = {"call": "load", "id": name, **parsed.model_dump(), "isolate": "none"}
    direct = Workers(task, MODULE, first)
    try:
        reply = direct.begin()
    except (WorkerError, TypeError) as error:
        raise UserError(f"task {task!r} cannot be loaded: {error}") from None
    if "error" in reply:
        raise UserError(f"task {task!r} cannot be used: {reply['error']}")
    hashed = {"versions": reply["versions"], **parsed.model_dump(exclude={"isolate"})}
    key = TaskKey(task, VERSION, config_hash(hashed))
    items = tuple(
        Item(question, "", system, content=row, tools=reply["tools"]) for question, system, row in reply["rows"]
    )
    bounds = parsed.low, parsed.high
    if reply["plays"]:
        start = ForkServer(task, direct, SCORE_S, LOAD_S + SCORE_S)
        return VerifiersTask(key, items, direct, direct, start, bounds, NOT_REPLAYED)
    if parsed.isolate == "none":
        return VerifiersTask(key, items, direct, Workers(task, MODULE, first), None, bounds, "")
    lacks = lacking()
    declared = {"declared": parsed.isolate == "text", "whole": not lacks, "seconds": SCORE_S}
    caged = {**first, "isolate": "text", **declared, "code": reply["versions"]}
    own = Workers(task, MODULE, caged) if parsed.isolate == "text" else direct
    if lacks:
        but = "" if parsed.isolate else ': isolate = "none" shares it if its rewards run no text'
        why = f"a stranger's text cannot be caged here ({lacks}){but}"
        return VerifiersTask(key, items, own, own, None, bounds, why)
    apart = Workers(task, MODULE, caged)
    return VerifiersTask(key, items, own, apart, None, bounds, _fails(apart, items[0].content))


def _fails(apart: Workers, row: str) -> str:
    """Try a reward in a cage; return why the task set is not shared, if it fails there."""
    try:
        reply = apart.begin()
        if "error" not in reply:
            seconds = SCORE_S + reply["loads_for"] + CAGE_S
            reply = apart.ask({"call": "score", "row": row, "text": RUBBISH}, seconds)
    except WorkerError as error:
        reply = {"error": str(error)}
    return f"its rewards fail in a cage ({reply['error']})" if "error" in reply else ""


NOT_REPLAYED = "no peer can play the episodes of its environment again"


class RefusedError(Exception):
    """A task set needs what this node does not offer; the text says what."""


def main() -> None:
    """Load one task set, then score or play for the node at the other end of a channel."""
    requests, request, folder = begin_worker()
    scale = partial(_scaled, request["low"], request["high"])
    load = partial(_load, request)
    if request["isolate"] == "text":
        hint = "" if request["declared"] else IN_CAGE
        serve_in_cages(requests, CageWork(load, _code_of, partial(_answered, scale), request, hint, ()), folder)
        return
    try:
        loaded = load()
        description = _opened(loaded, scale) if loaded.env is not None else _tried(loaded)
    except Exception as error:  # noqa: BLE001  # a task set may raise anything, and the node is told in one line
        requests.reply({"error": str(error) if isinstance(error, UserError) else _line(error)})
        return
    if loaded.env is None:  # else each episode is confined
        with suppress(ConfinementError):
            confine()
    else:
        adopt_from_here()
    requests.reply({**description, "versions": loaded.versions, "plays": loaded.env is not None})
    while True:
        request = requests.receive()
        if request["call"] == "start":
            begin = partial(_begun, loaded, request["item"], scale)
            fork_episode(requests, begin, confined=True)
        else:
            requests.reply(_answered(scale, loaded, request))


def _load(request: Message) -> "Loaded":
    """Load what a first message names, and deny this process the network; raise `UserError`."""
    try:
        loaded = load_rows(request["id"], request["config"], request["rows"])
    except Exception as error:  # noqa: BLE001  # a task set may raise anything
        raise UserError(_line(error)) from None
    sys.addaudithook(_no_network)
    return loaded


def _line(error: Exception) -> str:
    text = str(error) if isinstance(error, RefusedError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:500]


def _code_of(loaded: "Loaded") -> Message:
    return {"code": loaded.versions}


def _answered(scale: Callable[[float], float], loaded: "Loaded", request: Message) -> Message:
    return _scored(loaded.by_hash[request["row"]], request["text"], scale)


def _scaled(low: float, high: float, reward: float) -> float:
    if not is_reward(reward):
        raise ValueError(f"a reward of {reward}")
    return scaled(reward, low, high)


def _tried(loaded: "Loaded") -> Message:
    """Try a reward, and return what to tell the node of rows that are answered by one text."""
    reward = asyncio.run(_score(loaded.tasks[0], RUBBISH))
    if not math.isfinite(reward):
        raise RefusedError(f"its reward of rubbish is {reward}")
    return {"rows": [[*asked(task.data), task.hash] for task in loaded.tasks], "tools": ""}


def _opened(loaded: "Loaded", scale: Callable[[float], float]) -> Message:
    """Try an episode, and return what to tell the node of rows that are played: an environment may ask the question."""
    from node.tasks.verifiers.episodes import TaskSetGame, tools_told

    tried = TaskSetGame(loaded.env, loaded.tasks[0], scale)
    for _ in range(MAX_TURNS):
        if isinstance(step(tried, RUBBISH), Done):
            break
    rows = []
    for task in loaded.tasks:
        if task.data.prompt is not None:
            question, system = asked(task.data)
        else:
            game = TaskSetGame(loaded.env, task, scale)
            question, system = game.told or "", task.data.system_prompt or ""
            game.close()
            _check_length(question)
        rows.append([question, system, task.hash])
    return {"rows": rows, "tools": asyncio.run(tools_told(loaded.env, loaded.tasks[0]))}


def _begun(loaded: "Loaded", item: Mapping[str, str], scale: Callable[[float], float]) -> Environment:
    from node.tasks.verifiers.episodes import TaskSetGame

    task = loaded.by_hash[item["content"]]
    game = TaskSetGame(loaded.env, task, scale)
    if task.data.prompt is None and game.told != item["question"]:
        raise ValueError("its environment opens an episode otherwise than before: let it depend on the row alone")
    return game


def _scored(task: Any, text: str, scale: Callable[[float], float]) -> Message:
    try:
        return {"reward": scale(asyncio.run(_score(task, text)))}
    except Exception as error:  # noqa: BLE001  # a reward may raise anything
        return {"error": f"{type(error).__name__}: {error}"[:500]}


class Loaded(NamedTuple):
    """The tasks of a task set, the versions that make it what it is, and its environment if it is played."""

    tasks: list[Any]
    by_hash: dict[str, Any]
    versions: dict[str, str]
    env: Any


def load_rows(name: str, config: dict[str, Any], rows: int) -> Loaded:
    """Load a task set; raise `RefusedError`."""
    from verifiers import v1
    from verifiers.v1.utils import loaders
    from verifiers.v1.utils.generic import concrete_type

    kind = loaders.taskset_class(name)
    settings = (concrete_type(kind, v1.TasksetConfig) or v1.TasksetConfig)(**{**config, "id": name})
    taskset = kind(settings)
    tasks = list(islice(taskset, rows))
    if not tasks:
        raise RefusedError("it has no tasks")
    own = loaders.environment_class(name) is not v1.SingleAgentEnv
    tooled = bool(kind.toolsets(settings)) or any(task.toolsets(task.config) for task in tasks)
    for task in tasks:
        _check(task, paid=not own)
        if task.data.prompt is not None or not own:
            asked(task.data)
    env = _environment(name, config, tasks) if own or tooled else None
    module = kind.__module__.partition(".")[0]
    packages = [*importlib.metadata.packages_distributions().get(module, []), "verifiers"]
    versions = {package: importlib.metadata.version(package) for package in packages}
    return Loaded(tasks, {task.hash: task for task in tasks}, versions, env)


def _environment(name: str, config: dict[str, Any], tasks: Sequence[Any]) -> Any:
    from node.tasks.verifiers.episodes import environment_of, refuse

    env = environment_of(name, config)
    why = next(filter(None, (refuse(env, task) for task in tasks)), "")
    if why:
        raise RefusedError(why)
    return env


def _check(task: Any, *, paid: bool) -> None:
    from verifiers import v1

    if type(task).NEEDS_CONTAINER or task.data.image is not None:
        raise RefusedError("it needs a container")
    own = [hook for hook in ("setup", "finalize") if getattr(type(task), hook) is not getattr(v1.Task, hook)]
    if own or task.data.skills:
        raise RefusedError("it prepares a machine for an agent")
    if task.plugged_judges():
        raise RefusedError("it needs a judge, another model")
    rewards = task.hooks("reward")
    if paid and not rewards:
        raise RefusedError("it has no rewards")
    for reward in rewards:
        runtime = inspect.signature(reward).parameters.get("runtime")
        if runtime is not None and runtime.default is inspect.Parameter.empty:
            raise RefusedError(f"its reward {reward.__name__!r} needs a container")


def asked(data: Any) -> tuple[str, str]:
    """Return the question and the instruction of a row; raise `RefusedError` where it is no single text."""
    system = data.system_prompt or ""
    prompt = data.prompt
    if not isinstance(prompt, str):
        turns = list(prompt or [])
        if turns and turns[0].role == "system" and isinstance(turns[0].content, str):
            system = "\n\n".join(filter(None, [turns[0].content, system]))
            turns = turns[1:]
        if len(turns) != 1 or turns[0].role != "user" or not isinstance(turns[0].content, str):
            raise RefusedError("it asks otherwise than by one text")
        prompt = turns[0].content
    _check_length(prompt)
    return prompt, system


def _check_length(question: str) -> None:
    if not 0 < len(question.encode(errors="replace")) <= MAX_QUESTION_BYTES:
        raise RefusedError(f"a question of {len(question)} characters")


async def _score(task: Any, text: str) -> float:
    from verifiers import v1

    question, system = asked(task.data)
    messages: list[Any] = [v1.SystemMessage(content=system)] if system else []
    messages += [v1.UserMessage(content=question), v1.AssistantMessage(content=text)]
    nodes = [
        v1.MessageNode(message=message, parent=at - 1 if at else None, sampled=at == len(messages) - 1)
        for at, message in enumerate(messages)
    ]
    from verifiers.v1.trace import TraceTask

    trace: Any = v1.Trace(
        task=TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
        agent=v1.AgentInfo(config=v1.AgentConfig()),
        nodes=nodes,
        ok=True,
        is_completed=True,
    )
    await task.score(trace)
    return float(trace.reward)


def _no_network(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise PermissionError("rewards get no network here")


if __name__ == "__main__":
    main()
