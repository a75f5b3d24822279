"""What this node's own groups came to of late: how long its answers are, and how good. Pure.

Peers' answers are measured by it, and no peer moves it but by what it teaches.

**Length.** A right answer may be padded: said again and again, or argued for at any length, and every verifier pays it.
A peer's completion is compared with the node's own, in tokens of its own tokenizer:

    usual = median over this node's groups of the task of the median length of their right completions,
            where it has none of these, of all its completions of the task, and where it has none, of all tasks

**Reward.** What the node gets itself on a task is the mean reward of its last `RECENT` groups of the task, and 0 where
it has none.
"""

import statistics
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

from node.rollouts.sampling import RIGHT

KEPT = 256  # rounds that are remembered
RECENT = 32  # groups of a task whose rewards are averaged: a policy that learns gets better from round to round


class OwnResult(NamedTuple):
    """Of a group that this node made.

    Its task, the median tokens of its right completions, if any, and of all, and its mean reward.
    """

    task: str
    right_length: float | None
    length: float
    reward: float


def own_result(task: str, lengths: Sequence[int], rewards: Sequence[float]) -> OwnResult:
    """Return what a group came to whose completions have so many tokens and these rewards."""
    right = [length for length, reward in zip(lengths, rewards, strict=True) if reward >= RIGHT]
    usual = statistics.median(right) if right else None
    return OwnResult(task, usual, statistics.median(lengths), statistics.fmean(rewards))


class OwnResults:
    """Those of the last `KEPT` rounds, by task in their order: a round changes a few of a thousand and asks often."""

    def __init__(self) -> None:
        self._rounds: dict[int, Sequence[OwnResult]] = {}
        self._right: defaultdict[str, list[float]] = defaultdict(list)
        self._made: defaultdict[str, list[float]] = defaultdict(list)
        self._rewards: dict[str, float] = {}  # by task, as far as they were asked for since the last round

    def __iter__(self) -> Iterator[OwnResult]:
        return chain.from_iterable(self._rounds.values())

    def put(self, round_number: int, results: Sequence[OwnResult]) -> list[int]:
        """Take those of a round, in place of what it had; return the rounds of which others are forgotten."""
        last = round_number - KEPT
        gone = [number for number in self._rounds if number == round_number or number <= last]
        for one in chain.from_iterable(map(self._rounds.pop, gone)):
            for values, length in self._of(one):
                del values[bisect_left(values, length)]
        self._rounds[round_number] = results
        self._rewards.clear()
        for one in results:
            for values, length in self._of(one):
                insort(values, length)
        return gone

    def usual_length(self, task: str) -> float:
        """Return how many tokens an answer to `task` has here; 0 while there is no group of the node's own."""
        if self._made[task]:
            found = self._right[task] or self._made[task]
        else:
            found = [*chain(*self._right.values())] or [*chain(*self._made.values())]
        return statistics.median(found) if found else 0.0

    def reward(self, task: str) -> float:
        """Return the mean reward that this node gets on `task`; 0 where it has not answered it yet."""
        if task not in self._rewards:
            newest = chain.from_iterable(map(reversed, reversed(self._rounds.values())))
            found = list(islice((one.reward for one in newest if one.task == task), RECENT))
            self._rewards[task] = statistics.fmean(found) if found else 0.0
        return self._rewards[task]

    def _of(self, one: OwnResult) -> Iterator[tuple[list[float], float]]:
        yield self._made[one.task], one.length
        if one.right_length is not None:
            yield self._right[one.task], one.right_length
