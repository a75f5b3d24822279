"""The paper's rule without its filter: J groups, drawn uniformly without replacement from all.

Groups whose rewards are all equal have no advantage and teach nothing: this is the control that tells what the filter
is worth. Peers must send such groups for it (`network.share = "all"`).
"""

from collections.abc import Sequence

from node.rollouts.sampling import Candidate, Draw, Pick, Rule, picks_of_groups, whole_group


def draw_any(candidates: Sequence[Candidate], draw: Draw) -> list[Pick]:
    """Draw groups uniformly without replacement, those without advantage too."""
    return picks_of_groups(draw.choose(candidates, draw.count), draw)


RULE = Rule(own=whole_group, peers=draw_any)
