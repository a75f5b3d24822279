"""The benchmark of gossip: real hosts hold everything, a dead side is a row and not a crash, bad options are told."""

import importlib
import re
import sys

import pytest
import typer

from benchmarks import spread
from benchmarks.crowd import Crowd
from benchmarks.gossip import run
from tests.namespaces import why_impossible

OBSTACLE = why_impossible()


@pytest.mark.slow
def test_everybody_holds_everything_at_little_more_than_its_own_bytes() -> None:
    small, large, *ingest, noise, text, last = run(nodes=(4,), kib=(10, 100), runs=1, ingest_groups=200)
    for row in (small, large):
        assert (row["impl"], row["failed"], row["held"], row["processes"]) == ("gossamer", 0, 1.0, 4)
        assert row["median_s"] > 0 and row["cpu_s"] >= 0
    assert large["sent_per_delivered"] <= 1.5
    assert [row["path"] for row in ingest] == ["frames", "buffer", "sockets"]
    assert all(row["bytes"] >= 10_000 and row["groups_per_cpu_s"] > 0 for row in ingest)
    assert [(row["part"], row["body"]) for row in (noise, text)] == [("large", "random"), ("large", "text")]
    assert noise["median_s"] > 0 and text["median_s"] > 0
    assert last == {"bench": "gossip", "ratio": {}}


def test_a_side_that_does_not_start_is_a_row_and_the_other_is_measured() -> None:
    absent, ours, last = run(nodes=(2,), kib=(10,), runs=1, hivemind_python=sys.executable, ingest_groups=0)
    assert absent["impl"] == "hivemind" and "ended" in absent["error"]  # this interpreter has no hivemind
    assert ours["impl"] == "gossamer" and ours["failed"] == 0
    assert last["ratio"] == {"hivemind": {"nodes=2 kib=10": None}}


def test_a_crowd_that_lost_a_process_says_so_and_stops() -> None:
    with Crowd([sys.executable, "-m", "benchmarks.gossip_peers", "00" * 16], 2, 2, 60) as crowd:
        crowd.join(1, 60)
        assert crowd.round(10_000, 20).held == 4
        crowd._children[1].kill()
        crowd._children[1].wait()
        assert "ended" in crowd.round(10_000, 20).error
        assert crowd.is_dead


@pytest.mark.parametrize(
    ("benchmark", "options", "hint"),
    [
        ("gossip", ["--nodes", "8,x"], "--nodes"),
        ("gossip", ["--nodes", "1"], "at least 2"),
        ("gossip", ["--kib", "0"], "--kib"),
        ("gossip", ["--against", "hivemind", "--hivemind-python", "/nowhere/python"], "--help"),
        ("allreduce", ["--against", "nccl"], "gloo,pccl"),
        *(("allreduce", ["--mib", mib], "sizes from 0.001 to 4096") for mib in ("x", "", "0", "nan", "1,-4", "5000")),
        ("round", ["--lengths", "256"], "two numbers"),
    ],
)
def test_bad_options_are_told_before_anything_is_measured(benchmark: str, options: list[str], hint: str) -> None:
    app = typer.Typer()
    app.command()(importlib.import_module(f"benchmarks.{benchmark}").command)
    with pytest.raises(typer.BadParameter, match=re.escape(hint)):
        app(options, standalone_mode=False)


@pytest.mark.slow
@pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)
def test_a_large_item_reaches_all_on_slow_lines_in_more_than_the_bound() -> None:
    row, last = spread.run(receivers=2, mb=[1], mbit=[20.0], runs=1, libtorrent_python="", home=False)
    assert row["median_s"] >= row["bound_s"] == 0.4
    assert last == {"bench": "spread", "ratio": {}}
