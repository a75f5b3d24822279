"""The buffer: bounded by every bound, durable through a kill, forgetful when rewound."""

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.config import BufferConfig
from node.errors import UserError
from node.rollouts.group import Group, encode, one_turn
from node.rollouts.group_buffer import GroupBuffer, ReceivedGroup, texts_id
from node.rollouts.own_results import KEPT, RECENT, OwnResult, OwnResults, own_result
from node.rollouts.rule import Candidate
from node.tasks import TaskKey


def shared(
    number: int, peer: str = "a", received: float = 0.0, size: int = 10, question: int | None = None, text: str = ""
) -> ReceivedGroup:
    """A group of its own texts on a question of its own, unless others are named."""
    made = (one_turn((text or str(number)).rjust(size, "x"), True, 1.0), one_turn("", False, 0.0))
    group = Group(TaskKey("t", 1, "c"), 0, f"q{number if question is None else question}", made, "p", 0)
    return ReceivedGroup(number.to_bytes(32, "big"), peer, received, group, encode(group))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pool.sqlite"


def number_of(one: Candidate) -> int:
    return int.from_bytes(one.id, "big")


def ids(buffer: GroupBuffer, now: float = 0.0, round_number: int = 1) -> set[int]:
    return set(map(number_of, buffer.candidates(now, round_number)))


def use(buffer: GroupBuffer, number: int, round_number: int, now: float = 0.0) -> None:
    """Use a group as a round does: of those that it may draw."""
    drawn = [candidate for candidate in buffer.candidates(now, round_number) if number_of(candidate) == number]
    assert drawn, f"{number} may not be drawn"
    buffer.use(drawn, round_number, now)


def test_a_group_is_kept_once_and_comes_back_whole(path: Path) -> None:
    with GroupBuffer(path, BufferConfig()) as buffer:
        assert buffer.add([shared(1), shared(1), shared(2)], now=0, first_round=1) == 2
        assert buffer.add([shared(2)], now=0, first_round=1) == 0
        (one, _) = buffer.candidates(5.0, 1)
        assert (one.peer, one.received, one.rewards) == ("a", 0.0, (1.0, 0.0))
        assert buffer.read([one.id, one.id]) == {one.id: shared(1).group}


def test_a_used_group_is_not_drawn_again(path: Path) -> None:
    with GroupBuffer(path, BufferConfig()) as buffer:
        buffer.add([shared(1), shared(2)], now=0, first_round=1)
        use(buffer, 1, 1)
        assert ids(buffer) == {2}
    with GroupBuffer(path, BufferConfig()) as buffer:
        assert ids(buffer) == {2}


def test_a_group_sent_again_under_other_ids_and_names_gains_no_further_use(path: Path) -> None:
    with GroupBuffer(path, BufferConfig()) as buffer:
        again = [shared(1, text="7"), shared(2, "b", 1.0, question=1, text="7"), shared(3)]
        buffer.add(again, now=1, first_round=1)
        assert ids(buffer) == {1, 3}  # of one question, the first to come
        use(buffer, 1, 1)
        assert ids(buffer) == {3}
        assert buffer.add([shared(4, "c", 2.0, question=1, text="7")], now=2, first_round=2) == 0
        assert ids(buffer, round_number=2) == {3}
    with GroupBuffer(path, BufferConfig()) as buffer:
        assert ids(buffer, round_number=2) == {3}
        assert buffer.add([shared(4, "c", 2.0, question=1, text="7")], now=2, first_round=2) == 0


def test_other_groups_of_a_question_follow_in_later_rounds_each_once(path: Path) -> None:
    with GroupBuffer(path, BufferConfig()) as buffer:
        buffer.add([shared(number, received=number, question=7) for number in (1, 2, 3)], now=3, first_round=1)
        for number in (1, 2, 3):
            assert ids(buffer, 3) == {number}
            use(buffer, number, number, 3)
        assert ids(buffer, 3) == set()


