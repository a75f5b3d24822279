"""What a rule is: it goes from groups to weighted completions. Pure.

A rule (`node.rollouts.rules`, one a file) looks at candidates and returns picks: single completions, each with an
advantage and a weight. So a rule may take whole groups, as the paper does, or choose among completions, and nothing
downstream can tell.

**A group counts as a group**, however many completions its maker put in it. If it has more than a round uses, only as
many are drawn, and a whole group's picks share the weight 1. The drawn keep the advantages that they have in the whole
group, so their sum is no longer zero, but their mean is that of the whole group in expectation, and so is the gradient.
(Advantages of the drawn alone would sum to zero, and lose groups whose one right answer is not drawn.)
"""

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from node.rollouts.group import EncodedGroup
from protocol.value import value

_EPSILON = 1e-4  # TRL's guard against a zero deviation in group scaling
RIGHT = 1 - 1e-6  # the least reward of a completion that is wholly right; a mean of parts may miss 1 by rounding
FLAT = 1e-9  # rewards closer than this are equal: a group in which all are equal has no gradient


@value
class Sample:
    """One completion to train on: an episode's tokens after those of its prompt, weighted by `advantage`.

    Those at the places in `given` are an environment's: the policy reads them, and is not trained on them.

    `weight` is what it counts in the round's loss beside the others, where a whole own group counts 1 (see
    `node.training.batch`). Samples of one group have one `group`, a number that no other group of the round has.
    `logprobs` are the sampler's, in nats, one for each token of `completion`, where it gave them. It is completion
    `index` of the group with content id `source`.
    """

    prompt: Sequence[int]
    completion: Sequence[int]
    advantage: float
    weight: float = 1.0
    group: int = 0
    external: bool = False
    logprobs: Sequence[float] | None = None
    source: bytes = b""
    index: int = 0
    given: frozenset[int] = frozenset()

    @property
    def sampled(self) -> int:
        """How many tokens it trains on."""
        return len(self.completion) - len(self.given)

    def without_tokens(self) -> "Sample":
        """Return the row that trains on nothing."""
        return replace(self, completion=(), given=frozenset())


@value
class Candidate:
    """A peer's group as its signer claims it, for a rule to choose by: it is verified once it is drawn.

    Its signer, its task's name, the id of its question (`node.tasks.questions`), the id of its texts
    (`node.rollouts.group_buffer`), when it came (Unix seconds), the first round that may draw it, its rewards.
    """

    id: bytes
    peer: str
    task: str
    question: bytes
    texts: bytes
    received: float
    first_round: int
    rewards: tuple[float, ...]
    informative: bool = field(init=False, compare=False, repr=False)  # whether its advantages are not all zero
    all_right: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "informative", is_informative(self.rewards))  # once, and not in every round
        object.__setattr__(self, "all_right", is_right(min(self.rewards)))


@value
class Pick:
    """A rule's choice: completion `index` of candidate `id`, trained with `advantage`, as `weight` of a group.

    The advantage is computed from the rewards of the group's completions `rests_on`: these must be verified.
    """

    id: bytes
    index: int
    advantage: float
    weight: float
    rests_on: Sequence[int]


Scale = Callable[[Sequence[float]], list[float]]
Place = tuple[bytes, int]  # a completion: its group's id, and its place there


