"""`gossamer bench`: the benchmarks, one JSON object a line."""

import json
from typing import Annotated, Literal

import typer

from node.cli.options import Debug
from node.errors import UserError

Compare = Literal["trl", "sharing", "both"]

app = typer.Typer(help="Run a benchmark; results are JSON lines on stdout.", rich_markup_mode=None)


@app.command("round")
def bench_round(
    model: Annotated[str, typer.Option(help="As policy.model.")] = "builtin",
    questions: Annotated[int, typer.Option(min=1, help="Questions a round.")] = 4,
    completions: Annotated[int, typer.Option(min=2, help="Completions a question.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds timed in each block.")] = 20,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of each side, taken in turns.")] = 6,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads for tensors.")] = 1,
    compare: Annotated[Compare, typer.Option(help="Which comparison to make.")] = "both",
    debug: Debug = False,
) -> None:
    """Time a round against TRL's own trainer on the same work, and sharing on against off.

    \b
    Example:
      gossamer bench round --blocks 6 > round.jsonl
      gossamer bench round --compare sharing --model runs/models/smollm2-135m-instruct --rounds 3 --blocks 3
    """
    try:
        from benchmarks.round import run
    except ModuleNotFoundError as error:
        if error.name not in ("benchmarks", "benchmarks.round"):
            raise
        raise UserError("the benchmarks are not installed: run this from a checkout of gossamer") from None
    for row in run(
        model=model,
        questions=questions,
        completions=completions,
        rounds=rounds,
        blocks=blocks,
        threads=threads,
        compare=compare,
    ):
        print(json.dumps(row), flush=True)


@app.callback()
def _group() -> None:
    """Run a benchmark; results are JSON lines on stdout."""
