"""`gossamer tasks`: what can be asked, a try of one, and a file to begin with."""

from pathlib import Path
from typing import Annotated

import typer

from node.cli.options import Debug, task_config
from node.errors import UserError, for_shell
from node.state_folder import check_parent

app = typer.Typer(help="List tasks, try one, or begin one of your own.", rich_markup_mode=None)

SHOWN = 3
WIDTH = 200  # characters of a question that are shown

Target = Annotated[
    str,
    typer.Argument(
        metavar="TASK", help="A name such as builtin/sums, a .py, .jsonl, .csv or .parquet file, or a CONFIG."
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option of the task, e.g. digits=2; may be repeated."),
]
Examples = Annotated[int, typer.Option(min=0, max=16, help="Solved examples before each question.")]
Answer = Annotated[str | None, typer.Option(help="Where the answer is read: tags, boxed, ...", show_default=False)]


@app.command("list")
def list_(debug: Debug = False) -> None:
    """Print the names of all tasks that can be asked here.

    \b
    Example:
      gossamer tasks list
    """
    from node.tasks import task_names

    for name in task_names():
        print(name)


@app.command()
def check(
    task: Target, option: Options = None, examples: Examples = 0, answer: Answer = None, debug: Debug = False
) -> int:
    """Try a task, and what a swarm relies on.

    Shows some questions; exits with 1 if something does not hold.

    \b
    Example:
      gossamer tasks check ./riddles.py
      gossamer tasks check builtin/arithmetic -o digits=2 --examples 3 --answer first_line
    """
    from node.config import load_config, parse_config
    from node.tasks import load_tasks
    from node.tasks.check import check as findings

    if task.endswith(".toml"):
        configs = load_config(Path(task)).tasks
    else:
        one = task_config(task, option or [])
        configs = parse_config({"tasks": [{**one, "examples": examples, "answer": answer}]}).tasks
    holds = True
    for config in configs:
        for loaded in load_tasks([config]).tasks:
            print(f"{loaded.key.name}  version {loaded.key.version}, configuration {loaded.key.config}")
            for seed in range(SHOWN):
                item = loaded.make(seed)
                print(f"  asked   {_short(item.question)}\n  answer  {_short(item.solution or item.answer) or '-'}")
            for finding in findings(config, loaded):
                holds = holds and finding.holds
                print(f"  {'ok' if finding.holds else 'FAILS'}  {finding.line}")
    return 0 if holds else 1


@app.command()
def template(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The Python file to write, e.g. riddles.py.")],
    debug: Debug = False,
) -> None:
    """Write a small task that works, to be changed into yours.

    \b
    Example:
      gossamer tasks template riddles.py
    """
    from node.tasks.third_party import TEMPLATE

    if file.suffix != ".py":
        raise UserError(f"{str(file)!r} is no Python file: give a name that ends in .py")
    check_parent(file)
    try:
        with file.open("x") as out:
            out.write(TEMPLATE.replace("FILE", file.name))
    except FileExistsError:
        raise UserError(f"{file} is there already: choose another name") from None
    print(f"wrote {file}: try it with gossamer tasks check {for_shell(file)}")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."
