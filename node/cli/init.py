"""`gossamer init`: asks four questions, and writes a settings file that explains its keys."""

import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, NamedTuple

import typer

from node.cli.options import Debug
from node.config import NodeConfig, parse_config, put
from node.errors import UserError, for_shell
from node.operations.config_text import to_toml
from node.operations.given import check_tasks, task_config
from node.operations.presets import with_preset
from node.state_folder import check_parent
from protocol.storage import write_atomically

File = Annotated[Path, typer.Argument(metavar="FILE", help="The TOML file to write.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")]
Model = Annotated[
    str | None, typer.Option(metavar="ID", help="The model; answers the first question.", show_default=False)
]
Task = Annotated[
    str | None, typer.Option(metavar="TASK", help="The task; answers the second question.", show_default=False)
]
Listen = Annotated[
    str | None,
    typer.Option(
        metavar="ENDPOINT", help="Where to listen, '' for nowhere; answers the third question.", show_default=False
    ),
]
SeedPeer = Annotated[
    str | None,
    typer.Option(
        "--seed-peer",
        metavar="ADDRESS",
        help="A node to dial, '' for none; answers the fourth question.",
        show_default=False,
    ),
]


class SetupQuestion(NamedTuple):
    """A question, its default answer, and what an answer sets, by dotted key."""

    text: str
    default: str
    settings: Callable[[str], dict[str, Any]]


QUESTIONS = (
    SetupQuestion(
        "Which model shall it train: builtin, a folder, or a model id?", "builtin", lambda text: {"policy.model": text}
    ),
    SetupQuestion(
        "What shall it learn: a task of `gossamer tasks list`, or a .py, .jsonl, .csv or .parquet file?",
        "builtin",
        lambda text: {"tasks": [{key: value for key, value in task_config(text).items() if value}]},
    ),
    SetupQuestion(
        "Where may peers on other machines dial it, e.g. tcp://0.0.0.0:4001? Nothing: nowhere, it dials them.",
        "",
        lambda text: {"network.listen": text} if text else {},
    ),
    SetupQuestion(
        "By whom does it meet others: the line in the file `address` of a node's folder? "
        "Nothing: by nobody, or by an invite later.",
        "",
        lambda text: {"network.seeds": [text]} if text else {},
    ),
)


def init(
    file: File = Path("gossamer.toml"),
    model: Model = None,
    task: Task = None,
    listen: Listen = None,
    seed_peer: SeedPeer = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Ask four questions, and write a node's settings to a file.

    An option answers its question. Without a terminal, the defaults are taken. The file also has other common settings
    as comments, each with its meaning and its value for this model and machine.

    \b
    Example:
      gossamer init
      gossamer init riddles.toml --model Qwen/Qwen3-0.6B --task ./riddles.py --listen tcp://0.0.0.0:4001 --seed-peer ''
    """
    if file.exists() and not force:
        raise UserError(f"{file} is there already: choose another name, or write over it with --force")
    check_parent(file)
    if file.is_dir():
        raise UserError(f"{file} is a folder: name a file")
    try:
        with TemporaryFile(dir=file.absolute().parent):  # before a person has answered anything
            pass
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}: choose another path") from None
    tree: dict[str, Any] = {}
    for question, given in zip(QUESTIONS, (model, task, listen, seed_peer), strict=True):
        _answer(question, given, tree)
    config, notes = with_preset(parse_config(tree))
    head = f"# A node's settings. What is commented out holds as it stands.\n#\n#   gossamer node {for_shell(file)}\n\n"
    write_atomically(file, (head + to_toml(config, notes, only_what_is_set=True, every_key=False)).encode())
    name = for_shell(file)
    print(f"wrote {file}: start a node on it with gossamer node {name}, or several with gossamer swarm {name}")


def _answer(question: SetupQuestion, given: str | None, tree: dict[str, Any]) -> None:
    """Put what an answer sets into `tree`: `given`, or what a person types, asked again until it is valid."""
    while True:
        text = _ask(question) if given is None else given.strip()
        try:
            _check(question.settings(text))
        except UserError as error:
            if given is not None or not sys.stdin.isatty():
                raise
            print(f"  that will not do: {error}", file=sys.stderr)
            continue
        for key, value in question.settings(text).items():
            put(tree, key, value)
        return


def _ask(question: SetupQuestion) -> str:
    default = f" [{question.default}]" if question.default else ""
    print(f"{question.text}{default} ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()  # empty at the end of the input: the default holds
    if not line:
        print(f"no answer, which means {question.default or 'nothing'}", file=sys.stderr)
    elif not line.endswith("\n"):
        print(file=sys.stderr)
    return line.strip() or question.default


def _check(settings: dict[str, Any]) -> NodeConfig:
    """Return the configuration of these settings alone; raise `UserError` if they cannot be used here."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        put(tree, key, value)
    config = parse_config(tree)
    if "tasks" in tree:
        check_tasks(config)
    if "policy" in tree and config.policy.model != "builtin":
        from node.policy.detection import find_model

        find_model(config.policy.model)
    return config
