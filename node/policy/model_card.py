"""A model card: how an exported model came about, from what its node recorded.

The card travels with the model, so it names no folder, account or machine: a base model that is a
folder is told by the folder's own name, a task by its name, and peers by their number.

Its front matter says which questions were held out from the training, by share and salt: of this training and of those
that the base's card tells of. A swarm that holds out others may have its held-out questions trained on.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from node.config import NodeConfig
from node.tasks.questions import Split
from protocol.storage import read_bounded

CARD_FILE = "README.md"
HELD_OUT = "gossamer_held_out"  # in the front matter: [{"share": ..., "salt": ...}, ...]
MAX_CARD_BYTES = 1 << 20
MAX_SPLITS = 64  # of a card that are read
PACKAGES = ("gossamer", "transformers", "trl", "torch", "peft")


@dataclass(frozen=True, slots=True)
class TrainingHistory:
    """What is known of the training.

    Its rounds, the node's figures in a run's summary, the most peers it had, its evaluations, and the swarm's name, ""
    without one. `held_out` says which questions were held out from it, and from what the base's card tells of.
    """

    rounds: int
    summary: Mapping[str, Any]
    peers: int
    evaluations: Sequence[Mapping[str, Any]]
    swarm: str
    held_out: Sequence[Split] = ()


def model_card(
    base_model: str, config: NodeConfig, name: str, history: TrainingHistory | None, today: datetime.date
) -> str:
    """Return the card as Markdown with the front matter that model hubs read.

    Args:
        base_model: `policy.model` of the node before its first round.
        config: of the node that trained the model.
        name: of the policy, its architecture and size.
        history: of its training; None for a model that no node's record belongs to.
        today: the day of the export.
    """
    base, is_id = _base(base_model)
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gossamer", "reinforcement-learning", "grpo"],
        **({"base_model": base} if is_id else {}),
        **(held_out_entry(history.held_out) if history is not None and history.held_out else {}),
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    by = "trained" if history is not None else "exported"
    lines += [f"# {base}, {by} by a Gossamer node", "", f"A `{name}` language model. Base model: `{base}`."]
    if history is not None:
        lines += ["", "## How it came about", "", *_training(config, history)]
        lines += ["", "## Settings", "", *_settings(config)]
    lines += ["", "## Versions", ""]
    lines += [", ".join(f"{package} {version(package)}" for package in PACKAGES) + f". Exported on {today}.", ""]
    return "\n".join(lines)


def held_out_entry(splits: Sequence[Split]) -> dict[str, list[dict[str, float | int]]]:
    """Return the entry of a card's front matter that says which questions were held out."""
    return {HELD_OUT: [split._asdict() for split in dict.fromkeys(splits)]}


def splits_in(folder: Path) -> list[Split]:
    """Return what the card in a folder says was held out; nothing if there is no card, or none of ours."""
    try:
        text = read_bounded(folder / CARD_FILE, MAX_CARD_BYTES).decode(errors="replace")
    except OSError:
        return []
    front = text.split("\n---", 1)[0] if text.startswith("---\n") else ""
    for line in front.splitlines():
        key, _, value = line.partition(":")
        if key == HELD_OUT:
            return _splits(value)
    return []


def _splits(text: str) -> list[Split]:
    try:
        return [Split(float(split["share"]), int(split["salt"])) for split in json.loads(text)[:MAX_SPLITS]]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # somebody else's card, or a changed one
        return []


def card_doubts(model: str, split: Split) -> list[str]:
    """Return a line for each training in which, by its card, a model may have met questions that `split` holds out.

    A training with the same salt and at least the same share has met none of them.
    """
    return [
        f"the card of {model} says that it was trained where other questions are held out (share {other.share:g}, salt "
        f"{other.salt}; here {split.share:g} and {split.salt}): it may have been trained on what is held out here"
        for other in splits_in(Path(model).expanduser())
        if other.salt != split.salt or other.share < split.share
    ]


def _training(config: NodeConfig, history: TrainingHistory) -> list[str]:
    summary = history.summary
    trained = summary["groups_local"] + summary["groups_external"]
    share = summary["groups_external"] / trained if trained else 0.0
    lines = [
        f"- {history.rounds} rounds of reinforcement learning (`{config.trainer.options.loss_type}` loss, GRPO "
        "advantages) on verifiable rewards.",
        f"- Tasks: {', '.join(f'`{task.name}`' for task in config.tasks)}.",
        f"- Mean reward of its own completions: {summary['reward_first']:.3f} in the first tenth of the rounds, "
        f"{summary['reward_last']:.3f} in the last.",
        f"- Swarm: {json.dumps(history.swarm) if history.swarm else 'none with a name'}; "
        f"at most {history.peers} live peers. "
        f"{summary['groups_external']} of the {trained} groups of completions that it trained on ({share:.0%}) "
        "came from peers.",
        f"- {summary['tokens_generated']} tokens generated, {summary['tokens_trained']} trained on.",
    ]
    if history.evaluations:
        lines += ["", *_evaluations(history.evaluations[0], history.evaluations[-1])]
    return lines


def _evaluations(first: Mapping[str, Any], last: Mapping[str, Any]) -> list[str]:
    kinds = [("greedy accuracy", "accuracy"), ("pass@8", "pass@8")]
    header = ["held-out questions", f"after round {first['round']}"]
    rows = [first] if first["round"] == last["round"] else [first, last]
    if len(rows) > 1:
        header.append(f"after round {last['round']}")
    table = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for label, key in kinds:
        if all(isinstance(row.get(key), int | float) for row in rows):
            cells = [f"{row[key]:.3f} ({row[f'{key}_low']:.3f} to {row[f'{key}_high']:.3f})" for row in rows]
            table.append(f"| {label} | {' | '.join(cells)} |")
    return [*table, "", f"{first['questions']} questions that training never asks; intervals at 95 %."]


def _settings(config: NodeConfig) -> list[str]:
    adapters = config.policy.lora
    how = f"LoRA of rank {adapters.r}, merged into the weights" if adapters.r else "all weights trained"
    sampling, engine = config.sampling, config.engine
    return [
        f"- {how}; learning rate {config.trainer.learning_rate:g}, {config.trainer.options.lr_scheduler_type}",
        f"- {sampling.local} own and {sampling.external} external groups of {sampling.completions} completions a round",
        f"- completions of at most {engine.max_completion_length} tokens, "
        f"temperature {engine.temperature:g}, top-p {engine.top_p:g}",
    ]


def _base(model: str) -> tuple[str, bool]:
    """Return what to call the base model, and whether that is an id on a model hub."""
    if model == "builtin":
        return "Gossamer's built-in policy", False
    path = Path(model)
    is_folder = path.is_absolute() or path.exists() or model.startswith((".", "~")) or model.count("/") > 1
    return (path.expanduser().name or "a local folder", False) if is_folder else (model, True)
