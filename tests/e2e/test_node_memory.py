"""A node's folder remembers what it is: started again with --state alone it is the same node."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.commands import start
from tests.swarms import events_of, rows_of
from tests.waiting import wait_until

LISTEN = ("--listen", "tcp://127.0.0.1:0")
SEED = f"tcp://127.0.0.1:9?key={'ab' * 32}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "node"


def run_for_a_while(folder: Path, event: str, *arguments: str) -> None:
    """Run `gossamer node` until it has logged `event` once more, and stop it."""
    before = len(events_of(folder, event))
    child = start(folder.parent, "node", "--state", folder, *arguments)
    try:
        wait_until(lambda: len(events_of(folder, event)) > before or child.exitcode is not None, 60, event)
        assert child.exitcode is None, (child.exitcode, (folder.parent / "stderr").read_text())
        os.kill(child.pid or 0, signal.SIGTERM)
        child.join(60)
        assert child.exitcode == 0, (folder.parent / "stderr").read_text()
    finally:
        child.kill()
        child.join()


def test_a_node_goes_on_after_kubernetes_has_given_its_volume_to_a_group(folder: Path) -> None:
    run_for_a_while(folder, "listening", "--set", "role=relay", *LISTEN)
    for path in (folder, *folder.rglob("*")):  # as the kubelet does for `fsGroup`
        path.chmod(path.stat().st_mode | (0o2070 if path.is_dir() else 0o060))
    run_for_a_while(folder, "listening")
    assert (folder / "identity.key").stat().st_mode & 0o777 == 0o600
    assert len(events_of(folder, "the key file was open to its group, and is its owner's alone again")) == 1


@pytest.mark.slow
def test_a_node_goes_on_as_it_was_started(folder: Path) -> None:
    settings = "--set", f"network.seeds=['{SEED}']", "--set", "sampling.local=3"
    run_for_a_while(folder, "training", "--model", "builtin", *settings, "--rounds", "1000")
    first = json.loads((folder / "config.json").read_text())
    assert (first["sampling"]["local"], first["network"]["seeds"], first["threads"]) == (3, [SEED], 1)
    done = rows_of(folder)[-1]["round"]
    run_for_a_while(folder, "training")
    assert json.loads((folder / "config.json").read_text()) == first
    assert events_of(folder, "training")[-1]["round"] == done
    assert not events_of(folder, "changed since the last start")
    run_for_a_while(folder, "training", "--rounds", "2000")
    (said,) = events_of(folder, "changed since the last start")
    assert said["settings"] == ["rounds: 1000 -> 2000"]


def test_a_node_says_where_it_is_from_its_first_second_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.telemetry.round_log.INTERVAL_S", 0.5)  # of the node, too: it is forked from here
    run_for_a_while(folder, "round", "--model", "builtin")
    events = [json.loads(line)["event"] for line in (folder / "log.jsonl").read_text().splitlines()]
    at_times = {"round", "waiting for peers to take the last groups", "nobody took the last groups"}  # if it had any
    said = [event for event in events if event not in at_times]
    before = ["starting", "loading tasks", "listening", "dashboard", "loading"]
    assert said == [*before, "training", "evaluating", "evaluated", "finished"]


def test_a_relay_that_is_started_again_stays_a_relay(folder: Path) -> None:
    run_for_a_while(folder, "listening", "--set", "role=relay")
    run_for_a_while(folder, "listening")
    assert len(events_of(folder, "listening")) == 2
    assert not events_of(folder, "training") and not rows_of(folder)
