"""Right answers first: the best one of each of J peers' groups, and of own groups as many bad answers as good ones.

**Of a peer's group** with best reward r, where this node gets b itself on the task (the mean of its last groups):

    A = (r - b) / (1 - b)  where b < r < 1,  1  where r = 1

and nothing where r is not above b, or all rewards of the group are equal. So a right answer counts 1, and one that
earns a part counts by how far it is above this node's own. It is one completion of L: it weighs 1/L of an own group.
Peers' wrong answers are never pushed down: what a peer sends can only be imitated, and only where a verifier that runs
here paid it. This is supervised learning on verified text, and no estimate of a policy gradient.

**Of an own group** with advantages A (its rewards less their mean, scaled as the trainer is set), in which p
completions have A > 0 and q have A < 0:

    each of the p                                    A, as it is
    k = min(p, q) of the q, drawn uniformly          A times (the sum of all q) / (the sum of the k drawn)

so the advantages sum to zero as those of the whole group do, and what is left out costs no training. Where rewards are
0 or 1, n of L right and m = n / L, that is 1 - m for a right answer and -m (L - n) / k for a wrong one. A group whose
rewards are all equal teaches nothing.

Source: measured here (docs/results). The asymmetry is that of success-gated transfer in Mutual RL (arXiv 2605.07244).
"""

from collections.abc import Sequence

from node.rollouts.sampling import FLAT, RIGHT, Advantages, Candidate, Draw, Pick, Rule


def best_of_each(candidates: Sequence[Candidate], draw: Draw) -> list[Pick]:
    """Draw groups whose best answer is above this node's own, uniformly; take one of the best ones of each."""
    better = [one for one in candidates if one.informative and gain(max(one.rewards), draw.own_reward(one.task)) > 0]
    picks = []
    for candidate in draw.choose(better):
        best = max(candidate.rewards)
        index = draw.rng.choice([at for at, reward in enumerate(candidate.rewards) if reward >= best - FLAT])
        advantage = gain(best, draw.own_reward(candidate.task))
        picks.append(Pick(candidate.id, index, advantage, 1 / draw.completions, (index,)))
    return picks


def gain(reward: float, own: float) -> float:
    """Return how far a reward is above this node's own, 1 for a right answer; 0 where it is not above it."""
    if reward >= RIGHT - FLAT:
        return 1.0
    return (reward - own) / (1 - own) if reward - own > FLAT else 0.0


def balanced(rewards: Sequence[float], draw: Draw) -> Advantages:
    """Return the good completions of an own group and at most as many bad ones, in their order."""
    advantages = draw.scale(rewards)
    good = [(index, one) for index, one in enumerate(advantages) if one > 0]
    bad = [(index, one) for index, one in enumerate(advantages) if one < 0]
    drawn = draw.rng.sample(bad, min(len(good), len(bad)))
    push = sum(one for _, one in bad) / sum(one for _, one in drawn) if drawn else 0.0
    return sorted([*good, *((index, one * push) for index, one in drawn)])


RULE = Rule(own=balanced, peers=best_of_each, group_weight=lambda completions: 1 / completions)
