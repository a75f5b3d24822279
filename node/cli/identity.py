"""`gossamer identity`: the key of a node."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from node.cli.options import Debug
from node.errors import UserError

app = typer.Typer(help="Show, export or import a node's key.", rich_markup_mode=None)

Folder = Annotated[Path, typer.Option("--folder", "--state", help="The node's state folder.")]
STATE = Path("node-state")


@app.command()
def show(folder: Folder = STATE, debug: Debug = False) -> None:
    """Print the node's id, and where it was last dialled.

    \b
    Example:
      gossamer identity show --state n0
    """
    from protocol.identity import Identity

    print(f"node id  {Identity.load(_key(folder)).node_id}")
    address = folder / "address"
    if address.exists():
        print(f"address  {address.read_text().strip()}")


@app.command()
def export(folder: Folder = STATE, debug: Debug = False) -> None:
    """Print the private key as PEM. Whoever holds it is this node: keep it as you keep a password.

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
    """Give a state folder the key in FILE. A key that is already there is never replaced.

    \b
    Example:
      gossamer identity import n0.pem --state n0-again
    """
    from protocol.identity import Identity

    if _key(folder).exists():
        raise UserError(f"{folder} has a key already: move {_key(folder)} away first")
    identity = Identity.import_(_read(source))
    folder.mkdir(parents=True, exist_ok=True)
    identity.save(_key(folder))
    print(f"node id  {identity.node_id}")


def _key(folder: Path) -> Path:
    return folder / "identity.key"


def _read(source: str) -> str:
    try:
        return sys.stdin.read() if source == "-" else Path(source).read_text(encoding="ascii")
    except UnicodeDecodeError:
        raise UserError(f"{source} is no PEM file: export the key again") from None
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from None
