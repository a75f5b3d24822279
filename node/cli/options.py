"""Options that several verbs share, and how they change a configuration."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from node.config import NodeConfig, load_config, parse_config

Folder = Annotated[
    Path, typer.Option("--out", "--state", help="The node's state folder: key, manifest, pool, checkpoints.")
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
Rounds = Annotated[
    int | None, typer.Option(help="Rounds to train for.  [default: until it is stopped]", show_default=False)
]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Log more, and show tracebacks.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resulting configuration as TOML, and stop.")]


def read_config(
    path: Path | None,
    settings: Sequence[str] | None,
    *,
    rounds: int | None = None,
    seed: int | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> NodeConfig:
    """Return the configuration in `path` with what the command line changes; `UserError` names a bad key.

    `defaults` are the verb's own, for keys that neither sets.
    """
    named = {"rounds": rounds, "seed": seed}
    extra = [f"{key}={value}" for key, value in named.items() if value is not None]
    return load_config(path, [*(settings or []), *extra], defaults)


def resumed(path: Path | None, folder: Path) -> Path | None:
    """Return `path`; without one, what the node in `folder` last ran, if it is in a swarm with a manifest."""
    last = folder / "config.json"
    return last if path is None and last.exists() and (folder / "manifest.bin").exists() else path


def with_network(config: NodeConfig, *, listen: str | None = None, seeds: Sequence[str] = ()) -> NodeConfig:
    """Return `config` with what the options say of the network; `UserError` for an endpoint or a seed that is none."""
    network = config.network
    changes = {"seeds": list(dict.fromkeys([*network.seeds, *seeds])), "listen": listen or network.listen}
    checked = parse_config({"network": network.model_dump() | changes}).network
    return config.model_copy(update={"network": checked})


def command_began() -> float:
    """Return when this process started, Unix seconds: imports count for those who wait."""
    return min(psutil.Process().create_time(), time.time())
