"""Who taught this node something: measured here, kept through restarts, followed by the draw."""

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.cli.app import run
from node.config import PoolConfig
from node.rollouts.replay_buffer import ReplayBuffer
from node.rollouts.sampling import Candidate, Sample, external_pulls
from node.rollouts.usefulness import KEPT, Lesson, Worth, choose_by_worth, worths


def candidates(**sent: int) -> list[Candidate]:
    return [
        Candidate(f"{peer}{at}".encode(), peer, f"{peer}{at}".encode(), 0.0, 1, (0.0, 1.0))
        for peer, count in sent.items()
        for at in range(count)
    ]


def test_a_peers_worth_is_the_mean_gain_of_the_rounds_that_trained_on_it_by_its_share() -> None:
    lessons = [Lesson(-2.0, {"a": 1.0}), Lesson(-1.0, {"a": 0.5, "b": 0.5}), Lesson(-1.5, {"b": 1.0})]
    known = worths(lessons, -1.75)  # gains 1, -0.5, -0.25
    assert known["a"].mean == pytest.approx((1.0 * 1 + 0.5 * -0.5) / 1.5)
    assert known["b"].mean == pytest.approx((0.5 * -0.5 + 1.0 * -0.25) / 1.5)
    assert known["a"].rounds == 1.5
    assert known[""].mean == pytest.approx(0.25 / 3)
    assert known["a"].deviation < known[""].deviation
    assert worths([], -1.0) == {"": Worth(0.0, 0.0, 0.0)}


def test_among_peers_of_whom_one_teaches_and_one_harms_the_draw_goes_to_the_first_and_still_tries_the_other() -> None:
    rng = random.Random(3)
    score, lessons, drawn = -3.0, [], Counter[str]()
    for number in range(200):
        chosen = choose_by_worth(candidates(good=4, plain=4, bad=4), 4, worths(lessons, score), rng)
        shares = Counter(one.peer for one in chosen)
        lessons.append(Lesson(score, {peer: count / 4 for peer, count in shares.items()}))
        score += sum({"good": 0.02, "plain": 0.01, "bad": -0.02}[one.peer] for one in chosen) / 4 + rng.gauss(0, 0.005)
        if number >= 100:
            drawn += shares
    assert drawn["good"] > 2 * drawn["plain"] > 0
    assert drawn["plain"] > 3 * drawn["bad"]


def test_peers_that_cannot_be_told_apart_are_drawn_alike_however_much_each_sends() -> None:
    rng = random.Random(1)
    known = {"": Worth(9.0, 1.0, 0.0)}
    drawn = Counter(choose_by_worth(candidates(loud=90, quiet=10), 1, known, rng)[0].peer for _ in range(4000))
    assert drawn["quiet"] / 4000 == pytest.approx(0.5, abs=0.04)
    drawn = Counter(
        choose_by_worth(candidates(loud=9, quiet=1), 1, {"": Worth(0.0, 0.0, 0.0)}, rng)[0].peer for _ in range(4000)
    )
    assert drawn["quiet"] / 4000 == pytest.approx(0.5, abs=0.04)  # before anything is known


def test_a_draw_takes_none_rather_than_more_of_peers_that_harm() -> None:
    known = {"": Worth(0.0, 1.0, 0.0), "good": Worth(0.5, 0.1, 9.0), "bad": Worth(-0.5, 0.1, 9.0)}
    rng = random.Random(1)
    chosen = [one.peer for _ in range(100) for one in choose_by_worth(candidates(good=2, bad=9), 8, known, rng)]
    assert Counter(chosen) == {"good": 200}
    tried = [len(choose_by_worth(candidates(new=1), 1, known, rng)) for _ in range(1000)]
    assert sum(tried) == pytest.approx(500, abs=60)  # who is not known may be either


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 5)), st.integers(0, 30), st.integers())
def test_each_candidate_is_chosen_once_and_all_where_there_are_too_few(
    sent: dict[str, int], count: int, seed: int
) -> None:
    pool = candidates(**sent)
    known = {"": Worth(9.0, 1.0, 0.0), "a": Worth(50.0, 0.1, 3.0)}
    chosen = choose_by_worth(pool, count, known, random.Random(seed))
    assert len({one.id for one in chosen}) == len(chosen) == min(count, len(pool))
    assert {one.id for one in chosen} <= {one.id for one in pool}
    if "a" in sent and count:
        assert chosen[0].peer == "a"
    assert chosen == choose_by_worth(pool, count, known, random.Random(seed))


def test_pulls_are_shares_of_the_whole_round() -> None:
    def row(source: bytes, advantage: float, weight: float, external: bool) -> Sample:
        return Sample([1], [1], advantage, weight, 0, external, source=source)

    samples = [row(b"own", -1.0, 0.5, False), row(b"x", 1.0, 0.25, True), row(b"y", 0.5, 0.5, True)]
    assert external_pulls(samples, {b"x": "a", b"y": "b"}) == {"a": 0.25, "b": 0.25}
    assert external_pulls(samples[:1], {}) == {}
    assert external_pulls([row(b"x", 0.0, 1.0, True)], {b"x": "a"}) == {}


def test_lessons_survive_a_restart_and_those_of_rounds_that_are_done_again_are_forgotten(tmp_path: Path) -> None:
    lessons = [Lesson(-float(number), {"a": 0.5, "b": number / 10}) for number in range(1, 6)]
    with ReplayBuffer(tmp_path / "pool.sqlite", PoolConfig()) as pool:
        for number, lesson in enumerate(lessons, 1):
            pool.learned(number, lesson)
    with ReplayBuffer(tmp_path / "pool.sqlite", PoolConfig()) as pool:
        assert pool.lessons(6) == lessons
        pool.rewind(3)
        assert pool.lessons(4) == lessons[:3]
        assert pool.lessons(6) == []  # rounds 4 and 5 were not measured: what follows on them says nothing of them
        pool.learned(4, lessons[3])
        assert pool.lessons(5) == lessons[:4]
        for number in range(5, 3 * KEPT):
            pool.learned(number, lessons[0])
        assert len(pool.lessons(3 * KEPT)) == KEPT


def test_inspect_shows_it_best_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ReplayBuffer(tmp_path / "pool.sqlite", PoolConfig()) as pool:
        for number, (score, peer) in enumerate([(-2.0, "b\x1b"), (-1.99, "a"), (-1.97, "a")], 1):
            pool.learned(number, Lesson(score, {peer: 1.0}))
    assert run(["inspect", str(tmp_path)], debug=False) == 0
    said = capfd.readouterr().out.splitlines()
    at = next(at for at, line in enumerate(said) if line.startswith("usefulness, 3 rounds"))
    assert said[at + 1].split()[0] == "+20.00" and said[at + 1].endswith("  a")
    assert said[at + 2].split()[0] == "+10.00" and said[at + 2].endswith(r"  b\x1b")
