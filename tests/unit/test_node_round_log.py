"""The line that a running node says now and then."""

from typing import Any

from node.telemetry.round_log import INTERVAL_S, RoundLog


def row(number: int, **more: Any) -> dict[str, Any]:
    return {
        "round": number,
        "reward": 0.5,
        "groups_local": 4,
        "groups_external": 2,
        "tokens_generated": 320,
        "swarm/peers": 3,
        **more,
    }


def test_quick_rounds_share_a_line() -> None:
    said = RoundLog(100.0)
    assert said.after_round(row(1, reward=0.0), 104.0) is None
    assert said.after_round(row(2, reward=None), 108.0) is None
    line = said.after_round(row(3, reward=0.9, **{"swarm/peers": 4}), 112.0)
    assert line == {
        "round": 3,
        "reward": 0.3,
        "own": 12,
        "external": 6,
        "peers": 4,
        "s_per_round": 4.0,
        "tokens_per_s": 80,
    }
    assert said.after_round(row(4), 112.0 + INTERVAL_S - 0.1) is None


def test_a_slow_round_has_a_line_of_its_own() -> None:
    said = RoundLog(0.0)
    for number in (1, 2, 3):
        line = said.after_round(row(number), 26.0 * number)
        assert line is not None
        assert (line["round"], line["own"], line["s_per_round"]) == (number, 4, 26.0)


def test_answers_that_could_not_be_scored_are_counted_where_there_are_any() -> None:
    said = RoundLog(0.0)
    assert said.after_round(row(1, unscorable=3), 5.0) is None
    line = said.after_round(row(2, unscorable=4), 12.0)
    assert line is not None and line["unscorable"] == 7
    later = said.after_round(row(3, unscorable=0), 30.0)
    assert later is not None and "unscorable" not in later
