"""A node that several processes train: killed and started again in other ways, it has the weights of one process."""

import os
import signal
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from node.config import NodeConfig
from node.engines import spread
from node.errors import PassingError
from node.operations.config_text import to_toml
from node.processes.worker_process import Message, WorkerProcess, children_of
from node.run import run_node
from node.telemetry.metrics_file import read_metrics
from node.telemetry.rollout_log import ROLLOUTS_FILE
from node.training import processes
from node.training.follower import follow
from tests.commands import FORK, start_node
from tests.processes import alive
from tests.ranks import forget_process, in_ranks, start_ranks
from tests.swarms import gossamer, rows_of, small_config
from tests.waiting import wait_until

ROUNDS = 24
ALONE = {"network": {"enabled": False}, "sampling": {"local": 4, "external": 4, "source": "self"}}
FSDP2 = """\
distributed_type: FSDP
num_machines: 1
num_processes: 2
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node that one process trained to the end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    child = start_node(small_config(ROUNDS, **ALONE), folder)
    child.join(60)
    assert child.exitcode == 0
    return folder


def assert_same(folder: Path, undisturbed: Path, rounds: int = ROUNDS) -> None:
    weights, expected = (
        load_file(state / "checkpoints" / f"checkpoint-{rounds}" / "model.safetensors")
        for state in (folder, undisturbed)
    )
    for name, weight in expected.items():
        assert torch.allclose(weights[name], weight, atol=1e-5)
    for row, other in zip(rows_of(folder), rows_of(undisturbed), strict=True):
        for key in ("round", "reward", "loss", "grad_norm", "tokens_trained", "groups_external"):
            assert row.get(key) == pytest.approx(other.get(key), rel=1e-3, abs=1e-6), key


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_node_whose_processes_are_killed_goes_on_with_the_weights_of_one_process(
    undisturbed: Path, tmp_path: Path
) -> None:
    settings, fsdp2, folder = tmp_path / "node.toml", tmp_path / "fsdp2.yaml", tmp_path / "n0"
    settings.write_text(to_toml(small_config(ROUNDS, **ALONE)))
    fsdp2.write_text(FSDP2)

    node = gossamer("node", settings, "--state", folder, "--processes", 2)
    wait_until(lambda: len(rows_of(folder)) >= 7, 100)
    (other,) = followers(node.pid)
    os.kill(other.pid, signal.SIGKILL)
    _, printed = node.communicate(timeout=60)
    lines = printed.splitlines()
    assert node.returncode == 1 and "Traceback" not in printed
    assert "process 1 of this node has died (killed by SIGKILL" in lines[-1]
    assert [line for line in lines if "error" in line] == lines[-1:]

    node = gossamer("node", settings, "--state", folder, "--accelerate-config", fsdp2)
    wait_until(lambda: len(rows_of(folder)) >= 14, 100)
    (other,) = followers(node.pid)
    os.kill(node.pid, signal.SIGKILL)
    node.communicate(timeout=60)
    wait_until(lambda: not alive(other.pid), 10)

    node = gossamer("node", settings, "--state", folder, "--processes", 2)
    _, printed = node.communicate(timeout=100)
    assert node.returncode == 0, printed
    assert_same(folder, undisturbed)


def followers(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if "node.training.follower" in child.cmdline()]


def run_or_follow(config: NodeConfig, folder: Path) -> None:
    """What a launcher starts in each process."""
    if os.environ["RANK"] == "0":
        run_node(config, folder)
    elif status := follow():
        raise SystemExit(status)


def run_to_a_line(config: NodeConfig, folder: Path) -> None:
    """The same; number 0 writes the line that it ends with."""
    try:
        run_or_follow(config, folder)
    except PassingError as error:
        (folder / "line").write_text(str(error))
        raise SystemExit(1) from None


def run_with_another(config: NodeConfig, folder: Path, number: int | None) -> None:
    """Run a node of two processes; before the other generates for the third time, send it a signal if there is one."""
    forget_process()
    spread.GRACE_S = 1.0
    asked = []

    def call(process: WorkerProcess, request: Message, timeout: float) -> Message:
        asked.append(request["call"])
        if number is not None and asked.count("generate") == 3:
            os.kill(children_of(process.pid)[0], number)
        return WorkerProcess.call(process, request, timeout)

    processes.WorkerProcess = type("Watched", (WorkerProcess,), {"call": call})
    try:
        run_node(config, folder, processes=2)
    except PassingError as error:
        (folder / "line").write_text(str(error))
        raise SystemExit(1) from None
    assert asked.count("generate") == config.rounds


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_two_processes_generate_and_train_what_one_does(tmp_path: Path) -> None:
    folders = {"1": run_node, "2": run_with_another}
    for name, run in folders.items():
        child = FORK.Process(target=run, args=(small_config(8, **ALONE), tmp_path / name, *[None][: name == "2"]))
        child.start()
        child.join(100)
        assert child.exitcode == 0
    one, two = ([{**row, "age": 0} for row in read_metrics(tmp_path / name / ROLLOUTS_FILE)] for name in folders)
    assert one == two, "the very completions, and their rewards"
    assert_same(tmp_path / "2", tmp_path / "1", 8)


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs_as_it_generates_ends_the_node_in_a_line(tmp_path: Path, number: int) -> None:
    child = FORK.Process(target=run_with_another, args=(small_config(None, **ALONE), tmp_path, number))
    child.start()
    child.join(100)
    assert child.exitcode == 1
    assert "process 1 of this node has died (" in (tmp_path / "line").read_text()
    assert len(rows_of(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_node_that_a_launcher_started_ends_with_a_line_when_a_process_dies_and_goes_on(
    undisturbed: Path, tmp_path: Path
) -> None:
    config = small_config(ROUNDS, **ALONE)
    first, second = start_ranks(2, run_to_a_line, config, tmp_path)
    wait_until(lambda: len(rows_of(tmp_path)) >= 7, 60)
    os.kill(second.pid or 0, signal.SIGKILL)
    first.join(30)
    assert first.exitcode == 1
    assert "another process of this node has died: start the node again" in (tmp_path / "line").read_text()
    for _ in range(2):  # the second finds nothing to do
        in_ranks(2, run_or_follow, config, tmp_path)
    assert_same(tmp_path, undisturbed)
