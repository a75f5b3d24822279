"""A node alone is killed with SIGKILL and started again: the very numbers of an undisturbed run."""

import itertools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import node.run
from node.config import EvalConfig, NodeConfig
from node.engines.hf import HfEngine
from node.operations.trained import find_trained
from node.run import run_node
from node.tasks.scoring.verdicts import Scoring
from node.telemetry.metrics_file import read_metrics
from node.telemetry.rollout_log import ROLLOUTS_FILE
from node.training.checkpoint import Checkpoint, list_checkpoints, whole_checkpoint
from node.training.evaluation import Evaluations
from node.training.trainer import SwarmTrainer
from tests.commands import FORK, start_node
from tests.swarms import GRADED, numbers, rows_of, small_config
from tests.waiting import wait_until

ROUNDS = 16
ALONE = {"network": {"enabled": False}, "sampling": {"local": 4, "external": 0}}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a node that has done its rounds without a disturbance; no test may change it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    child = start_node(small_config(ROUNDS, **ALONE), folder)
    child.join(60)
    assert child.exitcode == 0
    return folder


@pytest.fixture(scope="module")
def undisturbed(done: Path) -> list[tuple]:
    rows = rows_of(done)
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))
    return numbers(rows)


@pytest.mark.real
@pytest.mark.parametrize("kill_after", [3, 7, 12])
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


@pytest.mark.slow
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
    assert [row["round"] for row in evaluated] == [0, 7, 14, ROUNDS]
    assert {row["round"]: row["eval/accuracy"] for row in rows_of(tmp_path) if "eval/accuracy" in row} == {
        row["round"]: row["accuracy"] for row in evaluated[1:]
    }
    shown = [(row["round"], row["seed"], row["text"], row["reward"]) for row in read_metrics(tmp_path / ROLLOUTS_FILE)]
    assert [number for number, *_ in shown] == sorted(number for number, *_ in shown)
    assert len(set(shown)) == len(shown) and {number for number, *_ in shown} == set(range(1, ROUNDS + 1))
    assert all(row["tokens_trained"] <= row["tokens_generated"] for row in rows_of(tmp_path))


def test_a_node_asked_to_stop_leaves_a_checkpoint_of_its_last_round_and_goes_on_from_a_tar_archive(
    undisturbed: list[tuple], tmp_path: Path
) -> None:
    config, folder = small_config(ROUNDS, **ALONE), tmp_path / "n0"
    child = start_node(config, folder)
    wait_until(lambda: rows_of(folder), 60)
    os.kill(child.pid or 0, signal.SIGTERM)
    child.join(30)
    assert child.exitcode == 0
    done = rows_of(folder)[-1]["round"]
    assert (folder / "checkpoints" / f"checkpoint-{done}").is_dir()
    subprocess.run(["tar", "-cf", "n0.tar", "n0"], cwd=tmp_path, check=True)
    shutil.rmtree(folder)
    subprocess.run(["tar", "-xf", "n0.tar"], cwd=tmp_path, check=True)
    again = start_node(config, folder)
    again.join(60)
    assert again.exitcode == 0
    assert numbers(rows_of(folder)) == undisturbed


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
    done: Path, undisturbed: list[tuple], name: str, tmp_path: Path
) -> None:
    config = small_config(ROUNDS, **ALONE)
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / f"checkpoint-{ROUNDS}" / name).write_bytes(b"")
    again = start_node(config, tmp_path)
    again.join(60)
    assert again.exitcode == 0
    assert numbers(rows_of(tmp_path)) == undisturbed
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-15", "checkpoint-16"]
    assert whole_checkpoint(tmp_path / "checkpoints") == Checkpoint(ROUNDS, tmp_path / "checkpoints/checkpoint-16")


def test_a_node_whose_rounds_are_done_says_so_and_changes_nothing(
    done: Path, undisturbed: list[tuple], tmp_path: Path
) -> None:
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    child = start_node(small_config(ROUNDS, **ALONE), tmp_path)
    child.join(60)
    assert child.exitcode == 0
    assert numbers(rows_of(tmp_path)) == undisturbed


