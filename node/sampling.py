"""What a round trains on: pure functions from groups to weighted completions.

A rule sees candidates and returns `Sample`s, single completions with an advantage
each, so a rule may take whole groups, as the paper does, or pick among completions.
Algorithm 1 of "Sharing is Caring" (arXiv 2509.08721): advantages belong to the whole
group; external groups without any are dropped, then drawn uniformly.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from node.rollout import Group


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion to train on: `group.completions[index]`, weighted by `advantage`."""

    group: Group
    index: int
    advantage: float
    external: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """A peer's verified group in the pool: its id, who signed it, its age in seconds."""

    id: bytes
    peer: str
    age: float
    group: Group


Rule = Callable[[Sequence[Candidate], int, random.Random], list[Candidate]]
