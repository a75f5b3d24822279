"""`gossamer identity`: the key of a node."""

import re
from pathlib import Path
from typing import Annotated

import typer

from node.cli.options import Debug
from node.errors import UserError
from node.state_folder import of_a_node

app = typer.Typer(help="Show a node's key, or hand its swarm over.", rich_markup_mode=None)

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", callback=of_a_node, help="The node's state folder.", show_default=False)
]


@app.command()
def show(folder: Folder, debug: Debug = False) -> None:
    """Print a node's id, public key and last address.

    \b
    Example:
      gossamer identity show n0
    """
    from protocol.identity import Identity

    identity = Identity.load(_key(folder))
    print(f"node id  {identity.node_id}")
    print(f"key      {identity.public_key.hex()}")
    address = folder / "address"
    if address.exists():
        print(f"address  {address.read_text().strip()}")


@app.command("hand-over")
def hand_over(
    folder: Folder,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The next owner's public key, as `show` prints it there.")],
    debug: Debug = False,
) -> None:
    """Hand the swarm over to another key. It cannot be undone.

    The folder must belong to the swarm's owner. From then on the other key signs invites and revocations. Earlier
    grants stay valid. The node in the folder tells the swarm while it runs.

    \b
    Example:
      gossamer identity hand-over n0 03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8
    """
    from node.swarm import revoking

    if not re.fullmatch("[0-9a-fA-F]{64}", key):
        raise UserError("KEY has 64 hex digits, as `gossamer identity show` prints it on the next owner's machine")
    revoking.hand_over(folder, bytes.fromhex(key))
    print(f"handed over: the node in {folder} tells the swarm; keep it running until the next owner's has heard")


def _key(folder: Path) -> Path:
    return folder / "identity.key"