@pytest.mark.parametrize("bound", ["generated_tokens", "compute"])
def test_a_budget_ends_a_node_with_the_round_that_reaches_it_killed_or_not(
    undisturbed: list[tuple], bound: str, tmp_path: Path
) -> None:
    budget = {"generated_tokens": 1800, "compute": 2050}[bound]
    config = small_config(None, **ALONE, budget={bound: budget}, eval={"every": "ends", "count": 4, "completions": 0})
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
    prompts = sum(row["tokens_prompts"] for row in rows)
    spent = {"generated_tokens": generated, "compute": generated + prompts + 3 * trained}[bound]
    beside = 3 * rows[-1]["tokens_trained"] + rows[-1]["tokens_prompts"]
    last = {"generated_tokens": 0, "compute": beside}[bound] + rows[-1]["tokens_generated"]
    assert spent - last < budget <= spent
    assert whole_checkpoint(tmp_path / "checkpoints").round == len(rows)
    assert [row["round"] for row in read_metrics(tmp_path / "evaluations.jsonl")] == [0, len(rows)]


def test_a_killed_node_has_each_mark_once(undisturbed: list[tuple], tmp_path: Path) -> None:
    config = small_config(ROUNDS, **ALONE, eval={"every": "marks", "count": 4, "completions": 0})
    child = start_node(config, tmp_path)
    wait_until(lambda: len(rows_of(tmp_path)) >= 7, 60)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join(10)
    again = start_node(config, tmp_path)
    again.join(60)
    assert again.exitcode == 0
    assert numbers(rows_of(tmp_path)) == undisturbed
    assert [row["round"] for row in read_metrics(tmp_path / "evaluations.jsonl")] == [0, 1, 2, 3, 4, 6, 8, 12, 16]


SHORT = small_config(
    6,
    **ALONE,
    tasks=GRADED,
    trainer={"save_steps": 100, "num_iterations": 2, "tokens_per_batch": 100, "stop_grace": 0.2},
)


class Moment(NamedTuple):
    """The `call`-th call of a function when so many rounds are `done`; `after`: once it has done its work."""

    target: object
    name: str
    done: int = 3
    call: int = 1
    after: bool = False
    seconds: float = 600
    sends: signal.Signals = signal.SIGTERM


def stop_at(moment: Moment, folder: Path) -> None:
    """Ask this process to stop in one call of a function, which takes some seconds more than it would."""
    original, calls = getattr(moment.target, moment.name), itertools.count(1)

    def stopping(*args: object, **named: object) -> object:
        if len(rows_of(folder)) != moment.done or next(calls) != moment.call:
            return original(*args, **named)
        done = original(*args, **named) if moment.after else None
        os.kill(os.getpid(), moment.sends)
        time.sleep(moment.seconds)
        return done if moment.after else original(*args, **named)

    setattr(moment.target, moment.name, stopping)


def run_armed(config: NodeConfig, folder: Path, moment: Moment | None) -> None:
    if moment is not None:
        stop_at(moment, folder)
    run_node(config, folder)


def in_child(config: NodeConfig, folder: Path, moment: Moment | None = None) -> int | None:
    child = FORK.Process(target=run_armed, args=(config, folder, moment))
    child.start()
    child.join(30)
    code = child.exitcode
    child.kill()
    child.join()
    return code


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short")
    assert in_child(SHORT, folder) == 0
    return folder


def assert_same_end(one: Path, other: Path) -> None:
    assert numbers(rows_of(one)) == numbers(rows_of(other))
    for name in ("model.safetensors", "optimizer.pt"):
        path = Path("checkpoints", "checkpoint-6", name)
        assert (one / path).read_bytes() == (other / path).read_bytes()


