"""`gossamer identity`: the key of a node."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from node.cli.options import Debug
from node.errors import UserError
from node.state_folder import make_folder, of_a_node

app = typer.Typer(help="Show, export or import a node's key.", rich_markup_mode=None)

Folder = Annotated[Path, typer.Option("--folder", "--state", callback=of_a_node, help="The node's state folder.")]
STATE = Path("node-state")


@app.command()
def show(folder: Folder = STATE, debug: Debug = False) -> None:
    """Print a node's id, public key and last address.

    \b
    Example:
      gossamer identity show --state n0
    """
    from protocol.identity import Identity

    identity = Identity.load(_key(folder))
    print(f"node id  {identity.node_id}")
    print(f"key      {identity.public_key.hex()}")
    address = folder / "address"
    if address.exists():
        print(f"address  {address.read_text().strip()}")


@app.command()
def export(folder: Folder = STATE, debug: Debug = False) -> None:
    """Print the private key as PEM.

    Anybody who has it can act as this node: keep it as you keep a password.

    \b
    Example:
      (umask 077; gossamer identity export --state n0 > n0.pem)
    """
    from protocol.identity import Identity

    print(Identity.load(_key(folder)).export(), end="")


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="FILE", help="PEM file that `export` wrote; - reads stdin.")],
    folder: Folder = STATE,
    debug: Debug = False,
) -> None:
    """Give a state folder the key in FILE.

    A key that is already there is not replaced.

    \b
    Example:
      gossamer identity import n0.pem --state n0-again
    """
    from protocol.identity import Identity

    if _key(folder).exists():
        raise UserError(f"{folder} has a key already: move {_key(folder)} away first")
    identity = Identity.import_(_read(source))
    make_folder(folder)
    identity.save(_key(folder))
    print(f"node id  {identity.node_id}")


@app.command("hand-over")
def hand_over(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The next owner's public key, as `show` prints it there.")],
    folder: Folder = STATE,
    debug: Debug = False,
) -> None:
    """Hand the swarm over to another key. It cannot be undone.

    The folder must belong to the swarm's owner. From then on the other key signs invites and revocations. Earlier
    grants stay valid. The node in the folder tells the swarm while it runs.

    \b
    Example:
      gossamer identity hand-over 03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8 --state n0
    """
    from node.swarm import revoking

    if not re.fullmatch("[0-9a-fA-F]{64}", key):
        raise UserError("KEY has 64 hex digits, as `gossamer identity show` prints it on the next owner's machine")
    revoking.hand_over(folder, bytes.fromhex(key))
    print(f"handed over: the node in {folder} tells the swarm; keep it running until the next owner's has heard")


def _key(folder: Path) -> Path:
    return folder / "identity.key"


def _read(source: str) -> str:
    try:
        return sys.stdin.read() if source == "-" else Path(source).read_text(encoding="ascii")
    except UnicodeDecodeError:
        raise UserError(f"{source} is no PEM file: export the key again") from None
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from None
