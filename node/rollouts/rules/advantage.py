"""Whole groups without replacement, each in proportion to w, its mean absolute advantage.

The J largest of u**(1/w), u uniform in [0, 1), are such a draw (Efraimidis and Spirakis, 2006).
"""

import statistics
from collections.abc import Sequence

from node.rollouts.sampling import Candidate, Draw, Pick, Rule, picks_of_groups, whole_group


def draw_by_advantage(candidates: Sequence[Candidate], draw: Draw) -> list[Pick]:
    """Draw groups that carry any advantage, those with more of it more often."""
    keyed = []
    for candidate in candidates:
        weight = statistics.fmean(abs(advantage) for advantage in draw.scale(candidate.rewards))
        if weight > 0:
            keyed.append((draw.rng.random() ** (1 / weight), candidate))
    keyed.sort(key=lambda pair: (-pair[0], pair[1].id))
    return picks_of_groups([candidate for _, candidate in keyed[: draw.count]], draw)


RULE = Rule(own=whole_group, peers=draw_by_advantage)
