"""The rules by which a node shares, one a file; `sampling.rule` names one.

    sapo        the paper's: whole informative groups, drawn uniformly
    uniform     whole groups, drawn uniformly, the uninformative too
    advantage   whole groups, in proportion to their mean absolute advantage
    freshest    the youngest whole informative groups
    correct     one right completion from each of many groups
    positive    the same, and of own groups no more wrong completions than right ones
    rescue      as `correct`, from tasks that the round's own answers all got wrong
    likely      as `correct`, of twice as many the half that is likelier under the own policy
    hacpo       as `correct`, each weighted by its likelihood under the own policy, never above the plain weight
    maxrl       as `correct`, and own groups by the advantage over their mean

To add one: a file that opens with its formula and its source and ends with a `RULE`, and a line in `RULES` and here.
"""

from collections.abc import Mapping

from node.rollouts.rules import advantage, correct, freshest, hacpo, likely, maxrl, positive, rescue, sapo, uniform
from node.rollouts.sampling import Rule

RULES: Mapping[str, Rule] = {
    "sapo": sapo.RULE,
    "uniform": uniform.RULE,
    "advantage": advantage.RULE,
    "freshest": freshest.RULE,
    "correct": correct.RULE,
    "positive": positive.RULE,
    "rescue": rescue.RULE,
    "likely": likely.RULE,
    "hacpo": hacpo.RULE,
    "maxrl": maxrl.RULE,
}
