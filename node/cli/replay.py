"""`gossamer replay`: a node's decisions, made again from its record."""

from pathlib import Path
from typing import Annotated

import typer

from node.cli.options import Debug, of_a_node

Place = Annotated[
    Path, typer.Argument(metavar="FOLDER", callback=of_a_node, help="A node's state folder, or a copy of it.")
]
EVERY = 100  # rounds between two lines on how far it is


def replay(folder: Place, debug: Debug = False) -> int:
    """Make a node's decisions again, and compare.

    What it admitted and refused, what it drew, and with which weight.

    From the folder's record alone; the node may be running. Exits with 1 where a round comes out otherwise,
    and names it.

    \b
    Example:
      gossamer replay runs/a/nodes/n0
    """
    from node.replay import replay as rounds_again

    done = differing = 0
    for one in rounds_again(folder):
        done += 1
        if one.difference:
            differing += 1
            print(f"round {one.number}: {one.difference}", flush=True)
        elif done % EVERY == 0:
            print(f"round {one.number}: as recorded", flush=True)
    print(f"{done} rounds done again, {differing} of them otherwise than recorded")
    return 1 if differing else 0
