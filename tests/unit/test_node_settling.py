"""What a node is to run: options before the file, before what its folder remembers, before the preset."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from node.config import SETTINGS_VERSION, NodeConfig, all_keys, fill, flatten, is_key, merge, parse_config
from node.errors import UserError
from node.operations.presets import with_preset
from node.operations.settling import Settled, StaleSettingsError, changes, settle
from node.policy.memory import ModelSize
from node.state_folder import keep_config, recall, resolve_seed

SIZES = {
    "small": ModelSize(5_000_000, 4, 64, 128, 4, 64, 1000, 128),
    "large": ModelSize(135_000_000, 30, 576, 1536, 9, 192, 49152, 8192),
}
SEED = f"tcp://192.0.2.7:4001?key={'ab' * 32}"


@pytest.fixture(autouse=True)
def known_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.operations.presets.measure_model", lambda model: SIZES[model])


def start(folder: Path, *settings: str, path: Path | None = None, **options: Any) -> Settled:
    """Settle and keep, as a node that has started does."""
    further = {key: options.pop(key) for key in ("forget",) if key in options}
    named = {key.replace("__", "."): value for key, value in options.items()}
    settled = settle(path, settings, named, folder=folder, **further)
    folder.mkdir(exist_ok=True)
    keep_config(settled.config, resolve_seed(settled.config, folder), folder)
    return settled


def test_what_a_node_was_told_is_for_its_owner_alone_also_in_a_folder_that_others_may_read(tmp_path: Path) -> None:
    folder = tmp_path / "n0"
    folder.mkdir(mode=0o755)
    (folder / "settings.json").write_text("{}")
    start(folder, "observe.token=s3cret")
    kept = {path.name: path for path in folder.iterdir() if "s3cret" in path.read_text()}
    assert {name: path.stat().st_mode & 0o777 for name, path in kept.items()} == {
        "settings.json": 0o600,
        "config.json": 0o600,
    }


def test_no_log_has_what_is_for_a_nodes_owner_alone(tmp_path: Path) -> None:
    start(tmp_path, "observe.token=s3cret", "sampling.local=3")
    again = start(tmp_path, "sampling.local=4")
    assert list(again.remembered) == ["observe.token = ..."]
    assert start(tmp_path, "observe.token=other").changes == ["observe.token: ... -> ..."]


def test_a_folder_alone_is_enough_to_start_again(tmp_path: Path) -> None:
    first = start(
        tmp_path, "sampling.local=3", network__listen="tcp://0.0.0.0:4001", network__seeds=[SEED], policy__model="large"
    ).config
    again = start(tmp_path)
    assert again.config.model_copy(update={"seed": None}) == first
    assert (again.config.sampling.local, again.config.network.listen, again.config.network.seeds) == (
        3,
        "tcp://0.0.0.0:4001",
        [SEED],
    )
    assert again.config.trainer.learning_rate == 1e-5
    assert "sampling.local = 3" in again.remembered
    assert again.changes == []
    assert again.notes["sampling.local"] == "as remembered"


def test_what_is_given_goes_before_is_remembered_and_what_changed_is_said(tmp_path: Path) -> None:
    start(tmp_path, "sampling.local=3", "sampling.completions=4")
    again = start(tmp_path, "sampling.local=5", rounds=9)
    assert again.changes == ["rounds: None -> 9", "sampling.local: 3 -> 5"]
    third = start(tmp_path)
    assert (third.config.sampling.local, third.config.sampling.completions, third.config.rounds) == (5, 4, 9)
    assert third.changes == []


def test_rounds_are_given_anew_or_taken_back(tmp_path: Path) -> None:
    start(tmp_path, rounds=5)
    assert start(tmp_path, rounds=8).config.rounds == 8
    endless = start(tmp_path, rounds=0)
    assert endless.config.rounds is None
    assert endless.changes == ["rounds: 8 -> None"]
    assert start(tmp_path).config.rounds is None


def test_a_relay_stays_one_until_it_is_told_otherwise(tmp_path: Path) -> None:
    assert start(tmp_path, role="relay", policy__model="none").config.role == "relay"  # whose model nobody looks for
    assert start(tmp_path).config.role == "relay"
    again = start(tmp_path, "role=train", policy__model="large")
    assert again.config.role == "train"
    assert "role: 'relay' -> 'train'" in again.changes


def test_a_file_goes_before_the_folder_and_the_rest_is_remembered(tmp_path: Path) -> None:
    folder, path = tmp_path / "state", tmp_path / "node.toml"
    trl = ("trainer.trl.weight_decay=0.1", "trainer.trl.epsilon=0.1")
    start(folder, "sampling.local=3", *trl, network__listen="tcp://0.0.0.0:4001")
    path.write_text("[sampling]\nlocal = 5\n[trainer]\nsave_steps = 7\n")
    again = start(folder, "trainer.save_steps=9", path=path)
    assert (again.config.sampling.local, again.config.trainer.save_steps) == (5, 9)
    assert (again.config.trainer.trl["weight_decay"], again.config.network.listen) == (0.1, "tcp://0.0.0.0:4001")
    remembered = ["trainer.trl = {weight_decay = 0.1, epsilon = 0.1}", 'network.listen = "tcp://0.0.0.0:4001"']
    assert again.remembered == remembered
    other = start(folder, "trainer.trl.epsilon=0.3", path=path)
    assert "trainer.trl = {weight_decay = 0.1, epsilon = 0.3}" in other.remembered
    assert (
        "trainer.trl: {'weight_decay': 0.1, 'epsilon': 0.1} -> {'weight_decay': 0.1, 'epsilon': 0.3}" in other.changes
    )
    assert start(folder, *trl, "trainer.trl.epsilon=0.3", path=path).remembered == remembered[1:]


def test_what_a_folder_remembers_is_told_a_setting_a_line_without_what_is_empty(tmp_path: Path) -> None:
    riddles = {"name": "file/riddles", "options": {"path": "/r.py", "of day": 1}}
    start(tmp_path, "network.swarm=", "sampling.local=3", "observe.enabled=false", tasks=[riddles])
    with structlog.testing.capture_logs() as logs:
        start(tmp_path).say(None)
    assert sorted(entry["event"] for entry in logs) == [
        "the folder remembers observe.enabled = false",
        "the folder remembers sampling.local = 3",
        'the folder remembers tasks = [{name = "file/riddles", options = {path = "/r.py", "of day" = 1}}]',
    ]


@pytest.mark.parametrize(
    ("forget", "left"),
    [
        ("sampling.local", {"sampling.completions": 4, "rounds": 5}),
        ("sampling", {"rounds": 5}),
        ("network", {"sampling.local": 3, "sampling.completions": 4, "rounds": 5}),
        ("all", {}),
    ],
)
def test_forgetting_brings_defaults_back(forget: str, left: dict[str, Any], tmp_path: Path) -> None:
    start(tmp_path, "sampling.local=3", "sampling.completions=4", rounds=5)
    seed = recall(tmp_path).last["seed"]
    config = start(tmp_path, forget=[forget]).config
    assert flatten(recall(tmp_path).settings) == left
    assert config.sampling.local == left.get("sampling.local", NodeConfig().sampling.local)
    assert recall(tmp_path).last["seed"] == seed


@pytest.mark.parametrize("key", ["rounds.x", "sampling.local.x", "tasks.0"])
def test_what_is_no_table_has_no_key_to_forget(key: str, tmp_path: Path) -> None:
    start(tmp_path, "sampling.local=3", rounds=5)
    with pytest.raises(UserError, match=f"--forget {key}: unknown configuration key"):
        start(tmp_path, forget=[key])


def test_another_model_brings_the_preset_of_its_own_size(tmp_path: Path) -> None:
    start(tmp_path, "sampling.local=3")
    other = start(tmp_path, policy__model="large").config
    assert (other.trainer.learning_rate, other.threads, other.sampling.local) == (1e-5, 0, 3)
    assert start(tmp_path, "policy.lora.r=8").config.trainer.learning_rate == 1e-4


def test_what_ran_goes_on_whatever_a_preset_says_today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start(tmp_path, policy__model="large").config
    monkeypatch.setitem(SIZES, "large", SIZES["small"])
    assert start(tmp_path).config.trainer == first.trainer
    assert start(tmp_path, forget=["rounds"]).config.trainer.learning_rate == 1e-4


def test_a_template_that_a_preset_chose_goes_on(tmp_path: Path) -> None:
    start(tmp_path)
    ran = recall(tmp_path).last | {"policy": {"template": {"enable_thinking": False}}}
    (tmp_path / "config.json").write_text(json.dumps(ran))
    assert start(tmp_path).config.policy.template == {"enable_thinking": False}


def test_a_folder_without_settings_goes_on_with_what_it_last_ran(tmp_path: Path) -> None:
    old = parse_config({"rounds": 5, "seed": 3, "sampling": {"local": 3}})
    (tmp_path / "config.json").write_text(old.model_dump_json())
    assert start(tmp_path).config == old


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_settings_of_another_version_are_refused_with_the_command_that_keeps_the_rest(tmp_path: Path) -> None:
    start(tmp_path, "sampling.local=3", rounds=5)
    changed(tmp_path / "settings.json", frobnicate=1, tasks=[{"nam": "builtin"}], sampling={"local": 3, "probe": 8})
    command = f"gossamer node --state {tmp_path} --forget frobnicate --forget sampling.probe --forget tasks"
    with pytest.raises(StaleSettingsError, match="has a setting of another version") as error:
        start(tmp_path)
    assert str(error.value).endswith(f"to go on with its key and checkpoints, type {command}")
    again = start(tmp_path, forget=["frobnicate", "sampling.probe", "tasks"]).config
    assert (again.rounds, again.sampling.local) == (5, 3)
    assert start(tmp_path).config.sampling == again.sampling


def test_settings_under_another_version_number_are_left_behind_but_for_what_the_checkpoints_are_of(
    tmp_path: Path,
) -> None:
    start(tmp_path, "sampling.local=3", policy__model="large", tasks=[{"name": "builtin/sums"}])
    seed = recall(tmp_path).last["seed"]
    for name in ("settings.json", "config.json"):
        changed(tmp_path / name, version=SETTINGS_VERSION + 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StaleSettingsError, match=f"settings of version {SETTINGS_VERSION + 1}, and this is") as error:
        start(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    words = shlex.split(error.value.command)
    assert words[:6] == ["gossamer", "node", "--state", str(tmp_path), "--forget", "all"]
    again = start(tmp_path, *words[7::2], forget=["all"]).config
    assert (again.policy.model, again.tasks[0].name, again.sampling.local) == ("large", "builtin/sums", 2)
    assert recall(tmp_path).last["seed"] == seed


def test_settings_that_do_not_agree_any_more_are_left_behind(tmp_path: Path) -> None:
    start(tmp_path, rounds=5)
    changed(tmp_path / "settings.json", policy={"dtype": "nf4"})
    with pytest.raises(StaleSettingsError) as error:
        settle(None, [], {}, folder=tmp_path, verb="board")
    assert error.value.command == f"gossamer board --state {tmp_path} --forget all"


def test_what_ran_last_and_is_no_setting_now_is_told_among_the_changes(tmp_path: Path) -> None:
    start(tmp_path, policy__model="large")
    last = recall(tmp_path).last
    changed(tmp_path / "config.json", frobnicate=1, sampling=last["sampling"] | {"rule": "correct"})
    again = start(tmp_path)
    assert again.changes == ["sampling.rule: 'correct' -> 'positive'"]
    assert again.config.trainer.learning_rate == 1e-5


def test_what_was_refused_is_not_remembered(tmp_path: Path) -> None:
    start(tmp_path, rounds=5)
    before = recall(tmp_path)
    with pytest.raises(UserError):
        start(tmp_path, "sampling.local=-1")
    assert recall(tmp_path) == before


def test_a_preset_is_remembered_as_none_of_a_persons_settings(tmp_path: Path) -> None:
    start(tmp_path, policy__model="large")
    assert flatten(recall(tmp_path).settings) == {"policy.model": "large"}
    assert recall(tmp_path).last["trainer"]["learning_rate"] == 1e-5


trees = st.recursive(
    st.integers(0, 3), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8
).filter(lambda tree: isinstance(tree, dict))


@given(trees, trees)
def test_a_merged_tree_has_what_goes_before_and_what_is_left(under: dict[str, Any], over: dict[str, Any]) -> None:
    merged, top = flatten(merge(under, over)), flatten(over)
    assert {key: merged[key] for key in top} == top
    rest = {key: value for key, value in merged.items() if key not in top}
    assert rest.items() <= flatten(under).items()


def test_every_key_is_known_and_no_other() -> None:
    keys = set(all_keys())
    assert set(flatten(NodeConfig().model_dump())) <= keys
    assert {"trainer", "trainer.learning_rate", "policy.lora.r", "rounds", "tasks"} <= keys
    assert not is_key("trainer.learning_rat") and not is_key("")


def test_changes_are_told_by_key() -> None:
    assert changes({"a": {"b": 1}, "seed": 3}, {"a": {"b": 2}, "seed": None}) == ["a.b: 1 -> 2"]
    assert changes({}, {"a": 1}) == []


def test_filling_twice_is_filling_once() -> None:
    config, _ = with_preset(parse_config({"policy": {"model": "large"}}))
    assert with_preset(fill(config, {}))[0] == config
