"""What a node has spent, and when that is all it may."""

import pytest

from node.config import NodeConfig
from node.fleet.progress import NodeProgress
from node.training.budget import Spent, is_done, part_done, spent_in


def config(**budget: int) -> NodeConfig:
    return NodeConfig.model_validate({"budget": budget})


def test_compute_counts_a_trained_token_three_times() -> None:
    spent = spent_in([{"tokens_generated": 10, "tokens_trained": 4}, {"tokens_generated": 5}, {}])
    assert spent == Spent(15, 4)
    assert spent.compute == 27


@pytest.mark.parametrize(
    ("budget", "spent", "done"),
    [
        ({}, Spent(10**12, 10**12), False),
        ({"generated_tokens": 100}, Spent(99, 500), False),
        ({"generated_tokens": 100}, Spent(100, 0), True),
        ({"compute": 100}, Spent(40, 19), False),
        ({"compute": 100}, Spent(40, 20), True),
        ({"generated_tokens": 100, "compute": 1000}, Spent(100, 0), True),
        ({"generated_tokens": 100, "compute": 1000}, Spent(99, 301), True),
    ],
)
def test_the_first_bound_that_is_reached_ends_a_node(budget: dict[str, int], spent: Spent, done: bool) -> None:
    assert is_done(config(**budget), 3, spent) is done


def test_a_last_round_ends_a_node_within_its_budget() -> None:
    both = NodeConfig.model_validate({"rounds": 3, "budget": {"compute": 100}})
    assert not is_done(both, 2, Spent(99, 0))
    assert is_done(both, 3, Spent(0, 0))
    assert NodeConfig().ends is False
    assert both.ends and config(compute=1).ends and NodeConfig(rounds=1).ends


@pytest.mark.parametrize(
    ("tree", "part"),
    [
        ({}, 0.0),
        ({"rounds": 12}, 0.25),
        ({"budget": {"compute": 100}}, 0.7),
        ({"budget": {"generated_tokens": 80}}, 0.5),
        ({"rounds": 4, "budget": {"generated_tokens": 80, "compute": 100}}, 0.75),
    ],
)
def test_the_part_that_is_done_is_that_of_the_nearest_bound(tree: dict[str, object], part: float) -> None:
    assert part_done(NodeConfig.model_validate(tree), 3, Spent(40, 10)) == pytest.approx(part, abs=1e-9)


def test_what_was_spent_a_round_ago_is_what_is_spent_without_the_newest_row() -> None:
    last = {"tokens_generated": 10, "tokens_trained": 4, "tokens_scored": 2, "tokens_prompts": 7}
    rows = [{"tokens_generated": 5}, last]
    assert spent_in(rows).compute == 15 + 2 + 7 + 3 * 4
    assert spent_in(rows).before(rows[1]) == spent_in(rows[:1]) and Spent().before({}) == Spent()


def test_rounds_that_are_done_again_are_spent_once() -> None:
    progress = NodeProgress(None)
    progress.update([{"round": number, "tokens_generated": 10, "tokens_trained": 1} for number in (1, 2, 3, 2)])
    assert (progress.round, progress.spent) == (2, Spent(20, 2))
