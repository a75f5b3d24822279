"""A swarm on a cluster: what nodes ask for, how their folders come here, and how they come back. Without Ray."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from structlog.testing import capture_logs

from node.cli.app import run as command
from node.config import NodeConfig, PolicyConfig, parse_config
from node.errors import UserError
from node.fleet import child_process, mirror, on_ray
from node.fleet.local_swarm import RunOutcome, make_plan, run_swarm
from node.fleet.mirror import CheckpointEnd, MirrorReceiver, MirrorSender, parts_of
from node.fleet.on_ray import ClusterMachine, NodeShare, able, ray_swarm, share_of, wants_gpu
from node.fleet.supervisor import NodeProcess, NodeState
from node.telemetry.metrics_file import MetricsLog, MetricsTail, read_metrics
from node.training.checkpoint import latest_checkpoint, list_checkpoints
from tests.fakes import nodes
from tests.fakes.ray_cluster import FakeRay, Machine

GB = 10**9
BIG, SMALL = ClusterMachine(64, 4, 64 * GB), ClusterMachine(2, 0, 4 * GB)


# --- what a node asks for -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machines", "count", "gpu", "share"),
    [
        ([BIG], 4, True, NodeShare(0.9, 1.0, 0, 1)),
        ([BIG, SMALL], 8, True, NodeShare(0.9, 0.5, 0, 2)),  # two take turns at a GPU; none is where there is no GPU
        ([ClusterMachine(2, 4, GB)], 4, True, NodeShare(0.45, 1.0, 0, 1)),  # four GPUs and two processors
        ([SMALL, SMALL], 4, False, NodeShare(0.9, 0.0, GB, 2)),
        ([SMALL], 4, False, NodeShare(0.45, 0.0, GB, 4)),
        ([SMALL, ClusterMachine(0, 0, 64 * GB)], 3, False, NodeShare(0.45, 0.0, GB, 3)),  # a head takes no work
    ],
)
def test_nodes_ask_for_equal_shares_that_the_cluster_has(
    machines: list[ClusterMachine], count: int, gpu: bool, share: NodeShare
) -> None:
    machines = able(machines, gpu=gpu)
    found = share_of(machines, count, 0 if gpu else GB, gpu=gpu)
    assert found == pytest.approx(share)
    places = sum(
        min(
            int(machine.cpus / found.cpus + 1e-6),
            int(machine.gpus) * int(1 / found.gpus + 1e-6) if gpu else count,
            int(machine.memory // found.memory) if found.memory else count,
        )
        for machine in machines
    )
    assert places >= count


def test_nodes_that_the_memory_of_no_machine_holds_are_refused() -> None:
    with pytest.raises(UserError, match=r"a node takes some 3\.0 GB, and .* room for 2, not 3"):
        share_of([SMALL, SMALL], 3, 3 * GB, gpu=False)


def test_a_gpu_is_for_models_that_use_one() -> None:
    assert not wants_gpu(PolicyConfig(), [BIG])  # the built-in one
    assert wants_gpu(PolicyConfig(device="cuda"), [BIG])
    assert wants_gpu(PolicyConfig(model="a/model"), [SMALL, BIG])
    assert not wants_gpu(PolicyConfig(model="a/model", device="cpu"), [BIG])
    assert not wants_gpu(PolicyConfig(model="a/model"), [SMALL])
    with pytest.raises(UserError, match="no machine of the cluster has a GPU"):
        wants_gpu(PolicyConfig(device="cuda"), [SMALL])
    with pytest.raises(UserError, match="no machine of the cluster has a processor: see `ray status`"):
        able([ClusterMachine(0, 8, GB)], gpu=False)


# --- a node's folder in two places --------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    return there, here


def send(sender: MirrorSender, here: Path) -> None:
    receiver = MirrorReceiver(here)
    while parts := sender.take():
        receiver.put(parts)


def checkpoint(folder: Path, number: int, accuracy: float | None = None) -> None:
    path = folder / "checkpoints" / f"checkpoint-{number}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(bytes(range(256)) * number)
    (path / "optimizer.pt").write_bytes(b"")
    if accuracy is not None:
        (path / "evaluation.json").write_text(f'{{"accuracy": {accuracy}, "reward": 0.5}}')


def test_rows_come_as_they_grow_and_anew_where_the_node_went_back(pair: tuple[Path, Path], tmp_path: Path) -> None:
    there, here = pair
    sender, log = MirrorSender(there, tmp_path / "links"), MetricsLog(there / "metrics.jsonl")
    tail = MetricsTail(here / "metrics.jsonl")
    log.append({"round": 1}, {"round": 2})
    (there / "identity.key").write_text("secret")
    send(sender, here)
    assert [row["round"] for row in tail.poll()] == [1, 2]
    log.append({"round": 3})
    send(sender, here)
    assert [row["round"] for row in tail.poll()] == [3]
    log.rewind(1)
    log.append({"round": 2, "reward": 0.5})
    send(sender, here)
    assert tail.poll() == [{"round": 1}, {"round": 2, "reward": 0.5}]
    assert (here / "metrics.jsonl").read_bytes() == (there / "metrics.jsonl").read_bytes()
    assert sorted(path.name for path in here.iterdir()) == ["metrics.jsonl"]
    sender.close()


def test_logs_of_all_processes_of_a_node_are_one_and_bounded(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = pair
    for said in ("one", "two"):  # in a new folder each
        (there / "log.jsonl").unlink(missing_ok=True)
        (there / "log.jsonl").write_text(f"{said}\n")
        send(sender := MirrorSender(there, tmp_path / "links"), here)
        sender.close()
    assert (here / "log.jsonl").read_text() == "one\ntwo\n"
    output = there / "output.log"
    output.write_text("a")
    send(sender := MirrorSender(there, tmp_path / "links"), here / "again")
    with output.open("a") as file:
        file.write("b")  # and is moved out of the way before it is sent
    output.rename(there / "output.log.1")
    output.write_text("c")
    send(sender, here / "again")
    sender.close()
    assert (here / "again" / "output.log").read_text() == "abc"
    output.unlink()
    monkeypatch.setattr(mirror, "MAX_LOG_BYTES", 4)
    send(sender := MirrorSender(there, tmp_path / "links"), here)
    sender.close()
    assert ((here / "log.jsonl.1").read_text(), (here / "log.jsonl").read_text()) == ("one\ntwo\n", "two\n")


def test_a_checkpoint_is_here_when_it_is_whole_and_after_its_rows(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = pair
    monkeypatch.setattr(mirror, "PART", 1000)
    sender, receiver, log = (
        MirrorSender(there, tmp_path / "links"),
        MirrorReceiver(here),
        MetricsLog(there / "metrics.jsonl"),
    )
    checkpoint(there, 5, accuracy=0.5)
    receiver.put(sender.take())
    log.append({"round": 6})
    checkpoint(there, 10)
    (there / "checkpoints" / "checkpoint-5" / "model.safetensors").unlink()  # which the node may remove meanwhile
    seen = []
    while parts := sender.take():
        assert list_checkpoints(here / "checkpoints") == seen
        receiver.put(parts)
        seen = list_checkpoints(here / "checkpoints")
        assert read_metrics(here / "metrics.jsonl") == [{"round": 6}]
    assert [one.round for one in seen] == [5, 10]  # the best, and the newest
    model = Path("checkpoints") / "checkpoint-10" / "model.safetensors"
    assert (here / model).read_bytes() == (there / model).read_bytes()
    checkpoint(there, 15)
    send(sender, here)
    assert [checkpoint.round for checkpoint in list_checkpoints(here / "checkpoints")] == [5, 15]
    sender.close()


def test_what_came_is_enough_to_go_on_elsewhere_and_is_not_sent_back(pair: tuple[Path, Path], tmp_path: Path) -> None:
    there, here = pair
    MetricsLog(here / "metrics.jsonl").append({"round": 5})
    checkpoint(here, 5, accuracy=0.5)
    checkpoint(here, 10)
    (here / "checkpoints" / ".writing-15").mkdir()  # its machine died
    for name in ("address", "identity.key", "log.jsonl"):
        (here / name).write_text("of the node before\n")
    MirrorReceiver(there).put(list(parts_of(here)))
    assert sorted(path.name for path in there.iterdir()) == ["checkpoints", "metrics.jsonl"]
    newest = latest_checkpoint(there / "checkpoints")
    assert newest is not None and newest.round == 10 and (newest.path / "optimizer.pt").exists()
    sender = MirrorSender(there, tmp_path / "links")
    assert sender.take() == []
    checkpoint(there, 20)
    MirrorReceiver(here)
    assert CheckpointEnd(20) in [part for _ in range(4) for part in sender.take()]
    sender.close()
    assert [checkpoint.round for checkpoint in list_checkpoints(here / "checkpoints")] == [5, 10]


# --- nodes on a cluster -------------------------------------------------------------------------------


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    """Two machines of one processor each; nodes are fakes in real processes."""
    fake = FakeRay(*(Machine(name, CPU=1.0, memory=4.0 * GB) for name in ("a", "b")))
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(on_ray, "run_real_node", nodes.afar)
    monkeypatch.setattr(on_ray, "start_server", lambda: child_process.start_server(()))
    monkeypatch.setattr(on_ray, "POLL_S", 0.02)
    with mock.patch.dict(os.environ):  # which a new cluster changes
        yield fake
    for actor in fake.actors:
        actor.clean()


def run(
    out: Path, show: Callable[[Sequence[NodeProcess]], object] = lambda children: None, count: int = 2, **settings: Any
) -> RunOutcome:
    given = parse_config({"seed": 1, "rounds": 20, "observe": {"enabled": False}, **settings})
    with ray_swarm("ray", given, count) as swarm:
        plan = make_plan(out, count, swarm.config)
        return run_swarm(plan, show, started=0.0, machines=swarm.machines._replace(restart_delay=0.05))


def said(out: Path, name: str, word: str) -> list[str]:
    """What a node's processes said of how they were started."""
    lines = (out / "nodes" / name / "output.log").read_text().splitlines()
    return [line.removeprefix(f"{word} ") for line in lines if line.startswith(f"{word} ")]


