"""`gossamer eval`: score a policy on questions that training never asks."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice, zip_longest
from typing import TYPE_CHECKING, Annotated

import typer

from node.cli.inspect import completion_line
from node.cli.options import Debug, Settings, Target, say_loading
from node.errors import UserError
from node.operations.trained import find_trained
from node.telemetry.rollout_log import quoted

if TYPE_CHECKING:
    from node.training.evaluation import EvalReport, Score, ScoredQuestion

Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="TASK", help="A task's name, or a file; may be repeated.  [default: the node's]"),
]
Count = Annotated[int, typer.Option(min=1, help="Questions for each task.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Greedy answers only, without sampling.")]
SAMPLED = 8
WIDE = 160  # columns of the table if stdout is no terminal
Completions = Annotated[
    int | None,
    typer.Option(
        min=0, help=f"Answers to sample for each question, for pass@k.  [default: {SAMPLED}]", show_default=False
    ),
]
Show = Annotated[int, typer.Option(min=0, metavar="N", help="Print N of the questions, with answers and rewards.")]
Seed = Annotated[
    int | None,
    typer.Option(min=0, help="Seed of the choice of questions.  [default: a node's]", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def evaluate(  # noqa: PLR0913  # one parameter for each option of the command
    model: Target,
    tasks: Tasks = None,
    count: Count = 100,
    greedy: Greedy = False,
    completions: Completions = None,
    show: Show = 0,
    seed: Seed = None,
    settings: Settings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Score a policy on held-out questions.

    Prints greedy accuracy and sampled pass@k by task, with 95 % intervals. If the policy may have been trained on such
    questions, a note on standard error says why.

    \b
    Example:
      gossamer eval runs/a/nodes/n0 --count 200 --show 5
      gossamer eval builtin --task builtin/sums --task builtin/weekdays --greedy --json
    """
    trained = find_trained(model, settings, tasks)
    config = trained.config
    say_loading(trained)

    from node.engines import SamplingParams, in_process
    from node.policy.load import load_policy
    from node.tasks import load_tasks
    from node.tasks.task_set import EVALUATION_SEED
    from node.telemetry.logs import setup_logs
    from node.training.evaluation import answer, doubts, score

    setup_logs(debug=debug)
    split = trained.split()
    notes = list(doubts(trained.base, split))
    chosen = config.tasks if tasks else config.eval.tasks or config.tasks
    own = None
    if trained.tasks and chosen != trained.tasks:
        try:
            own = load_tasks(trained.tasks, split)
        except UserError as error:
            notes.append(f"some of these questions may be trained on: the node's own tasks cannot be read ({error})")
    asked = load_tasks(chosen, split, own)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    policy = load_policy(config.policy, config.trainer.bf16, trained.adapters)
    sampling = SamplingParams.from_config(config.engine)
    kinds = {"greedy": (replace(sampling, temperature=0.0, top_p=1.0), 1)}
    if sampled := (0 if greedy else SAMPLED) if completions is None else completions:
        kinds["sampled"] = (sampling, sampled)
    questions = EVALUATION_SEED if seed is None else seed
    answers = {
        kind: answer(
            policy,
            in_process(policy),
            asked,
            count=count,
            seed=questions,
            sampling=params,
            completions=each,
            longest=config.engine.longest_prompt(policy.positions),
        )
        for kind, (params, each) in kinds.items()
    }
    reports = {kind: score(questions, given) for kind, given in answers.items()}
    if as_json:
        scored = {kind: report.as_dict() for kind, report in reports.items()}
        print(json.dumps({"model": model, "notes": notes, **scored}))
        return
    for line in shown(answers, show):
        print(line)
    _print(reports)


def shown(answers: "dict[str, dict[str, list[ScoredQuestion]]]", count: int) -> Iterator[str]:
    """Yield lines about `count` questions, as many of each task as of another, with each kind of answers."""
    turns = zip_longest(*([(task, answer.item) for answer in found] for task, found in answers["greedy"].items()))
    for task, item in islice(filter(None, chain.from_iterable(turns)), count):
        yield f"{quoted(task)}  {quoted(item.question)}"
        yield f"  right answer  {quoted(item.solution or item.answer)}"
        for kind, given in answers.items():
            for outcome in (scored for scored in given.get(task, ()) if scored.item == item):
                yield f"  {kind}"
                for made, reward in zip(outcome.answers, outcome.rewards, strict=True):
                    yield completion_line(reward, made.finished, made.texts)


def _print(reports: "dict[str, EvalReport]") -> None:
    from rich.console import Console
    from rich.table import Table

    greedy = reports["greedy"]
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("task", no_wrap=True)
    columns = ["questions", "accuracy", "95 %", "reward", "finished", "tokens"]
    best = max(reports["sampled"].overall.pass_at) if "sampled" in reports else None
    for name in [*columns, *([] if best is None else ["pass@1", f"pass@{best}"])]:
        table.add_column(name, justify="right", no_wrap=True)
    scores = [*greedy.tasks, *([greedy.overall] if len(greedy.tasks) > 1 else [])]
    for score in scores:
        table.add_row(*_cells(score), *_pass_cells(reports, score.task, best))
    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)
    console.print(f"{greedy.overall.questions} different held-out questions; intervals count questions.")
    if unscorable := sum(report.overall.unscorable for report in reports.values()):
        console.print(f"{unscorable} answers could not be scored and count as wrong: the log says why.")


def _cells(score: "Score") -> tuple[str, ...]:
    return (
        score.task,
        str(score.questions),
        f"{score.accuracy:.1%}",
        f"{100 * score.low:.1f} to {100 * score.high:.1f}",
        f"{score.reward:.3f}",
        f"{score.finished:.0%}",
        f"{score.mean_length:.1f}",
    )


def _pass_cells(reports: "dict[str, EvalReport]", task: str, best: int | None) -> tuple[str, ...]:
    if best is None:
        return ()
    sampled = reports["sampled"]
    score = next(row for row in (*sampled.tasks, sampled.overall) if row.task == task)
    return f"{score.pass_at[1]:.1%}", f"{score.pass_at[best]:.1%}"
