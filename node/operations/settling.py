"""Settles a node's configuration from all its sources; each source goes before the ones below it.

options     --model, --listen, --rounds, ..., and --set in order
CONFIG      the file
--preset    settings that go together
the folder  what was set at its last start, which its settings.json remembers
the preset  of the model's size; where the model is that of the last start, what ran then
defaults    of `node.config`
"""

import copy
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from node.config import (
    NAMED_PRESETS,
    NetworkConfig,
    NodeConfig,
    OtherVersionError,
    fill,
    flatten,
    is_key,
    is_set,
    merge,
    parse_config,
    put,
    read_tree,
    refused_keys,
    understood,
    unknown_key,
)
from node.errors import UserError, for_shell
from node.operations.config_text import toml_value
from node.operations.presets import preset_of
from node.state_folder import Memory, recall

PRESET_OF = ("policy.model", "policy.device", "policy.lora.r")  # what a preset is made for
TRAINED = ("role", "policy.model", "policy.dtype", "policy.lora.r", "tasks")  # what checkpoints belong to
SECRET = ("observe.token",)

log = structlog.get_logger()


class Settled(NamedTuple):
    """A configuration, by dotted key whence it comes, and what changed since the folder's last start."""

    config: NodeConfig
    notes: Mapping[str, str]
    remembered: Sequence[str] = ()
    changes: Sequence[str] = ()

    def say(self, path: Path | None) -> None:
        """Tell the log what the folder remembers, and what differs from its last start, a line each."""
        if self.remembered and path is not None:
            log.info("the file goes before what the folder remembers", file=str(path))
        for line in [f"the folder remembers {setting}" for setting in self.remembered]:
            log.info(line)
        if self.changes:
            log.info("changed since the last start", settings=self.changes)
        for line in idle_settings(self.config):
            log.warning(line)


def settle(  # noqa: PLR0913  # each is a source of its own
    path: Path | None,
    settings: Sequence[str] | None,
    named: Mapping[str, Any],
    *,
    folder: Path,
    forget: Sequence[str] = (),
    preset: str | None = None,
    verb: str = "node",
    sharers: Callable[[], int] = lambda: 1,
    look: Callable[[NodeConfig], object] = lambda given: None,
) -> Settled:
    """Settle what the node in `folder` is to run.

    Args:
        path: CONFIG, if there is one.
        settings: of the form KEY=VALUE, in order.
        named: what options of their own say, by dotted key; None where they say nothing, `rounds` 0 for no last one.
        folder: the node's; it need not exist.
        forget: keys that the folder shall not remember, or "all".
        preset: a name among `NAMED_PRESETS`; what is set otherwise goes before.
        verb: by which a person starts what is in `folder`.
        sharers: says among how many processes FSDP2 shares the weights out; called after `look`.
        look: called with what was said, before a preset is made, for which torch may be imported.

    Raises:
        StaleSettingsError: the folder's settings are of another version.
        UserError: something that was said is of no use, or there is no such model.
    """
    forget = [*forget, *(["rounds"] if named.get("rounds") == 0 else [])]
    memory = memory_of(folder, forget, verb)
    tree = asked(path, settings, {**named, "rounds": named.get("rounds") or None}, preset)
    given = parse_config(merge(memory.settings, tree))
    look(given)
    values, notes = _unset_values(given, memory, sharers, as_before=not forget)
    config = fill(given, values)
    now, then = flatten(tree), flatten(memory.settings)
    remembered = {key: value for key, value in flatten(merge(memory.settings, tree)).items() if key in then}
    remembered = {key: value for key, value in remembered.items() if key not in now or now[key] != value}
    return Settled(
        config,
        {**notes, **dict.fromkeys(remembered, "as remembered")},
        [
            f"{key} = {_told(key, toml_value(value))}"
            for key, value in remembered.items()
            if value not in (None, "", [], {})
        ],
        changes(memory.last, config.model_dump(mode="json")),
    )


class StaleSettingsError(UserError):
    """A folder's settings are not those of this version; `command` takes its key and checkpoints over to new ones."""

    def __init__(self, why: str, command: str) -> None:
        super().__init__(f"{why}: to go on with its key and checkpoints, type {command}")
        self.why = why
        self.command = command


def memory_of(folder: Path, forget: Sequence[str] = (), verb: str = "node") -> Memory:
    """Return what `folder` remembers, without the keys of `forget`, for a node that is started by `verb`.

    Raises:
        StaleSettingsError: what was set is of another version.
        UserError: it cannot be read, or there is no such key to forget.
    """
    start = f"gossamer {verb} --state {for_shell(folder)}"
    try:
        memory = _without(recall(folder), forget)
    except OtherVersionError as error:
        if "all" in forget:
            return Memory({}, {})
        raise StaleSettingsError(str(error), f"{start} {_anew(error.tree)}") from None
    try:
        parse_config(memory.settings)
    except UserError as error:
        keys = {_place(memory.settings, key) for key in refused_keys(memory.settings)}
        more = _anew(memory.settings) if "" in keys else " ".join(f"--forget {key}" for key in sorted(keys))
        raise StaleSettingsError(f"{folder} has a setting of another version ({error})", f"{start} {more}") from None
    return memory


