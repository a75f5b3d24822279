"""The tasks that a swarm agreed on: how its founder writes them into the manifest, and what a joiner takes from it.

No founder chooses what code runs here or which files are read: `node.tasks.choices` says what it may choose.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import structlog
from pydantic import ValidationError

from node.config import FILE_OPTIONS, HUB_OPTIONS, TaskConfig, is_file_task
from node.errors import UserError
from node.tasks import Task, TaskKey, founder_may_choose, has_own_code, kind_of, load_tasks, own_options
from node.tasks.task_set import TaskSet
from node.tasks.third_party import installed
from protocol.credentials.manifest import (
    ManifestTask,
    SwarmManifest,
)

PROMPTING = "prompting"  # among a manifest's options: how the task is asked and read, whatever its kind

log = structlog.get_logger()


def describe_tasks(configs: Sequence[TaskConfig]) -> list[ManifestTask]:
    """Return the manifest's entries for the tasks that `configs` name, each built once to learn its key."""
    described = []
    for config in configs:
        for task in load_tasks([config]).tasks:
            name = _name_to_build_by(config, task)
            options = {} if has_own_code(name) else _without(config.options, own_options(name))
            if is_file_task(name):
                for option in FILE_OPTIONS:
                    options.pop(option, None)  # paths of this machine concern nobody else
            if PROMPTING in options:
                raise UserError(f"task {name!r}: an option of a swarm's task cannot be called {PROMPTING!r}")
            if config.prompting:
                options[PROMPTING] = config.prompting
            described.append(ManifestTask(name, task.key.version, task.key.config, _canonical(name, options)))
    return described


