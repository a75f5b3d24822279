"""Right answers first: the best one of each of J peers' groups, and of own groups as many bad answers as good ones.

**A peer's group.** Its best answer has reward r, and this node's own reward on the task is b
(`node.rollouts.own_results`). The best answer is taken with the advantage

    A = 1                    if r = 1
    A = (r - b) / (1 - b)    if b < r < 1

Nothing is taken if r < 1 is not above b, or if all rewards of the group are equal and not 1. So a right answer counts
1, and a partly right one counts by how far it is above this node's own reward. It is one completion of L: it weighs 1/L
of an own group. Peers' wrong answers are never pushed down: what a peer sends can only be imitated, and only if a
verifier that runs here paid it. This is supervised learning on verified text, and no estimate of a policy gradient.

Groups with differing rewards are drawn first. Where the draw finds none, groups that are all right are drawn, on tasks
on which b < `MASTERED`: they teach whoever is not yet all right. So a flood of easy groups takes no place of others.

Own rewards may be any numbers, and peers' are from 0 to 1. So 0 < A <= 1 also if b is negative, and nothing is taken
if b > 1.

**An own group.** Its advantages A are its rewards less their mean, scaled as the trainer is set. With p completions of
A > 0 and q of A < 0, these are trained on:

    each of the p                                    with A
    k = min(p, q) of the q, drawn uniformly          with A times (the sum of A over the q) / (that over the k)

So the advantages sum to zero, as those of the whole group do, and what is left out costs no training. If rewards are 0
or 1, n of L are right, and m = n / L, a right answer has 1 - m and a wrong one -m (L - n) / k. A group whose rewards
are all equal teaches nothing. Own rewards may lie outside [0, 1]: A follows them.

Source: measured here (docs/results). The asymmetry is that of success-gated transfer in Mutual RL (arXiv 2605.07244).
"""

import random
from collections.abc import Sequence

from node.rollouts.rule import FLAT, Advantages, Candidate, DrawRequest, Pick, Rule, is_right

MASTERED = 0.5  # own reward on a task from which peers' groups that are all right teach it no more


def gain(reward: float, own: float) -> float:
    """Return the advantage of a peer's best answer by the module's formula; 0 if it is not taken."""
    if is_right(reward):
        return 1.0
    return (reward - own) / (1 - own) if reward - own > FLAT else 0.0


def best_of_each(candidates: Sequence[Candidate], request: DrawRequest) -> list[Pick]:
    """Draw groups whose best answer is above this node's own reward, uniformly; take one best answer of each.

    Groups that are all right are drawn where no other is left.
    """
    better = [
        candidate
        for candidate in candidates
        if (own := request.own_reward(candidate.task)) <= 1 and gain(max(candidate.rewards), own) > 0
    ]  # whoever has b > 1 is paid beyond what any peer's answer can be
    mixed = [candidate for candidate in better if candidate.informative]
    easy = [candidate for candidate in better if candidate.all_right and request.own_reward(candidate.task) < MASTERED]
    picks = []
    for candidate in request.choose(mixed) or request.choose(easy):
        index = one_of_the_best(candidate.rewards, request.rng)
        advantage = gain(max(candidate.rewards), request.own_reward(candidate.task))
        picks.append(Pick(candidate.id, index, advantage, 1 / request.completions, (index,)))
    return picks


def one_of_the_best(rewards: Sequence[float], rng: random.Random) -> int:
    """Return the place of one of the highest rewards, drawn uniformly."""
    best = max(rewards)
    return rng.choice([at for at, reward in enumerate(rewards) if reward >= best - FLAT])


def balanced(rewards: Sequence[float], request: DrawRequest) -> Advantages:
    """Return the good completions of an own group and at most as many bad ones, in their order in the group."""
    advantages = request.scale(rewards)
    good = [(index, advantage) for index, advantage in enumerate(advantages) if advantage > 0]
    bad = [(index, advantage) for index, advantage in enumerate(advantages) if advantage < 0]
    drawn = request.rng.sample(bad, min(len(good), len(bad)))
    push = sum(advantage for _, advantage in bad) / sum(advantage for _, advantage in drawn) if drawn else 0.0
    return sorted([*good, *((index, advantage * push) for index, advantage in drawn)])


def one_of_a_group(completions: int) -> float:
    """Return the weight of one completion of a group that has so many."""
    return 1 / completions


RULE = Rule(own=balanced, peers=best_of_each, group_weight=one_of_a_group, easy_below=MASTERED)
