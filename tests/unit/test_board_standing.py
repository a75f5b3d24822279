"""Standing: the probability that a walk from the seeds comes to a node; no made-up identity raises it."""

import random

import numpy as np
import pytest

from node.board.standing import ONWARD, WALKS, Taught, standing, weighted_median

HONEST = [f"h{n}" for n in range(12)]
FEW = 1000  # walks, where what they find is compared with what the same walks find
CROWD = [f"x{n}" for n in range(100)]


def swarm(seed: int = 1) -> dict[str, dict[str, float]]:
    """Honest nodes that learned of some others."""
    rng = random.Random(seed)
    return {
        member: {other: rng.randrange(1, 9) for other in rng.sample(HONEST, 5) if other != member} for member in HONEST
    }


def exact(taught: Taught, seeds: list[str]) -> dict[str, float]:
    """The same by linear algebra: visits from the seeds, over visits from the node itself."""
    names = sorted({*taught, *(other for row in taught.values() for other in row)})
    step = np.zeros((len(names), len(names)))
    for member, row in taught.items():
        for other, weight in row.items():
            step[names.index(member), names.index(other)] = ONWARD * weight / sum(row.values())
    visits = np.linalg.inv(np.eye(len(names)) - step)
    start = np.array([seeds.count(name) / len(seeds) for name in names])
    return dict(zip(names, (start @ visits - start) / visits.diagonal(), strict=True))


def test_a_chain_of_teachers() -> None:
    found = standing({"seed": {"a": 1}, "a": {"b": 2}, "b": {"a": 9, "c": 1}}, ["seed"])
    assert found["a"] == pytest.approx(ONWARD, abs=0.015)
    assert found["b"] == pytest.approx(ONWARD**2, abs=0.02)
    assert "seed" not in found


@pytest.mark.parametrize("seeds", [["h0"], ["h0", "h3", "h7"]])
def test_walks_find_the_probability(seeds: list[str]) -> None:
    found, wanted = standing(swarm(), seeds), exact(swarm(), seeds)
    for node in HONEST:
        error = (wanted[node] * (1 - wanted[node]) / WALKS) ** 0.5
        assert found.get(node, 0.0) == pytest.approx(wanted[node], abs=4 * error + 1e-9)


def test_the_same_reports_give_the_same_standing() -> None:
    assert standing(swarm(), ["h0"], FEW) == standing(swarm(), ["h0"], FEW)


def test_without_seeds_nobody_has_standing() -> None:
    assert standing(swarm(), []) == {}


def test_until_a_seed_reports_a_teacher_the_seeds_have_all_standing() -> None:
    crowd = {member: dict.fromkeys(CROWD, 1.0) for member in CROWD}
    assert standing(crowd, ["h0", "h3"], FEW) == {"h0": 0.5, "h3": 0.5}
    assert standing(crowd | {"h3": {"h1": 1.0}}, ["h0", "h3"], FEW).keys() == {"h1"}


def test_a_node_that_praises_itself_gains_nothing() -> None:
    before = standing(swarm(), ["h0"], FEW)
    taught = swarm()
    taught["h5"]["h5"] = 1e6
    assert standing(taught, ["h0"], FEW) == before


def test_a_hundred_identities_that_praise_each_other_have_no_standing() -> None:
    crowd = {member: {other: 1000.0 for other in CROWD if other != member} for member in CROWD}
    praise = {member: row | dict.fromkeys(HONEST, 1.0) for member, row in crowd.items()}
    assert standing(swarm() | praise, ["h0"], FEW) == standing(swarm(), ["h0"], FEW)


@pytest.mark.parametrize("back", [1.0, 1e9])
def test_a_teacher_that_makes_a_hundred_identities_does_not_raise_its_standing(back: float) -> None:
    before = standing(swarm(), ["h0"], FEW)
    crowd = {member: {"h5": back} | {other: 1.0 for other in CROWD if other != member} for member in CROWD}
    after = standing(swarm() | {"h5": dict.fromkeys(CROWD, 1.0)} | crowd, ["h0"], FEW)
    assert after["h5"] == before["h5"]
    assert max(after.get(member, 0.0) for member in CROWD) < before["h5"]
    assert all(after[node] <= before[node] for node in HONEST if node in after)


def test_an_identity_that_only_its_maker_names_stands_below_it() -> None:
    taught = swarm() | {"h5": {"x0": 1.0}, "x0": {"h5": 1.0, "x1": 5.0}}
    found = standing(taught, ["h0"], FEW)
    assert found["x0"] <= ONWARD * found["h5"] + 0.05
    assert found["x1"] < found["x0"]


@pytest.mark.parametrize("members", [1, 3])
def test_all_identities_that_a_node_makes_up_have_together_at_most_its_standing(members: int) -> None:
    makers = HONEST[5 : 5 + members]
    crowd = {key: {other: 1.0 for other in CROWD if other != key} for key in CROWD}
    found = standing(swarm() | {maker: dict.fromkeys(CROWD, 1.0) for maker in makers} | crowd, ["h0"])
    assert sum(found.get(key, 0.0) for key in CROWD) <= sum(found[maker] for maker in makers) + 0.02


@pytest.mark.parametrize(
    ("values", "median"),
    [
        ([], None),
        ([(0.5, 0.0)], None),
        ([(0.1, 0.0), (0.2, 0.0), (9.0, 0.0)], None),  # a young swarm: made-up identities would outnumber its nodes
        ([(0.1, 1.0), (0.2, 1.0), (900.0, 1.9)], 0.2),
        ([(0.1, 0.0), (0.4, 0.3), (0.6, 0.2)], 0.4),
    ],
)
def test_the_median_goes_by_weight(values: list[tuple[float, float]], median: float | None) -> None:
    assert weighted_median(values) == median
