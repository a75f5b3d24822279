"""`gossamer replay`: a node's decisions, made again from its record."""

from pathlib import Path
from typing import Annotated

import typer

from node.cli.options import Debug
from node.state_folder import of_a_node

Place = Annotated[
    Path, typer.Argument(metavar="FOLDER", callback=of_a_node, help="A node's state folder, or a copy of it.")
]
EVERY = 1000  # rounds between two lines of progress, if the output is no terminal


def replay(folder: Place, debug: Debug = False) -> int:
    """Repeat a node's decisions, and compare.

    `gossamer node --journal` records a node's rounds. This reads them in FOLDER, and repeats what the node admitted,
    refused, drew and weighted. It names each round that differs, and then exits with 1. The node may be running.

    \b
    Example:
      gossamer replay n0
    """
    from rich.console import Console

    from node.replay import replay as rounds_again

    console = Console()
    done = differing = 0
    with console.status("reading the record") as spinner:  # which is shown in a terminal alone
        for again in rounds_again(folder):
            done += 1
            if again.difference:
                differing += 1
                console.print(
                    f"round {again.number}: {again.difference}",
                    highlight=False,
                    markup=False,
                    emoji=False,
                    soft_wrap=True,
                )
            elif console.is_terminal:
                spinner.update(f"round {again.number}: as recorded")
            elif done % EVERY == 0:
                print(f"round {again.number}: as recorded", flush=True)
    rounds = "1 round" if done == 1 else f"{done} rounds"
    print(f"{rounds} done again, {differing} of them otherwise than recorded")
    return 1 if differing else 0
