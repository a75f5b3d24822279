"""`found`, `invite`, `join` and `status` as a person gives them: two trainers on this machine, from one line."""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from node.founding import load_manifest
from protocol.identity import Identity
from tests.swarms import events_of, gossamer, rows_of
from tests.waiting import wait_until

SMALL = ["--set", "threads=1", "--set", "sampling.local=8", "--set", "trainer.save_steps=5"]


def run(*arguments: str | Path) -> str:
    process = gossamer(*arguments)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


def stop(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


def external(folder: Path) -> int:
    return sum(row["groups_external"] for row in rows_of(folder))


@contextmanager
def two_nodes(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str], str]]:
    """A founder in tmp_path/first and a joiner in tmp_path/second; their processes and the invite."""
    founder = gossamer(
        "found", "riddles", "--tasks", "builtin/sums,builtin/weekdays", "--out", tmp_path / "first", *SMALL
    )
    started = [founder]
    try:
        assert founder.stdout is not None
        invite = founder.stdout.readline().strip()
        assert invite.startswith("gossamer://riddles/")
        started.append(gossamer("join", invite, "--out", tmp_path / "second", *SMALL))
        yield started[0], started[1], invite
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.communicate()


def test_two_nodes_train_together_from_one_line(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with two_nodes(tmp_path) as (founder, joiner, invite):
        wait_until(lambda: external(first) > 0 and external(second) > 0, 90, "both to train on the other's groups")
        assert run("invite", first).startswith(invite)  # and then the address of the joiner, which it knows by now
        state = json.loads(run("status", second, "--json"))
        assert state["swarm"] == {"id": load_manifest(first).swarm.hex(), "name": "riddles"}  # type: ignore[union-attr]
        assert [peer["node"] for peer in state["peers"]] == [Identity.load(first / "identity.key").node_id]
        assert state["round"] > 0 and state["counters"]["items_received"] > 0
        assert state["rejected"].keys().isdisjoint({"unknown_task", "false_reward", "false_question"})
        stop(founder)
        stop(joiner)
    tasks = json.loads((second / "config.json").read_text())["tasks"]
    assert [task["name"] for task in tasks] == ["builtin/sums", "builtin/weekdays"]


@pytest.mark.slow
def test_a_node_that_joined_goes_on_with_the_same_line_or_without_any(tmp_path: Path) -> None:
    second = tmp_path / "second"
    with two_nodes(tmp_path) as (_, joiner, invite):
        for again in (["join", invite, "--out"], ["node", "--state"]):
            wait_until(lambda: rows_of(second) and external(second) > 0, 90, "the joiner to train")
            stop(joiner)
            done = rows_of(second)[-1]["round"]
            joiner = gossamer(*again, second)
            wait_until(lambda: rows_of(second)[-1]["round"] > done, 90, "the joiner to go on")  # noqa: B023  # awaited here
            assert events_of(second, "training")[-1]["round"] == done
        stop(joiner)
