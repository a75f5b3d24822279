"""What a configuration may hold, and what is said of what it may not."""

from pathlib import Path
from typing import Any, get_args

import pytest

from collectives.types import Codec
from node.config import SamplingConfig, load_config, parse_config, refused_keys, understood, without
from node.errors import UserError
from node.rollouts.rules import RULES as RULES_BY_NAME


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        (
            "eval.every=end",
            "key 'eval.every': Input should be a valid integer, .*, or Input should be 'hour', 'ends' or 'marks'",
        ),
        ("trainer.bf16=yess", "key 'trainer.bf16': Input should be a valid boolean, .*, or Input should be 'auto'"),
        ("network.seeds=[3]", "key 'network.seeds.0': Input should be a valid string .got 3"),
    ],
)
def test_a_wrong_value_is_told_all_that_the_setting_may_be(setting: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_config(None, [setting])


def test_a_setting_names_each_rule_and_no_other() -> None:
    assert set(get_args(SamplingConfig.model_fields["rule"].annotation)) == set(RULES_BY_NAME)


def test_weights_travel_by_any_codec_that_collectives_have() -> None:
    for codec in Codec:
        assert parse_config({"weights": {"codec": codec.value}}).weights.codec == codec.value
    with pytest.raises(UserError, match=r"weights\.codec"):
        parse_config({"weights": {"codec": "int9"}})


def test_an_experiment_is_told_from_a_nodes_configuration(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text('nodes = 8\n[arms."8/0"]\n')
    with pytest.raises(
        UserError, match=r"is an experiment and no node's configuration: gossamer lab run .*rules\.toml"
    ):
        load_config(tmp_path / "rules.toml")


@pytest.mark.parametrize(
    ("tree", "refused", "left"),
    [
        ({"rounds": 3}, [], {"rounds": 3}),
        ({"rounds": 3, "frobnicate": 1}, ["frobnicate"], {"rounds": 3}),
        ({"sampling": {"local": 3, "rule": "correct"}}, ["sampling.rule"], {"sampling": {"local": 3}}),
        ({"rounds": 3, "tasks": [{"weight": 2.0}]}, ["tasks.0.name"], {"rounds": 3}),
        ({"rounds": 0, "weights": {"streams": 4}}, ["rounds", "weights.streams"], {"weights": {}}),
        ({"rounds": 3, "policy": {"dtype": "nf4"}}, [""], {}),
    ],
)
def test_what_is_refused_is_named_and_the_rest_is_understood(
    tree: dict[str, Any], refused: list[str], left: dict[str, Any]
) -> None:
    assert refused_keys(tree) == refused
    assert understood(tree) == left


def test_a_tree_without_a_key_has_all_the_rest() -> None:
    tree = {"a": {"b": 1, "c": 2}, "d": [3]}
    assert without(tree, "a.b") == {"a": {"c": 2}, "d": [3]}
    assert without(tree, "d.0.x") == {"a": {"b": 1, "c": 2}}
    assert without(tree, "e") == without(tree, "") == tree == {"a": {"b": 1, "c": 2}, "d": [3]}
