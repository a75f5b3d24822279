"""Options that several verbs share, and how they change a configuration.

A configuration as TOML, every key with its meaning: what `--dry-run` prints.
"""

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import psutil
import typer
from pydantic import BaseModel

from node.config import COMMON_KEYS, FUNCTION_FILE, NodeConfig, anchor_files, apply_override, is_key, load_config
from node.errors import UserError

if TYPE_CHECKING:
    from protocol.credentials.invite import Invite


def of_a_node(folder: Path) -> Path:
    """Return `folder`, where a node's is wanted.

    Raises:
        UserError: it is a file, or the folder of a run of several.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file and no folder: choose another path")
    if (folder / "nodes").is_dir():
        raise UserError(f"{folder} is the folder of a run: name one of its nodes, e.g. {folder / 'nodes' / 'n0'}")
    return folder


Folder = Annotated[
    Path,
    typer.Option(
        "--state", "--out", callback=of_a_node, help="The node's state folder: key, manifest, pool, checkpoints."
    ),
]
Listen = Annotated[
    str | None,
    typer.Option(metavar="ENDPOINT", help="Where peers may dial, e.g. tcp://0.0.0.0:4001.", show_default=False),
]
Config = Annotated[Path | None, typer.Argument(help="TOML file; without one, the defaults.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. sampling.local=4; may be repeated."),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="ID",
        help="Train this model: 'builtin', a folder, or a model id; it brings the settings of its size.",
        show_default=False,
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(min=0, help="Rounds to train for; 0, or at first none: until it is stopped.", show_default=False),
]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.", show_default=False)]
Forget = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY", help="Forget what the folder remembers of this key or table, or of 'all'; may be repeated."
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="A task by name, a .py, .jsonl, .csv or .parquet file, or FILE.py:CLASS with --data; may be repeated.",
    ),
]
Rewards = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        metavar="FUNCTION",
        help="A reward function in TRL's form, for the rows of --data: FILE.py:NAME, trl:NAME; may be repeated.",
    ),
]
Rows = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="ROWS",
        help="Rows for --reward or FILE.py:CLASS: a .jsonl, .csv or .parquet file, or OWNER/NAME on the hub.",
        show_default=False,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Log more, and show tracebacks.")]
Preset = Annotated[
    Literal["paper"] | None,
    typer.Option(help="Settings that go together; 'paper': SAPO as published, 4 own and 4 external groups, no bounds."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resulting configuration as TOML, and stop.")]
EveryKey = Annotated[bool, typer.Option("--all", help="With --dry-run: also the settings that few people set.")]


def read_config(path: Path | None, settings: Sequence[str] | None) -> NodeConfig:
    """Return the configuration in `path` with what `settings` change; `UserError` names a bad key."""
    return load_config(path, settings or [])


def task_config(task: str, options: Sequence[str] = ()) -> dict[str, Any]:
    """Return the `[[tasks]]` table of a task by name, or of a Python file, its class or a data set by path."""
    path = Path(task)
    table: dict[str, Any] = {"name": task, "options": {}}
    if path.suffix in (".py", ".jsonl", ".csv", ".parquet"):
        kind = "file" if path.suffix == ".py" else "dataset"
        table = {"name": f"{kind}/{_label(path.stem)}", "options": {"path": str(path.absolute())}}
    if (found := FUNCTION_FILE.fullmatch(task)) is not None:
        table = {"name": f"environment/{_label(Path(found[1]).stem)}", "options": {"factory": task}}
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
        UserError: --reward without --data, or --data without --reward and without an environment.
    """
    made = [task_config(one, options) for one in tasks or []]
    environments = [one for one in made if "factory" in one["options"]]
    if bool(rewards or (environments and rows)) != bool(rows):
        hint = f"--task {rows} asks what it holds" if rows else "name the rows that it pays"
        raise UserError(f"--reward and --data go together: {hint}")
    path = Path(rows or "")
    source, label = ("path", path.stem) if path.suffix else ("hub", rows or "")
    for one in environments if rows else []:
        one["options"][source] = rows
        anchored_tasks(one)
    if rewards and rows:
        name = f"rewards/{_label(label)}"
        table: dict[str, Any] = {"name": name, "options": {source: rows, "functions": list(rewards)}}
        for option in options:
            apply_override(table["options"], option, "--option")
        made.append(anchored_tasks(table))
    return made


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
    if given.startswith("@") or (not given.startswith(SCHEME) and path.is_file()):
        try:
            with path.open(encoding="ascii") as file:
                return Invite.parse(file.read(MAX_INVITE_CHARS + 2))
        except UnicodeDecodeError:
            raise UserError(f"{path} holds no invite") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
    return Invite.parse(given)


def check_tasks(config: NodeConfig) -> None:
    """Raise `UserError` for a task that cannot be loaded here."""
    from node.tasks import load_tasks

    load_tasks(config.tasks)


def command_began() -> float:
    """Return when this process started, Unix seconds: imports count for those who wait."""
    return min(psutil.Process().create_time(), time.time())


def to_toml(
    config: BaseModel,
    notes: Mapping[str, str] = MappingProxyType({}),
    *,
    only_what_is_set: bool = False,
    every_key: bool = True,
) -> str:
    """Return `config` as a TOML document; reading it gives an equal configuration.

    Args:
        config: of a node.
        notes: say, by dotted key, where a value comes from, in place of what the key means.
        only_what_is_set: the other keys are comments that show what holds.
        every_key: otherwise, keys that few people set are there only where they have another value than the default.
    """
    lines = list(_table(config, "", notes, only_what_is_set, every_key))
    if not every_key:
        lines += ["", "# All other settings have their defaults. `gossamer node --dry-run --all` shows them."]
    return "\n".join(lines).lstrip("\n") + "\n"


def _table(
    section: BaseModel, name: str, notes: Mapping[str, str], only_what_is_set: bool, every_key: bool
) -> Iterator[str]:
    """Yield the lines of a section: its values first, as TOML wants, then its tables."""
    tables: list[tuple[str, BaseModel, bool]] = []
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        dotted = f"{name}{key}"
        meaning = notes.get(dotted, field.description)
        comment = f"  # {meaning}" if meaning else ""
        unset = "# " if only_what_is_set and key not in section.model_fields_set else ""
        if isinstance(value, BaseModel):
            tables.append((dotted, value, False))
        elif _is_tables(value):
            tables += [(dotted, item, True) for item in value]
        elif not every_key and is_key(dotted) and dotted not in COMMON_KEYS and value == field.default:
            continue
        elif value is None:
            yield f"# {key} ={comment}"
        else:
            yield f"{unset}{key} = {toml_value(value)}{comment}"
    for path, child, repeated in tables:
        lines = list(_table(child, f"{path}.", notes, only_what_is_set, every_key))
        if repeated or (lines and lines[0]):  # else it has no values of its own
            yield from ("", f"[[{path}]]" if repeated else f"[{path}]")
        yield from lines


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, BaseModel) for item in value)


def toml_value(value: Any) -> str:
    """Return a value of the configuration as TOML; in a table, without the keys that have none."""
    if isinstance(value, Mapping):
        held = {key: item for key, item in value.items() if item is not None}
        return "{" + ", ".join(f"{_key(str(key))} = {toml_value(item)}" for key, item in held.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


def _key(name: str) -> str:
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else _string(name)


def _string(text: str) -> str:
    """Return a TOML basic string: as JSON's, but DEL is escaped and other characters stand for themselves."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
