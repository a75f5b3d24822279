"""`gossamer export`: a trained policy as an ordinary model folder."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from node.cli.options import Debug, Settings
from node.cli.trained import Target, Trained, find_trained
from node.errors import UserError

if TYPE_CHECKING:
    from node.policy.model_card import History

Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make; it must not exist.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="What to write weights as.  [default: what they were trained as]", show_default=False),
]


def export(model: Target, out: Out, dtype: Dtype = None, settings: Settings = None, debug: Debug = False) -> None:
    """Write a policy as an ordinary model folder.

    transformers and vLLM load it: adapters are merged, and a model card says how it came about.

    \b
    Example:
      gossamer export runs/a/nodes/n0 my-model
      gossamer export runs/a/nodes/n0/checkpoints/best my-model   # by evaluation: eval.every
      gossamer export runs/a/nodes/n0/checkpoints/checkpoint-200 my-model --dtype bfloat16
    """
    write_model(model, out, dtype, settings, debug=debug)
    print(f"model: {out}")


def write_model(
    model: str, out: Path, dtype: str | None = None, settings: Sequence[str] | None = None, *, debug: bool = False
) -> None:
    """Write the policy that `model` names as the new folder `out`; `UserError` if it is there already."""
    if out.exists():
        raise UserError(f"{out} exists already: choose another folder, or delete it")
    trained = find_trained(model, settings)

    from node.policy.export import export_model
    from node.policy.load import load_policy
    from node.policy.model_card import model_card
    from node.telemetry.logs import setup_logs

    setup_logs(debug=debug)
    policy = load_policy(trained.config.policy, adapters=trained.adapters)
    today = datetime.datetime.now().astimezone().date()
    card = model_card(trained.base, trained.config, policy.name, _history(trained), today)
    of_training = trained.config.policy.dtype
    export_model(policy, out, dtype or ("bfloat16" if of_training == "nf4" else of_training), card)


def _history(trained: Trained) -> "History | None":
    from node.fleet.summary import summarise_node
    from node.policy.model_card import History
    from node.swarm.founding import load_manifest
    from node.telemetry.evaluations import EVALUATIONS_FILE
    from node.telemetry.metrics import iter_metrics, iter_with_older, number

    if trained.node is None or trained.round is None:
        return None
    manifest = load_manifest(trained.node)
    rows = [row for row in iter_with_older(trained.node / "metrics.jsonl") if row["round"] <= trained.round]
    return History(
        trained.round,
        summarise_node(rows),
        int(max((number(row, "swarm/peers") for row in rows), default=0)),
        [row for row in iter_metrics(trained.node / EVALUATIONS_FILE) if row["round"] <= trained.round],
        manifest.name if manifest else "",
    )
