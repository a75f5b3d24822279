"""What a node's folder says of the swarm that it founded or joined.

manifest.bin   the swarm's signed manifest
grant.bin      what admits this node to it; missing in open swarms and for nodes that are listed
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from node.config import TaskConfig
from node.errors import UserError
from node.tasks.base import Task, TaskKey
from node.tasks.load import TaskSet, load_tasks
from protocol.errors import ManifestError
from protocol.files import write_atomically
from protocol.manifest import ManifestTask, SwarmManifest, open_manifest
from protocol.messages import MAX_MANIFEST_BYTES
from protocol.records import MAX_GRANT_BYTES

MANIFEST_FILE = "manifest.bin"
GRANT_FILE = "grant.bin"
# Options that say where something is on this machine; they are no part of a task's configuration hash.
PRIVATE_OPTIONS = {"jsonl": frozenset({"path"})}


def load_manifest(folder: Path) -> SwarmManifest | None:
    """Return the manifest in `folder`, None if it belongs to no swarm; `UserError` for a damaged one."""
    data = _read(folder / MANIFEST_FILE, MAX_MANIFEST_BYTES)
    if data is None:
        return None
    try:
        return open_manifest(data)
    except ManifestError as error:
        raise UserError(
            f"{folder / MANIFEST_FILE} is damaged ({error}): delete it and join the swarm again with an invite"
        ) from None


def save_manifest(folder: Path, manifest: SwarmManifest) -> None:
    """Make `folder` the folder of a node in the manifest's swarm."""
    write_atomically(folder / MANIFEST_FILE, manifest.encoded)


def load_grant(folder: Path) -> bytes:
    """Return the node's grant, empty if it has none; whether it is any good its peers decide."""
    return _read(folder / GRANT_FILE, MAX_GRANT_BYTES) or b""


def save_grant(folder: Path, grant: bytes) -> None:
    """Keep what admits the node; an empty grant replaces none."""
    if grant:
        write_atomically(folder / GRANT_FILE, grant)


def _read(path: Path, limit: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def describe_tasks(configs: Sequence[TaskConfig]) -> list[ManifestTask]:
    """Return the manifest's entries for the tasks that `configs` name, each built once to learn its key."""
    described = []
    for config in configs:
        for task in load_tasks([config]).tasks:
            name = _name_to_build_by(config, task)
            hidden = PRIVATE_OPTIONS.get(name, frozenset())
            options = {key: value for key, value in config.options.items() if key not in hidden}
            described.append(ManifestTask(name, task.key.version, task.key.config, _canonical(name, options)))
    return described


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


def adopt_tasks(manifest: SwarmManifest, own: Sequence[TaskConfig]) -> list[TaskConfig]:
    """Return the configuration of the manifest's tasks on this machine.

    What `own` says of a task by the same name counts for its weight and for where its
    files are; all else comes from the manifest. `UserError` names the task that this machine
    cannot build, or builds differently, and the version that differs.
    """
    adopted = [_adopt(task, own) for task in manifest.tasks]
    for task, config in zip(manifest.tasks, adopted, strict=True):
        _check_key(task, load_tasks([config]))
    return adopted


def _adopt(task: ManifestTask, own: Sequence[TaskConfig]) -> TaskConfig:
    try:
        options = json.loads(task.options)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise UserError(
            f"the swarm's task {task.name!r} has options that cannot be read: its founder must found it anew"
        )
    private = PRIVATE_OPTIONS.get(task.name, frozenset())
    mine = next((config for config in own if config.name == task.name), TaskConfig(name=task.name))
    local = {key: value for key, value in mine.options.items() if key in private}
    if private - local.keys():
        raise UserError(
            f"the swarm's task {task.name!r} needs a file of yours: list the task under [[tasks]] of your CONFIG "
            f"with the option {', '.join(sorted(private))}"
        )
    return TaskConfig(name=task.name, weight=mine.weight, options=options | local)  # no founder chooses our files


def _check_key(task: ManifestTask, built: TaskSet) -> None:
    if built.get(TaskKey(task.name, task.version, task.config)) is not None:
        return
    here = built.tasks[0].key
    if here.version != task.version:
        raise UserError(
            f"task {task.name!r} has version {task.version} in the swarm and {here.version} here: "
            "install the release of gossamer that the swarm's founder runs"
        )
    raise UserError(
        f"task {task.name!r} version {task.version} has another configuration here ({here.config}) than in the swarm "
        f"({task.config}): install the release of what provides it, or get the file, that the swarm's founder has"
    )


def check_rules(manifest: SwarmManifest, tasks: TaskSet, completions: int) -> None:
    """Raise `UserError` when no peer would take what the node makes: another task, or too many completions a group."""
    if completions > manifest.limits.max_completions:
        raise UserError(
            f"sampling.completions={completions} is more than swarm {manifest.name!r} allows in a group: "
            f"set it to at most {manifest.limits.max_completions}"
        )
    known = {TaskKey(*task[:3]) for task in manifest.tasks}
    for task in tasks.tasks:
        if task.key not in known:
            raise UserError(
                f"task {task.key.name!r} (version {task.key.version}, configuration {task.key.config}) is none of "
                f"swarm {manifest.name!r}: start with the tasks it was joined with, or in another folder"
            )
