"""The rules by which a node shares, one a file; `sampling.rule` names one.

    sapo        the paper's: whole informative groups, drawn uniformly
    uniform     whole groups, drawn uniformly, the uninformative too
    correct     one right completion from each of many groups
    positive    the same, and of own groups no more wrong completions than right ones

To add one: a file that opens with its formula and its source and ends with a `RULE`, and a line in `RULES` and here.
Others were measured, were not ahead, and are gone: see docs/sharing.md.
"""

from collections.abc import Mapping

from node.rollouts.rules import correct, positive, sapo, uniform
from node.rollouts.sampling import Rule

RULES: Mapping[str, Rule] = {
    "sapo": sapo.RULE,
    "uniform": uniform.RULE,
    "correct": correct.RULE,
    "positive": positive.RULE,
}
