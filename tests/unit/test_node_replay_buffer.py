"""The pool: bounded by every bound, durable through a kill, forgetful when rewound."""

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.config import PoolConfig
from node.rollouts.group import Completion, Group, encode
from node.rollouts.lengths import KEPT, OwnLength, OwnLengths, own_length
from node.rollouts.replay_buffer import ReplayBuffer, Shared, question_id
from node.tasks import TaskKey


def shared(number: int, peer: str = "a", received: float = 0.0, size: int = 10, seed: int | None = None) -> Shared:
    made = (Completion("x" * size, True, 1.0), Completion("", False, 0.0))
    group = Group(TaskKey("t", 1, "c"), number if seed is None else seed, "q", made, "p", 0)
    return Shared(number.to_bytes(32, "big"), peer, received, group, encode(group))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pool.sqlite"


def ids(pool: ReplayBuffer, now: float = 0.0, max_uses: int = 1, round_number: int = 1) -> set[int]:
    return {int.from_bytes(one.id, "big") for one in pool.candidates(now, round_number, max_uses)}


def test_a_group_is_kept_once_and_comes_back_whole(path: Path) -> None:
    with ReplayBuffer(path, PoolConfig()) as pool:
        assert pool.add([shared(1), shared(1), shared(2)], now=0, first_round=1) == 2
        assert pool.add([shared(2)], now=0, first_round=1) == 0
        (one, _) = pool.candidates(5.0, 1, max_uses=1)
        assert (one.peer, one.received, one.rewards) == ("a", 0.0, (1.0, 0.0))
        assert pool.read([one.id, one.id]) == {one.id: shared(1).group}


def test_a_used_group_is_not_drawn_again_until_its_uses_allow(path: Path) -> None:
    with ReplayBuffer(path, PoolConfig()) as pool:
        pool.add([shared(1), shared(2)], now=0, first_round=1)
        pool.use([shared(1).id], 1)
        assert ids(pool) == {2}
        assert ids(pool, max_uses=2) == {1, 2}


def test_a_question_sent_again_under_other_ids_and_names_gains_no_further_use(path: Path) -> None:
    with ReplayBuffer(path, PoolConfig()) as pool:
        pool.add([shared(1, "a", 0.0, seed=7), shared(2, "b", 1.0, seed=7), shared(3, seed=8)], 1, 1)
        assert ids(pool) == {1, 3}  # of one question, the first to come
        pool.use([shared(1).id], 1)
        pool.add([shared(4, "c", 2.0, size=20, seed=7)], now=2, first_round=2)
        assert ids(pool, round_number=2) == {3}
        assert ids(pool, round_number=2, max_uses=2) == {1, 3}
    with ReplayBuffer(path, PoolConfig()) as pool:
        assert ids(pool, round_number=2) == {3}


def test_a_question_stays_used_when_its_group_is_gone(path: Path) -> None:
    bounds = PoolConfig(max_groups=3, max_age=10)
    with ReplayBuffer(path, bounds) as pool:
        pool.add([shared(1, seed=7)], now=0, first_round=1)
        pool.use([shared(1).id], 1)
        pool.add([shared(2, received=20, seed=7)], now=20, first_round=1)
        assert (len(pool), ids(pool, now=20)) == (1, set())


@given(st.lists(st.integers(0, 20), max_size=60), st.integers(1, 10))
def test_as_many_uses_are_remembered_as_groups_may_be_here(seeds: list[int], most: int) -> None:
    with ReplayBuffer(Path(":memory:"), PoolConfig(max_groups=most, max_peer_share=1)) as pool:
        for number, seed in enumerate(seeds):
            pool.add([shared(number, received=number, seed=seed)], now=0, first_round=1)
            pool.use([shared(number).id], number)
            assert pool._uses == Counter(question_id(shared(0, seed=one).group) for one in seeds[: number + 1][-most:])


def test_a_group_waits_for_its_first_round(path: Path) -> None:
    with ReplayBuffer(path, PoolConfig()) as pool:
        pool.add([shared(1)], now=0, first_round=3)
        pool.add([shared(2)], now=0, first_round=2)
        assert ids(pool, round_number=1) == set()
        assert ids(pool, round_number=2) == {2}
        pool.rewind(1)
        assert ids(pool, round_number=2) == {2}
        assert ids(pool, round_number=3) == {1, 2}


def test_a_group_that_has_waited_too_many_rounds_is_not_drawn(path: Path) -> None:
    with ReplayBuffer(path, PoolConfig(max_age_rounds=2)) as pool:
        pool.add([shared(1)], now=0, first_round=3)
        pool.add([shared(2)], now=0, first_round=4)
        assert [ids(pool, round_number=number) for number in range(3, 8)] == [{1}, {1, 2}, {1, 2}, {2}, set()]


def test_groups_of_one_moment_have_the_same_order_when_they_are_read_again(path: Path) -> None:
    with ReplayBuffer(path, PoolConfig()) as pool:
        pool.add([shared(number) for number in (3, 1, 2)], now=0, first_round=1)
        before = pool.candidates(0, 1, max_uses=1)
    with ReplayBuffer(path, PoolConfig()) as pool:
        assert pool.candidates(0, 1, max_uses=1) == before


