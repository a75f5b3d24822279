"""An experiment's file: which runs there are, and what each is given.

    nodes = 8
    seeds = 5                      # 1 to 5; or a list
    runner = "memory"              # or "processes": real nodes on loopback, one run after another
    baseline = "8/0"               # what arms are compared with; default: the first
    central = "central"            # one node that has the whole compute of a swarm: swarms are compared with it, too

    [settings]                     # of every node, as in any CONFIG
    rounds = 300
    budget.compute = 200000        # of a node (`node.training.budget`)

    [bases.sparse]                 # what all arms begin with; none: one without a name
    settings.policy.model = "builtin"

    [arms."8/0"]
    note = "alone"
    settings.sampling = { local = 8, external = 0, questions = 8 }

    [arms.paper]                   # takes the settings of `--preset paper`, over the base's; it cannot set them itself
    preset = "paper"

    [arms.central]                 # one node with the whole compute of eight: eight times the budget that the base sets
    nodes = 1
    budget = 8

    [arms."4/4, planted"]          # the last 2 nodes hostile, under "memory"
    attack = { kind = "planted", nodes = 2 }

    [arms."4/4, churn"]            # nodes leave and come back: each is away for a quarter of the time,
    churn = { away = 0.25, rounds = 20 }    # for 20 rounds of the others in the mean (`node.lab.churn`)

    [arms."2/16, wrong"]           # peers' wrong answers are imitated in place of their right ones, under "memory"
    control = "wrong"

    [arms.mixed.parts.small]       # an arm of different nodes: so many for each part, in the order of the file, with
    nodes = 4                      # settings over the arm's

    [arms.mixed.parts.large]
    nodes = 4
    settings.policy.model = "examples/bases/dense"

    [arms.uneven.parts.slow]       # under "memory": these take four rounds of the fastest for each of theirs,
    nodes = 2
    pace = 4
    budget = 0.5                   # and have half of the budget

    [arms.uneven.parts.new]        # this one joins when the first node has done half of its run
    nodes = 1
    begins = 0.5

    [arms.uneven.parts.gone]       # and this one ends before the others: the run's accuracy is of those that stay
    nodes = 1
    budget = 0.5
    leaves = true

    [arms.averaged]                # weights, too; Adam's moments are averaged with them (`node.lab.averaging`)
    moments = "averaged"
    settings.weights = { mode = "average", every = 20 }

A run is one arm on one base under one seed. A base's settings are over the file's, an arm's preset is over both, and
its settings over all three; a part's are over an arm's. `--set settings.KEY=VALUE` is also over a base's. Where an arm
or a part sets the same key it is refused. All are checked before the first begins. The results of an arm in parts are
followed by those of each part.
"""

import difflib
import itertools
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from node.config import (
    NAMED_PRESETS,
    NodeConfig,
    Section,
    anchor_files,
    apply_override,
    flatten,
    is_file_task,
    merge,
    parse_config,
    put,
)
from node.errors import UserError
from node.lab.attacks import ATTACKS
from node.lab.controls import CONTROLS
from node.tasks import TaskKey, load_tasks

MAX_SEEDS = 100

Moments = Literal["kept", "reset", "averaged"]  # see `node.lab.averaging`

Model = TypeVar("Model", bound=Section)


class BaseConfig(Section):
    """The start of all arms."""

    note: str = ""
    settings: dict[str, Any] = Field({})


class AttackConfig(Section):
    """The attack of a run's last nodes on the others; one of `node.lab.attacks`."""

    kind: str
    nodes: int = Field(ge=1, le=1024, description="hostile ones, of all")
    groups: int = Field(8, ge=1, le=1024, description="that each of them signs a round")

    @field_validator("kind")
    @classmethod
    def _is_known(cls, kind: str) -> str:
        if kind not in ATTACKS:
            raise ValueError(f"there is no attack {kind!r}: choose one of {', '.join(ATTACKS)}")
        return kind


