"""How long an answer is here: what bounds the length of peers' answers. Pure.

A right answer may be padded: said again and again, or argued for at any length, and every verifier pays it. A peer's
completion is compared with the node's own, in tokens of its own tokenizer:

    usual = median over this node's groups of the task of the median length of their right completions,
            where it has none of these, of all its completions of the task, and where it has none, of all tasks

No peer's answer is in it, so no peer moves it but by what it teaches.
"""

import statistics
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from node.rollouts.sampling import RIGHT

KEPT = 256  # rounds that are remembered


class OwnLength(NamedTuple):
    """Of a group that this node made: its task, and the median tokens of its right completions, if any, and of all."""

    task: str
    right: float | None
    made: float


def own_length(task: str, lengths: Sequence[int], rewards: Sequence[float]) -> OwnLength:
    """Return the lengths of a group whose completions have so many tokens and these rewards."""
    right = [length for length, reward in zip(lengths, rewards, strict=True) if reward >= RIGHT]
    return OwnLength(task, statistics.median(right) if right else None, statistics.median(lengths))


class OwnLengths:
    """Those of the last `KEPT` rounds, by task in their order: a round changes a few of a thousand and asks often."""

    def __init__(self) -> None:
        self._rounds: dict[int, Sequence[OwnLength]] = {}
        self._right: defaultdict[str, list[float]] = defaultdict(list)
        self._made: defaultdict[str, list[float]] = defaultdict(list)

    def __iter__(self) -> Iterator[OwnLength]:
        return chain.from_iterable(self._rounds.values())

    def put(self, round_number: int, lengths: Sequence[OwnLength]) -> list[int]:
        """Take those of a round, in place of what it had; return the rounds of which others are forgotten."""
        last = round_number - KEPT
        gone = [number for number in self._rounds if number == round_number or number <= last]
        for one in chain.from_iterable(map(self._rounds.pop, gone)):
            for values, length in self._of(one):
                del values[bisect_left(values, length)]
        self._rounds[round_number] = lengths
        for one in lengths:
            for values, length in self._of(one):
                insort(values, length)
        return gone

    def usual(self, task: str) -> float:
        """Return how many tokens an answer to `task` has here; 0 while there is no group of the node's own."""
        if self._made[task]:
            found = self._right[task] or self._made[task]
        else:
            found = [*chain(*self._right.values())] or [*chain(*self._made.values())]
        return statistics.median(found) if found else 0.0

    def _of(self, one: OwnLength) -> Iterator[tuple[list[float], float]]:
        yield self._made[one.task], one.made
        if one.right is not None:
            yield self._right[one.task], one.right
