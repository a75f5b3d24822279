"""Options that several verbs share, and how they change a configuration."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import psutil
import typer

from node.config import NodeConfig, load_config

Config = Annotated[Path | None, typer.Argument(help="TOML file; without one, the defaults.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. sampling.local=4; may be repeated."),
]
Rounds = Annotated[int | None, typer.Option(help="Rounds to train for.", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Log more, and show tracebacks.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resulting configuration as TOML, and stop.")]


def read_config(
    path: Path | None, settings: Sequence[str] | None, *, rounds: int | None = None, seed: int | None = None
) -> NodeConfig:
    """Return the configuration in `path` with what the command line changes; `UserError` names a bad key."""
    named = {"rounds": rounds, "seed": seed}
    extra = [f"{key}={value}" for key, value in named.items() if value is not None]
    return load_config(path, [*(settings or []), *extra])


def command_began() -> float:
    """Return when this process started, Unix seconds: imports count for those who wait."""
    return min(psutil.Process().create_time(), time.time())
