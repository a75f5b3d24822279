"""One process of a key at a time on a machine, whichever copies of its folder there are."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from node.errors import UserError
from node.state_folder import sole_process_of
from protocol.identity import Identity
from tests.waiting import wait_until


def hold(node: str, folder: Path, ready: Path) -> None:
    with sole_process_of(node, folder):
        ready.touch()
        signal.pause()


@pytest.mark.slow
def test_two_processes_of_one_key_do_not_run_on_one_machine_and_a_killed_one_is_no_hindrance(tmp_path: Path) -> None:
    node, folder = Identity.generate().node_id, tmp_path / "n0"
    child = multiprocessing.get_context("fork").Process(target=hold, args=(node, folder, tmp_path / "ready"))
    child.start()
    wait_until((tmp_path / "ready").exists, 10)
    says = f"node {node} runs on this machine already, in {folder}: .*push each other out"
    with pytest.raises(UserError, match=says), sole_process_of(node, tmp_path / "copy"):
        pass
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join(10)
    with sole_process_of(node, tmp_path / "copy"):
        pass
