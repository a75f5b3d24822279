"""The results of this node's own recent groups: how long its answers are, and how good. Pure.

Peers' answers are measured by them. A peer changes them only by what it teaches.

**Length.** A right answer may be padded: repeated, or argued for at any length, and every verifier pays it. So a peer's
completion is compared with the node's own completions, in tokens of its own tokenizer. The usual length of an answer to
a task is the first of these that there is:

    1. over this node's groups of the task, the median of the median length of their right completions
    2. over the same groups, the median of the median length of all their completions
    3. 1, or else 2, over this node's groups of all tasks

**Reward.** This node's own reward on a task is the mean reward of its last `RECENT` groups of the task, and 0 if it has
none.
"""

import statistics
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

from node.rollouts.rule import is_right

KEPT = 256  # rounds that are remembered
RECENT = 32  # groups of a task whose rewards are averaged: older ones say little of a policy that learns


class OwnResult(NamedTuple):
    """The result of a group that this node made.

    Its task, the median length in tokens of its right completions (None if it has none) and of all, its mean reward.
    """

    task: str
    right_length: float | None
    length: float
    reward: float


def own_result(task: str, lengths: Sequence[int], rewards: Sequence[float]) -> OwnResult:
    """Return the result of a group whose completions have these lengths in tokens and these rewards."""
    right = [length for length, reward in zip(lengths, rewards, strict=True) if is_right(reward)]
    usual = statistics.median(right) if right else None
    return OwnResult(task, usual, statistics.median(lengths), statistics.fmean(rewards))


class OwnResults:
    """The results of the last `KEPT` rounds.

    Each task's lengths are kept sorted: a round changes a few of a thousand and asks for medians often.
    """

    def __init__(self) -> None:
        self._rounds: dict[int, Sequence[OwnResult]] = {}
        self._right: defaultdict[str, list[float]] = defaultdict(list)
        self._made: defaultdict[str, list[float]] = defaultdict(list)
        self._rewards: dict[str, float] = {}  # by task: what `reward` has returned since the last `put`

    def __iter__(self) -> Iterator[OwnResult]:
        return chain.from_iterable(self._rounds.values())

    def put(self, round_number: int, results: Sequence[OwnResult]) -> list[int]:
        """Set the results of a round; return the rounds whose earlier results are forgotten."""
        last = round_number - KEPT
        gone = [number for number in self._rounds if number == round_number or number <= last]
        for result in chain.from_iterable(map(self._rounds.pop, gone)):
            for values, length in self._of(result):
                del values[bisect_left(values, length)]
        self._rounds[round_number] = results
        self._rewards.clear()
        for result in results:
            for values, length in self._of(result):
                insort(values, length)
        return gone

    def usual_length(self, task: str) -> float:
        """Return the usual length of an answer to `task`, in tokens; 0 while this node has no group of its own."""
        if self._made[task]:
            lengths = self._right[task] or self._made[task]
        else:
            lengths = [*chain(*self._right.values())] or [*chain(*self._made.values())]
        return statistics.median(lengths) if lengths else 0.0

    def reward(self, task: str) -> float:
        """Return this node's own reward on `task`; 0 while it has no group of it."""
        if task not in self._rewards:
            newest = chain.from_iterable(map(reversed, reversed(self._rounds.values())))
            rewards = list(islice((result.reward for result in newest if result.task == task), RECENT))
            self._rewards[task] = statistics.fmean(rewards) if rewards else 0.0
        return self._rewards[task]

    def _of(self, result: OwnResult) -> Iterator[tuple[list[float], float]]:
        yield self._made[result.task], result.length
        if result.right_length is not None:
            yield self._right[result.task], result.right_length