def _anew(settings: Mapping[str, Any]) -> str:
    """Return the options of a start with new settings, of the same model on the same tasks."""
    kept = flatten(understood(settings))
    chosen = [shlex.quote(f"{key}={toml_value(kept[key])}") for key in TRAINED if key in kept]
    return " ".join(["--forget all", *(f"--set {setting}" for setting in chosen)])


def _place(settings: Mapping[str, Any], key: str) -> str:
    """Return as much of dotted `key` as leads to a value, or a table, in `settings`."""
    names: list[str] = []
    inner: Any = settings
    for name in key.split("."):
        if not isinstance(inner, Mapping) or name not in inner:
            break
        names.append(name)
        inner = inner[name]
    return ".".join(names)


def asked(
    path: Path | None, settings: Sequence[str] | None, named: Mapping[str, Any], preset: str | None = None
) -> dict[str, Any]:
    """Return the tree of what CONFIG says, with the options over it, and the preset of that name below both."""
    tree = read_tree(path, settings or [])
    for key, value in named.items():
        if value is not None:
            put(tree, key, value)
    given = flatten(tree)
    for key, value in NAMED_PRESETS[preset].items() if preset else ():
        if key not in given:
            put(tree, key, value)
    return tree


def idle_settings(config: NodeConfig) -> list[str]:
    """Return a line for each setting that another one leaves without effect, or without sense."""
    network, sampling, trainer = config.network, config.sampling, config.trainer
    lines = []
    if not network.enabled and (network.seeds or network.listen != NetworkConfig().listen):
        lines.append("network.listen and network.seeds have no effect: network.enabled is false, and nobody is met")
    if sampling.questions is not None and sampling.questions < sampling.local:
        lines.append(
            f"sampling.local={sampling.local} has no effect beyond sampling.questions={sampling.questions}: "
            "a round has no more own groups than questions"
        )
    if not sampling.external and sampling.source == "self":
        lines.append("sampling.source has no effect: sampling.external is 0, and nothing is drawn")
    if trainer.options.warmup_steps and trainer.options.lr_scheduler_type == "constant":
        lines.append(
            "trainer.trl.warmup_steps has no effect: set trainer.trl.lr_scheduler_type=constant_with_warmup, or another"
        )
    if trainer.options.loss_type == "cispo" and trainer.options.epsilon_high < 1:
        lines.append(
            f"trainer.trl.epsilon_high={trainer.options.epsilon_high:g} cuts every ratio under 'cispo': set 5, say"
        )
    if config.engine.own_weights and trainer.options.off_policy_mask_threshold is not None:
        lines.append("trainer.trl.off_policy_mask_threshold has no effect: the sampler has the trainer's own weights")
    if config.engine.own_weights and config.engine.vllm.python:
        lines.append(f"engine.vllm.python has no effect: engine.kind is {config.engine.kind!r}")
    return lines


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return "KEY: OLD -> NEW" for what differs between two configurations; a seed not drawn yet does not."""
    old = flatten(before)
    return [
        f"{key}: {_told(key, repr(old[key]))} -> {_told(key, repr(value))}"
        for key, value in flatten(now).items()
        if key in old and old[key] != value and not (key == "seed" and value is None)
    ]


def _told(key: str, value: str) -> str:
    """Return `value` as a log may have it, which others may be able to read."""
    return "..." if key in SECRET else value


def _unset_values(
    config: NodeConfig, memory: Memory, sharers: Callable[[], int], *, as_before: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what holds where nothing is set: what ran last, for the same model, so that a run stays what it is."""
    last = flatten(understood(memory.last))
    now = flatten(config.model_dump(mode="json"))
    same = all(last.get(key) == now[key] for key in PRESET_OF if is_set(config, key))
    if last and as_before and same:
        return last, {}
    return preset_of(config, sharers=sharers())


def _without(memory: Memory, forget: Sequence[str]) -> Memory:
    """Return `memory` without the keys, or tables, of `forget`; `UserError` for one that there is not."""
    if "all" in forget:
        return memory._replace(settings={})
    settings: dict[str, Any] = copy.deepcopy(dict(memory.settings))
    for key in forget:
        *tables, last = key.split(".")
        table: Any = settings
        for name in tables:
            table = table.get(name) if isinstance(table, dict) else None
        if not isinstance(table, dict):
            table = {}
        if last not in table and not is_key(key):
            raise UserError(f"--forget {key}: {unknown_key(key)}")
        table.pop(last, None)
    return memory._replace(settings=settings)
