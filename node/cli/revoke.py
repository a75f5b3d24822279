"""`gossamer revoke`: what a swarm's owner takes back."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.cli.options import Debug
from node.errors import UserError
from node.operations.given import read_invite
from node.state_folder import is_held, of_a_node

if TYPE_CHECKING:
    from protocol.identity import NodeId

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", callback=of_a_node, help="The state folder of the swarm's owner.")
]
What = Annotated[
    list[str] | None,
    typer.Argument(metavar="WHAT...", help="Node ids, invites (the whole lines), or the ids that `invite` printed."),
]
Undo = Annotated[bool, typer.Option("--undo", help="Take WHAT off the list.")]


def revoke(folder: Folder, what: What = None, undo: Undo = False, debug: Debug = False) -> None:
    """Revoke a node, an invite or a pass.

    The node in FOLDER sends the signed list to the swarm while it runs, or at its next start. Other nodes then
    disconnect a revoked node, and take nothing that it signed. A revoked invite admits nobody. Without WHAT, the list
    is printed.

    \b
    Example:
      gossamer revoke n0 kzdvvj2umnduyauf35o36k6kw462mujv
      gossamer revoke n0 'gossamer://club/...'
    """
    from node.swarm import revoking

    if not what:
        print("\n".join(sorted(revoking.revoked_in(folder))) or "nobody is revoked")
        return
    ids = {_id(text) for text in what}
    before = revoking.revoked_in(folder)
    if not (before & ids if undo else ids - before):
        raise UserError(f"{'not on the list' if undo else 'on the list already'}: {', '.join(sorted(ids))}")
    update = revoking.revoke(folder, ids, undo=undo)
    told = "the node in {} tells the swarm" if is_held(folder) else "start the node in {} to tell the swarm"
    print(f"revocation list {update.sequence}: {len(update.revoked)} revoked; {told.format(folder)}")


def _id(text: str) -> "NodeId":
    from node.swarm import inviting, revoking
    from protocol.credentials.invite import SCHEME

    if not text.startswith(("@", SCHEME)):
        return inviting.parse_node_id(text)
    revocable = revoking.revocable(read_invite(text))
    if revocable is None:
        raise UserError("this invite holds no grant that could be taken back: name the nodes that used it")
    return revocable
