"""What a round trains on: pure functions from groups to weighted completions.

A rule sees candidates and returns picks: single completions, each with an advantage.
So a rule may take whole groups, as the paper does, or choose among completions, and
nothing downstream can tell. The paper's rule is Algorithm 1 of "Sharing is Caring"
(arXiv 2509.08721): advantages belong to the whole group, external groups without any
are dropped, and the rest are drawn uniformly without replacement.
"""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from node.rollouts.group import EncodedGroup

_EPSILON = 1e-4  # TRL's guard against a zero deviation in group scaling
_FLAT = 1e-9  # rewards closer than this are equal: the group carries no gradient


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion to train on: its tokens after those of its prompt, weighted by `advantage`.

    `logprobs` are the sampler's, in nats, one for each token of `completion`, where it gave them.
    """

    prompt: Sequence[int]
    completion: Sequence[int]
    advantage: float
    external: bool = False
    logprobs: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a rule may know of a peer's verified group.

    Who signed it, which question it answers, when it came (Unix seconds), the first round that may draw it, its
    rewards.
    """

    id: bytes
    peer: str
    question: bytes
    received: float
    first_round: int
    rewards: tuple[float, ...]

    @property
    def informative(self) -> bool:
        """Whether its rewards differ, so that its advantages are not all zero."""
        return is_informative(self.rewards)


@dataclass(frozen=True, slots=True)
class Pick:
    """A rule's choice: completion `index` of candidate `id`, trained with `advantage`."""

    id: bytes
    index: int
    advantage: float


Scale = Callable[[Sequence[float]], list[float]]
Rule = Callable[[Sequence[Candidate], int, random.Random, Scale], list[Pick]]


def is_informative(rewards: Sequence[float]) -> bool:
    """Whether a group with these rewards has any advantage other than zero."""
    return max(rewards) - min(rewards) > _FLAT


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


def sapo(candidates: Sequence[Candidate], count: int, rng: random.Random, scale: Scale) -> list[Pick]:
    """Drop groups without advantage, then draw whole groups uniformly without replacement."""
    informative = [candidate for candidate in candidates if candidate.informative]
    return _whole(rng.sample(informative, min(count, len(informative))), scale)


def uniform(candidates: Sequence[Candidate], count: int, rng: random.Random, scale: Scale) -> list[Pick]:
    """Draw whole groups uniformly without replacement, those without advantage too."""
    return _whole(rng.sample(candidates, min(count, len(candidates))), scale)


def advantage_weighted(candidates: Sequence[Candidate], count: int, rng: random.Random, scale: Scale) -> list[Pick]:
    """Draw whole groups without replacement, each in proportion to its summed absolute advantage.

    The `count` largest of u**(1/w), u uniform, are such a draw (Efraimidis and Spirakis, 2006).
    """
    keyed = []
    for candidate in candidates:
        weight = sum(abs(advantage) for advantage in scale(candidate.rewards))
        if weight > 0:
            keyed.append((rng.random() ** (1 / weight), candidate))
    keyed.sort(key=lambda pair: (-pair[0], pair[1].id))
    return _whole([candidate for _, candidate in keyed[:count]], scale)


def freshest(candidates: Sequence[Candidate], count: int, rng: random.Random, scale: Scale) -> list[Pick]:
    """Take the youngest groups that carry any advantage."""
    informative = sorted((c for c in candidates if c.informative), key=lambda c: (-c.received, c.id))
    return _whole(informative[:count], scale)


def correct(candidates: Sequence[Candidate], count: int, rng: random.Random, scale: Scale) -> list[Pick]:
    """Take one fully rewarded completion, at advantage 1, from each of `count` informative groups.

    Peers' wrong answers are never pushed down: not the paper's rule, but an alternative to it.
    """
    solved = [c for c in candidates if c.informative and max(c.rewards) >= 1.0]
    picks = []
    for candidate in rng.sample(solved, min(count, len(solved))):
        best = [index for index, reward in enumerate(candidate.rewards) if reward >= 1.0]
        picks.append(Pick(candidate.id, rng.choice(best), 1.0))
    return picks


RULES: Mapping[str, Rule] = {
    "sapo": sapo,
    "uniform": uniform,
    "advantage": advantage_weighted,
    "freshest": freshest,
    "correct": correct,
}


def drop_negatives(picks: Sequence[Pick]) -> list[Pick]:
    """Zero the negative advantages: peers' wrong answers neither teach nor push."""
    return [replace(pick, advantage=max(pick.advantage, 0.0)) for pick in picks]


def external_samples(picks: Sequence[Pick], groups: Mapping[bytes, EncodedGroup]) -> list[Sample]:
    """Attach the picked completions' tokens."""
    return [_sample(groups[pick.id], pick.index, pick.advantage, external=True) for pick in picks]


def local_samples(own: Sequence[EncodedGroup], count: int, rng: random.Random, scale: Scale) -> list[Sample]:
    """Take `count` of this round's own groups, whole; those with an advantage first when there are more."""
    ranked = rng.sample(own, len(own))
    ranked.sort(key=lambda one: not is_informative(one.group.rewards))
    return [
        _sample(one, index, advantage, external=False)
        for one in ranked[:count]
        for index, advantage in enumerate(scale(one.group.rewards))
    ]


def _sample(one: EncodedGroup, index: int, advantage: float, external: bool) -> Sample:
    logprobs = one.logprobs[index] if one.logprobs is not None else None
    return Sample(one.prompt, one.completions[index], advantage, external, logprobs)


def _whole(candidates: Sequence[Candidate], scale: Scale) -> list[Pick]:
    return [
        Pick(candidate.id, index, advantage)
        for candidate in candidates
        for index, advantage in enumerate(scale(candidate.rewards))
    ]
