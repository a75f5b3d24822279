"""How long an answer is here: what bounds the length of peers' answers. Pure.

A right answer may be padded: said again and again, or argued for at any length, and every verifier pays it. A peer's
completion is compared with the node's own, in tokens of its own tokenizer:

    usual = median over this node's groups of the task of the median length of their right completions,
            where it has none of these, of all its completions of the task, and where it has none, of all tasks

No peer's answer is in it, so no peer moves it but by what it teaches.
"""

import statistics
from collections.abc import Sequence
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


def usual_length(own: Sequence[OwnLength], task: str) -> float:
    """Return how many tokens an answer to `task` has here, by the node's own groups, of which there is one at least."""
    of_task = [one for one in own if one.task == task] or own
    return statistics.median([one.right for one in of_task if one.right is not None] or [one.made for one in of_task])
