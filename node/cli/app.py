"""The entry of the command: its verbs, and its exit status and last line when one of them fails.

`explain` decides which failures a person can correct, and says how in one line.
"""

import atexit
import errno
import gc
import importlib.metadata
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from node.cli import (
    answer,
    archive,
    board,
    chat,
    demo,
    doctor,
    evaluate,
    export,
    found,
    identity,
    inspect,
    invite,
    join,
    lab,
    node,
    report,
    revoke,
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
INSTEAD = {
    "chat --remember": "`gossamer export` the model, and talk to it by another program",
    "identity show --state": "`gossamer identity show FOLDER`",
    "identity hand-over --state": "`gossamer identity hand-over FOLDER KEY`",
    "invite --seed": "--address ADDRESS",
    "invite --plain": "--no-grant",
    "tasks check --policy": "--model ID",
    "doctor --port": "a start with `--listen tcp://0.0.0.0:PORT` says at once whether the port is free",
    "report --alone": "`gossamer report RUN OTHER`",
    "lab compare": "`gossamer report RUN OTHER`",
    "node --join": "`gossamer join INVITE`; for more options add --no-start, then `gossamer node --state FOLDER`",
    "node --allow-task": "`gossamer join INVITE --allow-task NAME`",
    "node --seed-peer": "--set 'network.seeds=[\"tcp://HOST:PORT?key=HEX\"]'",
    "node --seed-only": "--set role=relay",
    "identity export": "the key is n0/identity.key, a PEM file; copy that",
    "identity import": "`mkdir -m 700 n0`, then copy the PEM file to n0/identity.key, and `chmod 600` it",
    "init": "`gossamer node --model ID --task TASK --dry-run > gossamer.toml` writes the settings with their meaning",
    "serve": "`gossamer export NODE my-model`, then `transformers serve ./my-model` or `vllm serve my-model`",
    "lab run --known": "run all seeds in one folder: --out FOLDER",
    "backup": "stop the node, then `tar -cf n0.tar n0`",
    "restore": "`tar -xf n0.tar` (a file of an older release: `mkdir -m 700 n0`, then `tar -xf n0.tar -C n0`)",
}
"""What to type for a verb, or a verb's option, that there was."""

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
app.add_typer(identity.app, name="identity")
app.add_typer(tasks.app, name="tasks")
app.add_typer(lab.app, name="lab")
app.command("inspect")(inspect.inspect)
app.command("doctor")(doctor.doctor)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 done, 1 a defect or a failed node, 2 something to correct, 130 interrupted."""
    atexit.register(gc.freeze)  # else Python looks through all of torch once more at its end, which takes two seconds
    given = list(sys.argv[1:] if arguments is None else arguments)
    setup_logs(debug="--debug" in given)  # to stderr, until a verb says otherwise: stdout may be a key, or an invite
    if not given and sys.stdout.isatty():
        from node.cli.here import here

        print(*here(Path.cwd()), sep="\n")
        sys.exit(0)
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
        line = _instead(arguments) if isinstance(error, typer.TyperException) else None
        line = line or explain(error)
        if debug or line is None:
            traceback.print_exc()
        if line is not None:
            print(f"error: {line}", file=sys.stderr)
        return EXIT_DEFECT if line is None or isinstance(error, PassingError) else EXIT_USER_ERROR


def _instead(arguments: Sequence[str]) -> str | None:
    """Return what to type where a person typed what is gone; None where that is not so."""
    words = [word.partition("=")[0] for word in arguments]
    for gone, instead in INSTEAD.items():
        verb, *others = gone.split()
        if words[:1] == [verb] and set(others) <= set(words[1:]):
            return f"`gossamer {gone}` is gone: {instead}"
    return None


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