class ChurnConfig(Section):
    """How nodes of a run leave and come back; see `node.lab.churn`."""

    away: float = Field(gt=0, lt=1, description="part of the time that a node is away")
    rounds: float = Field(20, ge=1, description="of the others, that it is then away in the mean")

    @property
    def present(self) -> float:
        """Rounds of its own that a node is there for, in the mean."""
        return self.rounds * (1 - self.away) / self.away

    @model_validator(mode="after")
    def _is_there_for_a_round(self) -> Self:
        if self.present < 1 and not math.isclose(self.present, 1):  # 4 x 0.2 / 0.8 is a little less
            least = self.away / (1 - self.away)
            raise ValueError(f"a node would stay for less than a round: set rounds to {least:.3g} or more")
        return self


class PartConfig(Section):
    """Nodes of an arm that are alike; their settings are over the arm's."""

    note: str = ""
    nodes: int = Field(ge=1, le=1024)
    budget: float = Field(1, gt=0, le=1024, description="of a node, times that of the arm")
    pace: int = Field(1, ge=1, le=1024, description="rounds of the fastest for each of theirs; of the runner 'memory'")
    begins: float = Field(
        0, ge=0, lt=1, description="they join when the first node has done this part of its run; under 'memory'"
    )
    leaves: bool = Field(False, description="they end before the others, and the run's accuracy is without theirs")
    settings: dict[str, Any] = Field({})


class ArmConfig(Section):
    """One set of a node's settings, such as a way to share."""

    note: str = ""
    nodes: int | None = Field(None, ge=1, le=1024, description="default: the file's")
    budget: float = Field(1, gt=0, le=1024, description="of a node, times the budget that the file or the base sets")
    preset: str = Field("", description="name of a preset whose settings the arm takes, as with `--preset`")
    delay: int = Field(0, ge=0, description="rounds that a group needs to get to the others; of the runner 'memory'")
    attack: AttackConfig | None = Field(None, description="of the runner 'memory'")
    churn: ChurnConfig | None = Field(None, description="default: all nodes are there from the first round to the last")
    control: str | None = Field(None, description="one of `node.lab.controls`; of the runner 'memory'")
    moments: Moments = Field("kept", description="Adam's, when weights are averaged; of the runner 'memory'")
    parts: dict[str, PartConfig] = Field({}, description="by name, where not all nodes are alike; default: they are")
    settings: dict[str, Any] = Field({})

    @field_validator("preset")
    @classmethod
    def _is_a_preset(cls, preset: str) -> str:
        if preset and preset not in NAMED_PRESETS:
            raise ValueError(f"there is no preset {preset!r}: choose one of {', '.join(NAMED_PRESETS)}")
        return preset

    @field_validator("control")
    @classmethod
    def _is_known(cls, control: str | None) -> str | None:
        if control is not None and control not in CONTROLS:
            raise ValueError(f"there is no control {control!r}: choose one of {', '.join(CONTROLS)}")
        return control

    @model_validator(mode="after")
    def _sets_nothing_twice(self) -> Self:
        for name, settings in _own_settings(self).items():
            where = f"part {name!r} sets" if name else "it sets"
            for key in flatten(settings):
                if key in NAMED_PRESETS.get(self.preset, {}):
                    raise ValueError(f"{where} {key}, which preset {self.preset!r} decides: leave one of them out")
                budget = self.budget * (self.parts[name].budget if name else 1)
                if budget != 1 and key.startswith("budget."):
                    raise ValueError(f"{where} {key} beside budget = {budget:g}: leave one of them out")
        return self


def _own_settings(arm: ArmConfig) -> dict[str, Mapping[str, Any]]:
    """Return what an arm itself sets, by the name of its part; its own have none."""
    return {"": arm.settings, **{name: part.settings for name, part in arm.parts.items()}}


class LabConfig(Section):
    """An experiment's file."""

    nodes: int = Field(8, ge=1, le=1024)
    seeds: int | list[int] = 5
    runner: Literal["memory", "processes"] = "processes"
    baseline: str = ""
    central: str = Field("", description="arm of one node with the whole compute of a swarm; see `node.lab.worth`")
    settings: dict[str, Any] = Field({})
    bases: dict[str, BaseConfig] = Field({"": BaseConfig()})
    arms: dict[str, ArmConfig] = Field(min_length=1)