def test_it_knows_how_many_a_draw_left(path: Path) -> None:
    with ReplayBuffer(path, PoolConfig()) as pool:
        pool.add([shared(number) for number in range(1, 5)], now=0, first_round=1)
        assert ids(pool) == {1, 2, 3, 4}
        pool.use([shared(1).id, shared(2).id], 1)
        assert pool.left == 2
        pool.bury([shared(3).id], 1)
        assert pool.left == 1


def test_a_question_whose_use_is_forgotten_may_be_drawn_again_at_once(path: Path) -> None:
    with ReplayBuffer(path, PoolConfig(max_groups=2, max_peer_share=1)) as pool:
        pool.add([shared(1), shared(2)], now=0, first_round=1)
        pool.use([shared(1).id], 1)
        assert ids(pool) == {2}
        for number in (1, 2):
            pool.use([shared(2).id], number)
        assert ids(pool) == {1}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "add", "add", "draw", "use", "use", "bury", "rewind", "later uses"]),
            st.integers(0, 3),
            st.integers(0, 3),
        ),
        min_size=10,
        max_size=40,
    ),
    st.sampled_from([None, 0, 2]),
)
def test_what_may_be_drawn_is_the_same_whether_it_is_kept_up_or_found_anew(
    steps: list[tuple[str, int, int]], max_age_rounds: int | None
) -> None:
    """A buffer that was asked after every step says what one does that reads the same file and was never asked."""
    bounds = PoolConfig(max_age=5, max_age_rounds=max_age_rounds, max_groups=4, max_peer_share=1)
    now, number, max_uses, made = 0.0, 1, 1, 0
    with tempfile.TemporaryDirectory() as folder, ReplayBuffer(Path(folder, "pool.sqlite"), bounds) as pool:
        for step, which, ahead in steps:
            held = list(pool._entries)
            now += ahead / 2
            match step:
                case "add":
                    made += 1
                    pool.add([shared(made, received=now, seed=which)], now, number + ahead)
                case "draw":
                    number += ahead
                case "use" if held:
                    pool.use([held[which % len(held)]], number)
                case "bury" if held:
                    pool.bury([held[which % len(held)]], number)
                case "rewind":
                    number = max(1, number - ahead)
                    pool.rewind(number)
                case "later uses":
                    max_uses = 1 + ahead
            with ReplayBuffer(Path(folder, "pool.sqlite"), bounds) as fresh:
                assert pool.candidates(now, number, max_uses) == fresh.candidates(now, number, max_uses)


def test_a_file_of_another_format_is_emptied(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE groups (id BLOB PRIMARY KEY, body BLOB)")
        db.execute("INSERT INTO groups VALUES (x'00', x'00')")
        db.commit()
    with ReplayBuffer(path, PoolConfig()) as pool:
        assert len(pool) == 0
        assert pool.add([shared(1)], now=0, first_round=1) == 1
    with ReplayBuffer(path, PoolConfig()) as pool:
        assert len(pool) == 1


def test_rewinding_forgets_only_later_rounds(path: Path) -> None:
    with ReplayBuffer(path, PoolConfig()) as pool:
        pool.add([shared(1), shared(2)], now=0, first_round=1)
        pool.use([shared(1).id], 3)
        pool.use([shared(2).id], 4)
        pool.rewind(3)
        assert ids(pool) == {2}


def test_what_is_buried_is_drawn_no_more_and_does_not_come_again(path: Path) -> None:
    with ReplayBuffer(path, PoolConfig(max_age=10)) as pool:
        pool.add([shared(1, seed=7), shared(2, seed=7), shared(3)], now=0, first_round=1)
        pool.bury({shared(1).id: "a lie"}, 4)
        assert ids(pool) == {2, 3} and len(pool) == 2  # another group of its question may be drawn now
        assert shared(1).id in pool and pool.add([shared(1)], now=0, first_round=5) == 0
    with ReplayBuffer(path, PoolConfig(max_age=10)) as pool:
        assert ids(pool) == {2, 3} and len(pool) == 2
        pool.rewind(3)
        assert ids(pool) == {1, 3}  # the round that is done again draws the same, and finds out the same
        pool.bury([shared(1).id], 4)
        pool.add([], now=11, first_round=5)
        assert len(pool) == 0 and shared(1).id not in pool


def test_old_groups_are_neither_drawn_nor_kept(path: Path) -> None:
    with ReplayBuffer(path, PoolConfig(max_age=10)) as pool:
        pool.add([shared(1, received=0), shared(2, received=8)], now=8, first_round=1)
        assert ids(pool, now=11) == {2}
        pool.add([], now=11, first_round=1)
        assert len(pool) == 1


def test_one_peer_cannot_fill_the_pool(path: Path) -> None:
    bounds = PoolConfig(max_groups=10, max_peer_share=0.5)
    with ReplayBuffer(path, bounds) as pool:
        pool.add([shared(n, "honest", received=n) for n in range(3)], now=0, first_round=1)
        pool.add([shared(100 + n, "flood", received=100 + n) for n in range(50)], now=0, first_round=1)
        assert ids(pool) == {0, 1, 2} | {145, 146, 147, 148, 149}


items = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from("abc"), st.integers(0, 100), st.integers(0, 20_000)), max_size=40
)


