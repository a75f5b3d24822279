"""An experiment's file: which runs there are, and what each is given.

    nodes = 8
    seeds = 5                      # 1 to 5; or a list
    runner = "memory"              # or "processes": real nodes on loopback, one run after another
    baseline = "8/0"               # what arms are held against; default: the first

    [settings]                     # of every node, as in any CONFIG
    rounds = 300
    budget.compute = 200000        # generated tokens + 3 x trained ones, of a node

    [bases.sparse]                 # what all arms begin with; none: one without a name
    settings.policy.model = "builtin"

    [arms."8/0"]
    note = "alone"
    settings.sampling = { local = 8, external = 0, questions = 8 }

    [arms."4/4, planted"]          # the last 2 nodes hostile, under "memory"
    attack = { kind = "planted", nodes = 2 }

A run is one arm on one base under one seed, with the base's settings over the file's, and the arm's over both. All are
checked before the first begins.
"""

import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import Field, ValidationError, field_validator

from node.config import Section, apply_override, merge, parse_config
from node.errors import UserError
from node.lab.attacks import ATTACKS

MAX_SEEDS = 100

Model = TypeVar("Model", bound=Section)


class BaseConfig(Section):
    """What all arms begin with."""

    note: str = ""
    settings: dict[str, Any] = Field({})


class AttackConfig(Section):
    """What the last nodes of a run do to the others; one of `node.lab.attacks`."""

    kind: str
    nodes: int = Field(ge=1, le=1024, description="hostile ones, of all")
    groups: int = Field(8, ge=1, le=1024, description="that each of them signs a round")

    @field_validator("kind")
    @classmethod
    def _is_known(cls, kind: str) -> str:
        if kind not in ATTACKS:
            raise ValueError(f"there is no attack {kind!r}: choose one of {', '.join(ATTACKS)}")
        return kind


class ArmConfig(Section):
    """One way to share, or whatever else a node's settings can say."""

    note: str = ""
    nodes: int | None = Field(None, ge=1, le=1024, description="default: the file's")
    delay: int = Field(0, ge=0, description="rounds that a group needs to get to the others; of the runner 'memory'")
    attack: AttackConfig | None = Field(None, description="of the runner 'memory'")
    slow: int = Field(0, ge=0, description="nodes, the last, that take two rounds for one; of the runner 'memory'")
    settings: dict[str, Any] = Field({})


class LabConfig(Section):
    """An experiment's file."""

    nodes: int = Field(8, ge=1, le=1024)
    seeds: int | list[int] = 5
    runner: Literal["memory", "processes"] = "processes"
    baseline: str = ""
    settings: dict[str, Any] = Field({})
    bases: dict[str, BaseConfig] = Field({"": BaseConfig()})
    arms: dict[str, ArmConfig] = Field(min_length=1)


class Run(NamedTuple):
    """One swarm to be run: where, how large, with which delay and settings."""

    base: str
    arm: str
    seed: int
    nodes: int
    delay: int
    settings: Mapping[str, Any]
    folder: Path
    attack: AttackConfig | None = None
    slow: int = 0


class Lab(NamedTuple):
    """An experiment: its name, its file as read, and its runs, seed by seed, so that a part of them is of use."""

    name: str
    config: LabConfig
    runs: Sequence[Run]

    @property
    def baseline(self) -> str:
        """The arm that the others are held against."""
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
        UserError: the file, or the settings of one of its runs, are of no use.
    """
    config = read_experiment(path, LabConfig, overrides)
    config = config.model_copy(update={"baseline": config.baseline or next(iter(config.arms))})
    for kind, wanted, known in (
        ("arm", [*arms, config.baseline], config.arms),
        ("base", bases, config.bases),
    ):
        for name in wanted:
            if name not in known:
                raise UserError(f"{path} has no {kind} {name!r}: it has {', '.join(map(repr, known))}")
    return lab_of(path, config, out, list(itertools.product(bases or config.bases, arms or config.arms)))


def lab_of(path: Path, config: LabConfig, out: Path, wanted: Sequence[tuple[str, str]]) -> Lab:
    """Return the experiment of `config`, read from `path`: the runs of these (base, arm), seed by seed.

    Raises:
        UserError: the settings of one of its runs are of no use.
    """
    seeds = _seeds(path, config)
    return Lab(path.stem, config, [_run(config, base, arm, seed, out) for seed in seeds for base, arm in wanted])


def as_given(config: LabConfig, base: str, arm: str) -> ArmConfig:
    """Return all that the runs of an arm on a base are given: the arm with its nodes and settings, without its note."""
    chosen = config.arms[arm]
    settings = merge(merge(config.settings, config.bases[base].settings), chosen.settings)
    nodes = config.nodes if chosen.nodes is None else chosen.nodes
    return chosen.model_copy(update={"note": "", "nodes": nodes, "settings": settings})


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
    for override in overrides:
        apply_override(tree, override)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _seeds(path: Path, config: LabConfig) -> list[int]:
    seeds = list(range(1, config.seeds + 1)) if isinstance(config.seeds, int) else config.seeds
    if not 1 <= len(set(seeds)) == len(seeds) <= MAX_SEEDS or min(seeds) < 0:
        raise UserError(f"{path}: seeds wants a number of 1 to {MAX_SEEDS}, or a list of different ones")
    return seeds


def _run(config: LabConfig, base: str, arm: str, seed: int, out: Path) -> Run:
    given = as_given(config, base, arm)
    try:
        parsed = parse_config(given.settings)
    except UserError as error:
        where = f" on base {base!r}" if base else ""
        raise UserError(f"arm {arm!r}{where}: {error}") from None
    if not parsed.ends:
        raise UserError(f"arm {arm!r} has no end: set settings.rounds or settings.budget")
    if (given.delay or given.attack or given.slow) and config.runner != "memory":
        raise UserError(f"arm {arm!r}: delay, attack and slow are of the runner 'memory' only")
    nodes = given.nodes or config.nodes
    if given.attack and given.attack.nodes >= nodes:
        raise UserError(f"arm {arm!r}: of {nodes} nodes {given.attack.nodes} are hostile: leave one to be attacked")
    if given.slow >= nodes:
        raise UserError(f"arm {arm!r}: of {nodes} nodes {given.slow} are slow: leave one that is not")
    folder = arm_folder(out, base, arm) / f"seed{seed}"
    return Run(base, arm, seed, nodes, given.delay, given.settings, folder, given.attack, given.slow)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") or "-"