class RunPart(NamedTuple):
    """Nodes of a run that are alike: how many, and with which settings."""

    name: str
    nodes: int
    settings: Mapping[str, Any]
    pace: int = 1
    begins: float = 0
    leaves: bool = False


class Run(NamedTuple):
    """One swarm to be run: where, how large, with which delay and settings; where it has parts, theirs go before."""

    base: str
    arm: str
    seed: int
    nodes: int
    delay: int
    settings: Mapping[str, Any]
    folder: Path
    attack: AttackConfig | None = None
    churn: ChurnConfig | None = None
    parts: tuple[RunPart, ...] = ()
    control: str | None = None
    moments: Moments = "kept"

    @property
    def by_node(self) -> list[Mapping[str, Any]]:
        """The settings of each node."""
        return [part.settings for part in self.parts for _ in range(part.nodes)] or [self.settings] * self.nodes

    @property
    def tempo(self) -> dict[str, list[float]]:
        """The pace of each node, and when it begins; empty where all are there from the start and alike."""
        parts = [part for part in self.parts for _ in range(part.nodes)]
        if all(part.pace == 1 and part.begins == 0 for part in parts):
            return {}
        return {"pace": [part.pace for part in parts], "begins": [part.begins for part in parts]}


class Lab(NamedTuple):
    """An experiment: its name, its file as read, and its runs, seed by seed: the first ones have all arms."""

    name: str
    config: LabConfig
    runs: Sequence[Run]

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        return self.config.baseline


def read_lab(
    path: Path,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    arms: Sequence[str] = (),
    bases: Sequence[str] = (),
) -> Lab:
    """Read an experiment whose runs go to `out`.

    Args:
        path: the file.
        out: the folder.
        overrides: `key=value` of the file, in order, such as `seeds=2` or `settings.rounds=50`.
        arms: only these; default: all.
        bases: likewise.

    Raises:
        UserError: the file, or the settings of one of its runs, cannot be used.
    """
    config = read_experiment(path, LabConfig, overrides)
    config = config.model_copy(update={"baseline": config.baseline or next(iter(config.arms))})
    for kind, wanted, known in (
        ("arm", [*arms, config.baseline, *filter(None, [config.central])], config.arms),
        ("base", bases, config.bases),
    ):
        for name in wanted:
            if name not in known:
                raise UserError(f"{path} has no {kind} {name!r}: it has {', '.join(map(repr, known))}")
    for name in arms or config.arms:
        for part, settings in _own_settings(config.arms[name]).items():
            place = f"arms.{name}.parts.{part}" if part else f"arms.{name}"
            refuse_hidden(overrides, f"{place}.settings", flatten(settings))
        refuse_hidden(overrides, f"arms.{name}.preset", NAMED_PRESETS.get(config.arms[name].preset, {}))
    return lab_of(path, config, out, list(itertools.product(bases or config.bases, arms or config.arms)))


def lab_of(path: Path, config: LabConfig, out: Path, wanted: Sequence[tuple[str, str]]) -> Lab:
    """Return the experiment of `config`, read from `path`: the runs of these (base, arm), seed by seed.

    Raises:
        UserError: the settings of one of its runs cannot be used.
    """
    seeds = _seeds(path, config)
    runs = [_run(config, base, arm, seed, out) for seed in seeds for base, arm in wanted]
    tasks = [task for run in runs for node in _parsed(run) for task in (*node.tasks, *node.eval.tasks)]
    for task in {task.model_dump_json(): task for task in tasks if is_file_task(task.name)}.values():
        load_tasks([task])  # a file that cannot be used fails here, not minutes later in a run
    return Lab(path.stem, config, runs)


def _as_given(config: LabConfig, base: str, arm: str) -> ArmConfig:
    """Return all that the runs of an arm on a base are given: nodes and settings, without notes and sources."""
    chosen = config.arms[arm]
    settings = merge(config.settings, config.bases[base].settings)
    if chosen.budget != 1:
        settings = merge(settings, {"budget": _times(chosen.budget, settings.get("budget"), arm)})
    preset: dict[str, Any] = {}
    for key, value in NAMED_PRESETS.get(chosen.preset, {}).items():
        put(preset, key, value)
    settings = merge(merge(settings, preset), chosen.settings)
    parts = {}
    for name, part in chosen.parts.items():
        of_part = settings
        if part.budget != 1:
            of_part = merge(settings, {"budget": _times(part.budget, settings.get("budget"), f"{arm}: {name}")})
        merged = merge(of_part, part.settings)
        parts[name] = part.model_copy(update={"note": "", "budget": 1, "settings": merged})
    nodes = sum(part.nodes for part in parts.values()) or chosen.nodes or config.nodes
    given = {"note": "", "nodes": nodes, "budget": 1, "preset": "", "settings": settings, "parts": parts}
    return chosen.model_copy(update=given)


