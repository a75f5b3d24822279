"""Right answers first: peers' as `correct` takes them, and of own groups as many bad answers as good ones, at most.

Of an own group with advantages A (its rewards less their mean, scaled as the trainer is set), in which p completions
have A > 0 and q have A < 0:

    each of the p                                    A, as it is
    k = min(p, q) of the q, drawn uniformly          A times (the sum of all q) / (the sum of the k drawn)

so the advantages sum to zero as those of the whole group do, and what is left out costs no training. Where rewards are
0 or 1, n of L right and m = n / L, that is 1 - m for a right answer and -m (L - n) / k for a wrong one. A group whose
rewards are all equal teaches nothing. Source: measured here (docs/results); the asymmetry is that of success-gated
transfer in Mutual RL (arXiv 2605.07244).
"""

from collections.abc import Sequence

from node.rollouts.rules.correct import one_right_each
from node.rollouts.sampling import Advantages, Draw, Rule


def balanced(rewards: Sequence[float], draw: Draw) -> Advantages:
    """Return the good completions of an own group and at most as many bad ones, in their order."""
    advantages = draw.scale(rewards)
    good = [(index, one) for index, one in enumerate(advantages) if one > 0]
    bad = [(index, one) for index, one in enumerate(advantages) if one < 0]
    drawn = draw.rng.sample(bad, min(len(good), len(bad)))
    push = sum(one for _, one in bad) / sum(one for _, one in drawn) if drawn else 0.0
    return sorted([*good, *((index, one * push) for index, one in drawn)])


RULE = Rule(own=balanced, peers=one_right_each)
