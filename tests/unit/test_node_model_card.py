"""A model card tells how a model came about, and nothing about the machine that it came about on."""

import datetime
import json

import pytest

from node.config import parse_config
from node.policy.model_card import TrainingHistory, model_card
from node.telemetry.summary import summarise_node
from tests.fakes.rows import make_row

TODAY = datetime.date(2026, 1, 2)
CONFIG = parse_config({"tasks": [{"name": "jsonl", "options": {"path": "/data/alice/secret.jsonl"}}], "rounds": 20})


def evaluation(done: int, accuracy: float) -> dict[str, object]:
    values = {"accuracy": accuracy, "accuracy_low": accuracy - 0.05, "accuracy_high": accuracy + 0.05}
    return {"round": done, "questions": 100, **values}


def front_of(card: str) -> dict[str, object]:
    """The values of a card's front matter; each is written as JSON, which is YAML too."""
    lines = card.split("---\n")[1].splitlines()
    return {key: json.loads(value) for key, value in (line.split(": ", 1) for line in lines)}


def test_it_tells_rounds_rewards_peers_and_evaluations() -> None:
    rows = [make_row(0, number) for number in range(1, 21)]
    history = TrainingHistory(20, summarise_node(rows), 3, [evaluation(0, 0.1), evaluation(20, 0.5)], "club `x`")
    card = model_card("acme/small-1b", CONFIG, "llama-1b", history, TODAY)
    for part in (
        "20 rounds of reinforcement learning",
        "Tasks: `jsonl`.",
        'Swarm: "club `x`"; at most 3 live peers. 70 of the 150 groups',
        "(47%) came from peers",
        "| greedy accuracy | 0.100 (0.050 to 0.150) | 0.500 (0.450 to 0.550) |",
        "2400 tokens generated",
        "Exported on 2026-01-02",
        "transformers ",
    ):
        assert part in card, card
    assert "pass@8" not in card, "it was not measured"
    front = front_of(card)
    assert front["base_model"] == "acme/small-1b" and front["library_name"] == "transformers"


@pytest.mark.parametrize("base", ["/data/alice/models/small", "./small", "~/small", "builtin", "../../alice/small"])
def test_it_names_no_folder(base: str) -> None:
    card = model_card(base, CONFIG, "llama-1b", TrainingHistory(1, summarise_node([make_row(0, 1)]), 0, [], ""), TODAY)
    assert "alice" not in card and "/small" not in card and "~" not in card
    assert "base_model" not in front_of(card)
    assert ("`small`" in card) == (base != "builtin")


def test_a_model_that_no_node_trained_has_a_card_too() -> None:
    card = model_card("acme/small-1b", CONFIG, "llama-1b", None, TODAY)
    assert "acme/small-1b" in card and "trained" not in card, "nothing is known of that"
