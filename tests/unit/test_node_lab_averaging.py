"""Weights averaged under the runner "memory": a node's own code, in the lockstep's time."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from collectives import Communicator
from collectives.outer_optimizer import TrainedParameters
from node.config import WeightsConfig
from node.errors import UserError
from node.fleet.local_swarm import PlanPart, make_plan, node_folders
from node.lab.averaging import AdamMoments, Averaging, LockstepWeights, optimizers_known
from node.lab.lockstep import run_in_memory
from node.lab.plan import ChurnConfig
from node.lab.results import read_run
from node.swarm.averaging import AveragedWeights, WeightExchange
from node.telemetry.metrics_file import read_metrics
from tests.unit.test_node_lab_memory import even_config
from tests.waiting import wait_until

LIMIT = 20.0


class Clock:
    now = 0

    def __call__(self) -> int:
        return self.now


class Node:
    """A node whose rounds each add something to all weights."""

    def __init__(self, start: float = 0.0) -> None:
        self.model = torch.nn.Linear(3, 1)
        for parameter in self.model.parameters():
            torch.nn.init.constant_(parameter, start)
        self.policy = type("Policy", (), {"model": self.model, "name": "linear"})
        self.weights: AveragedWeights
        self.number = 0

    def learn(self, value: float) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(value)

    def round(self, learnt: float) -> dict[str, object]:
        self.learn(learnt)
        self.number += 1
        return dict(self.weights.after_round(self.number))

    @property
    def flat(self) -> torch.Tensor:
        return TrainedParameters(self.model).flat_copy()

    @property
    def value(self) -> float:
        assert (self.flat == self.flat[0]).all()
        return self.flat[0].item()


class Swarm:
    """Nodes of one group, whose rounds are the lockstep's."""

    def __init__(self, count: int, mode: str = "average", every: int = 2, delay: int = 0, **options: object) -> None:
        self.clock = Clock()
        self.group = Averaging(delay, **{"present": set(range(count))} | options)
        self.nodes = [Node() for _ in range(count)]
        for index, node in enumerate(self.nodes):
            config = WeightsConfig(mode=mode, every=every)
            node.weights = LockstepWeights(index, self.group, config, node.policy, self.clock)
        for node in self.nodes:
            node.weights.begin()

    def round(self, *learnt: float, of: list[int] | None = None) -> list[dict[str, object]]:
        self.clock.now += 1
        return [self.nodes[at].round(value) for at, value in zip(of or range(len(self.nodes)), learnt, strict=True)]


def test_the_mean_is_taken_up_a_round_later_and_what_was_learnt_meanwhile_stays() -> None:
    swarm = Swarm(2)
    assert [row["weights/members"] for row in swarm.round(1.0, 3.0)] == [2, 2]  # all have just joined
    assert swarm.round(1.0, 3.0) == [{}, {}]  # the exchange of 2.0 and 6.0 is held at the end of this round
    rows = swarm.round(0.5, 0.25)
    assert [(row["weights/revision"], row["weights/joined"]) for row in rows] == [(1, False)] * 2
    assert [node.value for node in swarm.nodes] == [4.5, 4.25]
    assert rows[0]["weights/bytes_sent"] == rows[0]["weights/bytes_received"] == 4 * 4  # 2 (n - 1) / n of 4 weights


def test_a_result_comes_late_by_the_arms_delay() -> None:
    swarm = Swarm(2, delay=3)
    rows = [swarm.round(1.0, 1.0)[0] for _ in range(12)]
    assert [at for at, row in enumerate(rows, 1) if row] == [4, 8, 12]  # given at the start, in round 4 and in round 8


def test_an_exchange_waits_for_the_slowest_and_goes_on_without_one_that_has_left() -> None:
    swarm = Swarm(3)
    swarm.round(0.0, 0.0, 0.0)
    assert [swarm.round(3.0, of=[0]), swarm.round(1.0, of=[0])] == [[{}], [{}]]  # it gives 3.0, and learns on
    swarm.round(6.0, of=[1])
    assert [node.value for node in swarm.nodes] == [4.0, 6.0, 0.0]
    swarm.nodes[2].weights.leave()
    rows = swarm.round(0.0, 0.0, of=[0, 1])
    assert [row["weights/members"] for row in rows] == [2, 2]
    assert [node.value for node in swarm.nodes] == [5.5, 4.5, 0.0]


