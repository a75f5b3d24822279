"""`gossamer board`: a swarm's public page."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from node.cli.options import Debug, Folder, Forget, Listen, OptionalInvite, Settings
from node.cli.running import run
from node.errors import UserError, for_shell
from node.operations.given import read_invite
from node.operations.settling import settle
from node.state_folder import check_free

Host = Annotated[str, typer.Option("--host", help="Serve the page here; 0.0.0.0 for everybody.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port of the page; 0: any free one.")]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        metavar="NODE_ID",
        help="Trust this node's reports of its teachers, as the founder's; repeatable, remembered.",
    ),
]


def board(  # noqa: PLR0913  # one parameter for each option of the command
    invite: OptionalInvite = None,
    folder: Folder = Path("board-state"),
    listen: Listen = None,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    trust: Trust = None,
    settings: Settings = None,
    forget: Forget = None,
    debug: Debug = False,
) -> int:
    """Serve a public page of a swarm, as a relay in it.

    The page shows what the swarm has learned, its nodes, and who taught whom, if it was founded with --reports. Without
    INVITE, the board resumes from its folder.

    \b
    Example:
      gossamer board @invite.txt --state b0 --listen tcp://0.0.0.0:4002 --host 0.0.0.0 --port 80
    """
    parsed = None if invite is None else read_invite(invite)
    named = {"role": "relay", "network.listen": listen or None}
    check_free(folder)
    settled = settle(None, settings, named, folder=folder, forget=forget or [], verb="board")

    from node.board.serving import open_board
    from node.swarm import inviting, joining, swarm_folder
    from node.swarm.peering import check_endpoint
    from node.telemetry.logs import setup_logs
    from protocol.credentials.records import Address

    trusted = [inviting.parse_node_id(text) for text in trust or []]
    check_endpoint(settled.config.network)
    joined = settled.config
    if parsed is not None:
        setup_logs(None, debug=debug)  # the folder is not there before the swarm has admitted this node
        joined = joining.join(parsed, settled.config, folder)
    elif swarm_folder.load_manifest(folder) is None:
        raise UserError(f"{folder} belongs to no swarm: `gossamer board INVITE --state {for_shell(folder)}` joins one")
    setup_logs(folder, debug=debug)
    settled.say(None)
    # The invite's maker chose the first seed; the others are peers that its node happened to know.
    seeds = [Address.parse(text) for text in joined.network.seeds[:1]]
    opened = partial(
        open_board,
        folder=folder,
        place=(host, port),
        seeds=seeds,
        trusted=trusted,
        serving=lambda link: print(f"board: {link}", flush=True),
    )
    return run(joined, folder, looking=opened)
