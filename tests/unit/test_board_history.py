"""A board's memory: last reports, curves that get thinner with age, bounds, and a kill at any moment."""

import multiprocessing
import os
import signal
import sqlite3
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from node.board.history import DAY_S, HOUR_S, MINUTE_S, BoardHistory
from node.swarm.reports import NodeReport
from tests.locks import WatchedLock, watched

START = 1_700_006_400.0  # a day begins
LATELY = 750.0


def report(reward: float | None = 0.5, accuracy: float | None = None, **taught_by: int) -> NodeReport:
    return NodeReport(0, "gossamer/0.1.0", "builtin", 7, reward, accuracy, {"sums": reward or 0.0}, taught_by)


def test_a_nodes_last_report_is_remembered_and_when_its_first_came(tmp_path: Path) -> None:
    with BoardHistory(tmp_path / "h", LATELY) as history:
        history.add("a", report(0.25), START)
        history.add("a", report(0.5, 0.75), START + 300)
        (one,) = history.nodes()
    assert (one.first, one.last, one.reward, one.accuracy) == (START, START + 300, 0.5, 0.75)
    assert (one.model, one.rounds, one.rewards) == ("builtin", 7, {"sums": 0.5})


def test_what_was_taught_adds_up_and_fades(tmp_path: Path) -> None:
    with BoardHistory(tmp_path / "h", LATELY) as history:
        history.add("a", report(b=8, c=1), START)
        history.add("a", report(b=1), START + DAY_S)
        assert history.nodes()[0].taught_by == {"b": 5.0, "c": 0.5}
        history.add("a", report(), START + 9 * DAY_S)
        assert history.nodes()[0].taught_by == {"b": 5 / 256}


def test_a_node_stands_by_what_others_report(tmp_path: Path) -> None:
    with BoardHistory(tmp_path / "h", LATELY) as history:
        history.add("seed", report(a=3), START)
        history.add("a", report(), START)
        history.add("liar", report(liar2=9), START)
        history.add("liar2", report(liar=9), START)
        history.tick(START, ["seed"])
        nodes = history.nodes()
    assert nodes[0].id == "a"
    assert nodes[0].standing > 0.4
    assert {node.standing for node in nodes[1:]} == {0.0}


def test_liars_without_standing_do_not_move_the_swarms_curve(tmp_path: Path) -> None:
    with BoardHistory(tmp_path / "h", LATELY) as history:
        history.add("seed", report(0.4, a=3, b=3), START)
        history.add("a", report(0.5, 0.25), START)
        history.add("b", report(0.6), START)
        for number in range(50):
            history.add(f"liar{number}", report(1000.0, 1.0), START)
        history.tick(START, ["seed"])
        (point,) = history.curve()
    assert (point.nodes, point.accuracy) == (53, 0.25)
    assert point.reward in (0.5, 0.6)


def test_who_is_silent_counts_no_more(tmp_path: Path) -> None:
    with BoardHistory(tmp_path / "h", LATELY) as history:
        history.add("seed", report(a=1), START - 60)
        history.add("a", report(0.5), START)
        history.tick(START + LATELY - 1, ["seed"])
        history.tick(START + LATELY + 60, ["seed"])
        assert [(point.nodes, point.reward) for point in history.curve()] == [(1, 0.5), (0, None)]


def test_a_curve_gets_thinner_with_age_and_keeps_its_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "node.board.history.standing", lambda taught, seeds: {"a": 0.5}
    )  # three hours of walks are slow
    with BoardHistory(tmp_path / "h", LATELY) as history:
        for minute in range(3 * 60):
            now = START + 60 * minute
            history.add("a", report(minute / 100), now)
            history.tick(now, ["seed"])
        curve = history.curve()
    steps = [point.step for point in curve]
    assert steps == sorted(steps, reverse=True)
    assert steps.count(MINUTE_S) == 120
    assert [point.at for point in curve if point.step == HOUR_S] == [START]
    assert [point.reward for point in curve if point.step == HOUR_S] == pytest.approx([0.295])
    assert [point.at for point in curve] == sorted(point.at for point in curve)


