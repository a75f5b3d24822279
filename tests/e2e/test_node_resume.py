"""A node alone is killed with SIGKILL and started again: the very numbers of an undisturbed run."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from node.config import NodeConfig
from node.run import run_node
from tests.swarms import numbers, rows_of, small_config
from tests.waiting import wait_until

ROUNDS = 24
ALONE = {"network": {"enabled": False}, "sampling": {"local": 4, "external": 0}}


def run_in_child(config: NodeConfig, folder: Path) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=run_node, args=(config, folder))
    child.start()
    return child


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    folder = tmp_path_factory.mktemp("undisturbed")
    child = run_in_child(small_config(ROUNDS, **ALONE), folder)
    child.join(60)
    assert child.exitcode == 0
    rows = rows_of(folder)
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))
    return numbers(rows)


@pytest.mark.parametrize("kill_after", [3, 11, 20])
def test_a_killed_node_goes_on_with_the_same_numbers(undisturbed: list[tuple], kill_after: int, tmp_path: Path) -> None:
    config = small_config(ROUNDS, **ALONE)
    child = run_in_child(config, tmp_path)
    wait_until(lambda: len(rows_of(tmp_path)) >= kill_after, 60)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join(10)
    before = (tmp_path / "config.json").read_bytes()
    again = run_in_child(config, tmp_path)
    again.join(60)
    assert again.exitcode == 0
    assert numbers(rows_of(tmp_path)) == undisturbed
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_node_asked_to_stop_leaves_a_checkpoint_of_its_last_round(undisturbed: list[tuple], tmp_path: Path) -> None:
    config = small_config(ROUNDS, **ALONE)
    child = run_in_child(config, tmp_path)
    wait_until(lambda: rows_of(tmp_path), 60)
    os.kill(child.pid or 0, signal.SIGTERM)
    child.join(30)
    assert child.exitcode == 0
    done = rows_of(tmp_path)[-1]["round"]
    assert (tmp_path / "checkpoints" / f"checkpoint-{done}").is_dir()
    again = run_in_child(config, tmp_path)
    again.join(60)
    assert numbers(rows_of(tmp_path)) == undisturbed
