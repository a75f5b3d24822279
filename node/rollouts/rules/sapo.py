"""The paper's rule: Algorithm 1 of "Sharing is Caring" (arXiv 2509.08721).

Advantages belong to the whole group, A_i = r_i - mean(r). External groups without any are dropped, and J of the rest
are drawn uniformly without replacement, whole. Own groups are trained on whole.
"""

from collections.abc import Sequence

from node.rollouts.rule import Candidate, DrawRequest, Pick, Rule, picks_of_groups, whole_group


def draw_informative(candidates: Sequence[Candidate], request: DrawRequest) -> list[Pick]:
    """Drop groups without advantage, then draw groups uniformly without replacement."""
    return picks_of_groups(request.choose([candidate for candidate in candidates if candidate.informative]), request)


RULE = Rule(own=whole_group, peers=draw_informative, group_weight=lambda completions: 1.0)
