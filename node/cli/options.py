"""Options that several verbs share."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import psutil
import typer

from node.config import NodeConfig
from node.operations.settling import idle_settings
from node.operations.trained import Trained
from node.state_folder import of_a_node

Folder = Annotated[
    Path,
    typer.Option("--state", callback=of_a_node, help="The node's folder: key, manifest, group buffer, checkpoints."),
]
OptionalInvite = Annotated[
    str | None,
    typer.Argument(
        metavar="[INVITE]",
        help="What `gossamer invite` printed; - reads standard input, @FILE a file. The folder remembers it.",
        show_default=False,
    ),
]
Listen = Annotated[
    str | None,
    typer.Option(metavar="ENDPOINT", help="Listen for peers here, e.g. tcp://0.0.0.0:4001.", show_default=False),
]
Config = Annotated[Path | None, typer.Argument(help="TOML file; without one, the defaults.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. sampling.local=4; may be repeated."),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="ID",
        help="The model: 'builtin', a folder, or a model id. Presets follow its size.",
        show_default=False,
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        min=0, help="Rounds to train for; 0: no end.  [default: the folder's, else no end]", show_default=False
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.", show_default=False)]
Forget = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", help="Drop the folder's value of this setting or table, or 'all'; may be repeated."),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="A task's name, a .py, .jsonl, .csv or .parquet file, or FILE.py:CLASS with --data; may be repeated.",
    ),
]
Rewards = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        metavar="FUNCTION",
        help="A reward function in TRL's form, for the rows of --data: FILE.py:NAME, trl:NAME; with a weight "
        "FILE.py:NAME=0.5; may be repeated.",
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
AllowedTasks = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-task",
        metavar="NAME",
        help="Take this task of the swarm with all that its founder chose, such as code of an installed package, a "
        "file's name or a set on the hub; may be repeated. Without it, `join` says what such a task would do.",
    ),
]
Target = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint, a node's folder (its newest checkpoint), or a model.")
]
Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Train in N processes of this machine, each on its own GPU if there are any.  [default: 1]",
        show_default=False,
    ),
]
AccelerateConfig = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="How the processes share the work: a file of `accelerate config`, FSDP2 or data parallel; it may set N.",
        show_default=False,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Log more, and show tracebacks.")]
Preset = Annotated[
    Literal["paper"] | None,
    typer.Option(help="A set of settings. 'paper': SAPO as published, 4 own and 4 external groups, no bounds."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resulting configuration as TOML, and stop.")]
EveryKey = Annotated[bool, typer.Option("--all", help="With --dry-run: also rarely used settings.")]


def command_began() -> float:
    """Return when this process started, Unix seconds: imports count for those who wait."""
    return min(psutil.Process().create_time(), time.time())


def warn(config: NodeConfig, notes: Sequence[str] = ()) -> None:
    """Print which settings have no effect, and what else there is to note, for a command without a log."""
    for line in (*idle_settings(config), *notes):
        print(f"note: {line}", file=sys.stderr)


def say_loading(trained: Trained) -> None:
    """Tell a person who waits which model is loaded; on standard error, where no answer is."""
    adapters = f" with the adapters in {trained.adapters}" if trained.adapters else ""
    print(f"loading {trained.config.policy.model}{adapters} ...", file=sys.stderr, flush=True)
