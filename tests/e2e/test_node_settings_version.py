"""A node whose settings are of another version goes on with its key and checkpoints, by the command that it prints."""

import json
import shlex
from pathlib import Path

import pytest

from node.config import SETTINGS_VERSION
from node.operations.trained import find_trained
from node.telemetry.metrics_file import read_metrics
from node.training.checkpoint import latest_checkpoint
from tests.commands import run as run_command

ENDS = ("--set", "observe.enabled=false")


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def round_of(folder: Path) -> int:
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    return checkpoint.round


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_node_with_settings_of_another_version_goes_on_by_the_command_that_it_prints(tmp_path: Path) -> None:
    folder = tmp_path / "n 0"
    first = run_command("node", "--state", folder, "--task", "builtin/sums", "--seed", "7", "--rounds", "2", *ENDS)
    assert first.returncode == 0, first.stderr
    key = (folder / "identity.key").read_bytes()
    rounds = 2
    for changes in ({"frobnicate": 1}, {"version": SETTINGS_VERSION + 1, "sampling": {"probe": 8}}):
        change(folder / "settings.json", **changes)
        change(folder / "config.json", **changes)
        assert find_trained(str(folder), None).round == rounds  # as `eval`, `export`, `chat` and `serve` load it
        refused = run_command("node", "--state", folder)
        assert refused.returncode == 2
        (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
        program, *command = shlex.split(line.partition(", type ")[2])
        assert program == "gossamer"
        rounds += 2
        again = run_command(*command, "--rounds", str(rounds), *ENDS)
        assert again.returncode == 0, again.stderr
        assert round_of(folder) == rounds
        assert (folder / "identity.key").read_bytes() == key
        recorded = json.loads((folder / "config.json").read_text())
        assert (recorded["seed"], recorded["tasks"][0]["name"]) == (7, "builtin/sums")
    assert [row["round"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(1, rounds + 1))
