"""A model card tells how a model came about, and nothing about the machine that it came about on."""

import datetime
import json
from pathlib import Path

import pytest

from node.config import parse_config
from node.policy.model_card import TrainingHistory, card_doubts, model_card, splits_in
from node.tasks.questions import DEFAULT_SPLIT, Split
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


def test_it_says_what_was_held_out_and_who_holds_out_other_questions_is_warned(tmp_path: Path) -> None:
    held_out = [Split(0.2, 7), DEFAULT_SPLIT, Split(0.2, 7)]
    history = TrainingHistory(1, summarise_node([make_row(0, 1)]), 0, [], "club", held_out)
    (tmp_path / "README.md").write_text(model_card("acme/small-1b", CONFIG, "llama-1b", history, TODAY))
    assert splits_in(tmp_path) == [Split(0.2, 7), DEFAULT_SPLIT]
    (warned,) = card_doubts(str(tmp_path), Split(0.2, 7))
    assert "(share 0.125, salt 0; here 0.2 and 7): it may have been trained on what is held out here" in warned
    assert len(card_doubts(str(tmp_path), Split(0.3, 7))) == 2  # more is held out here than was there
    (warned,) = card_doubts(str(tmp_path), Split(0.1, 7))
    assert "salt 0" in warned, "who held out more by the same salt held out all of these"
    assert card_doubts("acme/small-1b", DEFAULT_SPLIT) == card_doubts("builtin", DEFAULT_SPLIT) == []


@pytest.mark.parametrize(
    "card",
    [
        "",
        "gossamer_held_out: [{'share': 0.2, 'salt': 7}]",
        '# A model\n\ngossamer_held_out: [{"share": 0.2, "salt": 7}]\n',
        "---\ngossamer_held_out: 7\n---\n",
        '---\ngossamer_held_out: [{"share": "much", "salt": 7}]\n---\n',
        '---\ngossamer_held_out: [{"share": 0.2, "salt": Infinity}]\n---\n',
        "---\ngossamer_held_out: " + "[" * 100_000 + "\n---\n",
        '---\ntitle: x\n---\ngossamer_held_out: [{"share": 0.2, "salt": 7}]\n',
    ],
)
def test_a_card_of_somebody_else_says_nothing(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert splits_in(tmp_path) == []
    assert splits_in(tmp_path / "none") == splits_in(tmp_path / "README.md") == []