def test_a_groups_texts_are_the_same_in_whatever_order_and_whatever_is_said_of_them() -> None:
    one = shared(1).group
    turned = replace(one, completions=one.completions[::-1], policy="other", policy_version=9, seed=4)
    assert texts_id(turned) == texts_id(one)
    lie = replace(one, completions=tuple(made._replace(reward=0.5, finished=True) for made in one.completions))
    assert texts_id(lie) == texts_id(one)
    others = [
        replace(one, question="q"),
        replace(one, task=one.task._replace(name="u")),
        replace(one, completions=one.completions[:1]),
        replace(one, completions=(*one.completions, one.completions[0])),
        shared(1, size=11).group,
    ]
    assert len({texts_id(other) for other in (one, *others)}) == 1 + len(others)


def test_a_group_stays_used_when_it_is_gone_for_as_long_as_it_might_have_stayed(path: Path) -> None:
    bounds = BufferConfig(max_groups=1, max_age=10)
    with GroupBuffer(path, bounds) as buffer:
        buffer.add([shared(1)], now=0, first_round=1)
        use(buffer, 1, 1)
        buffer.add([shared(2, received=5)], now=5, first_round=1)
        assert shared(1).id not in buffer
        assert buffer.add([shared(3, "b", 10, question=1, text="1")], now=10, first_round=1) == 0
        buffer.use([], 2, now=10.5)
        assert buffer.add([shared(3, "b", 11, question=1, text="1")], now=11, first_round=1) == 1
        assert ids(buffer, now=11) == {3}


def test_a_group_gains_no_use_by_an_item_that_was_signed_before_it_was_used(path: Path) -> None:
    uses = []
    with GroupBuffer(path, BufferConfig(max_age=10), item_life=30) as buffer:
        for now in range(100):
            if now <= 30:  # the life of an item that was signed when the group was made
                buffer.add([shared(now, received=now, question=1, text="1")], now=now, first_round=1)
            if drawn := buffer.candidates(now, 1):
                buffer.use(drawn, 1, now)
                uses.append(now)
            else:
                buffer.use([], 1, now)
    assert len(uses) == 1


def test_a_group_that_was_evicted_after_it_was_drawn_is_used_all_the_same(path: Path) -> None:
    with GroupBuffer(path, BufferConfig(max_groups=1)) as buffer:
        buffer.add([shared(1)], now=0, first_round=1)
        drawn = buffer.candidates(0, 1)
        buffer.add([shared(2, received=1)], now=1, first_round=1)
        buffer.bury([shared(1).id], 1)
        buffer.use(drawn, 1, now=1)
        assert (len(buffer), buffer.read([shared(1).id])) == (1, {})
        assert buffer.add([shared(3, received=1, question=1, text="1")], now=1, first_round=2) == 0
    with GroupBuffer(path, BufferConfig(max_groups=1)) as buffer:
        assert len(buffer) == 1


def test_time_does_not_go_back_behind_the_newest_group(path: Path) -> None:
    with GroupBuffer(path, BufferConfig(max_age=10)) as buffer:
        buffer.add([shared(1), shared(2, received=9)], now=9, first_round=1)
        buffer.add([shared(3, received=12)], now=1, first_round=1)  # the clock was set back while it came
        assert ids(buffer, now=1) == {2, 3}
        buffer.add([shared(4, received=1)], now=1, first_round=1)
        assert [(number_of(candidate), candidate.received) for candidate in buffer.candidates(1, 1)] == [
            (2, 9),
            (3, 12),
            (4, 12),
        ]
        use(buffer, 2, 1, now=1)
        buffer.use([], 2, now=20)
        assert shared(2).id not in buffer
        assert buffer.add([shared(5, received=20, question=2, text="2")], now=20, first_round=1) == 0  # used at 12


def test_a_group_waits_for_its_first_round(path: Path) -> None:
    with GroupBuffer(path, BufferConfig()) as buffer:
        buffer.add([shared(1)], now=0, first_round=3)
        buffer.add([shared(2)], now=0, first_round=2)
        assert ids(buffer, round_number=1) == set()
        assert ids(buffer, round_number=2) == {2}
        buffer.rewind(1)
        assert ids(buffer, round_number=2) == {2}
        assert ids(buffer, round_number=3) == {1, 2}


