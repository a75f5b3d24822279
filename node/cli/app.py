"""The entry of the command: its verbs, and its exit status and last line when one of them fails.

`explain` decides which failures a person can correct, and says how in one line.
"""

import errno
import importlib.metadata
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from node.cli import (
    answer,
    archive,
    backup,
    board,
    chat,
    demo,
    doctor,
    evaluate,
    export,
    found,
    identity,
    init,
    inspect,
    invite,
    join,
    lab,
    node,
    report,
    restore,
    revoke,
    serve,
    status,
    swarm,
    tasks,
)
from node.errors import PassingError, UserError
from node.telemetry.logs import flush_logs, setup_logs
from protocol.errors import ProtocolError

EXIT_DEFECT = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="gossamer",
    help="A node for decentralised RL post-training: it learns from its own rollouts and from its peers'.\n\n"
    "Each verb has its own --help with an example; start with `gossamer demo`.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"gossamer {importlib.metadata.version('gossamer')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and stop."),
    ] = False,
) -> None:
    pass


app.command("demo")(demo.demo)
app.command("init")(init.init)
app.command("swarm")(swarm.swarm)
app.command("node")(node.node)
app.command("found")(found.found)
app.command("invite")(invite.invite)
app.command("join")(join.join)
app.command("answer")(answer.answer)
app.command("board")(board.board)
app.add_typer(archive.app, name="archive")
app.command("revoke")(revoke.revoke)
app.command("status")(status.status)
app.command("report")(report.report)
app.command("eval")(evaluate.evaluate)
app.command("chat")(chat.chat)
app.command("export")(export.export)
app.command("serve")(serve.serve)
app.command("backup")(backup.backup)
app.command("restore")(restore.restore)
app.add_typer(identity.app, name="identity")
app.add_typer(tasks.app, name="tasks")
app.add_typer(lab.app, name="lab")
app.command("inspect")(inspect.inspect)
app.command("doctor")(doctor.doctor)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 done, 1 a defect or a failed node, 2 something to correct, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    setup_logs(debug="--debug" in given)  # to stderr, until a verb says otherwise: stdout may be a key, or an invite
    sys.exit(run(given or ["--help"], debug="--debug" in given))


def run(arguments: Sequence[str], *, debug: bool) -> int:
    """Run the command and return its exit status; what a person can correct is one line on stderr."""
    try:
        try:
            return app(list(arguments), prog_name="gossamer", standalone_mode=False) or 0
        finally:
            flush_logs()  # so that the error below is the last line
    except (typer.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__cause__, EOFError):  # typer turns any EOFError into Abort; this one is a defect
            traceback.print_exception(error.__cause__)
            return EXIT_DEFECT
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001  # the edge of the program: every failure gets its exit status here
        line = explain(error)
        if debug or line is None:
            traceback.print_exc()
        if line is not None:
            print(f"error: {line}", file=sys.stderr)
        return EXIT_DEFECT if line is None or isinstance(error, PassingError) else EXIT_USER_ERROR


def explain(error: Exception) -> str | None:
    """Return one line for the person, or None when `error` is a defect of the program."""
    if isinstance(error, UserError | ProtocolError):
        return _one_line(str(error))
    if isinstance(error, typer.TyperException):
        return _one_line(f"{error.format_message()} (see --help)")
    if isinstance(error, OSError):
        return _explain_os_error(error)
    return None


def _explain_os_error(error: OSError) -> str | None:
    where = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{' at' + where if where else ''}: free some space and start again"
    if error.errno == errno.EFBIG:
        return (
            f"a file{where} would be larger than is allowed here: raise the limit (`ulimit -f`), or choose another disk"
        )
    if error.filename and error.errno in (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
    ):
        return f"cannot use{where}: {error.strerror}: choose another path, or change its permissions"
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())
