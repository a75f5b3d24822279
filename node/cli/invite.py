"""`gossamer invite`: the line with which others join."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.cli.options import Debug
from node.cli.running import print_invite
from node.errors import UserError, for_shell
from node.state_folder import of_a_node

if TYPE_CHECKING:
    from protocol.credentials.grants import Pass
    from protocol.credentials.invite import SharedInvite
    from protocol.credentials.records import Address

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", callback=of_a_node, help="The state folder of a node in the swarm.")
]
Seeds = Annotated[
    list[str] | None,
    typer.Option(
        "--address", metavar="ADDRESS", help="A node to dial, tcp://HOST:PORT?key=HEX; default: this node. Repeatable."
    ),
]
For = Annotated[
    str | None, typer.Option("--for", metavar="NODE_ID", help="Admit this node (owner only).", show_default=False)
]
Uses = Annotated[int | None, typer.Option(help="Admit this many nodes (owner only).", show_default=False)]
Expires = Annotated[
    str | None, typer.Option(metavar="TIME", help="How long --for or --uses is valid: 30m, 12h.  [default: 7d]")
]
NoGrant = Annotated[
    bool, typer.Option("--no-grant", help="Add no right: for nodes that are listed, or have one already.")
]

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_LIFETIME_S = 3660 * 86400


def invite(
    folder: Folder,
    address: Seeds = None,
    node_id: For = None,
    uses: Uses = None,
    expires: Expires = None,
    no_grant: NoGrant = False,
    debug: Debug = False,
) -> None:
    """Print an invite to the swarm of a node.

    It holds the node's address, addresses of peers, and the manifest's hash. In a swarm with an allowlist, the owner
    adds a right to enter: for one node by --for, or for a number of nodes by --uses. When the right expires, those who
    used it leave the swarm. An invite without a right admits nobody; --no-grant prints one.

    \b
    Example:
      gossamer invite n0
      gossamer invite n0 --uses 20 --expires 30d
    """
    if node_id is not None and uses is not None:
        raise UserError("an invite is for one node or for a number of uses: give --for or --uses")
    admits = node_id is not None or uses is not None
    if admits and no_grant:
        raise UserError("--no-grant is for an invite that admits nobody: leave out --for and --uses")
    if expires is not None and not admits:
        raise UserError("--expires says how long --for or --uses admit: give one of them, or leave it out")
    lifetime = _lifetime(expires or "7d")

    from node.swarm import inviting, revoking
    from protocol.credentials.records import Address

    seeds = [Address.parse(text) for text in address or []]
    grant: Pass | SharedInvite | None = None
    if not (admits or no_grant):
        inviting.check_open(folder)
    if node_id is not None:
        grant = inviting.pass_for(folder, inviting.parse_node_id(node_id), lifetime)
    elif uses is not None:
        grant = inviting.shared_invite(folder, uses, lifetime)
    invite = inviting.make_invite(folder, seeds, grant, _own(folder))
    print_invite(invite)
    if (revocable := revoking.revocable(invite)) is not None:
        print(f"note: `gossamer revoke {for_shell(folder)} {revocable}` takes it back", file=sys.stderr)


def _own(folder: Path) -> list["Address"]:
    """Return where the node in `folder` can be dialled now, if it runs: its network may see it elsewhere by now."""
    from node.telemetry.status_server import ask
    from protocol.credentials.records import Address

    try:
        return [Address.parse(text) for text in ask(folder).get("addresses", [])]
    except UserError:
        return []


def _lifetime(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    seconds = int(match[1]) * SECONDS[match[2]] if match else 0
    if not 0 < seconds <= MAX_LIFETIME_S:
        raise UserError(f"--expires wants a time such as 30m, 12h or 7d, at most ten years, got {text!r}")
    return float(seconds)
