"""`gossamer report`: write a run's page again, and compare the run with another."""

from pathlib import Path
from typing import Annotated

import typer

from node.cli.options import Debug
from node.errors import UserError

Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="The folder of a run, or of an arm of an experiment with a run a seed.")
]
Other = Annotated[
    Path | None,
    typer.Argument(metavar="[OTHER]", help="A run, or an arm, to compare it with.", show_default=False),
]


def report(run: Run, other: Other = None, debug: Debug = False) -> None:
    """Write a run's report again, or compare it with another run.

    The run may still be going on. With OTHER, figures of both are printed side by side, and report.html compares their
    held-out accuracy over the tokens generated; for that both need `eval`. Of two arms the common seeds are compared.
    Compute is tokens generated, scored or read as prompts, plus three times those trained on. Groups are for a round,
    bytes for the whole run.

    \b
    Example:
      gossamer report runs/a
      gossamer report runs/a runs/a-alone
      gossamer report runs/worth/8-0 runs/worth/4-4
    """
    for folder in (run, other):
        if folder is not None and not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
    if other is not None:
        from node.lab.tables import compare

        for line in compare(run, other):
            print(line)
    elif not _is_run(run):
        raise UserError(f"{run} is no run of a swarm: it has no folder `nodes`")
    if _is_run(run):
        from node.fleet.report import write_report

        print(f"report: {write_report(run, other if other and _is_run(other) else None)}")


def _is_run(folder: Path) -> bool:
    return (folder / "nodes").is_dir()