def test_years_take_a_point_a_day(tmp_path: Path) -> None:
    with BoardHistory(tmp_path / "h", LATELY) as history:
        for day in range(40):
            history.tick(START + day * DAY_S, [])
        curve = history.curve()
        assert [point.step for point in curve] == 32 * [DAY_S] + 7 * [HOUR_S] + [MINUTE_S]


class WatchedConnection(sqlite3.Connection):
    """One that notes whether the thread holds `lock` at each statement."""

    lock: WatchedLock
    held: list[bool]

    def execute(self, *given: Any) -> sqlite3.Cursor:
        self.held.append(self.lock.is_mine)
        return super().execute(*given)

    def executemany(self, *given: Any) -> sqlite3.Cursor:
        self.held.append(self.lock.is_mine)
        return super().executemany(*given)


def test_each_statement_is_made_under_the_lock_for_any_thread_may_call(tmp_path: Path) -> None:
    opened = partial(sqlite3.connect, factory=WatchedConnection)
    WatchedConnection.held = []
    with (
        watched("node.board.history.Lock") as WatchedConnection.lock,
        mock.patch("node.board.history.sqlite3.connect", opened),
    ):
        history = BoardHistory(tmp_path / "h", LATELY, max_nodes=1)
    WatchedConnection.held.clear()  # what made the tables: nobody else had it yet
    with history:
        for call in (
            lambda: history.add("a", report(b=1), START),
            lambda: history.add("b", report(), START + 1),  # for which "a" makes room
            lambda: history.tick(START + 2, ["b"]),
            lambda: history.name_seeds(["b"]),
            history.seeds,
            history.nodes,
            history.curve,
        ):
            before = len(WatchedConnection.held)
            call()
            assert len(WatchedConnection.held) > before
    assert all(WatchedConnection.held)


def test_a_flood_of_identities_pushes_out_nobody_who_taught(tmp_path: Path) -> None:
    with BoardHistory(tmp_path / "h", LATELY, max_nodes=10) as history:
        history.add("seed", report(a=3), START)
        history.add("a", report(seed=1), START)
        history.tick(START, ["seed"])
        for number in range(30):
            history.add(f"made-up{number}", report(1.0), START + 1 + number)
        assert {node.id for node in history.nodes()} == {"seed", "a", *(f"made-up{number}" for number in range(22, 30))}
        assert history.curve("made-up0") == []
        assert len(history.curve("made-up29")) == 1


def test_a_flood_of_identities_does_not_push_out_a_seed_whom_nobody_names(tmp_path: Path) -> None:
    with BoardHistory(tmp_path / "h", LATELY, max_nodes=10) as history:
        history.add("seed", report(a=3), START)
        history.tick(START, ["seed"])
        for number in range(30):
            history.add(f"made-up{number}", report(1.0), START + 1 + number)
        history.tick(START + 60, ["seed"])
        assert "seed" in {node.id for node in history.nodes()}, "all standing begins with what it reports"


def _write_for_good(path: Path, ready) -> None:  # type: ignore[no-untyped-def]
    with BoardHistory(path, LATELY) as history:
        number = 0
        while True:
            history.add(f"n{number % 50}", report(0.5, n0=1), START + number)
            history.tick(START + number, ["n1"])
            number += 1
            ready.set()


@pytest.mark.slow
def test_what_was_written_is_there_after_a_kill(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    child = fork.Process(target=_write_for_good, args=(tmp_path / "h", ready))
    child.start()
    assert ready.wait(60)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    with BoardHistory(tmp_path / "h", LATELY) as history:
        assert history.nodes()[0].id.startswith("n")
        assert history.curve()
        history.add("after", report(), START)
