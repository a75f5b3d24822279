"""A folder that the code of commit 19586e0 wrote (tests/old_folder/make.sh): the node goes on as who it was.

It founded a swarm with an allowlist, and trained 358 rounds. Since then the built-in policy is a larger one, its tasks
are of another version, settings are gone, and the tables of the replay buffer have another form.
"""

import json
import tarfile
from pathlib import Path

import pytest

from node.cli.app import run
from node.earlier_settings import upgraded
from node.operations.backup import back_up, restore
from node.operations.settling import settle
from node.operations.trained import find_trained
from node.tasks.questions import DEFAULT_SPLIT
from node.telemetry.metrics import read_metrics
from node.training.checkpoint import latest_checkpoint
from node.training.evaluation import doubts
from protocol.identity import Identity
from tests.commands import run as run_command

ARCHIVE = Path(__file__).parents[1] / "old_folder" / "19586e0.tar.xz"
ROUNDS = 358
NODE = "5buqeq7z7ezdq3aymze4hgycn6rkhnbl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "folder"


def test_an_older_node_goes_on_as_who_it_was_with_what_was_set(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for verb, says in {"inspect": "of another release", "replay": "no round of this release"}.items():
        assert run([verb, str(folder)], debug=False) == 2
        assert says in capfd.readouterr().err
    before = {name: (folder / name).read_bytes() for name in ("identity.key", "manifest.bin")}
    config = settle(None, ["observe.enabled=false"], {"rounds": ROUNDS + 3}, folder=folder).config
    assert (config.sampling.rule, config.sampling.local, config.seed, config.tasks[0].name) == (
        "positive",
        2,
        5,
        "builtin/sums",
    )
    node = run_command("node", "--state", folder, "--set", "observe.enabled=false", "--rounds", str(ROUNDS + 3))
    assert node.returncode == 0, node.stderr
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 4))
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None and checkpoint.round == ROUNDS + 3
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert run(["replay", str(folder)], debug=False) == 0
    assert run(["inspect", str(folder)], debug=False) == 0
    said = node.stdout + node.stderr
    assert "the replay buffer of an earlier release is emptied" in said and "founded by an earlier release" in said
    assert "which trained on the questions that are held out now" in said
    (note,) = doubts(folder, "builtin", DEFAULT_SPLIT)  # which `gossamer eval` prints, also after new rounds
    assert "began under an earlier release" in note


def test_an_older_folder_is_backed_up_evaluated_and_invites(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert Identity.load(folder / "identity.key").node_id == NODE
    head = back_up(folder, tmp_path / "old.tar")
    assert (head["node"], head["round"]) == (NODE, ROUNDS)
    restore(tmp_path / "old.tar", tmp_path / "again")
    assert find_trained(str(tmp_path / "again"), None).config.sampling.local == 2
    assert run(["node", "--state", str(folder), "--dry-run"], debug=False) == 0
    capfd.readouterr()
    assert run(["invite", str(folder), "--uses", "2"], debug=False) == 0
    assert capfd.readouterr().out.startswith("gossamer://club/")


def test_what_older_versions_called_otherwise_has_todays_name_and_the_rest_is_left_alone() -> None:
    old = {
        "rounds": 3,
        "sampling": {"rule": "paper", "local": 2},
        "trainer": {"gradient_accumulation_steps": 1, "save_steps": 3},
        "tasks": [{"name": "jsonl", "options": {"path": "a.jsonl"}}, {"name": "builtin"}],
    }
    kept = json.dumps(old)
    assert upgraded(old) == {
        "rounds": 3,
        "sampling": {"rule": "sapo", "local": 2},
        "trainer": {"save_steps": 3},
        "tasks": [{"name": "dataset", "options": {"path": "a.jsonl"}}, {"name": "builtin"}],
    }
    assert json.dumps(old) == kept
    for odd in ({"tasks": 3, "sampling": [], "trainer": None}, {"tasks": ["jsonl"]}, {}):
        assert upgraded(odd) == odd
