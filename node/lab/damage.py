"""The damage of an attack: how often honest nodes do what it wanted, and what they lose by it.

While a run goes on, `Witness` looks at every completion that an honest node makes, and counts which attack's marks it
shows; a run without an attack has these counts too. An attack is compared with its control: the same honest nodes,
under the same settings, and nobody else.
"""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from node.lab.attacks import ATTACKS
from node.lab.plan import Run
from node.lab.statistics import Estimate, estimate, finite, rounded
from node.lab.trials import AttackTrial, Trials
from node.rollouts.group import Group
from node.tasks.task_set import TaskSet
from node.telemetry.evaluations import EVALUATIONS_FILE
from node.telemetry.metrics_file import read_metrics
from node.training.budget import spent_in
from protocol.storage import write_atomically

FILE = "attack.json"


class Witness:
    """Counts honest nodes' completions by round, and those of them that show an attack's marks."""

    def __init__(self, tasks: TaskSet) -> None:
        self._tasks = tasks
        self._made: Counter[int] = Counter()
        self._shown: dict[str, Counter[int]] = {kind: Counter() for kind in ATTACKS}

    def saw(self, round_number: int, groups: Sequence[Group]) -> None:
        """Count a round's groups of an honest node."""
        for group in groups:
            task = self._tasks.get(group.task)
            assert task is not None  # the node asked it
            item = task.make(group.seed)
            self._made[round_number] += len(group.completions)
            marked = {
                shows: sum(shows(completion.text, item) for completion in group.completions)
                for shows in {attack.shows for attack in ATTACKS.values()}
            }
            for kind, attack in ATTACKS.items():
                self._shown[kind][round_number] += marked[attack.shows]

    def write(self, folder: Path, honest: int) -> None:
        """Leave the counts in a run's folder, of which the first `honest` nodes are."""
        rounds = range(1, max(self._made, default=0) + 1)
        tree = {
            "honest": honest,
            "made": [self._made[at] for at in rounds],
            "shown": {kind: [counts[at] for at in rounds] for kind, counts in self._shown.items()},
        }
        write_atomically(folder / FILE, (json.dumps(tree) + "\n").encode())


class WitnessRecord(NamedTuple):
    """The record of a run's witness: the number of honest nodes, completions by round, and those of them with marks."""

    honest: int
    made: Sequence[int]
    shown: dict[str, Sequence[int]]

    def share(self, kind: str, last: int) -> float:
        """Return which part of the completions of the `last` rounds shows the marks of `kind`."""
        completions = sum(self.made[-last:])
        return sum(self.shown[kind][-last:]) / completions if completions else 0.0


def read_seen(folder: Path) -> WitnessRecord:
    """Return what the witness of a run left."""
    return WitnessRecord(**json.loads((folder / FILE).read_text()))


class Damage(NamedTuple):
    """One run's figures: the part of honest nodes' completions with an attack's marks, their accuracy and compute.

    Accuracy is held out, at the end; compute is what a node spent (`node.training.budget`). Both are means over honest
    nodes.
    """

    success: float
    accuracy: float
    compute: float


class DamageLine(NamedTuple):
    """A row of the table: a trial over its seeds. `unattacked` is the part with the marks in the control.

    `loss` is the part of the control's accuracy that is lost, by seed; None in a control's own row.
    """

    trial: AttackTrial
    seeds: int
    success: Estimate | None
    unattacked: Estimate | None
    accuracy: Estimate
    loss: Estimate | None
    compute: Estimate


def read_damage(run: Run, kind: str, last: int) -> Damage:
    """Return a finished run's figures; marks of the attack `kind` are counted in its `last` rounds."""
    seen = read_seen(run.folder)
    nodes = [run.folder / "nodes" / f"n{index}" for index in range(seen.honest)]
    scores = [read_metrics(node / EVALUATIONS_FILE)[-1]["accuracy"] for node in nodes]
    spent = [spent_in(read_metrics(node / "metrics.jsonl")).compute for node in nodes]
    return Damage(seen.share(kind, last) if kind else 0.0, statistics.fmean(scores), statistics.fmean(spent))


def tabulate(trials: Trials) -> list[DamageLine]:
    """Return a line for each trial, in the order of the file; all runs must be done."""
    last = trials.config.last
    lines = []
    for trial in trials.trials:
        damages = [read_damage(run, trial.attack, last) for run in trials.runs_of(trial)]
        accuracy, compute = (estimate([getattr(damage, key) for damage in damages]) for key in ("accuracy", "compute"))
        if not trial.attack:
            lines.append(DamageLine(trial, len(damages), None, None, accuracy, None, compute))
            continue
        controls = [read_damage(run, trial.attack, last) for run in trials.runs_of(trials.control_of(trial))]
        losses = [
            1 - damage.accuracy / control.accuracy
            for damage, control in zip(damages, controls, strict=True)
            if control.accuracy > 0
        ]
        lines.append(
            DamageLine(
                trial,
                len(damages),
                estimate([damage.success for damage in damages]),
                estimate([damage.success for damage in controls]),
                accuracy,
                estimate(losses) if len(losses) == len(damages) else None,
                compute,
            )
        )
    return lines


def to_markdown(lines: Sequence[DamageLine], trials: Trials) -> str:
    """Return the table."""
    bases = any(line.trial.base for line in lines)
    titles = ["defence", "attack", "hostile", "seeds", "marked", "marked, control", "accuracy", "lost", "compute"]
    rows = [[*(["base"] if bases else []), *titles]]
    rows.append(["---"] * len(rows[0]))
    for line in lines:
        trial = line.trial
        who = f"{trial.hostile} of {trial.nodes}" if trial.attack else f"0 of {trial.nodes - trial.hostile}"
        cells = [trial.defence, trial.attack or "none", who, str(line.seeds)]
        cells += ["" if cell is None else str(cell) for cell in line[2:]]
        rows.append([*([trial.base] if bases else []), *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def to_json(lines: Sequence[DamageLine], trials: Trials) -> str:
    """Return all of it: what was run, and the estimates."""
    tree = {"file": trials.config.model_dump(mode="json"), "trials": [_plain(line) for line in lines]}
    return json.dumps(tree, indent=1) + "\n"


def _plain(line: DamageLine) -> dict[str, object]:
    trial = {key: value for key, value in line.trial._asdict().items() if key != "arm"}
    figures = {key: value for key, value in line._asdict().items() if isinstance(value, Estimate)}
    return trial | {"seeds": line.seeds} | {key: rounded([*map(finite, figure)]) for key, figure in figures.items()}
