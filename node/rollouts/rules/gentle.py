"""The default with a weaker push: a bad answer of an own group counts as itself, not for those that are left out.

**A peer's group** is taken as `positive` takes it.

**An own group.** Its advantages A are its rewards less their mean, scaled as the trainer is set. With p completions of
A > 0 and q of A < 0, these are trained on, each with its own A:

    all of the p, and min(p, q) of the q, drawn uniformly

If rewards are 0 or 1, n of L are right, and m = n / L, the pushes up sum to n (1 - m), and those down to
min(n, L - n) m. `positive` makes the two sums equal, whatever n is. Here the push down is n / (L - n) of the push up
as long as no more answers are right than wrong: a seventh for one right answer of eight, as much for four of eight.

- Graded rewards: as above, with m the mean reward.
- Unbounded rewards, which only own groups have: A follows them, as in GRPO. `trainer.trl.scale_rewards` bounds it.
- All rewards equal: an own group teaches nothing; a peer's that is all right is taken as by `positive`.

Source: measured here; it lies between `positive` and `rft`. Good samples alone raise pass@1 and cost diversity, and bad
ones alone keep it (arXiv 2506.01347).
"""

from collections.abc import Sequence

from node.rollouts.rule import Advantages, DrawRequest, Rule
from node.rollouts.rules.positive import MASTERED, best_of_each, good_and_as_many_bad, one_of_a_group


def unscaled(rewards: Sequence[float], request: DrawRequest) -> Advantages:
    """Return the good completions of an own group and at most as many bad ones, in their order in the group."""
    good, _, drawn = good_and_as_many_bad(rewards, request)
    return sorted([*good, *drawn])


RULE = Rule(own=unscaled, peers=best_of_each, group_weight=one_of_a_group, easy_below=MASTERED)
