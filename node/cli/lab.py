"""`gossamer lab`: experiments."""

from pathlib import Path
from typing import Annotated

import typer

from node.cli.options import Debug
from node.errors import UserError

app = typer.Typer(help="Run experiments.", rich_markup_mode=None)

Experiment = Annotated[Path, typer.Argument(metavar="FILE", help="An experiment, e.g. examples/worth.toml.")]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the runs; those that it has are not repeated.  [default: runs/FILE]", show_default=False
    ),
]
Results = Annotated[
    Path | None, typer.Option(help="Folder of table, JSON and plots.  [default: --out]", show_default=False)
]
Arms = Annotated[list[str] | None, typer.Option("--arm", metavar="ARM", help="Only this arm; may be repeated.")]
Bases = Annotated[list[str] | None, typer.Option("--base", metavar="BASE", help="Only this base; may be repeated.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of FILE, e.g. seeds=1 or settings.rounds=50."),
]
Jobs = Annotated[
    int | None, typer.Option(min=1, help="Runs at once.  [default: as many as the cores allow]", show_default=False)
]
On = Annotated[
    str | None,
    typer.Option(
        metavar="ray[=ADDRESS]",
        help="Do the runs on this machine's Ray cluster, or on the one at ADDRESS.",
        show_default=False,
    ),
]


@app.command()
def run(  # noqa: PLR0913  # one parameter for each option of the command
    file: Experiment,
    out: Out = None,
    results: Results = None,
    arm: Arms = None,
    base: Bases = None,
    settings: Settings = None,
    jobs: Jobs = None,
    on: On = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Start no run: show what is missing, and the time that runs have taken.")
    ] = False,
    done: Annotated[bool, typer.Option("--done", help="Start no run: summarise those that are done.")] = False,
    debug: Debug = False,
) -> None:
    """Do an experiment's missing runs, and summarise all.

    It may be killed at any moment: the same command resumes.

    \b
    Example:
      gossamer lab run examples/worth.toml
      gossamer lab run examples/worth.toml --dry-run
      gossamer lab run examples/worth.toml --done --results docs/results
      gossamer lab run examples/worth.toml --base dense --arm 8/0 --arm 2/16 --set seeds=1 --out runs/a
      gossamer lab run examples/worth.toml --on ray=head.example:6379
    """
    from node.lab.figures import tabulate
    from node.lab.plan import read_lab
    from node.lab.plots import plot
    from node.lab.results import in_order, read_runs
    from node.lab.runs import do_missing, done_runs, time_table
    from node.lab.tables import to_json, to_markdown

    folder = out or Path("runs") / file.stem
    lab = read_lab(file, folder, overrides=settings or [], arms=arm or [], bases=base or [])
    if dry_run:
        print(time_table(lab))
        return
    if done:
        lab = lab._replace(runs=done_runs(lab))
        if not lab.runs:
            raise UserError(f"no run is done yet in {folder}: leave out --done")
    else:
        do_missing(lab, jobs or 0, lambda line: print(line, flush=True), on or "")
    found = in_order(read_runs(lab.runs), lab)
    lines = tabulate(found, lab.baseline, lab.config.central)
    table = to_markdown(lines, lab)
    target = results or folder
    write_results(target, lab.name, table, to_json(found, lines, lab))
    drawn = plot([result for result in found if not arm or result.arm in arm], target, lab.name, lab.config.central)
    print(f"\n{table}\nwritten to {target}: {', '.join([f'{lab.name}.md', f'{lab.name}.json', *drawn])}")


@app.command()
def attack(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of attacks, e.g. examples/attacks.toml.")],
    out: Out = None,
    results: Results = None,
    settings: Settings = None,
    jobs: Jobs = None,
    on: On = None,
    debug: Debug = False,
) -> None:
    """Try hostile nodes against honest ones.

    It may be killed at any moment: the same command resumes.

    \b
    Example:
      gossamer lab attack examples/attacks.toml
      gossamer lab attack examples/attacks.toml --set seeds=1 --out runs/a
    """
    from node.lab.damage import tabulate, to_json, to_markdown
    from node.lab.runs import do_missing
    from node.lab.trials import read_trials

    folder = out or Path("runs") / file.stem
    trials = read_trials(file, folder, settings or [])
    do_missing(trials.lab, jobs or 0, lambda line: print(line, flush=True), on or "")
    lines = tabulate(trials)
    table = to_markdown(lines, trials)
    target = results or folder
    write_results(target, file.stem, table, to_json(lines, trials))
    print(f"\n{table}\nwritten to {target}/{file.stem}.md and .json")


def write_results(target: Path, name: str, table: str, json_text: str) -> None:
    """Write an experiment's table, into its page if there is one, and its JSON."""
    from protocol.storage import write_atomically

    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / f"{name}.json", json_text.encode())
    page = target / f"{name}.md"
    write_atomically(page, (_with_table(page.read_text(), table) if page.is_file() else table).encode())


def _with_table(page: str, table: str) -> str:
    """Return a page with its first table replaced, or with one at its end."""
    lines = page.splitlines(keepends=True)
    begin = next((at for at, line in enumerate(lines) if line.startswith("|")), len(lines))
    end = next((at for at in range(begin, len(lines)) if not lines[at].startswith("|")), len(lines))
    return "".join([*lines[:begin], table, *lines[end:]])
