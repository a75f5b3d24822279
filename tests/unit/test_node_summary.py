"""The summary's figures, from rows as nodes write them."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from node.cli.swarm import evaluation_lines, reward_lines, teaching_lines
from node.metrics import Display, counted, shown_in
from node.telemetry.summary import summarise, summarise_node, write_summary

KEYS = {
    "rounds",
    "reward_cumulative",
    "reward_first",
    "reward_last",
    "groups_local",
    "groups_external",
    "rejected",
    "bytes_sent",
    "bytes_received",
    "seconds",
    "tokens_generated",
    "tokens_trained",
    "tokens_scored",
    "tokens_prompts",
    "accuracy_first",
    "accuracy_first_interval",
    "accuracy_last",
    "accuracy_last_interval",
    "pass8_first",
    "pass8_first_interval",
    "pass8_last",
    "pass8_last_interval",
}


def test_a_summary_has_the_total_of_each_metric_that_is_declared_for_it() -> None:
    declared = shown_in(Display.SUMMARY)
    values = {metric.name: {"a": at} if metric.label else at for at, metric in enumerate(declared, 1)}
    node = summarise_node([{"round": 1, **values}])
    assert [node[metric.name.rpartition("/")[2]] for metric in declared] == list(values.values())


def row(number: int, reward: float, **extra: object) -> dict[str, object]:
    return {"round": number, "reward": reward, "began": 1000.0 + number, "time/round": 0.5, **extra}


def test_first_and_last_are_means_over_a_tenth() -> None:
    node = summarise_node([row(index, float(index)) for index in range(1, 31)])
    assert set(node) == KEYS
    assert (node["rounds"], node["reward_first"], node["reward_last"]) == (30, 2.0, 29.0)
    assert (node["reward_cumulative"], node["seconds"]) == (465.0, 15.0)


def test_a_short_run_uses_its_first_and_last_round() -> None:
    node = summarise_node([row(1, 0.25), row(2, 0.75)])
    assert (node["reward_first"], node["reward_last"]) == (0.25, 0.75)


def test_swarm_is_the_mean_over_nodes_that_ran() -> None:
    nodes = {"n0": [row(1, 0.1), row(2, 0.3)], "n1": [row(1, 0.1), row(2, 0.5)], "n2": []}
    swarm = summarise(nodes, {}, started=1000.0)["swarm"]
    assert (swarm["reward_first"], swarm["reward_last"]) == (0.1, 0.4)
    assert abs(swarm["ratio"] - 4.0) < 1e-9


def test_tokens_are_summed_and_evaluations_belong_to_their_node() -> None:
    nodes = {name: [row(1, 0.1, tokens_generated=30, tokens_trained=20)] * 2 for name in ("n0", "n1")}
    evaluated = {"n0": [{"round": 0, "questions": 50, "accuracy": 0.1}, {"round": 2, "questions": 50, "accuracy": 0.5}]}
    summary = summarise(nodes, evaluated, started=0.0)
    assert (summary["nodes"]["n1"]["tokens_generated"], summary["nodes"]["n1"]["tokens_trained"]) == (60, 40)
    assert (summary["swarm"]["tokens_generated"], summary["swarm"]["tokens_trained"]) == (120, 80)
    assert [summary["nodes"][name]["accuracy_last"] for name in nodes] == [0.5, None]
    assert (summary["swarm"]["accuracy_first"], summary["swarm"]["accuracy_last"]) == (0.1, 0.5)


def test_a_run_that_begins_at_nothing_has_no_ratio() -> None:
    assert summarise({"n0": [row(1, 0.0), row(2, 0.5)]}, {}, started=0.0)["swarm"]["ratio"] is None
    assert summarise({}, {}, started=0.0)["swarm"]["ratio"] is None


def test_how_far_reward_went_is_told_over_tenths_of_the_rounds_done_and_as_a_factor_where_that_is_no_chance() -> None:
    def told(*nodes: list[float]) -> list[str]:
        rows = {f"n{at}": [row(*metric) for metric in enumerate(rewards, 1)] for at, rewards in enumerate(nodes)}
        return reward_lines(summarise(rows, {}, started=0.0))

    assert told([0.25] * 20 + [0.5] * 20) == [
        "mean reward 0.250 in the first tenth (4 rounds), 0.500 in the last (2.0 times)"
    ]
    assert told([0.01] * 20 + [0.5] * 20) == ["mean reward 0.010 in the first tenth (4 rounds), 0.500 in the last"]
    assert told([0.0] * 35, [0.0] * 22, []) == [
        "mean reward 0.000 in the first tenth (2 to 3 rounds), 0.000 in the last"
    ]
    assert told([0.0]) == ["mean reward 0.000 in the first tenth (1 round), 0.000 in the last"]
    assert told([], []) == []


def test_the_end_says_how_much_came_from_peers_and_that_its_worth_is_not_known() -> None:
    rows = {name: [row(1, 0.1, groups_local=2, groups_external=6), row(2, 0.1, groups_local=1)] for name in ("a", "b")}
    (line,) = teaching_lines(summarise(rows, {}, started=0.0))
    assert line == "12 of 18 groups came from peers; what they did for the reward is not known"
    assert teaching_lines(summarise({"a": [row(1, 0.1, groups_local=2)], "b": []}, {}, started=0.0)) == []


def test_first_round_is_measured_from_the_command_that_resumed() -> None:
    rows = [row(1, 0.1), row(2, 0.2), row(3, 0.3)]
    summary = summarise({"n0": rows, "n1": []}, {}, started=1001.5)
    assert summary["first_round_seconds"] == {"n0": 0.5, "n1": None}


def test_rejects_and_bytes_survive_a_restart_of_their_counters() -> None:
    rows = [
        row(1, 0.0, **{"swarm/bytes_sent": 100, "swarm/rejected": {"malformed": 1}}),
        row(2, 0.0, **{"swarm/bytes_sent": 250, "swarm/rejected": {"malformed": 3, "false_reward": 1}}),
        row(3, 0.0, **{"swarm/bytes_sent": 40, "swarm/rejected": {"false_reward": 1}}),
        row(4, 0.0, **{"swarm/bytes_sent": 90, "swarm/rejected": {"malformed": 2, "false_reward": 1}}),
    ]
    node = summarise_node(rows)
    assert node["bytes_sent"] == 340
    assert node["rejected"] == {"malformed": 5, "false_reward": 1}


@given(st.lists(st.lists(st.integers(0, 1000), min_size=1), min_size=1))
def test_a_counter_counts_every_step_of_every_life(lives: list[list[int]]) -> None:
    seen: list[int] = []
    expected = 0
    for steps in lives:
        value = 0
        life = []
        for step in steps:
            value += step
            life.append(value)
        if seen and life[0] >= seen[-1]:
            continue  # a restart that no reader of the counter alone can see
        seen += life
        expected += value
    assert counted(seen) == expected


def test_summary_is_plain_json(tmp_path: Path) -> None:
    summary = summarise({"n0": [row(1, 0.1)]}, {}, started=0.0)
    write_summary(summary, tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_the_last_lines_of_a_run_tell_held_out_accuracy_before_and_after() -> None:
    before, after = ({"round": 0, "questions": 100, "accuracy": rate, "pass@8": 2 * rate} for rate in (0.1, 0.5))
    swarm = summarise({"n0": [row(1, 0.1)]}, {"n0": [before, after]}, started=0.0)["swarm"]
    assert evaluation_lines(swarm) == [
        "held-out greedy accuracy 0.100 (0.055 to 0.174) before, 0.500 (0.404 to 0.596) after",
        "held-out pass@8 0.200 (0.133 to 0.289) before, 1.000 (0.963 to 1.000) after",
    ]
    only_before = summarise({}, {"n0": [before | {"pass@8": None}]}, started=0.0)["swarm"]
    assert evaluation_lines(only_before) == ["held-out greedy accuracy 0.100 (0.055 to 0.174) before"]
    assert evaluation_lines(summarise({}, {}, started=0.0)["swarm"]) == []
