"""`gossamer restore`: a node's folder from what `gossamer backup` wrote."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from node.cli.options import Debug
from node.errors import for_shell

File = Annotated[Path, typer.Argument(metavar="FILE", help="What `gossamer backup` wrote.")]
Folder = Annotated[Path, typer.Option("--folder", "--state", help="The folder to make.")]


def restore(file: File, folder: Folder = Path("node-state"), debug: Debug = False) -> None:
    """Make a node's folder from a backup.

    The folder must be empty or new. A node whose key is in use on this machine is not restored: two processes of one
    key push each other out of the swarm.

    \b
    Example:
      gossamer restore n0.tar --state n0
    """
    from node.operations.backup import restore as make

    head = make(file, folder)
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(head["time"]))
    at = "without a checkpoint" if head["round"] is None else f"at round {head['round']}"
    print(f"restored {folder} as of {day}: node {head['node'] or 'without a key'}, {at}")
    print(f"start it with gossamer node --state {for_shell(folder)}")
    print("note: start it only if this node runs nowhere else any more", file=sys.stderr)
