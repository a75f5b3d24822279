"""Rejection-sampling fine-tuning: one right answer of each group, a peer's or an own one, and nothing is pushed down.

**A peer's group** is taken as `positive` takes it: its best answer, with A = 1 if it is right, at 1/L of a group.

**An own group.** Its best answer has reward r, and the group's mean is m. One of its best answers is taken, with

    A = 1                    if r >= 1
    A = (r - m) / (1 - m)    if r < 1

So an own answer counts as a peer's does, with the group's mean as this node's own reward.

- Graded rewards: a better answer than the group's mean is imitated, by how much better it is.
- Rewards outside [0, 1], which only own groups have: every reward from 1 on counts as right, and 0 < A <= 1 for all.
- All rewards equal: an own group teaches nothing; a peer's that is all right is taken as by `positive`.

This is supervised learning on verified text: with no peers it is no GRPO, but imitation of own right answers.

Source: RFT (arXiv 2308.01825), STaR (arXiv 2203.14465), RAFT (arXiv 2304.06767), here with one answer of each question.
"""

import statistics
from collections.abc import Sequence

from node.rollouts.rule import Advantages, DrawRequest, Rule, is_informative
from node.rollouts.rules.positive import MASTERED, best_of_each, gain, one_of_a_group, one_of_the_best


def one_right(rewards: Sequence[float], request: DrawRequest) -> Advantages:
    """Return one of the best completions of an own group."""
    if not is_informative(rewards):
        return []
    return [(one_of_the_best(rewards, request.rng), gain(max(rewards), statistics.fmean(rewards)))]


RULE = Rule(own=one_right, peers=best_of_each, group_weight=one_of_a_group, easy_below=MASTERED)
