"""A person's words, read: tasks, rewards and rows as tables of the configuration, and invites."""

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node.config import FUNCTION_FILE, NodeConfig, anchor_files, apply_override
from node.errors import UserError

if TYPE_CHECKING:
    from protocol.credentials.invite import Invite

WEIGHTED = re.compile(
    r"(?!judge:)(.+:\w+(?:\(.*\))?)=([^=)]*)", re.DOTALL
)  # a reward function, with what it is made with, and its weight


def task_config(task: str, options: Sequence[str] = ()) -> dict[str, Any]:
    """Return the `[[tasks]]` table of a task by name, or of a Python file, its class or a data set by path."""
    path = Path(task)
    table: dict[str, Any] = {"name": task, "options": {}}
    if path.suffix in (".py", ".jsonl", ".csv", ".parquet"):
        kind = "file" if path.suffix == ".py" else "dataset"
        table = {"name": f"{kind}/{_label(path.stem)}", "options": {"path": str(path.absolute())}}
    if (match := FUNCTION_FILE.fullmatch(task)) is not None:
        table = {"name": f"environment/{_label(Path(match[1]).stem)}", "options": {"factory": task}}
        anchored_tasks(table)
    for option in options:
        apply_override(table["options"], option, "--option")
    return table


def _label(text: str) -> str:
    return re.sub("[^A-Za-z0-9_.-]", "_", text)


def tasks_given(
    tasks: Sequence[str] | None, rewards: Sequence[str] | None, rows: str | None, options: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return the `[[tasks]]` tables of --task, --reward and --data; `options` are for each of them.

    Raises:
        UserError: --reward without --data, or --data without --reward and without an environment; a weight
            that is no number.
    """
    tables = [task_config(task, options) for task in tasks or []]
    environments = [table for table in tables if "factory" in table["options"]]
    if bool(rewards or (environments and rows)) != bool(rows):
        hint = f"--task {rows} asks what it holds" if rows else "name the rows that it pays"
        raise UserError(f"--reward and --data go together: {hint}")
    path = Path(rows or "")
    source, label = ("path", path.stem) if path.suffix else ("hub", rows or "")
    for environment in environments if rows else []:
        environment["options"][source] = rows
        anchored_tasks(environment)
    if rewards and rows:
        name = f"rewards/{_label(label)}"
        functions, weights = zip(*map(_weighted, rewards), strict=True)
        table: dict[str, Any] = {"name": name, "options": {source: rows, "functions": list(functions)}}
        if any(weight is not None for weight in weights):
            table["options"]["weights"] = [1.0 if weight is None else weight for weight in weights]
        for option in options:
            apply_override(table["options"], option, "--option")
        tables.append(anchored_tasks(table))
    return tables


def _weighted(reward: str) -> tuple[str, float | None]:
    """Return the function that is given by its name, or by NAME=WEIGHT, and its weight."""
    match = WEIGHTED.fullmatch(reward)
    if match is None:
        return reward, None
    function, text = match.groups()
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"--reward wants a number after NAME=, got {text!r}")
    return function, weight


def anchored_tasks(table: dict[str, Any]) -> dict[str, Any]:
    """Return the `[[tasks]]` table of a task with absolute paths; relative ones begin at the current folder."""
    anchor_files({"tasks": [table]}, Path.cwd())
    return table


def read_invite(given: str) -> "Invite":
    """Return the invite that `given` is, or that it names: "-" standard input, "@PATH" or a path a file.

    A line among a command's arguments can be read by every user of the machine for as long as it runs.

    Raises:
        UserError: there is no such file.
        InviteError: what is there is no invite.
    """
    from protocol.credentials.invite import MAX_INVITE_CHARS, SCHEME, Invite

    if given == "-":
        return Invite.parse(sys.stdin.read(MAX_INVITE_CHARS + 2))
    path = Path(given.removeprefix("@"))
    if given.startswith("@") or (SCHEME not in given and path.is_file()):
        try:
            with path.open(encoding="utf-8") as file:
                return Invite.parse(file.read(MAX_INVITE_CHARS + 2))
        except UnicodeDecodeError:
            raise UserError(f"{path} holds no invite") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
    return Invite.parse(given)


def check_tasks(config: NodeConfig) -> list[str]:
    """Load the tasks, and return what a person should know of them: which pay outside of their range.

    Raises:
        UserError: a task cannot be loaded here.
    """
    from node.tasks import load_tasks
    from node.tasks.task_set import outside, unshared

    tasks = load_tasks(config.tasks).tasks
    return [outside(task) for task in tasks if config.network.enabled and not unshared(task) and outside(task)]
