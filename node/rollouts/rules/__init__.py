"""The rules by which a node shares, one a file; `sampling.rule` names one.

    sapo        the paper's: whole informative groups, drawn uniformly
    positive    the best completion of each of many groups; of own groups no more bad completions than good ones
    rft         one right completion of each group, a peer's or an own one; nothing is pushed down

To add a rule: write its file, which opens with its formula and its source and ends with a `RULE`. Give it a line above
and in `RULES`, and its name to `SamplingConfig.rule` in node/config.py. No rule has to bound what one signer gets: the
screening takes no more of a signer's groups than its share, and asks the rule again for the rest.

Others were measured and were not ahead: see docs/results/rule-choice.md, and docs/learning.md, "Staleness".
"""

from collections.abc import Mapping

from node.config import SamplingConfig
from node.rollouts.rule import Rule
from node.rollouts.rules import positive, rft, sapo

RULES: Mapping[str, Rule] = {
    "sapo": sapo.RULE,
    "positive": positive.RULE,
    "rft": rft.RULE,
}


def configured_weight(config: SamplingConfig) -> float:
    """Return the weight of a full round, with all groups that are configured: a round's loss is divided by it.

    An own group counts 1, and a round has no more of them than it asks questions.
    """
    local = min(config.local, config.questions_per_round)
    return local + config.external * RULES[config.rule].group_weight(config.completions)
