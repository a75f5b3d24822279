"""`gossamer report`: write a run's page again, and compare the run with another."""

from pathlib import Path
from typing import Annotated

import typer

from node.cli.options import Debug
from node.errors import UserError

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run of `gossamer swarm`.")]
Alone = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="A run of one node without peers to compare it with.  [default: RUN/alone, if there is one]",
        show_default=False,
    ),
]


def report(run: Run, alone: Alone = None, debug: Debug = False) -> None:
    """Write a run's report again, or compare it with another run.

    The run may still be going on. With a run of one node alone, report.html compares held-out accuracy over the tokens
    generated; both runs need `eval`.

    \b
    Example:
      gossamer report runs/a --alone runs/a-alone
    """
    from node.fleet.report import write_report

    for folder in (run, alone):
        if folder is not None and not (folder / "nodes").is_dir():
            raise UserError(f"{folder} is no run of a swarm: it has no folder `nodes`")
    print(f"report: {write_report(run, alone)}")