@pytest.mark.parametrize("mode", ["average", "diloco", "async-diloco"])
def test_one_that_joins_late_is_given_the_groups_weights_and_counts_from_the_next_exchange_on(mode: str) -> None:
    swarm = Swarm(3, mode, every=1, present={0, 1})
    for _ in range(4):
        swarm.round(1.0, 1.0, of=[0, 1])
    new = swarm.nodes[2]
    new.weights.back()
    swarm.round(0.0, 0.0, of=[0, 1])
    row = swarm.round(0.0, 0.0, 0.0)[2]
    assert (row["weights/members"], row["weights/joined"]) == (3, True)
    assert new.value == pytest.approx(swarm.nodes[0].value)
    before = new.value
    for _ in range(3):
        swarm.round(0.0, 0.0, 9.0)
    assert swarm.nodes[0].value > before  # what it learns reaches the others


def test_one_that_comes_back_takes_what_the_group_has_and_gives_nothing_of_its_own_at_first() -> None:
    swarm = Swarm(2, every=1)
    for _ in range(3):
        swarm.round(1.0, 1.0)
    stays, away = swarm.nodes
    away.weights.leave()
    for _ in range(3):
        swarm.round(1.0, of=[0])
    expected = stays.value
    away.learn(100.0)  # as if it had trained on while it was away
    away.weights.back()
    swarm.round(0.0, 0.0)
    row = swarm.round(0.0, 0.0)[1]
    assert row["weights/joined"] and away.value == stays.value == expected


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("mode", ["average", "diloco"])
def test_the_weights_are_those_of_a_group_over_sockets(mode: str, tmp_path: Path) -> None:
    lab, real = Swarm(3, mode), [Node() for _ in range(3)]
    addresses = [tmp_path / f"n{index}" for index in range(3)]

    def others(index: int) -> Callable[[], list[str]]:
        return lambda: [path.read_text().strip() for path in addresses if path != addresses[index] and path.exists()]

    for index, node in enumerate(real):
        node.weights = WeightExchange(
            WeightsConfig(mode=mode, every=2),
            node.policy,
            lambda at=index: Communicator.connect("lab", others(at)(), timeout=LIMIT),
            addresses[index],
            others(index),
        )

    seen = [0] * 3  # the newest revision of which all three are members
    is_out = [True] * 3  # what a member gave is not back yet

    def all_together() -> bool:
        """Exchange until all members have taken up the same result, and none has given anything since."""
        newest = max(seen)
        for index, node in enumerate(real):
            if not is_out[index] and not 0 < newest == seen[index]:
                node.weights.after_round(2)
                is_out[index] = True
            elif is_out[index] and (row := node.weights.after_round(1)):
                is_out[index] = False
                if row["weights/members"] == 3:
                    seen[index] = row["weights/revision"]
        return not any(is_out) and 0 < max(seen) == min(seen)

    def taken_up(node: Node) -> dict[str, object]:
        return wait_until(lambda: node.weights.after_round(1), LIMIT, "a result")

    try:
        for node in real:
            node.weights.begin()
        wait_until(all_together, LIMIT, "all three in one group")
        lab.round(0.0, 0.0, 0.0)
        for learnt in [(0.5, 1.0, 4.0), (1.0, -2.0, 0.125), (0.0, 3.0, 1.0)]:
            lab.nodes[0].number = lab.nodes[1].number = lab.nodes[2].number = 1
            lab.round(*learnt)
            rows = lab.round(0.0, 0.0, 0.0)
            for node, value in zip(real, learnt, strict=True):
                node.number = 1
                node.round(value)
            told = [taken_up(node) for node in real]
            assert [row["weights/members"] for row in told] == [row["weights/members"] for row in rows] == [3] * 3
            for node, other in zip(real, lab.nodes, strict=True):
                torch.testing.assert_close(node.flat, other.flat)
    finally:
        for node in real:
            node.weights.close()


def adam(node: Node, gradient: float) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(node.model.parameters(), lr=0.0)
    for parameter in node.model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("moments", ["kept", "reset", "averaged"])