@pytest.mark.slow
def test_a_swarm_on_a_cluster_leaves_what_one_on_this_machine_does_and_nothing_elsewhere(
    ray: FakeRay, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = ["-n", "2", "--rounds", "20", "--on", "ray=head:6379", "--out", str(out), "--no-table"]
    assert command(["swarm", *options], debug=False) == 0
    shown = capfd.readouterr().out
    assert "Ray: 2 machines; a node asks for 0.9 processors" in shown and f"report: {out / 'report.html'}" in shown
    assert ray.given["address"] == "head:6379" and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert ray.is_shut_down and all(actor.dead for actor in ray.actors)
    assert [len(machine.actors) for machine in ray.machines] == [1, 1]
    for name in ("n0", "n1"):
        assert [row["round"] for row in read_metrics(out / "nodes" / name / "metrics.jsonl")] == list(range(1, 21))
        assert said(out, name, "listens") == ["tcp://127.0.0.1:0 off tcp://127.0.0.1:0"]
        assert said(out, name, "gpus") == [""]  # hidden
        (folder,) = (Path(one.split()[0]) for one in said(out, name, "folder"))
        assert folder.name == name and not folder.parent.exists()
    assert (out / "report.html").exists() and (out / "summary.json").exists()


@pytest.mark.slow
def test_a_node_whose_machine_dies_goes_on_elsewhere_without_its_key(ray: FakeRay, tmp_path: Path) -> None:
    dies, rows = ray.machines[1], tmp_path / "rows.jsonl"
    rows.write_text("{}")

    def look(children: Sequence[NodeProcess]) -> None:
        if dies.alive and all(child.progress.round >= 5 for child in children):
            for child in children:
                (child.folder / "identity.key").touch()
            dies.die()
        if any(child.restarts for child in children) and {child.state for child in children} == {NodeState.RUNNING}:
            os.kill(os.getpid(), signal.SIGINT)

    tasks = [{"name": "dataset/rows", "options": {"path": str(rows)}}]
    outcome = run(tmp_path / "run", look, rounds=100_000, tasks=tasks)
    assert [child.state for child in outcome.children] == [NodeState.STOPPED] * 2
    stayed, came_back = sorted(outcome.children, key=lambda child: child.restarts)
    assert (stayed.restarts, came_back.restarts, len(ray.machines[0].actors)) == (0, 1, 2)
    assert "its machine or its actor died: Its node was terminated." in came_back.error
    first, again = said(tmp_path / "run", came_back.name, "rounds")
    assert first == "0" and int(again) >= 5
    rounds = [row["round"] for row in read_metrics(came_back.folder / "metrics.jsonl")]
    assert rounds == list(range(1, came_back.progress.round + 1)) and len(rounds) > int(again)
    assert "identity.key" not in said(tmp_path / "run", came_back.name, "folder")[-1]
    assert said(tmp_path / "run", came_back.name, "task")[-1].endswith("/files0/rows.jsonl {}")


@pytest.mark.slow
def test_a_stop_lets_nodes_on_a_cluster_end_their_round_and_the_same_run_goes_on(ray: FakeRay, tmp_path: Path) -> None:
    until = 5

    def stop(children: Sequence[NodeProcess]) -> None:
        if all(child.progress.round >= until for child in children):
            os.kill(os.getpid(), signal.SIGINT)

    outcome = run(tmp_path, stop, rounds=100_000)
    assert outcome.signal == signal.SIGINT
    assert [child.state for child in outcome.children] == [NodeState.STOPPED] * 2
    until = 5 + max(child.progress.round for child in outcome.children)
    run(tmp_path, stop, rounds=100_000)
    for child in outcome.children:
        assert said(tmp_path, child.name, "rounds") == ["0", str(child.progress.round)]


def test_a_node_waits_for_a_machine_with_room_says_so_and_can_be_stopped_meanwhile(
    ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "WAITING_S", 0.1)
    given = parse_config({"rounds": 20})
    with ray_swarm("ray", given, 1) as swarm:
        for machine in ray.machines:
            machine.resources = {"CPU": 0.0}
        node = swarm.machines.start(NodeConfig(), tmp_path / "n0", {})
        log = tmp_path / "n0" / "log.jsonl"
        while not log.exists() or "waiting for a place on the cluster" not in log.read_text():
            assert node.is_alive()
        node.signal(signal.SIGUSR1)  # which asks for a checkpoint
        node.signal(signal.SIGTERM)
        assert node.ending().code != 0


@pytest.mark.slow
def test_a_node_that_hangs_is_killed_with_its_actor(
    ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "run_real_node", nodes.stuck)
    monkeypatch.setattr("node.fleet.supervisor.END_S", 0.25)

    asked: list[None] = []

    def stop(children: Sequence[NodeProcess]) -> None:
        if children[0].progress.round and not asked:
            asked.append(os.kill(os.getpid(), signal.SIGINT))

    with capture_logs() as logs:
        outcome = run(tmp_path, stop, count=1, trainer={"stop_grace": 0.5})
    assert outcome.children[0].state is NodeState.STOPPED
    assert [entry["seconds"] for entry in logs if "did not end in time" in entry["event"]] == [0.5 + 0.25]


def test_what_is_wrong_at_a_machine_is_one_line(
    ray: FakeRay, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--on", "ray", "--out", str(tmp_path / "run"), "--no-table"]
    assert command(["swarm", "--model", "/no/such/model", *options], debug=False) == 2
    line = "error: cannot load policy.model '/no/such/model': no such folder here: check the path\n"
    assert capfd.readouterr().err == line
    assert not (tmp_path / "run").exists() and ray.is_shut_down


def test_without_ray_a_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command(["swarm", "--on", "ray", "--out", str(tmp_path / "run")], debug=False) == 2
    assert capfd.readouterr().err == f"error: --on ray wants Ray: {sys.executable} -m pip install 'gossamer[ray]'\n"
    assert command(["swarm", "--on", "slurm", "--out", str(tmp_path / "run")], debug=False) == 2
    assert capfd.readouterr().err == "error: --on slurm: write ray, or ray=ADDRESS\n"
