"""Right answers first: peers' as `correct` takes them, and of own groups as many wrong answers as right ones, at most.

Of an own group of L completions, n of them right and 0 < n < L, with m = n / L:

    each right one           A = 1 - m
    k = min(n, L - n) wrong ones, drawn uniformly       A = -m (L - n) / k

so the advantages sum to zero as those of the whole group do, and the wrong ones that are left out cost no training.
A group in which all or none are right teaches nothing. Source: measured here (docs/results); the asymmetry is that of
success-gated transfer in Mutual RL (arXiv 2605.07244).
"""

from collections.abc import Sequence

from node.rollouts.rules.correct import one_right_each
from node.rollouts.sampling import RIGHT, Advantages, Draw, Rule


def balanced(rewards: Sequence[float], draw: Draw) -> Advantages:
    """Return the right completions of an own group and at most as many wrong ones, in their order."""
    right = [index for index, reward in enumerate(rewards) if reward >= RIGHT]
    wrong = [index for index, reward in enumerate(rewards) if reward < RIGHT]
    if not right or not wrong:
        return []
    mean = len(right) / len(rewards)
    drawn = draw.rng.sample(wrong, min(len(right), len(wrong)))
    push = -mean * len(wrong) / len(drawn)
    return sorted([(index, 1 - mean) for index in right] + [(index, push) for index in drawn])


RULE = Rule(own=balanced, peers=one_right_each)
