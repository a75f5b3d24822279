"""The benchmark of an all-reduce: both sides give the right sum, and the last row has the ratios."""

from benchmarks.allreduce import run


def test_both_sides_add_up_and_the_last_row_has_the_ratios():
    *rows, last = run(ranks=[3], mib=[1], runs=2)

    assert [row["impl"] for row in rows] == ["gossamer", "gossamer-tcp", "gloo"]
    assert all(row["median_s"] > 0 and row["runs"] == 2 and row["ranks"] == 3 for row in rows)
    assert last["ratio"]["gloo"]["ranks=3 mib=1"] == rows[0]["median_s"] / rows[2]["median_s"]
    assert last["ratio"]["gloo, tcp"]["ranks=3 mib=1"] == rows[1]["median_s"] / rows[2]["median_s"]
