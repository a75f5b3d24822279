"""The rules that look beyond rewards: which tasks this node fails, and how likely an answer is here."""

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.rollouts.rules import RULES
from node.rollouts.rules.hacpo import DEPTH, one_sided
from node.rollouts.rules.likely import LOOKED_AT
from node.rollouts.sampling import Candidate, Draw, OwnGroup, Place, mean_advantages, scaled_advantages

L = 4
rewards = st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=8).map(tuple)
scores = st.floats(-30, 0) | st.just(math.nan)


def candidate(number: int, found: tuple[float, ...], task: str = "sums") -> Candidate:
    return Candidate(number.to_bytes(4, "big"), "peer", number.to_bytes(4, "big"), 0.0, 1, found, task)


def draw_of(
    count: int, own: Sequence[OwnGroup] = (), scores: dict[Place, float] | None = None, seed: int = 0
) -> tuple[Draw, list[Place]]:
    """A draw, and the list to which each completion is added whose likelihood is asked for."""
    asked: list[Place] = []

    def likelihood(places: Sequence[Place]) -> list[float]:
        asked.extend(places)
        return [(scores or {}).get(place, math.nan) for place in places]

    return Draw(count, L, mean_advantages, random.Random(seed), own, likelihood), asked


@given(
    st.lists(rewards, max_size=9),
    st.integers(0, 9),
    st.sampled_from(["rescue", "likely", "hacpo", "maxrl", "correct", "positive"]),
    st.data(),
)
def test_no_rule_gives_a_peers_answer_more_than_one_completions_weight_or_pushes_one_down(
    found: list[tuple[float, ...]], count: int, rule: str, data: st.DataObject
) -> None:
    pool = [candidate(number, one) for number, one in enumerate(found)]
    known = {(one.id, at): data.draw(scores) for one in pool for at in range(len(one.rewards))}
    own = [OwnGroup(b"own", "sums", (0.0, 0.0))]
    draw, asked = draw_of(count, own, known | {(b"own", 0): -1.0})
    picks = RULES[rule].peers(pool, draw)
    by_id = {one.id: one for one in pool}
    assert len({pick.id for pick in picks}) == len(picks) <= count
    assert all(pick.advantage == 1.0 and 0 < pick.weight <= 1 / L for pick in picks)
    assert all(by_id[pick.id].rewards[pick.index] == 1.0 for pick in picks)
    assert len(asked) <= LOOKED_AT * count + len(own)


def test_rescue_draws_from_the_tasks_that_all_own_answers_of_the_round_failed() -> None:
    pool = [candidate(at, (0.0, 1.0), task) for at, task in enumerate(["sums", "bases", "days", "bases"])]
    own = [
        OwnGroup(b"1", "sums", (0.0, 0.25)),
        OwnGroup(b"2", "sums", (0.0, 1.0)),
        OwnGroup(b"3", "bases", (0.0, 0.25)),
    ]
    picks = RULES["rescue"].peers(pool, draw_of(8, own)[0])
    assert {pick.id for pick in picks} == {pool[1].id, pool[3].id}
    assert RULES["rescue"].peers(pool, draw_of(8, own[:2])[0]) == []


def test_likely_keeps_the_likelier_half_of_what_correct_would_draw() -> None:
    pool = [candidate(at, (0.0, 1.0)) for at in range(10)]
    known = {(one.id, 1): -float(at) for at, one in enumerate(pool)}
    draw, asked = draw_of(3, (), known)
    picks = RULES["likely"].peers(pool, draw)
    drawn = [pick.id for pick in RULES["correct"].peers(pool, draw_of(6)[0])]
    assert [place[0] for place in asked] == drawn
    best = sorted(drawn, key=lambda ident: -known[ident, 1])[:3]
    assert [pick.id for pick in picks] == [ident for ident in drawn if ident in best]


def test_likely_takes_nothing_that_has_no_likelihood_here() -> None:
    pool = [candidate(at, (0.0, 1.0)) for at in range(2)]
    (pick,) = RULES["likely"].peers(pool, draw_of(2, (), {(pool[0].id, 1): -3.0})[0])
    assert pick.id == pool[0].id


def test_hacpo_takes_weight_from_what_is_unlikely_here_and_gives_none() -> None:
    pool = [candidate(at, (0.0, 1.0)) for at in range(4)]
    own = [OwnGroup(b"a", "sums", (0.0, 1.0)), OwnGroup(b"b", "sums", (0.0, 0.0))]
    known = {(b"a", 0): -1.0, (b"b", 0): -3.0}  # L = -2
    known |= {(one.id, 1): score for one, score in zip(pool, (-0.1, -2.0, -2.5, -90.0), strict=True)}
    picks = RULES["hacpo"].peers(pool, draw_of(4, own, known)[0])
    weights = {pick.id: pick.weight * L for pick in picks}
    assert [weights[one.id] for one in pool] == pytest.approx([1.0, 1.0, math.exp(-0.5), 1 - DEPTH])


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_the_factor_rises_with_likelihood_between_its_bounds(first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert 1 - DEPTH <= one_sided(low) <= one_sided(high) <= 1.0


@given(rewards)
def test_maxrl_is_the_advantage_over_the_mean_and_nothing_where_that_is_0(found: tuple[float, ...]) -> None:
    made = RULES["maxrl"].own(found, draw_of(0)[0])
    mean = sum(found) / len(found)
    assert [index for index, _ in made] == list(range(len(found)))
    if mean == 0 or min(found) == max(found):
        assert not any(advantage for _, advantage in made)
    else:
        plain = mean_advantages(found)
        assert [advantage * mean for _, advantage in made] == pytest.approx(plain)
    if set(found) == {0.0, 1.0}:  # each wrong answer pulls as -1, however rare right ones are
        assert {advantage for index, advantage in made if found[index] == 0} == {-1.0}


def test_maxrl_is_not_scaled_again() -> None:
    draw = Draw(0, L, scaled_advantages, random.Random(0))
    assert RULES["maxrl"].own((1.0, 0.0), draw) == [(0, 1.0), (1, -1.0)]
