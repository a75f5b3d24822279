"""A node alone is killed with SIGKILL and started again: the very numbers of an undisturbed run."""

import os
import signal
from pathlib import Path

import pytest

from node.operations.backup import back_up, restore
from node.run import run_node
from node.telemetry.metrics import read_metrics
from node.telemetry.rollout_log import ROLLOUTS_FILE
from node.training.checkpoint import Checkpoint, whole_checkpoint
from tests.commands import FORK, start_node
from tests.swarms import numbers, rows_of, small_config
from tests.waiting import wait_until

ROUNDS = 24
ALONE = {"network": {"enabled": False}, "sampling": {"local": 4, "external": 0}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    folder = tmp_path_factory.mktemp("undisturbed")
    child = start_node(small_config(ROUNDS, **ALONE), folder)
    child.join(60)
    assert child.exitcode == 0
    rows = rows_of(folder)
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))
    return numbers(rows)


@pytest.mark.parametrize("kill_after", [3, 11, 20])
def test_a_killed_node_goes_on_with_the_same_numbers(undisturbed: list[tuple], kill_after: int, tmp_path: Path) -> None:
    config = small_config(ROUNDS, **ALONE)
    child = start_node(config, tmp_path)
    wait_until(lambda: len(rows_of(tmp_path)) >= kill_after, 60)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join(10)
    before = (tmp_path / "config.json").read_bytes()
    again = start_node(config, tmp_path)
    again.join(60)
    assert again.exitcode == 0
    assert numbers(rows_of(tmp_path)) == undisturbed
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_node_restored_from_a_backup_that_was_made_while_it_ran_goes_on_with_the_same_numbers(
    undisturbed: list[tuple], tmp_path: Path
) -> None:
    config, folder = small_config(ROUNDS, **ALONE), tmp_path / "n0"
    child = start_node(config, folder)
    wait_until(lambda: len(rows_of(folder)) >= 11, 60)
    head = back_up(folder, tmp_path / "n0.tar")
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join(10)
    assert restore(tmp_path / "n0.tar", tmp_path / "again") == head and head["round"] >= 10
    again = start_node(config, tmp_path / "again")
    again.join(60)
    assert again.exitcode == 0
    assert numbers(rows_of(tmp_path / "again")) == undisturbed


def test_a_node_that_evaluates_has_the_same_numbers_and_evaluates_each_round_once(
    undisturbed: list[tuple], tmp_path: Path
) -> None:
    config = small_config(ROUNDS, **ALONE, eval={"every": 7, "count": 4, "completions": 2})
    child = start_node(config, tmp_path)
    wait_until(lambda: len(rows_of(tmp_path)) >= 9, 60)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join(10)
    again = start_node(config, tmp_path)
    again.join(60)
    assert again.exitcode == 0
    assert numbers(rows_of(tmp_path)) == undisturbed
    evaluated = read_metrics(tmp_path / "evaluations.jsonl")
    assert [row["round"] for row in evaluated] == [0, 7, 14, 21, ROUNDS]
    assert {row["round"]: row["eval/accuracy"] for row in rows_of(tmp_path) if "eval/accuracy" in row} == {
        row["round"]: row["accuracy"] for row in evaluated[1:]
    }
    shown = [(row["round"], row["seed"], row["text"], row["reward"]) for row in read_metrics(tmp_path / ROLLOUTS_FILE)]
    assert [number for number, *_ in shown] == sorted(number for number, *_ in shown)
    assert len(set(shown)) == len(shown) and {number for number, *_ in shown} == set(range(1, ROUNDS + 1))
    assert all(row["tokens_trained"] <= row["tokens_generated"] for row in rows_of(tmp_path))


def test_a_node_asked_to_stop_leaves_a_checkpoint_of_its_last_round(undisturbed: list[tuple], tmp_path: Path) -> None:
    config = small_config(ROUNDS, **ALONE)
    child = start_node(config, tmp_path)
    wait_until(lambda: rows_of(tmp_path), 60)
    os.kill(child.pid or 0, signal.SIGTERM)
    child.join(30)
    assert child.exitcode == 0
    done = rows_of(tmp_path)[-1]["round"]
    assert (tmp_path / "checkpoints" / f"checkpoint-{done}").is_dir()
    again = start_node(config, tmp_path)
    again.join(60)
    assert numbers(rows_of(tmp_path)) == undisturbed


def test_a_node_asked_to_stop_while_it_loads_begins_no_round(tmp_path: Path) -> None:
    def stop(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    child = FORK.Process(target=run_node, args=(small_config(ROUNDS), tmp_path, stop))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert rows_of(tmp_path) == [] and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "trainer_state.json"])
def test_a_damaged_checkpoint_costs_the_rounds_since_the_one_before(
    undisturbed: list[tuple], name: str, tmp_path: Path
) -> None:
    config = small_config(ROUNDS, **ALONE)
    child = start_node(config, tmp_path)
    child.join(60)
    (tmp_path / "checkpoints" / f"checkpoint-{ROUNDS}" / name).write_bytes(b"")
    again = start_node(config, tmp_path)
    again.join(60)
    assert again.exitcode == 0
    assert numbers(rows_of(tmp_path)) == undisturbed
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-20", "checkpoint-24"]
    assert whole_checkpoint(tmp_path / "checkpoints") == Checkpoint(ROUNDS, tmp_path / "checkpoints/checkpoint-24")


def test_a_node_whose_rounds_are_done_says_so_and_changes_nothing(undisturbed: list[tuple], tmp_path: Path) -> None:
    for _ in range(2):
        child = start_node(small_config(ROUNDS, **ALONE), tmp_path)
        child.join(60)
        assert child.exitcode == 0
    assert numbers(rows_of(tmp_path)) == undisturbed


@pytest.mark.parametrize("bound", ["generated_tokens", "compute"])
def test_a_budget_ends_a_node_with_the_round_that_reaches_it_killed_or_not(
    undisturbed: list[tuple], bound: str, tmp_path: Path
) -> None:
    budget = {"generated_tokens": 2600, "compute": 2900}[bound]
    config = small_config(None, **ALONE, budget={bound: budget}, eval={"ends": True, "count": 4, "completions": 0})
    child = start_node(config, tmp_path)
    wait_until(lambda: len(rows_of(tmp_path)) >= 7, 60)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join(10)
    for _ in range(2):  # the second finds nothing to do
        again = start_node(config, tmp_path)
        again.join(60)
        assert again.exitcode == 0
    rows = rows_of(tmp_path)
    assert 7 < len(rows) < ROUNDS
    assert numbers(rows) == undisturbed[: len(rows)]
    generated, trained = (sum(row[f"tokens_{what}"] for row in rows) for what in ("generated", "trained"))
    spent = {"generated_tokens": generated, "compute": generated + 3 * trained}[bound]
    last = {"generated_tokens": 0, "compute": 3 * rows[-1]["tokens_trained"]}[bound] + rows[-1]["tokens_generated"]
    assert spent - last < budget <= spent
    assert whole_checkpoint(tmp_path / "checkpoints").round == len(rows)
    assert [row["round"] for row in read_metrics(tmp_path / "evaluations.jsonl")] == [0, len(rows)]
