"""`gossamer revoke`: what a swarm's owner takes back."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.cli.options import Debug
from node.errors import UserError
from node.operations.given import read_invite
from node.state_folder import of_a_node

if TYPE_CHECKING:
    from protocol.identity import NodeId

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", callback=of_a_node, help="The state folder of the swarm's owner.")
]
What = Annotated[
    list[str] | None,
    typer.Argument(metavar="WHAT...", help="Node ids, invites (the whole lines), or the ids that `invite` printed."),
]
Undo = Annotated[bool, typer.Option("--undo", help="Let it count again.")]


def revoke(folder: Folder, what: What = None, undo: Undo = False, debug: Debug = False) -> None:
    """Take back a node, an invite or a pass for good.

    Nothing that they sign or admit counts any more. The list is signed here; the node that runs in FOLDER, or its next
    start, tells the swarm. Nodes that hear of it part from the node, and take nothing that it signed. Without WHAT,
    print what is on the list.

    \b
    Example:
      gossamer revoke n0 kzdvvj2umnduyauf35o36k6kw462mujv
      gossamer revoke n0 'gossamer://club/...'
    """
    from node.swarm import founding

    if not what:
        print("\n".join(sorted(founding.revoked_in(folder))) or "nobody is revoked")
        return
    made = founding.revoke(folder, [_id(text) for text in what], undo=undo)
    print(f"revocation list {made.sequence}: {len(made.revoked)} revoked; the node in {folder} tells the swarm")


def _id(text: str) -> "NodeId":
    from node.swarm import founding
    from protocol.credentials.invite import SCHEME

    if not text.startswith(("@", SCHEME)):
        return founding.parse_node_id(text)
    revocable = founding.revocable(read_invite(text))
    if revocable is None:
        raise UserError("this invite holds no grant that could be taken back: name the nodes that used it")
    return revocable
