"""Peers' right answers as `correct` draws them, each weighted by how likely it is here beside what is said here.

    w(y) = min(1, max(1 - d, exp(l(y) - L))),    d = 0.8

l(y) is the mean log-probability of the answer under the own policy, nats a token, L its mean over the first completion
of each of the round's own groups. The ratio is one-sided: it takes weight from what is far from this policy and gives
none to anything. Source: HACPO (arXiv 2603.02604), whose ratio has the source's own log-probability in the place of L.
That would be the peer's to claim; L is measured here, so no peer gains by a lie. Left out: its capability ratio, since
every group counts the same here, and the bound's drift with the step.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from node.rollouts.rules.correct import one_right_each
from node.rollouts.sampling import Candidate, Draw, Pick, Rule, whole_group

DEPTH = 0.8  # d: the least weight is 1 - d


def weighted_by_likelihood(candidates: Sequence[Candidate], draw: Draw) -> list[Pick]:
    """Draw as `correct` does; an answer that has no likelihood here is left out."""
    picks = one_right_each(candidates, draw)
    scores = draw.likelihood([(one.id, 0) for one in draw.own] + [(pick.id, pick.index) for pick in picks])
    own = [score for score in scores[: len(draw.own)] if not math.isnan(score)]
    usual = sum(own) / len(own) if own else 0.0
    return [
        replace(pick, weight=pick.weight * one_sided(score - usual))
        for pick, score in zip(picks, scores[len(draw.own) :], strict=True)
        if not math.isnan(score)
    ]


def one_sided(difference: float) -> float:
    """Return the factor of a weight for a difference of log-probabilities, in [1 - d, 1]."""
    return max(1 - DEPTH, math.exp(min(difference, 0.0)))


RULE = Rule(own=whole_group, peers=weighted_by_likelihood)
