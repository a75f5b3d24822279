"""The benchmark of a round: both sides do the same work, and the peers' groups really come."""

import pytest
import torch

from benchmarks.round import run

SHARING = ["sharing on", "sharing off, beside others", "sharing off"]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_both_sides_make_the_same_completions_and_the_last_row_has_the_ratios(threads):
    *rows, last = run(rounds=3, blocks=1, compare="trl")

    assert [row["impl"] for row in rows] == ["gossamer", "trl", "gossamer", "trl"]
    assert all(row["bench"] == "round" and row["median_s"] > 0 and row["runs"] == 3 for row in rows)
    assert [row["same_completions"] for row in rows[:2]] == [1, 1]
    assert all(row["same_completions"] > 0.9 for row in rows[2:])  # TRL steps in a round without signal, we do not
    assert last["ratio"]["trl"]["reward=dense"] == rows[0]["median_s"] / rows[1]["median_s"]


@pytest.mark.slow
def test_peers_groups_come_and_change_no_completion_and_the_last_row_has_the_ratios(threads):
    *rows, last = run(rounds=20, blocks=1, compare="sharing")  # after so many rounds that the node knows its pace

    assert [row["impl"] for row in rows] == SHARING
    assert all(row["bench"] == "round" and row["median_s"] > 0 and row["runs"] == 20 for row in rows)
    assert rows[0]["peers_groups_a_round"] > 0
    assert rows[0]["same_completions"] == 1
    ratio = last["ratio"]["sharing off"]
    assert ratio["peers=7"] == rows[0]["median_s"] / rows[2]["median_s"]
    assert ratio["peers=7 cpu, beside others"] == rows[0]["mean_cpu_s"] / rows[1]["mean_cpu_s"]