@settings(max_examples=30, deadline=None)
@given(st.lists(items, min_size=1, max_size=3), st.integers(1, 12))
def test_every_bound_holds_on_disk_and_in_memory(batches: list[list[tuple[int, str, int, int]]], most: int) -> None:
    bounds = PoolConfig(max_groups=most, max_bytes=1 << 16, max_age=60, max_peer_share=0.5)
    path = Path(":memory:")
    with ReplayBuffer(path, bounds) as pool:
        for batch in batches:
            pool.add([shared(n, peer, received, size) for n, peer, received, size in batch], now=100, first_round=1)
            rows = list(pool._db.execute("SELECT id, peer, length(body), received FROM groups"))
            assert len(rows) == len(pool) <= most
            assert sum(size for _, _, size, _ in rows) <= bounds.max_bytes
            assert all(received >= 40 for *_, received in rows)
            for peer in "abc":
                mine = [size for _, one, size, _ in rows if one == peer]
                assert len(mine) <= max(most * 0.5, 1) and sum(mine) <= bounds.max_bytes * 0.5


def test_what_was_added_survives_kill_9(path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from node.config import PoolConfig
from node.rollouts.replay_buffer import ReplayBuffer
from tests.unit.test_node_replay_buffer import shared
pool = ReplayBuffer(Path({str(path)!r}), PoolConfig())
pool.add([shared(n) for n in range(5)], now=0, first_round=1)
pool.use([shared(3).id], 7)
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, timeout=60, env=os.environ, check=False)
    assert ended.returncode == -signal.SIGKILL
    with ReplayBuffer(path, PoolConfig()) as pool:
        assert ids(pool) == {0, 1, 2, 4}
        pool.rewind(6)
        assert ids(pool) == {0, 1, 2, 3, 4}
        assert pool.read([shared(4).id]) == {shared(4).id: shared(4).group}


def test_own_lengths_survive_a_restart_and_a_restore_and_those_of_rounds_that_are_done_again_are_forgotten(
    path: Path, tmp_path: Path
) -> None:
    first, second = OwnLength("sums", None, 4.5), OwnLength("bases", 3.0, 4.0)
    with ReplayBuffer(path, PoolConfig()) as pool:
        assert [*pool.made(1, [first])] == [first]
        assert [*pool.made(2, [second])] == [*pool.made(2, [second])] == [first, second]
        snapshot = pool.snapshot()
    with ReplayBuffer(path, PoolConfig()) as pool:
        pool.rewind(1)
        assert [*pool.made(2, [])] == [first]
        assert [*pool.made(1 + KEPT, [second])] == [second]
    with ReplayBuffer(path, PoolConfig()) as pool:
        assert [*pool.made(2 + KEPT, [])] == [second]
    with ReplayBuffer(tmp_path / "other.sqlite", PoolConfig()) as pool:
        pool.restore(snapshot)
        assert [*pool.made(3, [])] == [first, second]


def test_an_answers_usual_length_is_that_of_own_right_ones_then_of_own_ones_then_of_other_tasks() -> None:
    wrong, right = own_length("sums", [2, 9, 4], [0.0, 0.5, 0.0]), own_length("sums", [3, 9, 5], [1.0, 0.0, 1.0])
    assert (wrong, right) == (("sums", None, 4), ("sums", 4, 5))
    other = own_length("bases", [7, 7], [1.0, 0.0])
    assert usual([wrong, other], "sums") == 4
    assert usual([wrong, right, own_length("sums", [8, 1], [1.0, 0.0]), other], "sums") == 6
    assert usual([wrong, other], "days") == 7
    assert usual([wrong], "days") == 4
    assert usual([], "days") == 0


def usual(own: list[OwnLength], task: str) -> float:
    lengths = OwnLengths()
    lengths.put(1, [*own, *own])  # what a round had is replaced
    lengths.put(1, own)
    return lengths.usual(task)


def test_what_is_written_in_a_transaction_is_there_at_its_end_or_not_at_all(path: Path) -> None:
    with ReplayBuffer(path, PoolConfig()) as pool, ReplayBuffer(path, PoolConfig()) as other:
        with pool.transaction():
            pool.add([shared(1)], 0.0, 1)
            pool.use([shared(1).id], 1)
            assert not other.snapshot().groups
        assert [len(other.snapshot().groups), len(other.snapshot().uses)] == [1, 1]
        with suppress(ZeroDivisionError), pool.transaction():
            pool.use([shared(1).id], 2)
            raise ZeroDivisionError
        assert len(other.snapshot().uses) == 1
