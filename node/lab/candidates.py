"""Candidates for the default rule, as controls: what an own group teaches. Peers' groups teach what they do by default.

With L answers to a question, n of them right, m = n / L, and a group whose rewards are all equal left out:

    sampled       one right answer with n (1 - m), one wrong answer with -(L - n) m: the default's gradient in
                  expectation, from two rows (down-sampled rollouts: PODS, arXiv 2504.13818)
    pair          one right answer with 1, one wrong answer with -1: the same, but every question pulls as hard
    contrast 0.3  one right answer with 1, one wrong answer with -0.3: a baseline below the group's mean
    contrast 0.1  (asymmetric REINFORCE, arXiv 2506.20520)
    light         the default's rows, each with 0.3 of its advantage
    early         as the default in the first two thirds of a node's run, then as `rft`

All are group-relative but for the last third of `early`. Where rewards are graded, a right answer is one of the best,
and counts as in `rft`; a wrong one is one that is below the group's mean.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from node.rollouts.rule import Advantages, DrawRequest, Rule
from node.rollouts.rules import positive, rft

PartDone = Callable[[], float]
"""Tells which part of its run a node has done."""
Control = Callable[[PartDone], Rule]

LATE = 2 / 3  # of a run, from which on `early` pushes nothing down


def contrast(weight: float) -> Control:
    """Return the rule that pulls one of a group's best answers up, and pushes one bad answer down `weight` as hard."""

    def own(rewards: Sequence[float], request: DrawRequest) -> Advantages:
        best = rft.one_right(rewards, request)
        return sorted([*best, *((_one_below(rewards, request), -weight * advantage) for _, advantage in best)])

    return lambda part: replace(positive.RULE, own=own)


def sampled(rewards: Sequence[float], request: DrawRequest) -> Advantages:
    """Return one good answer with the advantages of all good ones, and one bad answer with those of all bad ones."""
    advantages = list(enumerate(request.scale(rewards)))
    sides = [[row for row in advantages if row[1] > 0], [row for row in advantages if row[1] < 0]]
    return sorted((request.rng.choice(side)[0], sum(advantage for _, advantage in side)) for side in sides if side)


def light(rewards: Sequence[float], request: DrawRequest) -> Advantages:
    """Return the default's rows with less weight."""
    return [(index, 0.3 * advantage) for index, advantage in positive.balanced(rewards, request)]


def early(part: PartDone) -> Rule:
    """Return the rule that pushes answers down in the first two thirds of a run only."""

    def own(rewards: Sequence[float], request: DrawRequest) -> Advantages:
        return (positive.balanced if part() < LATE else rft.one_right)(rewards, request)

    return replace(positive.RULE, own=own)


def _one_below(rewards: Sequence[float], request: DrawRequest) -> int:
    below = [index for index, advantage in enumerate(request.scale(rewards)) if advantage < 0]
    return request.rng.choice(below)


CANDIDATES: Mapping[str, Control] = {
    "sampled": lambda part: replace(positive.RULE, own=sampled),
    "pair": contrast(1.0),
    "contrast 0.3": contrast(0.3),
    "contrast 0.1": contrast(0.1),
    "light": lambda part: replace(positive.RULE, own=light),
    "early": early,
}