GENERATING = Moment(HfEngine, "_batch")
MOMENTS = [
    pytest.param(GENERATING, id="generating"),
    pytest.param(Moment(Scoring, "wait"), id="verifying", marks=pytest.mark.slow),
    pytest.param(Moment(SwarmTrainer, "compute_loss", call=2), id="between two passes", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_round_that_outlasts_the_grace_period_is_abandoned_and_done_again_to_the_bit(
    short: Path, moment: Moment, tmp_path: Path
) -> None:
    assert in_child(SHORT, tmp_path, moment) == 0
    assert [checkpoint.round for checkpoint in list_checkpoints(tmp_path / "checkpoints")] == [3]
    assert [row["round"] for row in rows_of(tmp_path)] == [1, 2, 3]
    assert in_child(SHORT, tmp_path) == 0
    assert_same_end(tmp_path, short)


def test_a_round_that_ends_within_the_grace_period_is_the_last_one(tmp_path: Path) -> None:
    config = SHORT.model_copy(update={"trainer": SHORT.trainer.model_copy(update={"stop_grace": 600})})
    assert in_child(config, tmp_path, GENERATING._replace(seconds=0)) == 0
    assert [checkpoint.round for checkpoint in list_checkpoints(tmp_path / "checkpoints")] == [4]
    assert [row["round"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 100])
def test_a_round_that_is_half_done_is_not_saved(short: Path, steps: int, tmp_path: Path) -> None:
    config = SHORT.model_copy(update={"trainer": SHORT.trainer.model_copy(update={"save_steps": steps})})
    assert in_child(config, tmp_path, Moment(torch.optim.AdamW, "step", after=True)) == 0
    assert [checkpoint.round for checkpoint in list_checkpoints(tmp_path / "checkpoints")] == (
        [2] if steps == 2 else []
    )
    assert in_child(config, tmp_path) == 0
    assert_same_end(tmp_path, short)


@pytest.mark.slow
def test_an_evaluation_that_outlasts_the_grace_period_is_abandoned_and_its_round_is_whole(
    short: Path, tmp_path: Path
) -> None:
    config = SHORT.model_copy(update={"eval": EvalConfig(every=3, count=2, completions=0)})
    assert in_child(config, tmp_path, Moment(Evaluations, "_ask", done=2)) == 0
    assert [checkpoint.round for checkpoint in list_checkpoints(tmp_path / "checkpoints")] == [3]
    assert in_child(config, tmp_path) == 0
    assert_same_end(tmp_path, short)
    assert [row["round"] for row in read_metrics(tmp_path / "evaluations.jsonl")] == [0, 3, 6]


def test_a_node_that_still_loads_its_model_is_not_waited_for(tmp_path: Path) -> None:
    config = SHORT.model_copy(update={"trainer": SHORT.trainer.model_copy(update={"stop_grace": 600})})
    assert in_child(config, tmp_path, Moment(node.run, "load_policy", done=0)) == 0
    assert rows_of(tmp_path) == [] and not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_a_second_signal_ends_a_node_at_once_as_the_signal_does(short: Path, tmp_path: Path) -> None:
    config = SHORT.model_copy(update={"trainer": SHORT.trainer.model_copy(update={"stop_grace": 600})})
    child = FORK.Process(target=run_armed, args=(config, tmp_path, GENERATING))
    child.start()
    wait_until(lambda: len(rows_of(tmp_path)) == 3, 60)

    def asked_again() -> bool:  # what comes within a second of the first counts as one with it
        os.kill(child.pid or 0, signal.SIGINT)
        child.join(0.1)
        return child.exitcode is not None

    wait_until(asked_again, 30)
    assert child.exitcode == -signal.SIGINT
    assert in_child(SHORT, tmp_path) == 0
    assert_same_end(tmp_path, short)


def test_a_checkpoint_is_written_when_a_signal_asks_for_one_after_the_round_in_progress(tmp_path: Path) -> None:
    assert in_child(SHORT, tmp_path, GENERATING._replace(seconds=0, sends=signal.SIGUSR1)) == 0
    assert [checkpoint.round for checkpoint in list_checkpoints(tmp_path / "checkpoints")] == [4, 6]


@pytest.mark.slow
def test_a_checkpoint_is_written_when_the_newest_is_so_many_minutes_old(tmp_path: Path) -> None:
    config = SHORT.model_copy(update={"rounds": 2, "trainer": SHORT.trainer.model_copy(update={"save_minutes": 1e-6})})
    assert in_child(config, tmp_path) == 0
    assert [checkpoint.round for checkpoint in list_checkpoints(tmp_path / "checkpoints")] == [1, 2]


@pytest.mark.slow
def test_the_policy_with_the_highest_score_is_saved_and_kept_and_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.1, 0.2, 0.5, 0.3, 0.5])  # before the first round and after each
    monkeypatch.setattr(
        Evaluations, "_evaluate", lambda self, *_: {"accuracy": next(scores), "reward": 0.0, "unscorable": 0}
    )
    trainer = SHORT.trainer.model_copy(update={"trl": {"save_total_limit": 1}})
    config = SHORT.model_copy(update={"rounds": 4, "trainer": trainer, "eval": EvalConfig(every=1)})
    assert in_child(config, tmp_path) == 0
    assert [checkpoint.round for checkpoint in list_checkpoints(tmp_path / "checkpoints")] == [2, 4]
    best = find_trained(str(tmp_path / "checkpoints" / "best"), None)
    assert (best.round, best.node) == (2, tmp_path)