def _without(options: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {option: value for option, value in options.items() if option not in names}


def _name_to_build_by(config: TaskConfig, task: Task) -> str:
    # "builtin" stands for seven tasks, each of which can be built by its own name.
    if config.name not in ("builtin", task.key.name):
        raise UserError(f"task {config.name!r} calls itself {task.key.name!r}: a swarm's task goes by one name")
    return task.key.name


def _canonical(name: str, options: Mapping[str, Any]) -> str:
    try:
        return json.dumps(options, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"task {name!r}: its options cannot be written into a manifest: {error}") from None


class WordNeededError(UserError):
    """A swarm's task does what only the owner of this machine may decide."""


def adopt_tasks(manifest: SwarmManifest, own: Sequence[TaskConfig], allowed: Collection[str] = ()) -> list[TaskConfig]:
    """Return the configuration of the manifest's tasks on this machine.

    A task of the same name in `own` decides its weight, how this node asks its own model (examples, instruction) and
    where its files are. All else comes from the manifest, as far as a founder may choose it (`node.tasks.choices`). Any
    other option has to be the same in `own`, unless the task's name is among `allowed`.

    Raises:
        WordNeededError: a task needs the word of this machine's owner; the text has what it is and what to do.
        UserError: this machine cannot build a task, or builds it differently; or no task has an allowed name.
    """
    names = {task.name for task in manifest.tasks}
    if unknown := set(allowed) - names:
        raise UserError(f"swarm {manifest.name!r} has no task {min(unknown)!r}: it has {', '.join(sorted(names))}")
    plans = [_plan(task, own, allowed) for task in manifest.tasks]
    if lacking := [plan.lacks for plan in plans if plan.lacks]:
        raise WordNeededError("; ".join(lacking))
    for task in manifest.tasks:
        if task.name in allowed:
            log.warning("this task of the swarm runs by your word", task=task.name, what=_described(task))
    return [_first_that_is(task, plan.candidates) for task, plan in zip(manifest.tasks, plans, strict=True)]


def words_needed(manifest: SwarmManifest) -> list[str]:
    """Return what a joiner whose configuration lists no task is told to decide itself, a line for each task."""
    return [plan.lacks for plan in (_plan(task, (), ()) for task in manifest.tasks) if plan.lacks]


class _Plan(NamedTuple):
    """The configurations that may build a manifest's task here; without any, what this machine's owner has to say."""

    candidates: Sequence[TaskConfig] = ()
    lacks: str = ""


def _plan(task: ManifestTask, own: Sequence[TaskConfig], allowed: Collection[str]) -> _Plan:
    named = [config for config in own if config.name == task.name]
    kind = kind_of(task.name)
    if kind and kind.own_code and not named:
        return _Plan(
            lacks=f"the swarm's task {task.name!r} needs rows and {kind.own_code} of yours: list the task under "
            f"[[tasks]] of your CONFIG with the options path and {kind.code_option}, the same as its founder's"
        )
    if is_file_task(task.name) and (files := [config for config in named if "path" in config.options]):
        named = files
    elif is_file_task(task.name) and not has_own_code(task.name) and "hub" not in _options(task):
        return _Plan(
            lacks=f"the swarm's task {task.name!r} needs a file of yours: list the task under [[tasks]] of your CONFIG "
            "with the option path"
        )
    candidates = [(_merged(task, mine), mine) for mine in named or [TaskConfig(name=task.name)]]
    if task.name in allowed or (kind is None and task.name not in installed()):  # what is not here cannot run
        return _Plan([merged for merged, _ in candidates])
    within = [merged for merged, mine in candidates if not _chosen_by_founder(merged, mine)]
    if within and (named or not _code_of(task.name)):
        return _Plan(within)
    return _Plan(
        lacks=f"the swarm's task {task.name!r} {_described(task)}: if you want that on this machine, join with "
        f"--allow-task {task.name}, or list the task with these options under [[tasks]] of your CONFIG"
    )


def _chosen_by_founder(merged: TaskConfig, mine: TaskConfig) -> list[str]:
    """Return the options that neither a founder may choose nor this node has listed with the same value."""
    return [
        option
        for option, value in merged.options.items()
        if not (option in mine.options and mine.options[option] == value)
        and not founder_may_choose(merged.name, option, value)
    ]


def _code_of(name: str) -> str:
    """Return which installed package's code a task of this name would run; empty for code of this release alone."""
    kind = kind_of(name)
    if kind is not None:
        return "of an installed package" if kind.package_code else ""
    point = installed().get(name)
    return f"of the package {point.dist.name if point.dist else '?'} ({point.value})" if point else ""


def _described(task: ManifestTask) -> str:
    """Say what a task would do here, for a person to judge."""
    options = {option: value for option, value in _options(task).items() if option != PROMPTING}
    written = json.dumps(options, sort_keys=True).replace("\x7f", "\\u007f")  # JSON escapes the others
    code = _code_of(task.name)
    does = f"runs code {code}" if code else f"is of the kind {task.name.partition('/')[0]!r}"
    return f"{does} with its founder's options {written}"


def _first_that_is(task: ManifestTask, candidates: Sequence[TaskConfig]) -> TaskConfig:
    """Return the first configuration that builds this very task."""
    for config in candidates[:-1]:
        if _is_same(task, load_tasks([config])):
            return config
    _check_key(task, load_tasks(candidates[-1:]))
    return candidates[-1]


def _merged(task: ManifestTask, mine: TaskConfig) -> TaskConfig:
    own = own_options(task.name)
    options = _without(_options(task), own)
    prompting = options.pop(PROMPTING, {})
    if has_own_code(task.name):  # no founder chooses what runs here
        options = dict(mine.options)
    elif is_file_task(task.name):
        ours = "path" in mine.options
        for option in (*FILE_OPTIONS, *(HUB_OPTIONS if ours else ())):
            options.pop(option, None)  # no founder chooses our files
        if ours:  # our files: we say what they hold, and in which columns
            options |= mine.options
    options |= {option: mine.options[option] for option in own & mine.options.keys()}
    asked = mine.model_dump(include={"examples", "instruction"}, exclude_unset=True)
    try:  # a founder who sets another field too, such as whose code to run, makes this a TypeError
        return TaskConfig(name=task.name, weight=mine.weight, options=options, **(prompting | asked))
    except (TypeError, ValidationError):
        raise _unreadable(task) from None


def _options(task: ManifestTask) -> dict[str, Any]:
    try:
        options = json.loads(task.options)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise _unreadable(task)
    return options


def _unreadable(task: ManifestTask) -> UserError:
    return UserError(f"the swarm's task {task.name!r} has options that cannot be read: its founder must found it anew")


def _is_same(task: ManifestTask, built: TaskSet) -> bool:
    return built.get(TaskKey(task.name, task.version, task.config)) is not None


def _check_key(task: ManifestTask, built: TaskSet) -> None:
    if _is_same(task, built):
        return
    ours = built.tasks[0].key
    if ours.version != task.version:
        raise UserError(
            f"task {task.name!r} has version {task.version} in the swarm and {ours.version} here: "
            "install the release of gossamer that the swarm's founder runs"
        )
    raise UserError(
        f"task {task.name!r} version {task.version} has another configuration here ({ours.config}) than in the swarm "
        f"({task.config}): install the release of what provides it, or get the file, that the swarm's founder has"
    )


def earlier_versions(manifest: SwarmManifest, tasks: TaskSet) -> dict[TaskKey, int]:
    """Return those tasks here that the swarm has in an earlier version, and that version."""
    return {
        task.key: then.version
        for task in tasks.tasks
        for then in manifest.tasks
        if then.version < task.key.version and TaskKey(*then[:3]) == task.key._replace(version=then.version)
    }


def check_rules(manifest: SwarmManifest, tasks: TaskSet, completions: int) -> None:
    """Raise `UserError` when no peer would take what the node makes: another task, or too many completions a group."""
    if completions > manifest.limits.max_completions:
        raise UserError(
            f"sampling.completions={completions} is more than swarm {manifest.name!r} allows in a group: "
            f"set it to at most {manifest.limits.max_completions}"
        )
    known, earlier = {TaskKey(*task[:3]) for task in manifest.tasks}, earlier_versions(manifest, tasks)
    for task in tasks.tasks:
        if task.key in earlier:
            log.warning(
                "the swarm was founded by an earlier release: nodes that still run it share nothing with this one",
                task=task.key.name,
                version=earlier[task.key],
                here=task.key.version,
            )
        elif task.key not in known:
            raise UserError(
                f"task {task.key.name!r} (version {task.key.version}, configuration {task.key.config}) is none of "
                f"swarm {manifest.name!r}: start with the tasks it was joined with, or in another folder"
            )
