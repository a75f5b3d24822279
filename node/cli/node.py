"""`gossamer node`: one node."""

from pathlib import Path
from typing import Annotated

import typer

from node.cli.options import (
    Config,
    Debug,
    DryRun,
    Folder,
    Listen,
    Rounds,
    Seed,
    Settings,
    Tasks,
    check_tasks,
    read_config,
    resumed,
    to_toml,
    with_network,
    with_tasks,
)
from node.cli.running import run

SeedPeers = Annotated[
    list[str] | None,
    typer.Option(
        "--seed-peer", metavar="ADDRESS", help="A node to meet the swarm by: what its `address` file holds; repeatable."
    ),
]
SeedOnly = Annotated[
    bool,
    typer.Option("--seed-only", help="Introduce peers, relay and serve the manifest; load no model, train nothing."),
]
Join = Annotated[
    str | None,
    typer.Option(metavar="INVITE", help="Join this swarm first, as `gossamer join` does.", show_default=False),
]


def node(  # noqa: PLR0913  # one parameter for each option of the command
    config: Config = None,
    folder: Folder = Path("node-state"),
    listen: Listen = None,
    seed_peer: SeedPeers = None,
    join: Join = None,
    seed_only: SeedOnly = False,
    task: Tasks = None,
    rounds: Rounds = None,
    settings: Settings = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> int:
    """Run one node until Ctrl-C, or its last round if it has one; started again, it goes on from its checkpoint.

    A node that founded or joined a swarm needs no CONFIG to be started again.

    \b
    Example:
      gossamer node --state n0 --listen tcp://0.0.0.0:4001
      gossamer node --state n0 --task ./riddles.py
      gossamer node --state n1 --seed-peer "$(cat n0/address)" --set trainer.learning_rate=1e-4
      gossamer node --state relay --join "$INVITE" --seed-only --listen tcp://0.0.0.0:4002
    """
    settled = read_config(resumed(config, folder), settings, rounds=rounds, seed=seed)
    settled = with_tasks(with_network(settled, listen=listen, seeds=seed_peer or []), task)
    if dry_run:
        check_tasks(settled)
        print(to_toml(settled), end="")
        return 0

    from node.telemetry.logs import setup_logs

    setup_logs(folder, debug=debug)
    if join is not None:
        from node import founding
        from protocol.invite import Invite

        settled = founding.join(Invite.parse(join), settled, folder, tasks=not seed_only)
    return run(settled, folder, seed_only=seed_only)
