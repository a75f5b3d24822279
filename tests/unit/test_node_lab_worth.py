"""What a swarm is worth: the arithmetic of curves, pooling efficiency and what it says of itself."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.lab.figures import tabulate
from node.lab.plan import Lab, LabConfig
from node.lab.plots import plot
from node.lab.results import RunResult
from node.lab.tables import to_json, to_markdown
from node.lab.worth import (
    MeanPoint,
    Pooling,
    compute_until,
    isotonic,
    mean_curve,
    pairs_at_equal_compute,
    pooling_efficiency,
)

VALUES = st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 10)), min_size=1, max_size=20)


def run(arm: str, seed: int, accuracies: list[float], nodes: int = 1, spent: float = 1600.0, **more: Any) -> RunResult:
    """A run of four marks, each at twice the compute of the one before, from an accuracy of 0.1 at the start."""
    marks = [(spent / 2 ** (len(accuracies) - 1 - at), accuracy) for at, accuracy in enumerate(accuracies)]
    figures: dict[str, Any] = dict.fromkeys(("reward", "external", "groups_kib"), 0.0)
    figures |= {"accuracy": accuracies[-1], "passes": {}, **more}
    return RunResult("", arm, seed, 2, compute=spent, nodes=nodes, curve=((0.0, 0.1), *marks), **figures)


@pytest.mark.parametrize(
    ("values", "weights", "fitted"),
    [
        ([1, 2, 3], [1, 1, 1], [1, 2, 3]),
        ([3, 2, 1], [1, 1, 1], [2, 2, 2]),
        ([1, 3, 2, 4], [1, 1, 1, 1], [1, 2.5, 2.5, 4]),
        ([1, 3, 2, 4], [1, 1, 3, 1], [1, 2.25, 2.25, 4]),
        ([2, 2, 1], [1, 1, 1], [5 / 3] * 3),
        ([], [], []),
    ],
)
def test_a_fit_that_never_falls_by_hand(values: list[float], weights: list[float], fitted: list[float]) -> None:
    assert isotonic(values, weights) == pytest.approx(fitted)


@given(VALUES)
def test_a_fit_never_falls_keeps_the_mean_and_leaves_what_never_falls(points: list[tuple[float, float]]) -> None:
    values, weights = map(list, zip(*points, strict=True))
    fitted = isotonic(values, weights)
    assert all(before <= after + 1e-12 for before, after in pairwise(fitted))
    total = sum(value * weight for value, weight in points)
    assert sum(fit * weight for fit, weight in zip(fitted, weights, strict=True)) == pytest.approx(total)
    assert isotonic(fitted, weights) == pytest.approx(fitted)
    assert isotonic(sorted(values), weights) == sorted(values)


@given(VALUES, st.lists(st.floats(0, 1), min_size=20, max_size=20))
def test_no_other_sequence_that_never_falls_is_closer(points: list[tuple[float, float]], other: list[float]) -> None:
    values, weights = map(list, zip(*points, strict=True))

    def distance(sequence: list[float]) -> float:
        return sum(weight * (one - value) ** 2 for one, value, weight in zip(sequence, values, weights, strict=True))

    assert distance(isotonic(values, weights)) <= distance(sorted(other[: len(values)])) + 1e-9


def test_a_curve_is_the_mean_over_seeds_at_each_mark_of_all_nodes_compute() -> None:
    first, last = mean_curve([run("a", 1, [0.2, 0.4], nodes=4), run("a", 2, [0.4, 0.8], nodes=4, spent=1700.0)])
    assert first == pytest.approx((4 * math.sqrt(800 * 850), 0.3, 2))
    assert last == pytest.approx((4 * math.sqrt(1600 * 1700), 0.6, 2))


def test_marks_that_one_run_alone_has_are_its_own() -> None:
    curve = mean_curve([run("a", 1, [0.2, 0.3, 0.4]), run("a", 2, [0.4, 0.8])])
    assert [round(point.compute) for point in curve] == [400, 800, 1600]
    assert [point.seeds for point in curve] == [1, 2, 2]


@pytest.mark.parametrize(
    ("accuracies", "wanted", "compute"),
    [
        ([0.2, 0.4, 0.6, 0.8], 0.4, 400),
        ([0.2, 0.4, 0.6, 0.8], 0.5, 400 * math.sqrt(2)),  # half of the way on the logarithm
        ([0.2, 0.4, 0.6, 0.8], 0.8, 1600),
        ([0.2, 0.4, 0.6, 0.8], 0.81, math.inf),
        ([0.2, 0.4, 0.6, 0.8], 0.1, 0),
        ([0.2, 0.2, 0.2, 0.8], 0.3, 800 * 2 ** (1 / 6)),
        ([0.2, 0.6, 0.4, 0.8], 0.5, 400),  # both marks have 0.5 in the fit: the first counts
        ([0.4, 0.4, 0.4, 0.4], 0.4, 0),
    ],
)
def test_compute_until_an_accuracy_is_between_two_marks_on_the_logarithm(
    accuracies: list[float], wanted: float, compute: float
) -> None:
    curve = [MeanPoint(200 * 2**at, accuracy, 1) for at, accuracy in enumerate(accuracies)]
    assert compute_until(curve, wanted) == pytest.approx(compute)


def pooling_of(swarm: list[float], central: list[list[float]]) -> Pooling:
    swarms = [run("swarm", seed, [0.2, one], nodes=8, spent=200.0) for seed, one in enumerate(swarm, 1)]
    pairs = pairs_at_equal_compute(swarms, [run("central", seed, one) for seed, one in enumerate(central, 1)])
    pooling = pooling_efficiency(pairs)
    assert pooling is not None
    return pooling


RISING = [0.2, 0.4, 0.6, 0.8]


@pytest.mark.parametrize(
    ("swarm", "central", "said"),
    [
        ([0.6] * 5, [RISING] * 5, "0.50 (0.50 to 0.50)"),
        ([0.7] * 5, [RISING] * 5, "0.71 (0.71 to 0.71)"),
        ([0.9] * 5, [RISING] * 5, "> 1"),
        ([0.1] * 5, [RISING] * 5, "< 0.12"),
        ([0.4, 0.5, 0.6, 0.7, 0.8], [RISING] * 5, "not told apart"),
        ([0.75, 0.78, 0.8, 0.82, 0.85], [RISING] * 5, "not told apart"),  # some resamples never get there
        ([0.6], [RISING], "one seed"),
        ([0.9], [RISING], "one seed"),
    ],
)
def test_pooling_efficiency_says_what_it_knows(swarm: list[float], central: list[list[float]], said: str) -> None:
    assert str(pooling_of(swarm, central)) == said


def test_the_interval_is_a_bootstrap_over_seeds_that_is_the_same_each_time() -> None:
    swarm, central = [0.58, 0.6, 0.62, 0.6, 0.59], [[0.2, 0.4, one, 0.8] for one in (0.55, 0.6, 0.65, 0.6, 0.58)]
    pooling = pooling_of(swarm, central)
    assert pooling == pooling_of(swarm, central)
    assert 0.45 < pooling.low < pooling.value < pooling.high < 0.55


def test_runs_are_paired_by_seed_and_only_at_equal_total_compute() -> None:
    swarm = [run("swarm", seed, [0.2, 0.5], nodes=8, spent=200.0) for seed in (1, 2, 4)]
    central = [run("central", seed, RISING) for seed in (2, 3, 4)]
    assert [(pair.swarm.seed, pair.central.seed) for pair in pairs_at_equal_compute(swarm, central)] == [(2, 2), (4, 4)]
    alone = [run("alone", seed, [0.2, 0.5], nodes=3, spent=200.0) for seed in (2, 4)]
    assert pairs_at_equal_compute(alone, central) == pairs_at_equal_compute(swarm, []) == []


def test_a_smaller_swarm_is_held_against_the_central_node_when_it_had_spent_as_much() -> None:
    swarm = [run("swarm", seed, [0.2, 0.5], nodes=2, spent=202.0, external=3.0) for seed in (1, 2)]
    central = [run("central", seed, [0.2, 0.3 + seed / 10, 0.6, 0.8]) for seed in (1, 2)]
    pairs = pairs_at_equal_compute(swarm, central)
    assert [pair.central_accuracy for pair in pairs] == [0.4, 0.5]
    pooling = pooling_efficiency(pairs)
    assert pooling is not None and pooling.most == pytest.approx(1600 / 404), "more than the swarm spent was measured"
    assert pooling.value == pytest.approx(400 * 2 ** (0.05 / 0.15) / 404)
    assert pairs_at_equal_compute([run("swarm", 1, [0.5], nodes=3, spent=200.0, external=3.0)], central) == []
    apart = [run("alone", 1, [0.5], nodes=2, spent=200.0)]
    assert pairs_at_equal_compute(apart, central) == [], "nodes that do not meet are no swarm"
    averaging = [run("averaging", 1, [0.5], nodes=2, spent=200.0, weights_kib=9.0)]
    assert len(pairs_at_equal_compute(averaging, central)) == 1, "nodes that share weights alone are one"


def test_without_marks_there_is_no_pooling_efficiency() -> None:
    pairs = pairs_at_equal_compute([run("swarm", 1, [0.5], nodes=8, spent=200.0)], [run("central", 1, [0.4])])
    assert len(pairs) == 1 and pooling_efficiency(pairs) is None


def experiment() -> tuple[Lab, list[RunResult]]:
    arms: dict[str, Any] = {name: {} for name in ("central", "swarm", "alone")}
    lab = Lab("worth", LabConfig(arms=arms, baseline="alone", central="central"), [])
    found = [run("central", seed, [0.2, 0.4, 0.6, 0.7 + seed / 100]) for seed in (1, 2, 3)]
    found += [run("swarm", seed, [0.2, 0.3, 0.6 + seed / 100], nodes=8, spent=200.0) for seed in (1, 2, 3)]
    found += [run("alone", seed, [0.2, 0.3], nodes=2, spent=200.0) for seed in (1, 2, 3)]
    return lab, found


def test_the_table_and_the_json_hold_a_swarm_against_the_central_node_and_nothing_else() -> None:
    lab, found = experiment()
    lines = tabulate(found, lab.baseline, lab.config.central)
    table = to_markdown(lines, lab).splitlines()
    assert "pooling efficiency" in table[0] and "accuracy less central's at equal total compute" in table[0]
    central, swarm, alone = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:])
    titles = [cell.strip() for cell in table[0].split("|")[1:-1]]
    pooling, less = titles.index("pooling efficiency"), titles.index("accuracy less central's at equal total compute")
    assert (central[pooling], central[less], alone[pooling], alone[less]) == ("", "", "", "")
    assert swarm[pooling].startswith("0.5") and swarm[less] == "-0.1 ± 0"
    tree = json.loads(to_json(found, lines, lab))
    assert tree["arms"][1]["pooling"]["said"] == swarm[pooling] and "pooling" not in tree["arms"][0]
    assert tree["runs"][0]["curve"][1] == [200.0, 0.2]


def test_accuracy_stays_in_the_table_when_nobody_is_ever_right() -> None:
    lab = Lab("none", LabConfig(arms={"a": {}, "b": {}}), [])
    found = [run(arm, seed, [0.0, 0.0]) for arm in "ab" for seed in (1, 2)]
    table = to_markdown(tabulate(found, "a"), lab)
    assert "| accuracy |" in table.splitlines()[0] and "reward" not in table


@pytest.mark.parametrize(("central", "arms"), [("central", {"central", "swarm"}), ("", {"central", "swarm", "alone"})])
def test_curves_over_total_compute_are_of_the_central_node_and_of_what_spent_as_much(
    central: str, arms: set[str], tmp_path: Path
) -> None:
    _, found = experiment()
    assert plot(found, tmp_path, "a", central) == ["a.svg", "a-curves.svg"]
    drawn = (tmp_path / "a-curves.svg").read_text()
    assert {arm for arm in ("central", "swarm", "alone") if f"<!-- {arm} -->" in drawn} == arms
    assert "compute of all nodes together" in drawn