def test_adams_moments_are_kept_or_reset_or_averaged(moments: str) -> None:
    with optimizers_known():
        swarm = Swarm(2, moments=moments)
        kept_alive = [adam(node, gradient) for node, gradient in zip(swarm.nodes, (1.0, 3.0), strict=True)]
        swarm.round(0.0, 0.0)
        swarm.round(0.0, 0.0)
        rows = swarm.round(0.0, 0.0)
        found = [AdamMoments(node.model.parameters()).read() for node in swarm.nodes]
        assert len(kept_alive) == 2
    if moments == "reset":
        assert found == [None, None]
        return
    firsts = [each["exp_avg"][0].item() for each in found]
    assert firsts == pytest.approx([0.1, 0.3] if moments == "kept" else [0.2, 0.2])
    seconds = [each["exp_avg_sq"][0].item() for each in found]
    assert seconds == pytest.approx([1e-3, 9e-3] if moments == "kept" else [5e-3, 5e-3])
    assert rows[0]["weights/bytes_sent"] == (4 * 4) * (3 if moments == "averaged" else 1)


def final_weights(folder: Path, count: int) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    found = []
    for index in range(count):
        [path] = (folder / "nodes" / f"n{index}" / "checkpoints").glob("checkpoint-*/model.safetensors")
        found.append(torch.cat([tensor.flatten() for tensor in load_file(path).values()]))
    return found


@pytest.mark.slow
def test_nodes_that_average_in_a_run_stay_together_and_a_run_is_the_same_again(tmp_path: Path) -> None:
    distances, again = {}, []
    for name, mode in {"off": "off", "on": "average", "again": "average"}.items():
        config = even_config(tmp_path, rounds=8, weights={"mode": mode, "every": 1})
        run_in_memory(make_plan(tmp_path / name, 3, config), 0, started=time.time())
        weights = final_weights(tmp_path / name, 3)
        distances[name] = max((one - other).norm().item() for one in weights for other in weights)
        again.append(weights)
    assert distances["on"] < distances["off"] / 2
    assert all(torch.equal(one, other) for one, other in zip(again[1], again[2], strict=True))
    assert read_run(tmp_path / "on", "", "", 4).weights_kib > 0 == read_run(tmp_path / "off", "", "", 4).weights_kib


@pytest.mark.slow
def test_members_of_unequal_pace_that_leave_and_join_average_in_a_run(tmp_path: Path) -> None:
    config = even_config(tmp_path, rounds=24, weights={"mode": "average", "every": 2})
    half = config.model_copy(update={"rounds": 12})
    parts = {
        "fast": PlanPart(1, config),
        "slow": PlanPart(1, half),
        "gone": PlanPart(1, half),
        "new": PlanPart(1, half),
    }
    plan = make_plan(tmp_path / "run", 4, config, parts)
    tempo = {"pace": [1, 2, 1, 1], "begins": [0, 0, 0, 0.5]}
    run_in_memory(plan, 0, started=time.time(), tempo=tempo)
    rows = [read_metrics(folder / "metrics.jsonl") for folder in node_folders(plan).values()]
    assert [len(node) for node in rows] == [24, 12, 12, 12]
    members = [[row["weights/members"] for row in node if "weights/members" in row] for node in rows]
    assert members[0][0] == 3 and members[3][0] == 3  # with the one that leaves at first, then with the new one
    joined = [[row["weights/joined"] for row in node if "weights/joined" in row] for node in rows]
    assert joined[3][0] and not any(joined[0])
    assert rows[3][0]["time"] > rows[0][11]["time"]  # the new one begins when the fast one has done half of its rounds
    away = ChurnConfig(away=0.5, rounds=2)
    run_in_memory(make_plan(tmp_path / "churn", 3, config), 0, started=time.time(), churn=away)


def test_nodes_of_different_policies_do_not_average(tmp_path: Path) -> None:
    config = even_config(tmp_path, weights={"mode": "average"})
    other = config.model_copy(update={"policy": config.policy.model_copy(update={"model": "builtin"})})
    plan = make_plan(tmp_path / "run", 2, config, {"a": PlanPart(1, config), "b": PlanPart(1, other)})
    with pytest.raises(UserError, match="weights of different policies"):
        run_in_memory(plan, 0, started=time.time())