def _times(factor: float, budget: object, arm: str) -> dict[str, Any]:
    if not isinstance(budget, Mapping) or not budget:
        raise UserError(f"arm {arm!r}: its budget is {factor:g} times that of file or base: set one there")
    return {key: round(factor * value) if isinstance(value, int | float) else value for key, value in budget.items()}


def arm_folder(out: Path, base: str, arm: str) -> Path:
    """Return where the runs of an arm are: a folder for each seed."""
    return out / _slug(base) / _slug(arm) if base else out / _slug(arm)


def read_experiment(path: Path, model: type[Model], overrides: Sequence[str]) -> Model:
    """Return what a file of an experiment says, with `key=value` changes of it.

    Raises:
        UserError: it cannot be read, or is none of that kind.
    """
    try:
        with path.open("rb") as file:
            tree = tomllib.load(file)
    except FileNotFoundError:
        raise UserError(f"no file {path}: check the path") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    anchor_files(tree, path.parent)
    for override in overrides:
        apply_override(tree, override)
        _over_bases(tree, override)
    anchor_files(tree, Path())
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        *table, key = map(str, first["loc"] or ("the file",))
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            close = [other for other in difflib.get_close_matches(key, _keys(model)) if other != key]
            what = "there is no such key here: " + (
                f"did you mean {close[0]!r}?" if close else "see docs/experiments.md"
            )
        elif first["type"] == "missing" and not table:
            what = "it has none, so it is no experiment (docs/experiments.md); settings are for `gossamer swarm`"
        raise UserError(f"{path}: {'.'.join([*table, key])}: {what}") from None


def _over_bases(tree: Mapping[str, Any], override: str) -> None:
    """Put what `override` says of all runs also into the bases that say otherwise."""
    bases = tree.get("bases")
    for base in bases.values() if isinstance(bases, Mapping) else ():
        settings = base.get("settings") if isinstance(base, Mapping) else None
        if isinstance(settings, dict):
            known = flatten(settings)
            for key, value in _settings_in(override).items():
                if key in known:
                    put(settings, key, value)


def _settings_in(override: str) -> dict[str, Any]:
    """Return the settings of all runs that `settings.KEY=VALUE` changes, by dotted key."""
    changed: dict[str, Any] = {}
    apply_override(changed, override)
    settings = changed.get("settings")
    return flatten(settings) if isinstance(settings, Mapping) else {}


def refuse_hidden(overrides: Sequence[str], place: str, settings: Mapping[str, Any]) -> None:
    """Raise a `UserError` for an override of all runs that those of one arm would not notice.

    Args:
        overrides: `key=value` of the file.
        place: where the file says what is over the settings of all runs.
        settings: these, by dotted key.
    """
    for override in overrides:
        for key in _settings_in(override):
            if key in settings:
                raise UserError(f"--set settings.{key}: {place} decides it there: change that, or choose other arms")


def _keys(section: type[Section]) -> list[str]:
    """Return the names of the keys of a file and of the tables in it."""
    keys = set(section.model_fields)
    for field in section.model_fields.values():
        for kind in get_args(field.annotation):
            if isinstance(kind, type) and issubclass(kind, Section):
                keys |= set(_keys(kind))
    return sorted(keys)


def _seeds(path: Path, config: LabConfig) -> list[int]:
    seeds = list(range(1, config.seeds + 1)) if isinstance(config.seeds, int) else config.seeds
    if not 1 <= len(set(seeds)) == len(seeds) <= MAX_SEEDS or min(seeds) < 0:
        raise UserError(f"{path}: seeds wants a number of 1 to {MAX_SEEDS}, or a list of different ones")
    return seeds


