"""Churn: when nodes of a run leave and come back, as a function of its seed.

Each node is an alternating renewal process of its own, as peers that come and go are usually modelled (Yao, Leonard,
Wang and Loguinov, "Modeling Heterogeneous User Churn and Local Resilience of Unstructured P2P Networks", ICNP 2006): it
is present for a stretch, then away for one, and so on. With a = `churn.away` and r = `churn.rounds`, lengths are
geometric:

    away       r rounds in the mean, which the others do meanwhile
    present    r (1 - a) / a rounds of its own in the mean, so that it is away for the part a of the time
    at first   away with probability a, as at any other moment: such a node joins late

Both runners follow one schedule. In memory a node leaves right after the round; a process is killed when its supervisor
sees that the round is done, some rounds later where they are short, and goes on from its newest checkpoint. Rounds that
it does again count once in what it has spent. A process also takes seconds to start, in which the others go on.
"""

import math
import random
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from node.fleet.supervisor import NodeProcess, NodeState
from node.lab.plan import ChurnConfig
from node.tasks import derive_seed
from node.training.budget import is_done

ENDED = (NodeState.DONE, NodeState.STOPPED, NodeState.FAILED)


class Stretch(NamedTuple):
    """How many of its own rounds a node stays, 0 only if it joins late, and how many rounds it is then away."""

    present: int
    away: int


def stretches(churn: ChurnConfig, seed: int, index: int) -> Iterator[Stretch]:
    """Yield the stretches of node `index` under a run's seed, without end."""
    rng = random.Random(derive_seed(seed, "churn", index))
    present = 0 if rng.random() < churn.away else _geometric(rng, churn.present)
    while True:
        yield Stretch(present, _geometric(rng, churn.rounds))
        present = _geometric(rng, churn.present)


def _geometric(rng: random.Random, mean: float) -> int:
    """Return a draw from the geometric distribution on 1, 2, ... with this mean, which is memoryless."""
    return 1 if mean <= 1 else 1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / mean))


class Departures:
    """When one node leaves, and for how long."""

    def __init__(self, schedule: Iterator[Stretch]) -> None:
        self._schedule = schedule
        self._next = next(schedule)
        self._at = self._next.present

    def due(self, rounds: int) -> int:
        """Return for how long a node leaves that has done `rounds` rounds of its own; 0: it stays."""
        if rounds < self._at:
            return 0
        away = self._next.away
        while self._at <= rounds:
            self._next = next(self._schedule)
            self._at += self._next.present
        return away


class Attendance:
    """Says which nodes are away in a swarm whose nodes each go at their own speed.

    Time is counted in rounds that the fastest node present has done, without those that it does again from a
    checkpoint. If nobody is there to do one, the first node to come back does so at once.
    """

    def __init__(self, departures: Sequence[Departures]) -> None:
        self._departures = departures
        self._most = [0] * len(departures)  # rounds that each node was ever at
        self._now = 0
        self._back: dict[int, int] = {}  # when each node that is away comes back

    def away(self, rounds: Sequence[int], ended: Collection[int] = ()) -> Collection[int]:
        """Return the nodes that are to be away now.

        Args:
            rounds: that each node has done.
            ended: nodes that have nothing left to do.
        """
        present = [at for at in range(len(rounds)) if at not in self._back and at not in ended]
        self._now += max((rounds[at] - self._most[at] for at in present if rounds[at] > self._most[at]), default=0)
        self._most = list(map(max, self._most, rounds))
        for at in present:
            if away := self._departures[at].due(rounds[at]):
                self._back[at] = self._now + away
        self._back = {at: back for at, back in self._back.items() if at not in ended}
        if self._back and all(at in self._back or at in ended for at in range(len(rounds))):
            self._now = max(self._now, min(self._back.values()))
        self._back = {at: back for at, back in self._back.items() if back > self._now}
        return self._back.keys()

    def among(self, children: Sequence[NodeProcess]) -> Collection[str]:
        """Return the names of those node processes that are to be away now."""
        ended = [
            at
            for at, child in enumerate(children)
            if child.state in ENDED or is_done(child.config, child.progress.round, child.progress.spent)
        ]
        away = self.away([child.progress.round for child in children], ended)
        return {children[at].name for at in away}


def attendance(churn: ChurnConfig, seed: int, nodes: int) -> Attendance:
    """Return who is away, and when, in a run of so many nodes."""
    return Attendance([Departures(stretches(churn, seed, index)) for index in range(nodes)])
