"""A file of attacks: which attack meets which defence, how many hostile nodes of how many, on which bases.

    nodes = 16                      # honest and hostile ones together
    seeds = 3
    last = 5                        # rounds at the end in which an attack's marks are counted

    [settings]                      # of every node; bases as in any experiment
    rounds = 50

    [defences.none]
    [defences.length]
    note = "twice an own right answer"
    settings.sampling.max_length_ratio = 2

    [[trials]]                      # each attack against each defence, with so many hostile nodes
    attacks = ["planted", "overlong"]
    defences = ["none", "length"]
    hostile = [1, 4]
    bases = ["sparse"]              # default: all
    nodes = 32                      # default: the file's

Each trial has a control: runs of the same honest nodes, and nobody else.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from node.config import Section, flatten, parse_config
from node.errors import UserError
from node.lab.attacks import ATTACKS
from node.lab.plan import (
    ArmConfig,
    AttackConfig,
    BaseConfig,
    Lab,
    LabConfig,
    Run,
    lab_of,
    read_experiment,
    refuse_hidden,
)


class DefenceConfig(Section):
    """The honest nodes' defence against attacks; its settings are over a base's."""

    note: str = ""
    settings: dict[str, Any] = Field({})


class TrialConfig(Section):
    """Attacks that meet defences."""

    attacks: list[str] = Field(min_length=1)
    defences: list[str] = Field(min_length=1)
    hostile: list[int] = Field(min_length=1, description="nodes, of all")
    groups: int = Field(8, ge=1, le=1024, description="that a hostile node signs a round")
    bases: list[str] = Field([], description="default: all")
    nodes: int | None = Field(None, ge=2, le=1024, description="default: the file's")


class TrialsConfig(Section):
    """A file of attacks."""

    nodes: int = Field(16, ge=2, le=1024)
    seeds: int | list[int] = 3
    runner: Literal["memory"] = "memory"
    last: int = Field(5, ge=1, description="rounds at the end in which an attack's marks are counted")
    settings: dict[str, Any] = Field({})
    bases: dict[str, BaseConfig] = Field({"": BaseConfig()})
    defences: dict[str, DefenceConfig] = Field(min_length=1)
    trials: list[TrialConfig] = Field(min_length=1)


class AttackTrial(NamedTuple):
    """One line of the results: who attacks whom with how many nodes of all (none in a control), and its arm's name."""

    base: str
    defence: str
    attack: str
    hostile: int
    nodes: int
    arm: str


class Trials(NamedTuple):
    """A file of attacks as read, with the runs that it takes."""

    config: TrialsConfig
    lab: Lab
    trials: Sequence[AttackTrial]

    def runs_of(self, trial: AttackTrial) -> list[Run]:
        """Return the runs of a trial, a seed each."""
        return [run for run in self.lab.runs if (run.base, run.arm) == (trial.base, trial.arm)]

    def control_of(self, trial: AttackTrial) -> AttackTrial:
        """Return the control of a trial: the same number of honest nodes under the same defence, and no others."""
        return _control(trial.base, trial.defence, trial.hostile, trial.nodes)


def read_trials(path: Path, out: Path, overrides: Sequence[str] = ()) -> Trials:
    """Read a file of attacks whose runs go to `out`, with `key=value` changes of the file.

    Raises:
        UserError: the file, or the settings of one of its runs, cannot be used.
    """
    config = read_experiment(path, TrialsConfig, overrides)
    for name, defence in config.defences.items():
        refuse_hidden(overrides, f"defences.{name}.settings", flatten(defence.settings))
    trials: dict[AttackTrial, ArmConfig] = {}
    for trial in config.trials:
        for kind, wanted, known in (
            ("attack", trial.attacks, ATTACKS),
            ("defence", trial.defences, config.defences),
            ("base", trial.bases, config.bases),
        ):
            for name in wanted:
                if name not in known:
                    raise UserError(f"{path} has no {kind} {name!r}: choose one of {', '.join(map(repr, known))}")
        nodes = trial.nodes or config.nodes
        if not all(0 < hostile < nodes for hostile in trial.hostile):
            raise UserError(f"{path}: hostile wants numbers from 1 to {nodes - 1}, of {nodes} nodes")
        trials |= _arms_of(config, trial)
    arms = {trial.arm: arm for trial, arm in trials.items()}
    shape = config.model_dump(include={"seeds", "nodes", "runner", "settings", "bases"})
    lab = lab_of(path, LabConfig(**shape, arms=arms), out, wanted=[(trial.base, trial.arm) for trial in trials])
    if not all(parse_config(run.settings).eval.every for run in lab.runs):
        raise UserError(f"{path}: nodes are not evaluated at the end: set settings.eval.every = 'ends'")
    return Trials(config, lab, list(trials))


def _arms_of(config: TrialsConfig, trial: TrialConfig) -> dict[AttackTrial, ArmConfig]:
    arms: dict[AttackTrial, ArmConfig] = {}
    nodes = trial.nodes or config.nodes
    for base in trial.bases or config.bases:
        for defence in trial.defences:
            settings = config.defences[defence].settings
            for hostile in trial.hostile:
                control = _control(base, defence, hostile, nodes)
                arms[control] = ArmConfig(nodes=nodes - hostile, settings=settings)
                for kind in trial.attacks:
                    attack = AttackConfig(kind=kind, nodes=hostile, groups=trial.groups)
                    name = f"{defence}, {hostile} {kind} of {nodes}"
                    arm = ArmConfig(nodes=nodes, attack=attack, settings=settings)
                    arms[AttackTrial(base, defence, kind, hostile, nodes, name)] = arm
    return arms


def _control(base: str, defence: str, hostile: int, nodes: int) -> AttackTrial:
    return AttackTrial(base, defence, "", hostile, nodes, f"{defence}, {nodes} without {hostile}")
