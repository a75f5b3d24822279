"""Peers' right answers where this node fails: `correct`, from tasks that its own answers of the round all got wrong.

A task counts as failed in a round that asked it and in which no own completion of it was wholly right; of the others,
those that were not asked too, nothing is drawn. Source: success-gated transfer of Mutual RL (arXiv 2605.07244), where
peers answer the same prompts. Here every node asks its own, so the gate is the task, not the prompt.
"""

from collections.abc import Sequence

from node.rollouts.rules.correct import one_right_each
from node.rollouts.sampling import RIGHT, Candidate, Draw, Pick, Rule, whole_group


def where_own_failed(candidates: Sequence[Candidate], draw: Draw) -> list[Pick]:
    """Draw as `correct` does, from the tasks that all of the round's own completions failed."""
    solved = {one.task for one in draw.own if max(one.rewards) >= RIGHT}
    failed = {one.task for one in draw.own} - solved
    return one_right_each([one for one in candidates if one.task in failed], draw)


RULE = Rule(own=whole_group, peers=where_own_failed)
