"""`gossamer eval`: score a policy on questions that training never asks."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.cli.options import Debug, Settings, read_config
from node.errors import UserError

if TYPE_CHECKING:
    from node.config import NodeConfig
    from node.training.evaluation import EvalReport, Score

Target = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint, a node's folder (its newest checkpoint), or a model.")
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--tasks", metavar="NAME", help="A task, e.g. builtin/sums; repeatable.  [default: the node's]"),
]
Count = Annotated[int, typer.Option(min=1, help="Questions for each task.")]
Completions = Annotated[int, typer.Option(min=1, help="Completions for each question.")]
Seed = Annotated[int, typer.Option(min=0, help="Chooses the questions.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def evaluate(  # one parameter for each option of the command
    model: Target,
    tasks: Tasks = None,
    count: Count = 100,
    completions: Completions = 1,
    seed: Seed = 0,
    settings: Settings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Score a policy: accuracy by task with its 95 % interval, and mean reward.

    \b
    Example:
      gossamer eval runs/a/nodes/n0 --count 200
      gossamer eval builtin --tasks builtin/sums --tasks builtin/weekdays --json
    """
    config = _config(model, tasks, settings)

    from node.engines import SamplingParams
    from node.engines.hf import HfEngine
    from node.policy import load_policy
    from node.tasks import load_tasks
    from node.telemetry.logs import setup_logs
    from node.training.evaluation import evaluate as run_evaluation

    setup_logs(debug=debug)
    asked = load_tasks(config.tasks)
    policy = load_policy(config.policy)
    sampling = SamplingParams.from_config(config.engine)
    report = run_evaluation(
        policy, HfEngine(policy), asked, count=count, seed=seed, sampling=sampling, completions=completions
    )
    if as_json:
        print(json.dumps({"model": config.policy.model, **report.as_dict()}))
    else:
        _print(report)


def _config(model: str, tasks: list[str] | None, settings: list[str] | None) -> "NodeConfig":
    """Return the configuration that belongs to the model, with what the command line changes."""
    from node.config import parse_config

    weights, folder = _find(model)
    tree = read_config(None, settings).model_dump(exclude_unset=True)
    if folder is not None:
        tree = _merge(_recorded(folder), tree)
    tree["policy"] = {**tree.get("policy", {}), "model": weights}
    if tasks:
        tree["tasks"] = [{"name": name} for name in tasks]
    return parse_config(tree)


def _find(model: str) -> tuple[str, Path | None]:
    """Return the model to load and, where there is one, the folder of the node that trained it."""
    path = Path(model)
    if (path / "checkpoints").is_dir():
        from node.training.checkpoint import latest_checkpoint

        checkpoint = latest_checkpoint(path / "checkpoints")
        if checkpoint is None:
            raise UserError(f"{path} has no complete checkpoint yet: wait for its first, or lower trainer.save_steps")
        return str(checkpoint.path), path
    if path.parent.name == "checkpoints" and path.is_dir():
        return str(path), path.parent.parent
    if (path / "nodes").is_dir():
        raise UserError(f"{path} is the folder of a run: name one of its nodes, e.g. {path / 'nodes' / 'n0'}")
    return model, None


def _recorded(folder: Path) -> dict[str, Any]:
    try:
        recorded = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / 'config.json'}: {error}") from None
    return recorded if isinstance(recorded, dict) else {}


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        before = merged.get(key)
        merged[key] = _merge(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _print(report: "EvalReport") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("task", no_wrap=True)
    for name in ("questions", "accuracy", "95 % interval", "reward", "finished", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for score in report.tasks:
        table.add_row(*_cells(score))
    if len(report.tasks) > 1:
        table.add_row(*_cells(report.overall))
    Console().print(table)


def _cells(score: "Score") -> tuple[str, ...]:
    return (
        score.task,
        str(score.questions),
        f"{score.accuracy:.1%}",
        f"{score.low:.1%} to {score.high:.1%}",
        f"{score.reward:.3f}",
        f"{score.finished:.0%}",
        f"{score.mean_length:.1f}",
    )
