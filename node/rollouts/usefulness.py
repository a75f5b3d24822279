"""How useful each peer has been, as measured here, and a draw that follows it and keeps exploring. Pure.

A node that is asked to (`sampling.probe`) keeps a few questions that no training can meet, with their right answers,
and measures their mean log-probability s_t under its policy before each round's update. A round's gain is
g_t = s_t+1 - s_t, in nats a token. A peer's usefulness is the mean gain of the rounds that trained on it, each weighted
by the share p_ti of the round's pull that was the peer's:

    u_i = sum_t p_ti g_t / n_i,    n_i = sum_t p_ti,    with deviation  d_i = d / sqrt(n_i + 1)

where d is the deviation of all gains. A draw picks each of its groups so (Thompson, 1933): for every peer that has one
left a number is drawn from N(u_i, d_i), the peer with the largest is chosen, and one of its groups uniformly. Where the
largest is below 0, nobody is thought to teach, and the draw ends: none is better than what harms. A peer
that is not known has the mean of all, and the widest deviation; peers that cannot be told apart are drawn equally
often, however much each of them sends. Nothing of it is a peer's to claim: it can only answer well or badly.
"""

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from node.rollouts.sampling import Candidate

KEPT = 256  # rounds that are remembered: what a peer was worth long ago says little of it now


class Lesson(NamedTuple):
    """A round: the probe's score before it (nats a token), and what share of its pull each peer had."""

    score: float
    pulls: Mapping[str, float]


class Worth(NamedTuple):
    """A peer's usefulness (nats a token and round), its deviation, and how many rounds' worth of pull it comes from."""

    mean: float
    deviation: float
    rounds: float


def worths(lessons: Sequence[Lesson], score: float) -> dict[str, Worth]:
    """Return the usefulness of each peer in `lessons`, consecutive rounds after which the probe stands at `score`.

    Under the name "" is that of a peer that is not known.
    """
    scores = [one.score for one in lessons] + [score]
    gains = [after - before for before, after in pairwise(scores)]
    mean = statistics.fmean(gains) if gains else 0.0
    deviation = statistics.pstdev(gains) if gains else 0.0
    shares: dict[str, float] = {}
    sums: dict[str, float] = {}
    for lesson, gain in zip(lessons, gains, strict=True):
        for peer, share in lesson.pulls.items():
            shares[peer] = shares.get(peer, 0.0) + share
            sums[peer] = sums.get(peer, 0.0) + share * gain
    known = {
        peer: Worth(sums[peer] / share, deviation / math.sqrt(share + 1), share)
        for peer, share in shares.items()
        if share > 0
    }
    return known | {"": Worth(mean, deviation, 0.0)}


def choose_by_worth(
    candidates: Sequence[Candidate], count: int, known: Mapping[str, Worth], rng: random.Random
) -> list[Candidate]:
    """Return at most `count` candidates, without replacement: each of a peer that is drawn by its usefulness."""
    left: dict[str, list[Candidate]] = {}
    for one in candidates:
        left.setdefault(one.peer, []).append(one)
    chosen: list[Candidate] = []
    while left and len(chosen) < count:
        drawn = {peer: rng.gauss(*known.get(peer, known[""])[:2]) for peer in left}
        peer = max(left, key=lambda peer: (drawn[peer], rng.random()))
        if drawn[peer] < 0:
            break
        mine = left[peer]
        chosen.append(mine.pop(rng.randrange(len(mine))))
        if not mine:
            del left[peer]
    return chosen
