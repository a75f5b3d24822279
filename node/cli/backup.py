"""`gossamer backup`: a node's folder in one file."""

from pathlib import Path
from typing import Annotated

import typer

from node.cli.options import Debug
from node.state_folder import of_a_node

Source = Annotated[Path, typer.Argument(metavar="FOLDER", callback=of_a_node, help="The node's state folder.")]
File = Annotated[Path, typer.Argument(metavar="FILE", help="The file to write, a tar archive.")]


def backup(folder: Source, file: File, debug: Debug = False) -> None:
    """Write all that a node needs into one file.

    The file has the key, settings, swarm, grant, uses of invites, known peers, newest checkpoint, metrics, group
    buffer and a board's history. The node may be running. Keep the file as you keep a password.

    \b
    Example:
      gossamer backup n0 n0.tar
    """
    from node.operations.backup import back_up

    head = back_up(folder, file)
    size = file.stat().st_size
    at = "without a checkpoint" if head["round"] is None else f"at round {head['round']}"
    print(f"wrote {file}, {size / 1e6:.1f} MB: node {head['node'] or 'without a key'}, {at}")
