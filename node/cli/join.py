"""`gossamer join`: a node in somebody's swarm, from one line."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from node.cli.options import AllowedTasks, Config, Debug, Folder, Forget, Listen, Model, Rounds, Seed, Settings
from node.cli.running import run
from node.operations.given import read_invite
from node.operations.settling import settle
from node.state_folder import check_free

Uri = Annotated[
    str,
    typer.Argument(
        metavar="INVITE",
        help="What `gossamer invite` printed, gossamer://...; - reads standard input, @FILE a file.",
        show_default=False,
    ),
]
NoStart = Annotated[bool, typer.Option("--no-start", help="Fetch, verify and store the manifest, and stop.")]


def join(  # noqa: PLR0913  # one parameter for each option of the command
    invite: Uri,
    config: Config = None,
    model: Model = None,
    folder: Folder = Path("node-state"),
    listen: Listen = None,
    rounds: Rounds = None,
    settings: Settings = None,
    seed: Seed = None,
    forget: Forget = None,
    allow_task: AllowedTasks = None,
    no_start: NoStart = False,
    debug: Debug = False,
) -> int:
    """Join a swarm with an invite, and start a node in it.

    The node fetches and verifies the manifest. It trains your own model on the swarm's tasks. CONFIG has the model and
    all other settings. It lists the swarm's tasks that need files of yours, and may set how your model is asked a task.
    A task that could read your files or run a package's code waits for your word (--allow-task). The same command
    resumes from the node's checkpoint.

    \b
    Example:
      gossamer join @invite.txt --state n1 --model my-model
    """
    parsed = read_invite(invite)
    named = {"rounds": rounds, "seed": seed, "policy.model": model, "network.listen": listen or None}
    check_free(folder)
    settled = settle(config, settings, named, folder=folder, forget=forget or [])

    from node.swarm import joining, swarm_folder
    from node.swarm.peering import check_endpoint
    from node.telemetry.logs import setup_logs

    if not no_start:
        check_endpoint(settled.config.network)
    setup_logs(None, debug=debug)  # the folder is not there before the swarm has admitted this node
    joined = joining.join(parsed, settled.config, folder, allow_task or [])
    setup_logs(folder, debug=debug)
    settled.say(config)
    if no_start and (manifest := swarm_folder.load_manifest(folder)) and manifest.archive:
        print(f"note: {swarm_folder.lasting(manifest)}", file=sys.stderr)  # a start says so itself
    return 0 if no_start else run(joined, folder)
