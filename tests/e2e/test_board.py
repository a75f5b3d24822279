"""A board as a person starts it: real processes report to it, a kill costs no history, and liars gain nothing."""

import http.client
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from node.swarm import founding, inviting
from protocol.credentials.manifest import JoinPolicy
from protocol.identity import Identity
from tests import commands
from tests.fakes import small_nodes
from tests.swarms import small_config
from tests.waiting import wait_until

NODES, LIARS = 20, 5

SMALL = ["--set", "threads=1", "--set", "sampling.local=8", "--set", "trainer.save_steps=50"]


class Printing:
    """A command that runs, and what it has printed."""

    def __init__(self, output: Path, *arguments: str | Path) -> None:
        output.mkdir(exist_ok=True)
        self._output = output
        self.process: BaseProcess = commands.start(output, *arguments)

    def line(self, start: str) -> str:
        """Return the first line that begins with `start`, once it is there."""

        def found() -> str:
            path = self._output / "stdout"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            return next((line.strip() for line in lines if line.startswith(start) and line.endswith("\n")), "")

        wait_until(lambda: found() or not self.process.is_alive(), 90, start)
        assert found(), (self._output / "stderr").read_text()
        return found()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def get(link: str, path: str) -> str:
    connection = http.client.HTTPConnection(link.removeprefix("board: http://").rstrip("/"), timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.read().decode()
    finally:
        connection.close()


def reported(link: str, *nodes: str) -> dict[str, Any] | None:
    """What the page says, once it has the rewards of `nodes` and the swarm's."""
    tree = json.loads(get(link, "/swarm.json"))
    rewards = {node["id"]: node["says_of_itself"]["reward"] for node in tree["nodes"]}
    is_there = all(rewards.get(node) is not None for node in nodes) and tree["history"]
    return tree if is_there and any(point["reward"] is not None for point in tree["history"]) else None


@contextmanager
def swarm(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Two nodes of a swarm that was founded with reports; its invite, and their ids."""
    nodes = [
        Printing(
            folder / "printed0",
            "found",
            "riddles",
            "--reports",
            "--task",
            "builtin/sums",
            *SMALL,
            "--state",
            folder / "n0",
        )
    ]
    try:
        invite = nodes[0].line("gossamer://")
        nodes.append(Printing(folder / "printed1", "join", invite, *SMALL, "--state", folder / "n1"))
        wait_until((folder / "n1" / "address").exists, 90, "the second node")
        yield invite, [Identity.load(folder / name / "identity.key").node_id for name in ("n0", "n1")]
    finally:
        for node in nodes:
            node.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_board_shows_both_nodes_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    start = ("board", "--state", tmp_path / "b", "--port", "0")
    with swarm(tmp_path) as (invite, nodes):
        first = Printing(tmp_path / "printed-b1", *start[:1], invite, *start[1:])
        try:
            link = first.line("board: ")
            before = wait_until(lambda: reported(link, *nodes), 120, "both nodes' rewards")
            page = get(link, "/")
            assert page.count('href="/nodes/') >= 2
            assert "<h1>riddles</h1>" in page
        finally:
            first.kill()
        again = Printing(tmp_path / "printed-b2", *start)
        try:
            after = reported(again.line("board: "), *nodes)
        finally:
            again.kill()
    assert after is not None
    assert {node["id"]: node["first_report"] for node in after["nodes"]} == {
        node["id"]: node["first_report"] for node in before["nodes"]
    }
    assert after["history"][0]["at"] == before["history"][0]["at"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_in_a_swarm_of_twenty_five_liars_that_praise_each_other_have_no_standing_and_move_no_curve(
    tmp_path: Path,
) -> None:
    names = [f"n{number}" for number in range(NODES)]
    folders = [tmp_path / name for name in names]
    founding.found(
        small_config(1, tasks=[{"name": "builtin/sums"}]), folders[0], "riddles", JoinPolicy.OPEN, [], reports_s=60
    )
    for folder in folders[1:]:
        folder.mkdir(mode=0o700)
        Identity.generate().save(folder / "identity.key")
        shutil.copy(folders[0] / "manifest.bin", folder)
    ids = [Identity.load(folder / "identity.key").node_id for folder in folders]
    honest, liars = ids[:-LIARS], ids[-LIARS:]
    children: list[BaseProcess] = []
    try:
        seeds: list[str] = []
        for folder, node in zip(folders, ids, strict=True):
            config = small_config(1, tasks=[{"name": "builtin/sums"}], network={"seeds": seeds})
            praised = [liar for liar in liars if liar != node] if node in liars else []
            children.append(small_nodes.start(config, folder, 60, praised))
            if not seeds:
                wait_until((folder / "address").exists, 60, "the founder")
                seeds.append((folder / "address").read_text())
        invite = inviting.make_invite(folders[0], [])
        board = Printing(tmp_path / "printed", "board", str(invite), "--state", tmp_path / "b", "--port", "0")
        children.append(board.process)
        link = board.line("board: ")
        # The founder's own word counts, whoever learned from it.
        tree = wait_until(lambda: stood(link, NODES, honest[1:]), 250, "all to report and the honest to stand")
    finally:
        for child in children:
            child.kill()
            child.join()
    standing = {node["id"]: node["standing"] for node in tree["nodes"]}
    assert [standing[node] for node in liars] == [0.0] * LIARS
    assert {node["says_of_itself"]["reward"] for node in tree["nodes"] if node["id"] in liars} == {1.0}
    assert tree["history"][-1]["reward"] == tree["history"][-1]["accuracy"] == 0.5


def stood(link: str, count: int, honest: list[str]) -> dict[str, Any] | None:
    """What the page says, once `count` nodes have reported and others have learned from each of `honest`."""
    tree = json.loads(get(link, "/swarm.json"))
    standing = {node["id"]: node["standing"] for node in tree["nodes"]}
    is_there = tree["history"] and tree["history"][-1]["nodes"] == count
    return tree if is_there and all(standing[node] > 0 for node in honest) else None
