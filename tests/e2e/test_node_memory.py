"""A node's folder remembers what it is: started again with --state alone it is the same node."""

import json
import signal
from pathlib import Path

from tests.swarms import events_of, gossamer, rows_of
from tests.waiting import wait_until

SEED = f"tcp://127.0.0.1:9?key={'ab' * 32}"


def run_for_a_while(folder: Path, event: str, *arguments: str) -> None:
    """Run `gossamer node` until it has logged `event` once more, and stop it."""
    before = len(events_of(folder, event))
    process = gossamer("node", "--state", folder, *arguments)
    try:
        wait_until(lambda: len(events_of(folder, event)) > before or process.poll() is not None, 60, event)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_a_node_goes_on_as_it_was_started(tmp_path: Path) -> None:
    run_for_a_while(tmp_path, "training", "--seed-peer", SEED, "--set", "sampling.local=3", "--rounds", "1000")
    first = json.loads((tmp_path / "config.json").read_text())
    assert (first["sampling"]["local"], first["network"]["seeds"], first["threads"]) == (3, [SEED], 1)
    done = rows_of(tmp_path)[-1]["round"]
    run_for_a_while(tmp_path, "training")
    assert json.loads((tmp_path / "config.json").read_text()) == first
    assert events_of(tmp_path, "training")[-1]["round"] == done
    assert not events_of(tmp_path, "changed since the last start")
    run_for_a_while(tmp_path, "training", "--rounds", "2000")
    (said,) = events_of(tmp_path, "changed since the last start")
    assert said["settings"] == ["rounds: 1000 -> 2000"]


def test_a_node_says_where_it_is_from_its_first_second_on(tmp_path: Path) -> None:
    run_for_a_while(tmp_path, "round")
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event for event in events if event != "round"] == [
        "starting",
        "listening",
        "dashboard",
        "loading",
        "training",
        "finished",
    ]


def test_a_relay_that_is_started_again_stays_a_relay(tmp_path: Path) -> None:
    run_for_a_while(tmp_path, "listening", "--seed-only")
    run_for_a_while(tmp_path, "listening")
    assert len(events_of(tmp_path, "listening")) == 2
    assert not events_of(tmp_path, "training") and not rows_of(tmp_path)
