"""Controls: rules that nobody would train with, which tell what of a rule's gain is due to what peers write.

    wrong    as the default, but of each of peers' groups ONE WRONG answer is imitated, A = 1, at 1/L of a group

They are no settings of a node: an arm of the runner "memory" names one (`control = "wrong"`), and its nodes have the
default rule otherwise. What is drawn is verified as ever, and the bounds on what a peer may teach hold as they are set.
Candidates for the default rule are named in the same way (`node.lab.candidates`).

To add a control: write its function, and give it a line above and in `CONTROLS`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from node.lab.candidates import CANDIDATES, Control
from node.rollouts.rule import FLAT, Candidate, DrawRequest, Pick
from node.rollouts.rules import positive


def wrong_of_each(candidates: Sequence[Candidate], request: DrawRequest) -> list[Pick]:
    """Draw groups with differing rewards, uniformly; take one completion below the best of each as if it were right.

    A graded completion counts 1 too, whatever it earned. A group whose rewards are all equal has none.
    """
    picks = []
    for candidate in request.choose([candidate for candidate in candidates if candidate.informative]):
        best = max(candidate.rewards)
        index = request.rng.choice([at for at, reward in enumerate(candidate.rewards) if reward < best - FLAT])
        picks.append(Pick(candidate.id, index, 1.0, 1 / request.completions, (index,)))
    return picks


CONTROLS: Mapping[str, Control] = {
    "wrong": lambda part: replace(positive.RULE, peers=wrong_of_each, easy_below=0.0),
    **CANDIDATES,
}
