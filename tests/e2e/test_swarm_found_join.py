"""`found`, `invite`, `join` and `status` as a person gives them: two trainers on this machine, from one line."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from node.swarm.swarm_folder import load_manifest
from protocol.identity import Identity
from tests import commands
from tests.swarms import events_of, rows_of
from tests.waiting import wait_until

SMALL = ["--set", "threads=1", "--set", "sampling.local=8", "--set", "trainer.save_steps=5"]


def start(folder: Path, *arguments: str | Path) -> BaseProcess:
    """Start the command on `folder`; what it prints goes into files beside `folder`, its node's."""
    output = folder.with_name(f"{folder.name}-printed")
    output.mkdir(exist_ok=True)
    return commands.start(output, *arguments, folder)


def run(*arguments: str | Path) -> str:
    done = commands.run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def status(folder: Path) -> dict[str, Any]:
    return json.loads(run("status", folder, "--json"))


def stop(process: BaseProcess, folder: Path) -> None:
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0, printed(folder, "stderr")


def printed(folder: Path, stream: str = "stdout") -> str:
    path = folder.with_name(f"{folder.name}-printed") / stream
    return path.read_text() if path.exists() else ""


def external(folder: Path) -> int:
    return sum(row["groups_external"] for row in rows_of(folder))


@contextmanager
def two_nodes(first: Path, second: Path) -> Iterator[tuple[BaseProcess, BaseProcess, str]]:
    """A founder and one that joins it; their processes and the invite."""
    started = [
        start(first, "found", "riddles", "--task", "builtin/sums", "--task", "builtin/weekdays", *SMALL, "--state")
    ]
    try:
        wait_until(lambda: "\n" in printed(first) or not started[0].is_alive(), 60, "the invite")
        invite = printed(first).partition("\n")[0].strip()
        assert invite.startswith("gossamer://riddles/"), printed(first, "stderr")
        started.append(start(second, "join", invite, *SMALL, "--state"))
        yield started[0], started[1], invite
    finally:
        for process in started:
            process.kill()
            process.join()


@pytest.mark.real
def test_two_nodes_train_together_from_one_line(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with two_nodes(first, second) as (founder, joiner, invite):
        wait_until(lambda: external(first) > 0 and external(second) > 0, 90, "both to train on the other's groups")
        assert run("invite", first).startswith(
            invite.rpartition("/")[0]
        )  # and then the address of the joiner, which it knows by now
        founders = [Identity.load(first / "identity.key").node_id]
        wait_until(lambda: [peer["node"] for peer in status(second)["peers"]] == founders, 60, "a link to the founder")
        state = status(second)
        assert state["swarm"] == {"id": load_manifest(first).swarm.hex(), "name": "riddles"}  # type: ignore[union-attr]
        assert state["round"] > 0 and state["counters"]["items_received"] > 0
        assert state["rejected"].keys().isdisjoint({"unknown_task", "false_reward", "false_question"})
        stop(founder, first)
        stop(joiner, second)
    tasks = json.loads((second / "config.json").read_text())["tasks"]
    assert [task["name"] for task in tasks] == ["builtin/sums", "builtin/weekdays"]


@pytest.mark.slow
def test_a_node_that_joined_goes_on_with_the_same_line_or_without_any(tmp_path: Path) -> None:
    second = tmp_path / "second"
    with two_nodes(tmp_path / "first", second) as (_, joiner, invite):
        for again in (["join", invite, "--state"], ["node", "--state"]):
            wait_until(lambda: rows_of(second) and external(second) > 0, 90, "the joiner to train")
            stop(joiner, second)
            done = rows_of(second)[-1]["round"]
            joiner = start(second, *again)
            wait_until(lambda: rows_of(second)[-1]["round"] > done, 90, "the joiner to go on")  # noqa: B023  # awaited here
            assert events_of(second, "training")[-1]["round"] == done
        stop(joiner, second)
