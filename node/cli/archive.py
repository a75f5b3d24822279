"""`gossamer archive`: keep a swarm's groups, check them, export them for other trainers."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from node.cli.options import AllowedTasks, Debug, Forget, Listen, OptionalInvite, Settings
from node.cli.running import run as run_to_its_end
from node.errors import UserError, for_shell, printable
from node.operations.given import read_invite
from node.operations.settling import settle
from node.state_folder import check_free, gone_if_new, of_a_node

app = typer.Typer(help="Keep what a swarm shares, check it, export it.", rich_markup_mode=None)

GIGABYTE = 10**9

Own = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="A CONFIG with [[tasks]] that need files of yours."),
]
Archived = Annotated[Path, typer.Argument(metavar="FOLDER", help="The archive: what --out named.")]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The archive's folder. It may be published.")]
State = Annotated[
    Path, typer.Option("--state", callback=of_a_node, help="The member's folder: key and settings. It may not.")
]
Gigabytes = Annotated[float, typer.Option(min=1e-6, help="Keep at most so much; a signer fills at most half of it.")]
Rows = Annotated[Path, typer.Option("--out", metavar="FILE", help="The JSONL file to write; its card comes beside it.")]
Plain = Annotated[
    bool, typer.Option("--plain", help="Prompts and completions are texts, for a model that was not taught to chat.")
]


@app.command()
def run(  # noqa: PLR0913  # one parameter for each option of the command
    invite: OptionalInvite = None,
    *,
    out: Out,
    folder: State = Path("archive-state"),
    gigabytes: Gigabytes = 1.0,
    listen: Listen = None,
    own: Own = None,
    allow_task: AllowedTasks = None,
    settings: Settings = None,
    forget: Forget = None,
    debug: Debug = False,
) -> int:
    """Keep what a swarm shares, as a relay in it.

    It ends at Ctrl-C, or when the archive is full. Only a swarm that was founded with --archive is kept, and of it no
    group that its maker marked, and none on a held-out question. Answers are not scored: `export` does that. Without
    INVITE, it resumes from its folder.

    \b
    Example:
      gossamer archive run @invite.txt --out club --state k0
    """
    archive, state = out.resolve(), folder.resolve()
    if state.is_relative_to(archive) or archive.is_relative_to(state):
        raise UserError(f"{folder} has the member's key, and {out} may be published: choose --state and --out apart")
    parsed = None if invite is None else read_invite(invite)
    check_free(folder)
    settled = settle(
        own, settings, {"role": "relay", "network.listen": listen or None}, folder=folder, forget=forget or []
    )

    from node.archive.keeping import open_keeper
    from node.archive.store import check_allowed
    from node.swarm import joining, swarm_folder
    from node.swarm.peering import check_endpoint
    from node.telemetry.logs import setup_logs

    check_endpoint(settled.config.network)
    joined = settled.config
    with gone_if_new(folder):
        if parsed is not None:
            setup_logs(None, debug=debug)  # the folder is not there before the swarm has admitted this node
            joined = joining.join(parsed, settled.config, folder)
        if (manifest := swarm_folder.load_manifest(folder)) is None:
            raise UserError(
                f"{folder} belongs to no swarm: `gossamer archive run INVITE --out {for_shell(out)} --state "
                f"{for_shell(folder)}` joins one"
            )
        check_allowed(manifest)
    setup_logs(folder, debug=debug)
    settled.say(own)
    opened = partial(
        open_keeper,
        out=out,
        max_bytes=round(gigabytes * GIGABYTE),
        own=joined.tasks,
        allowed=allow_task or (),
    )
    return run_to_its_end(joined, folder, looking=opened)


@app.command()
def verify(archive: Archived, debug: Debug = False) -> int:
    """Check an archive, without a network.

    Checks names, signatures and marks. Exits with 1 if a file is damaged. Damaged files are named on standard error.
    Answers are not scored: `export` does that.

    \b
    Example:
      gossamer archive verify club
    """
    from node.archive.store import Archive

    damaged = 0

    def say(path: Path, reason: str) -> None:
        nonlocal damaged
        damaged += 1
        _say_damaged(path, reason)

    groups = answers = 0
    signers: set[str] = set()
    opened = Archive(archive)
    for found in opened.groups(say):
        groups += 1
        answers += len(found.group.completions)
        signers.add(found.signer)
    print(
        f"swarm {opened.manifest.name}: {groups} groups, {answers} answers, {len(signers)} signers; {damaged} damaged"
    )
    return 1 if damaged else 0


@app.command()
def export(
    archive: Archived,
    *,
    out: Rows,
    plain: Plain = False,
    own: Own = None,
    allow_task: AllowedTasks = None,
    debug: Debug = False,
) -> int:
    """Write an archive's answers as JSONL.

    `datasets` and TRL's trainers read them. Each answer is scored anew, and a group that lies is left out. So is
    whatever is on a held-out question. Exits with 1 if a file is damaged.

    \b
    Example:
      gossamer archive export club --out club-rows/rows.jsonl
    """
    from node.archive.judging import GroupJudge
    from node.archive.rows import export_rows
    from node.archive.store import Archive
    from node.config import load_config
    from node.telemetry.logs import setup_logs

    setup_logs(debug=debug)
    opened = Archive(archive)
    tasks = () if own is None else load_config(own).tasks
    totals = export_rows(opened, GroupJudge(opened.manifest, tasks, allow_task or ()), out, plain=plain)
    for path, reason in totals.damaged:
        _say_damaged(path, reason)
    print(totals)
    return 1 if totals.damaged else 0


def _say_damaged(path: Path, reason: str) -> None:

    print(f"damaged: {printable(str(path))}: {reason}", file=sys.stderr)
