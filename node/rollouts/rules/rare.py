"""The default whose peers' answers count by how rare such answers are here.

**A peer's group.** Its best answer has reward r, and this node's own reward on the task is b
(`node.rollouts.own_results`), at least 0 and at most 1. The best answer is taken, at 1/L of a group, with

    A = r - b    if that is above 0

So a right answer counts 1 while this node has none right, a half when half of its own are right, and nothing once all
are. `positive` counts it 1 at all times. A is what a policy gradient with the baseline b would give the answer.

**An own group** is trained on as by `positive`.

- Graded rewards: the same formula.
- Unbounded rewards, which only own groups have: b is cut to [0, 1], so 0 < A <= 1 for a peer's answer.
- All rewards equal: an own group teaches nothing; a peer's that is all right is drawn where `positive` draws it.

Source: measured here. The baseline is that of REINFORCE; MaxRL (arXiv 2602.02710) also raises what is rarely right.
"""

from collections.abc import Sequence

from node.rollouts.rule import FLAT, Candidate, DrawRequest, Pick, Rule
from node.rollouts.rules.positive import MASTERED, balanced, best_of_each, one_of_a_group


def gain_by_rarity(reward: float, own: float) -> float:
    """Return the advantage of a peer's best answer by the module's formula; 0 if it is not taken."""
    above = reward - min(max(own, 0.0), 1.0)
    return above if above > FLAT else 0.0


def best_of_each_by_rarity(candidates: Sequence[Candidate], request: DrawRequest) -> list[Pick]:
    """Draw groups whose best answer is above this node's own reward, uniformly; take one best answer of each."""
    return best_of_each(candidates, request, gain_by_rarity)


RULE = Rule(own=balanced, peers=best_of_each_by_rarity, group_weight=one_of_a_group, easy_below=MASTERED)