@dataclass(frozen=True, slots=True)
class DrawRequest:
    """A request to a rule: `count` groups, at most `completions` of each, with advantages by `scale`.

    `own_reward` returns this node's own reward on the task of that name. At most `per_signer` groups of one signer are
    used, less those already `taken` from it; None is no bound. The screening sees to that, whatever a rule returns.
    """

    count: int
    completions: int
    scale: Scale
    rng: random.Random
    own_reward: Callable[[str], float] = lambda task: 0.0
    per_signer: int | None = None
    taken: Mapping[str, int] = field(default_factory=dict)

    def choose(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return `count` candidates, drawn uniformly, or fewer if the signers' shares allow no more.

        Each signer's share is drawn first, so what a signer sends beyond it takes no slot from the others.
        """
        if self.per_signer is not None:
            candidates = at_most_each(candidates, self.per_signer, self.taken, self.rng)
        return self.rng.sample(candidates, min(self.count, len(candidates)))


Advantages = Sequence[tuple[int, float]]  # of completions of one group, by their places in it


@dataclass(frozen=True, slots=True)
class Rule:
    """How own groups are trained on, and what is drawn from those of peers.

    `own(rewards, request)` returns the completions of an own group that teach, each with its advantage;
    `peers(candidates, request)` the picks from peers' groups, those that it wants most first. Neither looks at anything
    else, and all randomness is the request's, so a round that is done again draws the same.
    `group_weight(completions)` is the weight of all picks from one peer's group together, if a round uses so many
    completions of a group.

    Groups that are all right are asked for on tasks on which this node's own reward is below `easy_below`.
    """

    own: Callable[[Sequence[float], DrawRequest], Advantages]
    peers: Callable[[Sequence[Candidate], DrawRequest], list[Pick]]
    group_weight: Callable[[int], float]
    easy_below: float = -math.inf


def is_right(reward: float) -> bool:
    """Whether a completion with this reward is wholly right: 1, or beyond it."""
    return reward >= RIGHT


def is_informative(rewards: Sequence[float]) -> bool:
    """Whether a group with these rewards has any advantage other than zero."""
    return max(rewards) - min(rewards) > FLAT


def at_most_each(
    candidates: Sequence[Candidate], count: int, taken: Mapping[str, int], rng: random.Random
) -> list[Candidate]:
    """Return at most `count` candidates of each peer, less those already `taken`; drawn uniformly, order kept."""
    places: dict[str, list[int]] = {}
    for place, candidate in enumerate(candidates):
        places.setdefault(candidate.peer, []).append(place)
    kept = [
        place
        for peer, of_peer in places.items()
        for place in rng.sample(of_peer, min(max(count - taken.get(peer, 0), 0), len(of_peer)))
    ]
    return [candidates[place] for place in sorted(kept)]


def mean_advantages(rewards: Sequence[float]) -> list[float]:
    """Rewards less their group's mean (Dr. GRPO, arXiv 2503.20783): noise is not blown up to unit variance."""
    if not is_informative(rewards):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    return [reward - mean for reward in rewards]


def scaled_advantages(rewards: Sequence[float]) -> list[float]:
    """Mean advantages over the group's standard deviation (GRPO, arXiv 2402.03300)."""
    if not is_informative(rewards):
        return [0.0] * len(rewards)
    deviation = statistics.stdev(rewards) + _EPSILON
    return [advantage / deviation for advantage in mean_advantages(rewards)]


SCALES: Mapping[str, Scale] = {"none": mean_advantages, "group": scaled_advantages}


def whole_group(rewards: Sequence[float], request: DrawRequest) -> Advantages:
    """Return every completion with its advantage."""
    return list(enumerate(request.scale(rewards)))


def picks_of_groups(candidates: Sequence[Candidate], request: DrawRequest) -> list[Pick]:
    """Return each candidate's completions, or as many of them as are used, drawn uniformly."""
    picks = []
    for candidate in candidates:
        advantages = request.scale(candidate.rewards)
        all_of_it = range(len(advantages))
        indices: Sequence[int] = all_of_it
        if len(indices) > request.completions:
            indices = sorted(request.rng.sample(indices, request.completions))
        picks += [Pick(candidate.id, index, advantages[index], 1 / len(indices), all_of_it) for index in indices]
    return picks


def external_samples(picks: Sequence[Pick], groups: Mapping[bytes, EncodedGroup], first: int) -> list[Sample]:
    """Attach the picked completions' tokens; a pick whose group or tokens are not in `groups` is left out.

    Args:
        picks: a rule's.
        groups: by their ids.
        first: the number of the first of the groups.
    """
    numbers = {key: first + at for at, key in enumerate(dict.fromkeys(pick.id for pick in picks))}
    return [
        _sample(groups[pick.id], pick.index, pick.advantage, pick.weight, numbers[pick.id], external=True)
        for pick in picks
        if pick.id in groups and pick.index in groups[pick.id].completions
    ]


def local_samples(own: Sequence[EncodedGroup], count: int, rule: Rule, request: DrawRequest) -> list[Sample]:
    """Take `count` of this round's own groups, by the rule; those with an advantage first when there are more."""
    ranked = request.rng.sample(own, len(own))
    ranked.sort(key=lambda encoded: not is_informative(encoded.group.rewards))
    return [
        _sample(encoded, index, advantage, 1 / len(encoded.completions), number, external=False)
        for number, encoded in enumerate(ranked[:count])
        for index, advantage in rule.own(encoded.group.rewards, request)
    ]


def external_share(samples: Sequence[Sample]) -> float:
    """Return what part of a round's pull, weight times absolute advantage, is peers'; 0 where nothing pulls."""
    pulls = [_pull(sample) for sample in samples]
    external = sum(pull for pull, sample in zip(pulls, samples, strict=True) if sample.external)
    return external / sum(pulls) if any(pulls) else 0.0


def effective_size(samples: Sequence[Sample]) -> float:
    """Return a round's effective sample size (Kish, 1965): n samples of equal pull give n, one that outweighs all 1."""
    pulls = [_pull(sample) for sample in samples]
    return sum(pulls) ** 2 / sum(pull**2 for pull in pulls) if any(pulls) else 0.0


def _pull(sample: Sample) -> float:
    return sample.weight * abs(sample.advantage)


def _sample(encoded: EncodedGroup, index: int, advantage: float, weight: float, number: int, external: bool) -> Sample:
    ids, given, logprobs = encoded.completions[index]
    return Sample(encoded.prompt, ids, advantage, weight, number, external, logprobs, encoded.id, index, given)
