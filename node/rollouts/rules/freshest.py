"""The J youngest whole groups that carry any advantage: the least stale draw there is."""

from collections.abc import Sequence

from node.rollouts.sampling import Candidate, Draw, Pick, Rule, picks_of_groups, whole_group


def take_youngest(candidates: Sequence[Candidate], draw: Draw) -> list[Pick]:
    """Take the youngest groups that carry any advantage; of those that came at once, the lesser ids."""
    informative = sorted((c for c in candidates if c.informative), key=lambda c: (-c.received, c.id))
    return picks_of_groups(informative[: draw.count], draw)


RULE = Rule(own=whole_group, peers=take_youngest)
