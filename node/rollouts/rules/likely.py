"""Peers' right answers that this policy finds likely: of 2J that `correct` would draw, the J of the largest l.

    l(y) = mean over tokens of log p(y_t | x, y_<t)    under the own policy, nats

Source: ExPO (arXiv 2507.02834): a positive sample teaches when it is likely under the policy that it is to teach. It is
a guard, too: an answer with strange text before it is unlikely. The scores cost a forward pass over the 2J completions.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from node.rollouts.rules.correct import one_right_each
from node.rollouts.sampling import Candidate, Draw, Pick, Rule, whole_group

LOOKED_AT = 2  # times as many as are taken: more would be choosier, and cost more


def likeliest(candidates: Sequence[Candidate], draw: Draw) -> list[Pick]:
    """Draw twice as many right answers as asked for, and keep the likelier half, in the order of the draw."""
    picks = one_right_each(candidates, replace(draw, count=LOOKED_AT * draw.count))
    scores = draw.likelihood([(pick.id, pick.index) for pick in picks])
    known = [at for at, score in enumerate(scores) if not math.isnan(score)]
    kept = set(sorted(known, key=lambda at: (-scores[at], at))[: draw.count])
    return [pick for at, pick in enumerate(picks) if at in kept]


RULE = Rule(own=whole_group, peers=likeliest)
