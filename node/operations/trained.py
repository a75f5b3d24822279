"""The trained things that a person can name: a checkpoint, a node's folder (its newest one), or a model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from node.config import (
    NodeConfig,
    OtherVersionError,
    TaskConfig,
    fill,
    flatten,
    load_config,
    merge,
    parse_config,
    read_tree,
    understood,
)
from node.errors import UserError
from node.operations.given import task_config
from node.state_folder import CONFIG_FILE, KEY_FILE, of_a_node

if TYPE_CHECKING:
    from node.tasks.questions import Split

ADAPTERS = "adapter_config.json"  # in a checkpoint of LoRA adapters; the model is elsewhere


log = structlog.get_logger()


class Trained(NamedTuple):
    """A model to load: the configuration that belongs to it, with `policy.model` the weights or what adapters adapt.

    `base` is what training began from, as far as is known, `adapters` the folder of LoRA adapters to load onto it,
    `node` that of the node that trained it, and `round` the rounds that it trained for; None where there is none.
    `tasks` are those that the node trained on, as far as is known.
    """

    config: NodeConfig
    base: str
    adapters: Path | None
    node: Path | None
    round: int | None
    tasks: Sequence[TaskConfig]

    def split(self) -> "Split":
        """Return which questions its node holds out for evaluation; the default where no swarm says otherwise."""
        from node.swarm.swarm_folder import load_manifest, split_of

        return split_of(load_manifest(self.node) if self.node else None)


def find_trained(model: str, settings: Sequence[str] | None, tasks: Sequence[str] | None = None) -> Trained:
    """Return what `model` names, with what the command line changes of its configuration.

    Raises:
        UserError: a folder that holds nothing to load, or a setting that will not do.
    """
    checkpoint, node = _locate(model)
    tree = load_config(None, settings or []).model_dump(exclude_unset=True)
    recorded = {} if node is None else _recorded(node)
    tree = merge(recorded, tree)
    policy = tree.get("policy", {})
    adapters = checkpoint if checkpoint is not None and (checkpoint / ADAPTERS).is_file() else None
    base = str(policy.get("model", "builtin")) if node is not None else model
    if adapters is None:
        tree["policy"] = policy | {"model": model if checkpoint is None else str(checkpoint)}
    else:
        base = str(policy.get("model") or _base(adapters))
        tree["policy"] = policy | {"model": base}
    if tasks:
        tree["tasks"] = [task_config(task) for task in tasks]
    config = parse_config(tree)
    if node is None:  # which would have recorded the lengths that it trained with
        from node.operations.presets import preset_for

        choices = preset_for(config)
        config = fill(config, {key: choice.value for key, choice in choices.items() if key.startswith("engine.max_")})
    trained_on = parse_config({"tasks": recorded["tasks"]}).tasks if "tasks" in recorded else []
    return Trained(config, base, adapters, node, _round(checkpoint), trained_on)


def _locate(model: str) -> tuple[Path | None, Path | None]:
    """Return the checkpoint that `model` names and the folder of the node that trained it, as far as there are."""
    path = Path(model)
    if (path / "checkpoints").is_dir() or (path / KEY_FILE).is_file():
        from node.training.checkpoint import latest_checkpoint

        checkpoint = latest_checkpoint(path / "checkpoints")
        if checkpoint is None:
            raise UserError(f"{path} has no complete checkpoint yet: wait for its first, or lower trainer.save_steps")
        return checkpoint.path, path
    if path.resolve().parent.name == "checkpoints" and path.is_dir():
        return path, path.resolve().parent.parent
    of_a_node(path)
    return (path if (path / ADAPTERS).is_file() else None), None


def _round(checkpoint: Path | None) -> int | None:
    if checkpoint is None:
        return None
    digits = checkpoint.resolve().name.removeprefix("checkpoint-")
    return int(digits) if digits.isdecimal() else None


def _base(adapters: Path) -> str:
    """Return the model that the adapters in a folder without a node are for."""
    try:
        base = json.loads((adapters / ADAPTERS).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {adapters / ADAPTERS}: {error}") from None
    if not isinstance(base, str) or not base:
        raise UserError(f"{adapters / ADAPTERS} names no base model: name it with --set policy.model=...")
    return base


def _recorded(folder: Path) -> dict[str, Any]:
    """Return what the node last ran, as far as this version knows its settings; say what is left out."""
    if not (folder / CONFIG_FILE).exists():
        return {}
    try:
        recorded = read_tree(folder / CONFIG_FILE)
    except OtherVersionError as error:
        log.warning("a setting may have had another meaning when this node ran", reason=str(error))
        recorded = dict(error.tree)
    known = understood(recorded)
    if left_out := sorted(flatten(recorded).keys() - flatten(known).keys()):
        log.warning("settings of another version are left out", settings=left_out)
    return known
