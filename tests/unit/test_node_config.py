"""Settings of earlier releases: records with them are read, and a person who sets one is told what to do instead."""

import functools
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from collectives.types import Codec
from node.config import (
    NodeConfig,
    SamplingConfig,
    is_key,
    load_config,
    parse_config,
)
from node.earlier_settings import REMOVED_RULES, REMOVED_SETTINGS, RENAMED_SETTINGS, TRL_OPTIONS, upgraded
from node.errors import UserError
from node.rollouts.rules import RULES as RULES_BY_NAME
from node.state_folder import recall

RULES = [("uniform", "sapo"), ("correct", "positive"), ("paper", "sapo"), ("sapo", "sapo"), ("positive", "positive")]
VALUES = {
    "sampling.probe": 8,
    "sampling.external_negatives": "drop",
    "trainer.beta": 0.0,
    "trainer.adam_beta1": 0.95,
    "trainer.force_learning_rate": True,
    "network.max_peers": 5,
    "eval.ends": True,
    "eval.seed": 7,
    "network.share": "all",
    "network.timing": "lan",
    "weights.encrypt": False,
    "engine.vllm.tensor_parallel_size": 2,
    "engine.vllm.kv_cache_gib": 1,
    "engine.vllm.max_model_len": 1024,
    "engine.vllm.enforce_eager": True,
    "engine.vllm.start_timeout": 300.0,
    "engine.vllm.call_timeout": 1800.0,
    "engine.vllm.dtype": "float16",
    "engine.vllm.logprob_tolerance": 0.2,
    "network.store_memory": 2 << 20,
    "network.store_disk": 0,
    "weights.outer_lr": 0.5,
    "weights.momentum": 0.5,
    "weights.seeds": ["tcp://x:1"],
    "weights.streams": 4,
    "pool.max_peer_share": 1.0,
    "rollout_log.own": 1,
    "rollout_log.external": 0,
    "rollout_log.max_bytes": 1 << 16,
    "journal.max_bytes": 0,
}


def record(rule: str) -> dict[str, Any]:
    """A config.json of commit 19586e0, of a node whose every setting of then is set."""
    tree = NodeConfig(rounds=7).model_dump(mode="json")
    tree["policy"].pop("template")
    del tree["engine"]["placement"], tree["engine"]["timeout"], tree["trainer"]["trl"]
    tree["trainer"] |= TRL_OPTIONS
    for key, value in VALUES.items():
        *tables, name = key.split(".")
        functools.reduce(lambda table, part: table.setdefault(part, {}), tables, tree)[name] = value
    tree["sampling"] |= {"rule": rule, "local": 3}
    tree["eval"]["ends"] = False
    tree["pool"] |= tree.pop("buffer")
    return tree


@pytest.mark.parametrize(("rule", "today"), RULES)
def test_a_record_of_an_earlier_release_means_what_it_meant_without_what_is_gone(
    rule: str, today: str, tmp_path: Path
) -> None:
    old = record(rule)
    before = json.dumps(old)
    config = parse_config(upgraded(old))
    assert (config.rounds, config.sampling.local, config.sampling.rule) == (7, 3, today)
    assert config.model_dump() == parse_config({"rounds": 7, "sampling": {"local": 3, "rule": today}}).model_dump()
    assert json.dumps(old) == before
    for name in ("config.json", "settings.json"):
        (tmp_path / name).write_text(before)
    assert load_config(tmp_path / "config.json") == config
    assert parse_config(recall(tmp_path).settings) == parse_config(recall(tmp_path).last) == config


@pytest.mark.parametrize("odd", [{"sampling": [], "trainer": None, "network": 3}, {"sampling": {"rule": [1]}}, {}])
def test_what_is_no_record_is_left_alone(odd: dict[str, Any]) -> None:
    assert upgraded(odd) == odd


@pytest.mark.parametrize("key", REMOVED_SETTINGS)
def test_a_person_who_sets_what_is_gone_is_told_in_one_line_what_to_do(key: str, tmp_path: Path) -> None:
    assert not is_key(key)
    table, _, name = key.rpartition(".")
    path = tmp_path / "node.toml"
    path.write_text(f"[{table}]\n{name} = {json.dumps(VALUES[key])}\n")
    for file, settings in ((path, []), (None, [f"{key}={json.dumps(VALUES[key])}"])):
        with pytest.raises(UserError) as error:
            load_config(file, settings)
        said = str(error.value)
        assert said.startswith(f"the configuration key {key!r} is gone: ") and (
            "leave it out" in said or "set " in said
        )
        assert "\n" not in said


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        (
            "eval.every=end",
            "key 'eval.every': Input should be a valid integer, .*, or Input should be 'ends' or 'marks'",
        ),
        ("trainer.bf16=yess", "key 'trainer.bf16': Input should be a valid boolean, .*, or Input should be 'auto'"),
        ("network.seeds=[3]", "key 'network.seeds.0': Input should be a valid string .got 3"),
    ],
)
def test_a_wrong_value_is_told_all_that_the_setting_may_be(setting: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_config(None, [setting])


@pytest.mark.parametrize("key", RENAMED_SETTINGS)
def test_a_person_who_writes_an_older_name_is_told_todays(key: str) -> None:
    assert not is_key(key) and is_key(RENAMED_SETTINGS[key])
    with pytest.raises(UserError) as error:
        load_config(None, [f"{key}=1"])
    assert str(error.value) == f"the configuration key {key!r} has another name now: {RENAMED_SETTINGS[key]}"


@pytest.mark.parametrize(("old", "every"), [((0, True), "ends"), ((5, True), 5), ((5, False), 5), ((0, False), 0)])
def test_evaluations_of_an_earlier_release_come_as_often(old: tuple[int, bool], every: int | str) -> None:
    assert upgraded({"eval": dict(zip(("every", "ends"), old, strict=True))}) == {"eval": {"every": every}}


def test_a_file_of_an_earlier_release_is_told_all_its_older_names_at_once(tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text(
        "rounds = 3\n[trainer]\nepsilon = 0.1\noptim = 'adamw_8bit'\n[journal]\nmax_bytes = 0\n"
    )
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "old.toml")
    assert str(error.value) == (
        "the configuration key 'trainer.epsilon' has another name now: trainer.trl.epsilon; "
        "of earlier releases are also trainer.optim, journal.max_bytes"
    )


def test_a_record_has_todays_names_and_leaves_out_what_has_its_default() -> None:
    old = {"trainer": {"loss_type": "grpo", "epsilon": 0.2, "off_policy_mask_threshold": None, "save_steps": 3}}
    assert upgraded(old) == {"trainer": {"trl": {"loss_type": "grpo"}, "save_steps": 3}}
    pool = {"max_age": 60, "max_age_rounds": None, "max_peer_share": 0.5}
    assert upgraded({"pool": pool}) == {"buffer": {"max_age": 60}} and upgraded({"pool": {}}) == {}


@pytest.mark.parametrize("rule", REMOVED_RULES)
def test_a_person_who_names_a_rule_that_is_gone_is_told_in_one_line_which_to_take(rule: str) -> None:
    with pytest.raises(UserError, match=f"'sampling.rule': .*gone: set it to '{REMOVED_RULES[rule]}'.*{rule}") as error:
        load_config(None, [f"sampling.rule={rule}"])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"'sampling\.rule': Input should be 'sapo'"):
        load_config(None, ["sampling.rule=freshest"])


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
