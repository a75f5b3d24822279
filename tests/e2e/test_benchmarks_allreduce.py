"""The benchmark of an all-reduce: both sides give the right sum, and the last row has the ratios."""

import sys

import pytest

from benchmarks import diloco
from benchmarks.allreduce import run
from tests.namespaces import why_impossible

OBSTACLE = why_impossible()


@pytest.mark.slow
def test_both_sides_add_up_and_the_last_row_has_the_ratios():
    *rows, last = run(ranks=[3], mib=[1], runs=2, ddp=True)

    steps, rows = rows[:3], rows[3:]
    assert [row["impl"] for row in steps] == ["alone", "gossamer-torch", "gloo"]
    assert last["ratio"]["ddp, gloo"]["ranks=3"] == steps[1]["median_s"] / steps[2]["median_s"]
    assert [row["impl"] for row in rows] == ["gossamer", "gossamer-tcp", "gossamer-torch", "gloo"]
    assert all(row["median_s"] > 0 and row["runs"] == 2 and row["ranks"] == 3 for row in rows)
    assert all(row["cpu_s"] > 0 for row in rows)
    assert [row["paper_mib"] for row in (rows[1], rows[3])] == [9.3, 7.3]
    for name, row in {"gloo": rows[0], "gloo, tcp": rows[1], "gloo, torch": rows[2]}.items():
        assert last["ratio"][name]["ranks=3 mib=1"] == row["median_s"] / rows[3]["median_s"]


@pytest.mark.slow
def test_one_row_says_why_there_is_no_pccl_and_what_to_do():
    rows = [*run(ranks=[2, 2], mib=[0.25], runs=1, against=["pccl"], pccl_python=sys.executable)]
    assert {row["impl"] for row in rows[:-1]} == {"gossamer", "gossamer-tcp", "pccl"}
    (pccl,) = [row for row in rows[:-1] if row["impl"] == "pccl"]
    assert pccl["median_s"] is None and "cannot load pypccl" in pccl["error"] and "--pccl-python" in pccl["error"]


@pytest.mark.slow
@pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)
def test_outer_steps_go_on_when_a_member_is_killed_and_when_one_joins():
    row = diloco.measure("gossamer", [1000.0] * 3, mib=1, codec="int8", steps=2)
    assert row["median_s"] > row["limit_s"] > 0
    assert row["killed_s"] > 0 and row["joined_s"] > 0
    assert row["sent_mib"] == pytest.approx(4 / 3 / 4, rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)
def test_sums_of_gloo_end_when_a_member_is_killed():
    row = diloco.measure("gloo", [1000.0] * 3, mib=1, codec="none", steps=2)
    assert row["median_s"] > row["limit_s"] and row["ended_s"] > 0
