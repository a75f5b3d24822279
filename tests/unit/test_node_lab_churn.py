"""Churn of an experiment: the schedule of both runners, and who is away of nodes that go at their own speed."""

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from node.lab.churn import Attendance, Departures, Stretch, attendance, stretches
from node.lab.plan import ChurnConfig


def schedule(*made: tuple[int, int]) -> Departures:
    """A node's stretches, after which it stays."""
    return Departures(itertools.chain(itertools.starmap(Stretch, made), itertools.repeat(Stretch(10**9, 1))))


def test_the_schedule_is_the_seeds_and_each_nodes_own() -> None:
    churn = ChurnConfig(away=0.25, rounds=20)
    first, again, other, seed = (
        list(itertools.islice(stretches(churn, seed, index), 20)) for seed, index in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert first == again and first not in (other, seed)


@pytest.mark.parametrize(("away", "rounds"), [(0.25, 20), (0.5, 4), (0.75, 3), (0.5, 1)])
def test_a_node_is_away_for_its_part_of_the_time_in_stretches_of_the_length_that_was_asked_for(
    away: float, rounds: float
) -> None:
    churn = ChurnConfig(away=away, rounds=rounds)
    made = list(itertools.islice(stretches(churn, 1, 0), 1, 4001))
    assert sum(one.away for one in made) / len(made) == pytest.approx(rounds, rel=0.1)
    total = sum(plan.away + plan.present for plan in made)
    assert sum(one.away for one in made) / total == pytest.approx(away, rel=0.1)
    assert min(min(made)) >= 1
    late = [next(stretches(churn, seed, 0)).present == 0 for seed in range(2000)]
    assert sum(late) / len(late) == pytest.approx(away, rel=0.15)


def test_a_node_leaves_after_its_rounds_and_once_for_each_stretch() -> None:
    departures = schedule((2, 5), (3, 7))
    assert [departures.due(rounds) for rounds in (0, 1, 2, 2, 3, 4, 5, 5, 6)] == [0, 0, 5, 0, 0, 0, 7, 0, 0]


def test_one_that_joins_late_is_away_before_its_first_round() -> None:
    departures = schedule((0, 4), (1, 2))
    assert [departures.due(rounds) for rounds in (0, 0, 1)] == [4, 0, 2]


def test_a_stretch_that_ended_unseen_is_over() -> None:
    departures = schedule((2, 5), (1, 9), (4, 3))
    assert [departures.due(rounds) for rounds in (6, 6, 7)] == [5, 0, 3]


def test_a_node_is_away_for_rounds_of_the_fastest_of_the_others() -> None:
    swarm = Attendance([schedule(), schedule((2, 3)), schedule()])
    seen = [(1, 1, 0), (2, 2, 0), (3, 5, 1), (4, 2, 2), (5, 2, 2), (6, 2, 3)]  # it did three more before it was killed
    assert [sorted(swarm.away(rounds)) for rounds in seen] == [[], [1], [1], [1], [], []]


def test_rounds_that_are_done_again_from_a_checkpoint_do_not_count() -> None:
    swarm = Attendance([schedule((4, 1)), schedule((1, 4))])
    assert sorted(swarm.away((0, 1))) == [1]
    seen = [(3, 1), (1, 1), (2, 1), (3, 1), (3, 1)]  # the first one fell back
    assert [sorted(swarm.away(rounds)) for rounds in seen] == [[1]] * 5


def test_where_nobody_is_left_the_first_to_come_back_does_at_once() -> None:
    swarm = Attendance([schedule((1, 50)), schedule((1, 20)), schedule((0, 90))])
    assert sorted(swarm.away((0, 0, 0))) == [2]
    assert sorted(swarm.away((1, 1, 0))) == [0, 2]
    assert sorted(swarm.away((1, 2, 0), ended=[1])) == [2]


def test_one_that_has_ended_is_not_away() -> None:
    swarm = Attendance([schedule(), schedule((2, 9))])
    assert sorted(swarm.away((1, 2))) == [1]
    assert sorted(swarm.away((1, 2), ended=[1])) == []


@example(0, 0.8, 4.0, 1)  # there for one round in the mean, which is the least
@given(st.integers(0, 2**31), st.floats(0.05, 0.8), st.floats(4, 30), st.integers(1, 5))
def test_whatever_their_speeds_all_get_to_their_ends_and_nobody_does_rounds_while_away(
    seed: int, part: float, rounds: float, nodes: int
) -> None:
    swarm, rng, goal = attendance(ChurnConfig(away=part, rounds=rounds), seed, nodes), random.Random(seed), 60
    done = [0] * nodes
    for _ in range(goal * nodes * 50):
        ended = [at for at in range(nodes) if done[at] >= goal]
        away = swarm.away(done, ended)
        there = [at for at in range(nodes) if at not in away and at not in ended]
        assert not set(away) & set(ended)
        assert there or len(ended) == nodes
        if len(ended) == nodes:
            return
        for at in there:
            done[at] = _step(done, at, rng)
    raise AssertionError(done)


def _step(done: Sequence[int], at: int, rng: random.Random) -> int:
    return done[at] + rng.randint(0, 3)
