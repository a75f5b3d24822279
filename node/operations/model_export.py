"""Writes what a node trained as an ordinary model folder."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from node.errors import UserError
from node.operations.trained import Trained, find_trained

if TYPE_CHECKING:
    from node.policy.model_card import TrainingHistory


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


def _history(trained: Trained) -> "TrainingHistory | None":
    from node.policy.model_card import TrainingHistory, splits_in
    from node.swarm.swarm_folder import load_manifest, split_of
    from node.telemetry.evaluations import EVALUATIONS_FILE
    from node.telemetry.metrics_file import number, read_metrics
    from node.telemetry.summary import summarise_node

    if trained.node is None or trained.round is None:
        return None
    manifest = load_manifest(trained.node)
    rows = [row for row in read_metrics(trained.node / "metrics.jsonl") if row["round"] <= trained.round]
    return TrainingHistory(
        trained.round,
        summarise_node(rows),
        int(max((number(row, "swarm/peers") for row in rows), default=0)),
        [row for row in read_metrics(trained.node / EVALUATIONS_FILE) if row["round"] <= trained.round],
        manifest.name if manifest else "",
        [split_of(manifest), *splits_in(Path(trained.base).expanduser())],
    )