def test_groups_have_the_order_of_their_coming_when_they_are_read_again(path: Path) -> None:
    with GroupBuffer(path, BufferConfig()) as buffer:
        buffer.add([shared(number, received=5) for number in (3, 4)], now=5, first_round=1)
        buffer.add([shared(number, received=1) for number in (2, 1)], now=5, first_round=1)
        before = buffer.candidates(5, 1)
        assert list(map(number_of, before)) == [3, 4, 1, 2]
    with GroupBuffer(path, BufferConfig()) as buffer:
        assert buffer.candidates(5, 1) == before


def test_all_that_a_peer_has_here_is_found_but_for_what_is_buried(path: Path) -> None:
    with GroupBuffer(path, BufferConfig()) as buffer:
        buffer.add([shared(1, "a"), shared(2, "b", question=1), shared(3, "c"), shared(4, "b")], now=0, first_round=1)
        assert set(buffer.signers) == {"a", "b", "c"}
        buffer.bury([shared(4).id], 1)
        assert list(map(number_of, buffer.of_signers({"a", "b"}))) == [1, 2]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "add", "add", "draw", "use", "use", "bury", "rewind", "set the clock back"]),
            st.integers(0, 3),
            st.integers(0, 3),
        ),
        min_size=10,
        max_size=40,
    )
)
def test_what_may_be_drawn_is_the_same_whether_it_is_kept_up_or_found_anew(
    steps: list[tuple[str, int, int]],
) -> None:
    """A buffer that was asked after every step says what one does that reads the same file and was never asked."""
    bounds = BufferConfig(max_age=5, max_groups=4)
    now, number, made = 0.0, 1, 0
    with tempfile.TemporaryDirectory() as folder, GroupBuffer(Path(folder, "pool.sqlite"), bounds) as buffer:
        for step, which, ahead in steps:
            may = buffer.candidates(now, number)
            now += ahead / 2
            match step:
                case "add":
                    made += 1
                    buffer.add([shared(made, received=now, question=which // 2, text=str(which))], now, number + ahead)
                case "draw":
                    number += ahead
                case "use" if may:
                    buffer.use([may[which % len(may)]], number, now)
                case "bury" if may:
                    buffer.bury([may[which % len(may)].id], number)
                case "rewind":
                    number = max(1, number - ahead)
                    buffer.rewind(number)
                case "set the clock back":
                    now = max(0.0, now - which * ahead)
            with GroupBuffer(Path(folder, "pool.sqlite"), bounds) as fresh:
                assert buffer.candidates(now, number) == fresh.candidates(now, number)
                assert (len(buffer), set(buffer.signers)) == (len(fresh), set(fresh.signers))


@pytest.mark.parametrize("version", [1, 5, 9])
def test_a_file_of_another_version_is_refused_and_stays_as_it_is(path: Path, version: int) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE groups (id BLOB PRIMARY KEY, body BLOB)")
        db.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(UserError, match=r"is of another version: delete it; .* the checkpoints stay"):
        GroupBuffer(path, BufferConfig())
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall() == [("groups",)]


def test_rewinding_forgets_only_later_rounds(path: Path) -> None:
    with GroupBuffer(path, BufferConfig()) as buffer:
        buffer.add([shared(1), shared(2)], now=0, first_round=1)
        use(buffer, 1, 3)
        use(buffer, 2, 4)
        buffer.rewind(3)
        assert ids(buffer) == {2}


def test_what_is_buried_is_drawn_no_more_and_does_not_come_again(path: Path) -> None:
    with GroupBuffer(path, BufferConfig(max_age=10)) as buffer:
        buffer.add([shared(1, question=7), shared(2, question=7), shared(3)], now=0, first_round=1)
        buffer.bury([shared(1).id, shared(9).id], 4)
        assert ids(buffer) == {2, 3} and len(buffer) == 2  # another group of its question may be drawn now
        assert shared(1).id in buffer and buffer.add([shared(1)], now=0, first_round=5) == 0
    with GroupBuffer(path, BufferConfig(max_age=10)) as buffer:
        assert ids(buffer) == {2, 3} and len(buffer) == 2
        buffer.rewind(3)
        assert ids(buffer) == {1, 3}  # the round that is done again draws the same, and finds out the same
        buffer.bury([shared(1).id], 4)
        buffer.add([], now=11, first_round=5)
        assert len(buffer) == 0 and shared(1).id not in buffer


def test_old_groups_are_neither_drawn_nor_kept(path: Path) -> None:
    with GroupBuffer(path, BufferConfig(max_age=10)) as buffer:
        buffer.add([shared(1, received=0), shared(2, received=8)], now=8, first_round=1)
        assert ids(buffer, now=11) == {2}
        buffer.add([], now=11, first_round=1)
        assert len(buffer) == 1


def test_one_peer_cannot_fill_the_buffer(path: Path) -> None:
    bounds = BufferConfig(max_groups=10)
    with GroupBuffer(path, bounds) as buffer:
        buffer.add([shared(n, "honest", received=n) for n in range(3)], now=0, first_round=1)
        buffer.add([shared(100 + n, "flood", received=100 + n) for n in range(50)], now=0, first_round=1)
        assert ids(buffer) == {0, 1, 2} | {145, 146, 147, 148, 149}


items = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from("abc"), st.integers(0, 100), st.integers(0, 20_000)), max_size=40
)


@settings(max_examples=30, deadline=None)
@given(st.lists(items, min_size=1, max_size=3), st.integers(1, 12))
def test_every_bound_holds_on_disk_and_in_memory(batches: list[list[tuple[int, str, int, int]]], most: int) -> None:
    bounds = BufferConfig(max_groups=most, max_bytes=1 << 16, max_age=60)
    path = Path(":memory:")
    with GroupBuffer(path, bounds) as buffer:
        for batch in batches:
            buffer.add([shared(n, peer, received, size) for n, peer, received, size in batch], now=100, first_round=1)
            rows = list(buffer._db.execute("SELECT id, peer, length(body), received FROM groups"))
            assert len(rows) == len(buffer) <= most
            assert sum(size for _, _, size, _ in rows) <= bounds.max_bytes
            assert all(received >= 40 for *_, received in rows)
            for peer in "abc":
                mine = [size for _, one, size, _ in rows if one == peer]
                assert len(mine) <= max(most * 0.5, 1) and sum(mine) <= bounds.max_bytes * 0.5


@pytest.mark.slow
def test_what_was_added_survives_kill_9(path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from node.config import BufferConfig
from node.rollouts.group_buffer import GroupBuffer
from tests.unit.test_node_group_buffer import shared, use
buffer = GroupBuffer(Path({str(path)!r}), BufferConfig())
buffer.add([shared(n) for n in range(5)], now=0, first_round=1)
use(buffer, 3, 7)
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, timeout=60, env=os.environ, check=False)
    assert ended.returncode == -signal.SIGKILL
    with GroupBuffer(path, BufferConfig()) as buffer:
        assert ids(buffer) == {0, 1, 2, 4}
        buffer.rewind(6)
        assert ids(buffer) == {0, 1, 2, 3, 4}
        assert buffer.read([shared(4).id]) == {shared(4).id: shared(4).group}


def test_own_results_survive_a_restart_and_those_of_rounds_that_are_done_again_are_forgotten(path: Path) -> None:
    first, second = OwnResult("sums", None, 4.5, 0.25), OwnResult("bases", 3.0, 4.0, 1.0)
    with GroupBuffer(path, BufferConfig()) as buffer:
        assert [*buffer.record_own_results(1, [first])] == [first]
        assert [*buffer.record_own_results(2, [second])] == [*buffer.record_own_results(2, [second])] == [first, second]
    with GroupBuffer(path, BufferConfig()) as buffer:
        buffer.rewind(1)
        assert [*buffer.record_own_results(2, [])] == [first]
        assert [*buffer.record_own_results(1 + KEPT, [second])] == [second]
    with GroupBuffer(path, BufferConfig()) as buffer:
        assert [*buffer.record_own_results(2 + KEPT, [])] == [second]


def test_an_answers_usual_length_is_that_of_own_right_ones_then_of_own_ones_then_of_other_tasks() -> None:
    wrong, right = own_result("sums", [2, 9, 4], [0.0, 0.5, 0.0]), own_result("sums", [3, 9, 5], [1.0, 0.0, 1.0])
    assert wrong == ("sums", None, 4, pytest.approx(1 / 6)) and right == ("sums", 4, 5, pytest.approx(2 / 3))
    other = own_result("bases", [7, 7], [1.0, 0.0])
    assert usual([wrong, other], "sums") == 4
    assert usual([wrong, right, own_result("sums", [8, 1], [1.0, 0.0]), other], "sums") == 6
    assert usual([wrong, other], "days") == 7
    assert usual([wrong], "days") == 4
    assert usual([], "days") == 0


def usual(own: list[OwnResult], task: str) -> float:
    results = OwnResults()
    results.put(1, [*own, *own])  # what a round had is replaced
    results.put(1, own)
    return results.usual_length(task)


def test_what_a_node_gets_itself_is_the_mean_of_its_last_groups_of_the_task_and_the_same_after_a_restart(
    path: Path,
) -> None:
    def result(reward: float, task: str = "sums") -> OwnResult:
        return OwnResult(task, None, 1.0, reward)

    with GroupBuffer(path, BufferConfig()) as buffer:
        assert buffer.own_results.reward("sums") == 0
        for number in range(1, RECENT):
            buffer.record_own_results(number, [result(1.0), result(0.5), result(0.0, "bases")])
        assert (buffer.own_results.reward("sums"), buffer.own_results.reward("bases")) == (0.75, 0)
        buffer.record_own_results(RECENT, [result(0.0)] * RECENT)
        buffer.record_own_results(RECENT, [result(0.25)] * RECENT)  # in place of what the round had
        assert buffer.own_results.reward("sums") == 0.25
        buffer.record_own_results(RECENT + KEPT - 1, [result(0.5)] * 2)
        assert buffer.own_results.reward("sums") == pytest.approx((0.25 * (RECENT - 2) + 0.5 * 2) / RECENT)
        buffer.record_own_results(
            RECENT + KEPT, []
        )  # results over `KEPT` rounds old are forgotten, even if there are few since
        assert buffer.own_results.reward("sums") == 0.5
    with GroupBuffer(path, BufferConfig()) as buffer:
        assert buffer.own_results.reward("sums") == 0.5


def test_what_is_written_in_a_transaction_is_there_at_its_end_or_not_at_all(path: Path) -> None:
    with GroupBuffer(path, BufferConfig()) as buffer, closing(sqlite3.connect(path)) as other:

        def rows() -> list[int]:
            return [
                other.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] for table in ("groups", "uses", "buried")
            ]

        with buffer.transaction():
            buffer.add([shared(1)], 0.0, 1)
            use(buffer, 1, 1)
            assert rows() == [0, 0, 0]
        assert rows() == [1, 1, 0]
        with suppress(ZeroDivisionError), buffer.transaction():
            buffer.bury([shared(1).id], 2)
            raise ZeroDivisionError
        assert rows() == [1, 1, 0]


def test_a_reward_that_misses_all_there_is_by_rounding_is_a_right_answers() -> None:
    assert own_result("sums", [3, 9], [sum([0.1] * 10), 0.5]).right_length == 3


def test_a_count_outlives_the_process_and_a_rewinding(path: Path) -> None:
    with GroupBuffer(path, BufferConfig()) as buffer:
        assert buffer.count("asked") == 0
        buffer.set_count("asked", 3)
        buffer.set_count("asked", 5)
    with GroupBuffer(path, BufferConfig()) as buffer:
        buffer.rewind(0)
        assert (buffer.count("asked"), buffer.count("drawn")) == (5, 0)
