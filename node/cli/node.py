"""`gossamer node`: one node."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from node.cli.options import Config, Debug, DryRun, Rounds, Seed, Settings, read_config
from node.cli.toml import to_toml

Folder = Annotated[Path, typer.Option("--folder", "--state", help="The node's state folder: key, pool, checkpoints.")]
Listen = Annotated[
    str | None,
    typer.Option(metavar="ENDPOINT", help="Where peers may dial, e.g. tcp://0.0.0.0:4001.", show_default=False),
]
SeedPeers = Annotated[
    list[str] | None,
    typer.Option(
        "--seed-peer", metavar="ADDRESS", help="A node to meet the swarm by: what its `address` file holds; repeatable."
    ),
]


def node(  # noqa: PLR0913  # one parameter for each option of the command
    config: Config = None,
    folder: Folder = Path("node-state"),
    listen: Listen = None,
    seed_peer: SeedPeers = None,
    rounds: Rounds = None,
    settings: Settings = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> int:
    """Run one node until its last round or Ctrl-C; started again, it goes on from its checkpoint.

    \b
    Example:
      gossamer node --state n0 --listen tcp://0.0.0.0:4001
      gossamer node --state n1 --seed-peer "$(cat n0/address)" --set trainer.learning_rate=1e-4
    """
    settled = read_config(config, settings, rounds=rounds, seed=seed)
    changes = {"seeds": [*settled.network.seeds, *(seed_peer or [])], **({"listen": listen} if listen else {})}
    settled = settled.model_copy(update={"network": settled.network.model_copy(update=changes)})
    if dry_run:
        print(to_toml(settled), end="")
        return 0

    from node.logs import setup_logs

    setup_logs(folder, debug=debug)
    from node.run import run_node  # after the logs: its libraries log while they load

    with contextlib.suppress(KeyboardInterrupt):  # while it still starts; later the node ends its round first
        run_node(settled, folder)
    return 0
