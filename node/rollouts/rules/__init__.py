"""The rules by which a node shares, one a file; `sampling.rule` names one.

    sapo        the paper's: whole informative groups, drawn uniformly
    positive    the best completion of each of many groups; of own groups no more bad completions than good ones

To add one: a file that opens with its formula and its source and ends with a `RULE`, and a line in `RULES` and here.
Others were measured, were not ahead, and are gone: see docs/sharing.md.
"""

from collections.abc import Mapping

from node.rollouts.rules import positive, sapo
from node.rollouts.sampling import Rule

RULES: Mapping[str, Rule] = {"sapo": sapo.RULE, "positive": positive.RULE}


def configured_weight(rule: str, local: int, external: int, completions: int, external_weight: float) -> float:
    """Return the weight of a full round, with all groups that are configured: a round's loss is divided by it.

    Args:
        rule: its name.
        local: own groups in a round, each of weight 1.
        external: peers' groups in a round.
        completions: how many of a group are used.
        external_weight: the weight of a whole external group.
    """
    return local + external * external_weight * RULES[rule].group_weight(completions)
