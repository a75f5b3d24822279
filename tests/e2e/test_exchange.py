"""Other people's trainers in a swarm with an ordinary node: each draws groups of the other."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from node.swarm.founding import found, make_invite
from protocol.credentials.manifest import JoinPolicy
from protocol.credentials.records import Address
from protocol.identity import Identity
from tests.commands import start_node
from tests.swarms import GRADED, ROOT, rows_of, small_config
from tests.waiting import wait_until


@contextmanager
def swarm_of_one(folder: Path) -> Iterator[str]:
    """A swarm whose founder trains in `folder`, and an invite to it."""
    config = small_config(None, tasks=GRADED)
    found(config, folder, "club", JoinPolicy.OPEN, [])
    node = start_node(config, folder)
    try:
        wait_until(lambda: rows_of(folder), 90, "the node's first round")
        yield str(make_invite(folder, [], own=[Address.parse((folder / "address").read_text())]))
    finally:
        node.kill()
        node.join()


def teachers(folder: Path) -> set[str]:
    """The peers whose groups the node in `folder` has trained on."""
    return {peer for row in rows_of(folder) for peer in row["swarm/taught_by"]}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_bare_loop_and_a_node_draw_each_others_groups(tmp_path: Path) -> None:
    with swarm_of_one(tmp_path / "node") as invite:
        command = [sys.executable, str(ROOT / "examples" / "bare_loop.py"), invite]
        done = subprocess.run(
            [*command, "--state", str(tmp_path / "bare"), "--rounds", "30"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        assert len(lines) == 30 and sum(int(line[-1]) for line in lines) > 0
        bare = Identity.load(tmp_path / "bare" / "identity.key").node_id
        wait_until(lambda: bare in teachers(tmp_path / "node"), 60, "the node to be taught by the bare loop")
        assert all(
            row["swarm/rejected"].keys().isdisjoint({"false_reward", "false_question"})
            for row in rows_of(tmp_path / "node")
        )
