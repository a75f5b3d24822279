"""What an attack did: how often honest nodes came to do what it wanted, and what they lost by it.

While a run goes on, `Witness` looks at every completion that an honest node makes, and counts which attack's marks it
shows; a run without an attack has these counts too, and is the control.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from node.lab.attacks import ATTACKS
from node.rollouts.group import Group
from node.tasks import TaskSet
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
            for kind, attack in ATTACKS.items():
                self._shown[kind][round_number] += sum(attack.shows(one.text, item) for one in group.completions)

    def write(self, folder: Path, honest: int) -> None:
        """Leave the counts in a run's folder, of which the first `honest` nodes are."""
        rounds = range(1, max(self._made, default=0) + 1)
        tree = {
            "honest": honest,
            "made": [self._made[at] for at in rounds],
            "shown": {kind: [counts[at] for at in rounds] for kind, counts in self._shown.items()},
        }
        write_atomically(folder / FILE, (json.dumps(tree) + "\n").encode())


class Seen(NamedTuple):
    """What a run's witness left: how many nodes were honest, completions by round, and of these those with marks."""

    honest: int
    made: Sequence[int]
    shown: dict[str, Sequence[int]]

    def share(self, kind: str, last: int) -> float:
        """Return which part of the completions of the `last` rounds shows the marks of `kind`."""
        made = sum(self.made[-last:])
        return sum(self.shown[kind][-last:]) / made if made else 0.0


def read_seen(folder: Path) -> Seen:
    """Return what the witness of a run left."""
    return Seen(**json.loads((folder / FILE).read_text()))
