"""`gossamer tasks`: list tasks, test one, write a file to begin with."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.cli.options import Debug, Rewards, Rows, say_loading
from node.errors import UserError, for_shell, printable
from node.operations.given import tasks_given
from node.state_folder import check_parent

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.tasks import Item

app = typer.Typer(help="List tasks, try one, or begin one of your own.", rich_markup_mode=None)

SHOWN = 3
ASKED = 10  # of a policy
WIDTH = 200  # characters of a question that are shown

Target = Annotated[
    str | None,
    typer.Argument(
        metavar="[TASK]",
        help="A name such as builtin/sums, a .py, .jsonl, .csv or .parquet file, FILE.py:CLASS, or a CONFIG.",
        show_default=False,
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option of the task, e.g. digits=2; may be repeated."),
]
Examples = Annotated[int, typer.Option(min=0, max=16, help="Solved examples before each question.")]
Answer = Annotated[str | None, typer.Option(help="The form of the answer: tags, boxed, ...", show_default=False)]

Model = Annotated[
    str | None,
    typer.Option(
        metavar="ID",
        help="Let this model answer ten questions: 'builtin', a folder, a checkpoint.",
        show_default=False,
    ),
]
Fuzz = Annotated[bool, typer.Option("--fuzz", help="Try to fool the verifier with texts that answer nothing.")]


@app.command("list")
def list_(debug: Debug = False) -> None:
    """Print the names of all installed tasks.

    \b
    Example:
      gossamer tasks list
    """
    from node.tasks import task_names

    for name in task_names():
        print(name)


@app.command()
def check(  # noqa: PLR0913  # one parameter for each option of the command
    task: Target = None,
    reward: Rewards = None,
    data: Rows = None,
    option: Options = None,
    examples: Examples = 0,
    answer: Answer = None,
    model: Model = None,
    fuzz: Fuzz = False,
    debug: Debug = False,
) -> int:
    """Test a task.

    Shows some questions, and tests what a swarm needs of the task. Exits with 1 if a test fails.

    \b
    Example:
      gossamer tasks check ./riddles.py
      gossamer tasks check builtin/arithmetic -o digits=2 --examples 3 --answer first_line
      gossamer tasks check --reward ./rewards.py:accuracy --data rows.jsonl --model builtin --fuzz
      gossamer tasks check ./env.py:CounterEnv --data rows.jsonl
    """
    from node.config import load_config, parse_config
    from node.tasks import load_tasks
    from node.tasks.check import check as findings
    from node.tasks.fuzz import fuzz as fooled
    from node.tasks.task_set import unshared

    if (task is None) != bool(reward):
        raise UserError("give either TASK, or --reward with --data")
    if task is not None and task.endswith(".toml"):
        if data:
            raise UserError(f"{task} names the rows of its tasks itself: leave --data out")
        configs = load_config(Path(task)).tasks
    else:
        tables = tasks_given([task] if task else [], reward, data, option or [])
        configs = parse_config({"tasks": [{**table, "examples": examples, "answer": answer} for table in tables]}).tasks
    ask = _asking(model) if model else None
    holds = True
    for config in configs:
        for loaded in load_tasks([config]).tasks:
            print(f"{loaded.key.name}  version {loaded.key.version}, configuration {loaded.key.config}")
            if reason := unshared(loaded):
                print(f"  not shared with peers: {reason}")
            for seed in range(SHOWN if ask is None else ASKED):
                item = loaded.make(seed)
                print(f"  asked   {_short(item.question)}\n  answer  {_short(item.solution or item.answer) or '-'}")
                if ask is not None:
                    text = ask(item, seed)
                    print(f"  said    {_short(text) or '-'}\n  earns   {_paid(loaded.verify(item, text))}")
            for finding in (*findings(config, loaded), *(fooled(loaded) if fuzz else ())):
                holds = holds and finding.holds
                print(f"  {'ok' if finding.holds else 'FAILS'}  {finding.line}")
    return 0 if holds else 1


@app.command()
def template(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The Python file to write, e.g. riddles.py.")],
    debug: Debug = False,
) -> None:
    """Write a small task that works, for you to change.

    \b
    Example:
      gossamer tasks template riddles.py
    """
    from node.operations.preflight import PACKAGES
    from node.tasks.third_party import TEMPLATE

    if file.suffix != ".py":
        raise UserError(f"{str(file)!r} is no Python file: give a name that ends in .py")
    if file.stem in PACKAGES:
        raise UserError(f"{file.name} would hide Gossamer's package {file.stem!r} from scripts: choose another name")
    check_parent(file)
    try:
        with file.open("x") as out:
            out.write(TEMPLATE.replace("FILE", file.name))
    except FileExistsError:
        raise UserError(f"{file} is there already: choose another name") from None
    print(f"wrote {file}: try it with gossamer tasks check {for_shell(file)}")


def _asking(model: str) -> "Callable[[Item, int], str]":
    """Return a function by which a policy answers an item under a seed."""
    from node.engines import SamplingParams, in_process
    from node.operations.trained import find_trained
    from node.policy.load import load_policy

    trained = find_trained(model, None)
    say_loading(trained)
    policy = load_policy(trained.config.policy, trained.config.trainer.bf16, trained.adapters)
    engine, sampling = in_process(policy), SamplingParams.from_config(trained.config.engine)

    def ask(item: "Item", seed: int) -> str:
        ((made,),) = engine.generate([policy.encode_prompt(item)], 1, sampling, seed)
        return made.text

    return ask


def _paid(verdict: float | None) -> str:
    from node.tasks.scoring.verdicts import Scored

    if verdict is None:
        return "nothing: it cannot be scored"
    parts = verdict.parts.items() if isinstance(verdict, Scored) else ()
    return f"{verdict:.3g}" + "".join(f"  {name} {part:.3g}" for name, part in parts)


def _short(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."