def _run(config: LabConfig, base: str, arm: str, seed: int, out: Path) -> Run:
    given = _as_given(config, base, arm)
    parts = tuple(
        RunPart(name, part.nodes, part.settings, part.pace, part.begins, part.leaves)
        for name, part in given.parts.items()
    )
    nodes = given.nodes or config.nodes
    folder = arm_folder(out, base, arm) / f"seed{seed}"
    run = Run(
        base,
        arm,
        seed,
        nodes,
        given.delay,
        given.settings,
        folder,
        given.attack,
        given.churn,
        parts,
        given.control,
        given.moments,
    )
    _check(config, run)
    return run


def _check(config: LabConfig, run: Run) -> None:
    """Raise a `UserError` for a run that cannot be."""
    name, nodes = f"arm {run.arm!r}", run.nodes
    memory = config.runner == "memory"
    parsed = _parsed(run)
    if (run.delay or run.attack or run.control or run.moments != "kept" or run.tempo) and not memory:
        raise UserError(f"{name}: delay, attack, control, moments, pace and begins are of the runner 'memory' only")
    if run.moments != "kept" and any(node.weights.mode == "off" for node in parsed):
        raise UserError(f"{name}: moments = {run.moments!r}, and weights are not averaged: set settings.weights.mode")
    if run.control and any(node.sampling.rule != "positive" for node in parsed):
        raise UserError(f"{name}: control = {run.control!r} is in place of the default rule: leave sampling.rule out")
    if run.attack and run.attack.nodes >= nodes:
        raise UserError(f"{name}: of {nodes} nodes {run.attack.nodes} are hostile: leave one to be attacked")
    if run.parts:
        _check_parts(config, run, parsed)
    if run.churn and not memory:
        for node in parsed:
            if node.trainer.save_steps > run.churn.present:
                raise UserError(
                    f"{name}: a node is killed after {run.churn.present:.3g} rounds in the mean, and has a checkpoint "
                    f"every {node.trainer.save_steps}: set settings.trainer.save_steps to fewer"
                )


def _parsed(run: Run) -> list[NodeConfig]:
    """Return the configurations that a run's nodes have, one for each part."""
    where = f" on base {run.base!r}" if run.base else ""
    parsed = []
    for part in run.parts or [RunPart("", run.nodes, run.settings)]:
        name = f"arm {run.arm!r}, part {part.name!r}" if run.parts else f"arm {run.arm!r}"
        try:
            parsed.append(parse_config(part.settings))
        except UserError as error:
            raise UserError(f"{name}{where}: {error}") from None
        if not parsed[-1].ends:
            raise UserError(f"{name} has no end: set settings.rounds or settings.budget")
    return parsed


def _check_parts(config: LabConfig, run: Run, parsed: Sequence[NodeConfig]) -> None:
    name = f"arm {run.arm!r}"
    if config.arms[run.arm].nodes is not None:
        raise UserError(f"{name}: its nodes are those of its parts: leave nodes out")
    if run.attack:
        raise UserError(f"{name}: attack is of the last nodes of an arm that has no parts")
    if all(part.begins or part.leaves for part in run.parts):
        raise UserError(f"{name}: no part is there from the beginning to the end: leave begins and leaves out in one")
    if run.parts[0].begins:
        raise UserError(f"{name}: begins is by the first node's run: let the first part be there from the beginning")
    for part in run.parts:
        if not part.name[:1].isalnum():
            raise UserError(f"{name}: part {part.name!r} wants a name that begins with a letter or a digit")
    if config.runner == "memory":
        first = parsed[0]
        if any(node.sampling.completions != first.sampling.completions for node in parsed):
            raise UserError(f"{name}: under the runner 'memory' all parts have the same sampling.completions")
        if any(node.tasks != first.tasks and _task_keys(node) != _task_keys(first) for node in parsed):
            raise UserError(
                f"{name}: under the runner 'memory' all parts have the same tasks; only their examples and "
                "instruction may differ"
            )


def _task_keys(config: NodeConfig) -> set[TaskKey]:
    return {task.key for task in load_tasks(config.tasks).tasks}


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") or "-"
