"""Peers' right answers only: one wholly rewarded completion, at advantage 1, from each of J informative groups.

Not the paper's rule, but an alternative to it: peers' wrong answers are never pushed down, so what a peer sends can
only be imitated, and only where a verifier that runs here paid it in full. Each counts as one completion of an own
group, 1/L. Own groups are trained on whole.
"""

from collections.abc import Sequence

from node.rollouts.sampling import RIGHT, Candidate, Draw, Pick, Rule, whole_group


def one_right_each(candidates: Sequence[Candidate], draw: Draw) -> list[Pick]:
    """Draw groups that have right and other answers uniformly; take one of the right ones of each."""
    solved = [c for c in candidates if c.informative and max(c.rewards) >= RIGHT]
    picks = []
    for candidate in draw.choose(solved, draw.count):
        best = [index for index, reward in enumerate(candidate.rewards) if reward >= RIGHT]
        picks.append(Pick(candidate.id, draw.rng.choice(best), 1.0, 1 / draw.completions))
    return picks


RULE = Rule(own=whole_group, peers=one_right_each)
