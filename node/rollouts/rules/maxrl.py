"""Own groups by MaxRL's advantage, peers' right answers as `correct` takes them.

    A_i = (r_i - m) / m,    m the group's mean reward; 0 for all where m = 0

Divided by the mean, a rare success pulls as hard as many common ones together: in expectation the gradient is that of
the log of the pass rate, to the order that L completions can see, where the plain advantage has that of the pass rate.
Source: MaxRL (arXiv 2602.02710), which finds better pass@k. `trainer.scale_rewards` is of no matter to own groups here.
"""

import statistics
from collections.abc import Sequence

from node.rollouts.rules.correct import one_right_each
from node.rollouts.sampling import Advantages, Draw, Rule, is_informative


def over_mean(rewards: Sequence[float], draw: Draw) -> Advantages:
    """Return every completion with its advantage over the mean."""
    mean = statistics.fmean(rewards)
    if mean <= 0 or not is_informative(rewards):
        return [(index, 0.0) for index in range(len(rewards))]
    return [(index, (reward - mean) / mean) for index, reward in enumerate(rewards)]


RULE = Rule(own=over_mean, peers=one_right_each)
