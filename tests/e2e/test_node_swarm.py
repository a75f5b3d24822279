"""The supervisor with real processes: restarts, stops, and children that never outlive it."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from node.cli.app import run as command
from node.config import NodeConfig
from node.errors import UserError
from node.fleet.local_swarm import NO_PARTS, PlanPart, RunOutcome, gpu_of, gpus_of, make_plan, run_swarm
from node.fleet.supervisor import NodeProcess, NodeState, nobody
from node.policy.detection import NODES_ON_GPU
from node.swarm.peering import agent
from node.telemetry.metrics_file import read_metrics
from tests.fakes import nodes
from tests.waiting import wait_until

LIMIT = 30.0


def run(
    out: Path, count: int, rounds: int, target=nodes.quick, show=lambda children: None, away=nobody, parts=NO_PARTS
) -> RunOutcome:
    plan = make_plan(out, count, NodeConfig(seed=1, rounds=rounds), parts)
    return run_swarm(plan, show, started=time.time(), target=target, preload=(), restart_delay=0.05, away=away)


def rounds_of(out: Path, name: str) -> list[int]:
    return [row["round"] for row in read_metrics(out / "nodes" / name / "metrics.jsonl")]


def pid_of(out: Path, name: str) -> int:
    path = out / "nodes" / name / "pid"
    return int(path.read_text() or 0) if path.exists() else 0


@contextmanager
def supervisor(out: Path, count: int, rounds: int, kind: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.fakes.run_swarm", str(out), str(count), str(rounds), kind]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.real
def test_every_node_runs_to_its_end_and_leaves_the_run_folder(tmp_path: Path) -> None:
    outcome = run(tmp_path / "run", 3, 20)
    assert [child.state for child in outcome.children] == [NodeState.DONE] * 3
    assert [child.progress.round for child in outcome.children] == [20, 20, 20]
    assert outcome.signal == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == outcome.summary
    assert [node["rounds"] for node in outcome.summary["nodes"].values()] == [20, 20, 20]
    assert all(0 < seconds < LIMIT for seconds in outcome.summary["first_round_seconds"].values())
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("visible", "count", "seen"), [(None, 2, ["0", "1", "0"]), ("3, GPU-5f,7", 3, ["3", "GPU-5f", "7"])]
)
def test_nodes_take_the_gpus_in_turns(
    visible: str | None, count: int, seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    config = NodeConfig(seed=1, rounds=1, policy={"model": "a/model"})
    plan = make_plan(tmp_path / "run", 3, config)
    run_swarm(plan, lambda children: None, started=time.time(), target=nodes.quick, preload=())
    assert [(tmp_path / "run" / "nodes" / f"n{index}" / "gpu").read_text() for index in range(3)] == seen
    assert gpu_of(make_plan(tmp_path / "cpu", 1, NodeConfig(policy={"model": "a/model", "device": "cpu"})), 0) == {}
    assert gpus_of(make_plan(tmp_path / "cpu", 1, NodeConfig(policy={"model": "a/model", "device": "cpu"}))) == ""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert gpu_of(plan, 0) == {NODES_ON_GPU: "3"}, "all see it, and know how many they are"


@pytest.mark.parametrize(
    ("count", "line"),
    [
        (3, "GPUs: 0 for n0; 1 for n1; 2 for n2"),
        (2, "GPUs: 0 for n0, n2; 1 for n1 (nodes on one GPU take turns at it; presets give each 1/2 of its memory)"),
        (1, "GPUs: 0 for n0, n1, n2 (nodes on one GPU take turns at it; presets give each 1/3 of its memory)"),
    ],
)
def test_a_swarm_says_which_node_has_which_gpu_and_how_one_is_shared(
    count: int, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    plan = make_plan(tmp_path / "run", 3, NodeConfig(policy={"model": "a/model"}))
    assert gpus_of(plan) == line


def test_the_line_of_gpus_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(*_: object, **__: object) -> RunOutcome:
        raise UserError("enough")

    monkeypatch.setattr("node.fleet.local_swarm.visible_gpus", lambda policy: ["0", "1"])
    monkeypatch.setattr("node.fleet.local_swarm.run_swarm", end)
    assert command(["swarm", "-n", "2", "--out", str(tmp_path / "run"), "--no-table"], debug=False) == 2
    assert "GPUs: 0 for n0; 1 for n1\n" in capsys.readouterr().out


def test_the_first_node_starts_alone_and_is_the_others_seed(tmp_path: Path) -> None:
    run(tmp_path / "run", 3, 20)
    folders = [tmp_path / "run" / "nodes" / f"n{index}" for index in range(3)]
    first = (folders[0] / "address").read_text().strip()
    assert (folders[0] / "seeds").read_text() == ""
    for folder in folders[1:]:
        assert (folder / "seeds").read_text().splitlines()[0] == first


@pytest.mark.slow
def test_a_killed_node_comes_back_with_a_living_seed_and_nobody_waits(tmp_path: Path) -> None:
    out = tmp_path / "run"
    killed: list[int] = []
    others: list[int] = []

    def kill_once(children: Sequence[NodeProcess]) -> None:
        if not killed and children[0].progress.round >= 5 and all(child.progress.round for child in children):
            killed.append(pid_of(out, "n0"))
            os.kill(killed[0], signal.SIGKILL)
        if killed and children[0].state is NodeState.RESTARTING:
            others.append(children[1].progress.round)

    outcome = run(out, 3, 300, show=kill_once)
    assert [child.state for child in outcome.children] == [NodeState.DONE] * 3
    assert [child.restarts for child in outcome.children] == [1, 0, 0]
    assert outcome.children[0].error == "killed by SIGKILL"
    assert rounds_of(out, "n0") == list(range(1, 301))
    assert others and pid_of(out, "n0") != killed[0]
    living = {(out / "nodes" / name / "address").read_text().strip() for name in ("n1", "n2")}
    assert set((out / "nodes" / "n0" / "seeds").read_text().splitlines()) <= living
    assert (out / "nodes" / "n0" / "seeds").read_text() != ""


@pytest.mark.slow
def test_a_node_that_is_to_be_away_is_killed_and_comes_back_and_one_may_join_late(tmp_path: Path) -> None:
    out = tmp_path / "run"
    looks = iter(range(8))  # for as many is the second one away, and the third one comes after it
    life: list[NodeState] = []
    asleep: list[int] = []
    late: list[bool] = []

    def away(children: Sequence[NodeProcess]) -> set[str]:
        left = children[1].progress.round >= 5
        return {"n1", "n2"} if left and next(looks, None) is not None else set() if left else {"n2"}

    def show(children: Sequence[NodeProcess]) -> None:
        if life[-1:] != [children[1].state]:
            life.append(children[1].state)
        if children[1].state is NodeState.AWAY and not children[1].alive:
            asleep.append(children[1].progress.round)
        if NodeState.RESTARTING not in life:
            late.append(children[2].state is NodeState.WAITING)

    outcome = run(out, 3, 200, show=show, away=away)
    assert [child.state for child in outcome.children] == [NodeState.DONE] * 3
    assert [child.restarts for child in outcome.children] == [0, 1, 0]
    assert [child.failures for child in outcome.children] == [0] * 3
    quick = {NodeState.STARTING, NodeState.RUNNING}  # which may begin and end between two looks
    lasting = [state for state in life if state not in quick]
    assert lasting == [NodeState.WAITING, NodeState.AWAY, NodeState.RESTARTING, NodeState.DONE]
    assert len(set(asleep)) == 1 and asleep[0] >= 5
    assert all(late)
    assert [rounds_of(out, f"n{index}") for index in range(3)] == [list(range(1, 201))] * 3


def test_a_stop_ends_a_run_of_which_nodes_are_away(tmp_path: Path) -> None:
    out, sent = tmp_path / "run", []

    def stop(children: Sequence[NodeProcess]) -> None:
        if children[1].state is NodeState.AWAY and not children[1].alive and not sent:
            sent.append(signal.SIGINT)  # once: a second one would end this process
            os.kill(os.getpid(), signal.SIGINT)

    outcome = run(
        out, 2, 100_000, show=stop, away=lambda children: {"n1"} if children[1].progress.round >= 3 else set()
    )
    assert [child.state for child in outcome.children] == [NodeState.STOPPED] * 2
    assert outcome.signal == signal.SIGINT


def test_nodes_of_a_part_go_by_its_configuration_and_a_run_goes_on_with_the_same_parts(tmp_path: Path) -> None:
    out = tmp_path / "run"
    parts = {"short": PlanPart(1, NodeConfig(seed=1, rounds=4)), "long": PlanPart(2, NodeConfig(seed=1, rounds=9))}
    outcome = run(out, 3, 4, parts=parts)
    assert [len(rounds_of(out, f"n{index}")) for index in range(3)] == [4, 9, 9]
    assert outcome.summary["run"]["parts"]["long"]["nodes"] == 2
    run(out, 3, 4, parts=parts)
    longer = parts | {"long": PlanPart(2, NodeConfig(seed=1, rounds=10))}
    with pytest.raises(UserError, match=r"other settings \(parts.long.config.rounds\)"):
        run(out, 3, 4, parts=longer)
    with pytest.raises(UserError, match=r"other settings \(parts\)"):
        run(out, 3, 4)


def test_a_node_that_fails_again_and_again_is_given_up_and_the_others_finish(tmp_path: Path) -> None:
    outcome = run(tmp_path / "run", 3, 60, target=nodes.first_crashes)
    assert [child.state for child in outcome.children] == [NodeState.FAILED, NodeState.DONE, NodeState.DONE]
    assert outcome.children[0].error == "RuntimeError: shape mismatch"
    assert outcome.children[0].restarts == 3
    log = (tmp_path / "run" / "nodes" / "n0" / "log.jsonl").read_text()
    assert "shape mismatch" in json.loads(log.splitlines()[-1])["exception"]


def test_an_error_of_the_configuration_is_one_line_and_starts_nobody_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown task 'riddles': choose one of sums") as caught:
        run(tmp_path / "run", 4, 20, target=nodes.misconfigured)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "nodes" / "n1" / "log.jsonl").exists()


@pytest.mark.slow
def test_neither_many_words_nor_a_process_that_is_left_behind_keep_the_others_waiting(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no node could start: RuntimeError: no no no"):
        run(tmp_path / "words", 1, 3, nodes.talkative)
    try:
        outcome = run(tmp_path / "left", 1, 3, nodes.leaves_a_process_behind)
    finally:
        os.kill(int((tmp_path / "left/nodes/n0/left").read_text()), signal.SIGKILL)
    assert (outcome.children[0].state, outcome.children[0].restarts) == (NodeState.DONE, 1)


def test_what_may_pass_is_tried_again(tmp_path: Path) -> None:
    outcome = run(tmp_path / "run", 2, 3, target=nodes.short_of_memory)
    assert [(child.state, child.restarts) for child in outcome.children] == [(NodeState.DONE, 1)] * 2


def test_a_run_goes_on_as_the_same_swarm(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, 2, 20)
    before = json.loads((out / "swarm.json").read_text())
    for name in ("n0", "n1"):
        metrics = out / "nodes" / name / "metrics.jsonl"
        metrics.write_bytes(metrics.read_bytes()[:-700])
    run(out, 2, 20)
    assert json.loads((out / "swarm.json").read_text()) == before
    assert rounds_of(out, "n0") == rounds_of(out, "n1") == list(range(1, 21))


def test_one_stop_lets_each_node_end_its_round(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with supervisor(out, 2, 100_000, "quick") as process:
        wait_until(lambda: len(rounds_of(out, "n1")) >= 3, LIMIT, "the second node's rounds")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        assert process.wait(LIMIT) == 130
    assert all((out / "nodes" / name / "stopped").exists() for name in ("n0", "n1"))
    assert json.loads((out / "summary.json").read_text())["nodes"]["n1"]["rounds"] >= 3


@pytest.mark.slow
def test_a_request_for_checkpoints_is_passed_on_to_each_node(tmp_path: Path) -> None:
    with supervisor(tmp_path / "run", 2, 1000, "quick") as process:
        wait_until(lambda: all(rounds_of(tmp_path / "run", name) for name in ("n0", "n1")), LIMIT)
        os.killpg(process.pid, signal.SIGUSR1)  # as a batch system does: to all processes of a job
        asked = [tmp_path / "run" / "nodes" / name / "asked to save" for name in ("n0", "n1")]
        wait_until(lambda: all(path.exists() for path in asked), LIMIT)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 128 + signal.SIGTERM


def test_a_second_stop_kills(tmp_path: Path) -> None:
    stuck = tmp_path / "stuck"
    with supervisor(stuck, 1, 100_000, "stuck") as process:
        wait_until(lambda: rounds_of(stuck, "n0"), LIMIT, "the stuck node's round")
        process.send_signal(signal.SIGTERM)
        wait_until((stuck / "nodes" / "n0" / "asked").exists, LIMIT, "the first request to stop")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 128 + signal.SIGTERM
        assert not psutil.pid_exists(pid_of(stuck, "n0"))


@pytest.mark.slow
def test_nodes_that_do_not_end_in_time_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.fleet.supervisor.END_S", 0.1)
    config = NodeConfig.model_validate({"seed": 1, "rounds": 5, "trainer": {"stop_grace": 0.1}})

    def ask_once(children: Sequence[NodeProcess]) -> None:
        if children[0].progress.round and children[0].state is NodeState.RUNNING and not asked:
            asked.append(os.kill(os.getpid(), signal.SIGTERM))

    asked: list[None] = []
    plan = make_plan(tmp_path / "run", 2, config)
    outcome = run_swarm(plan, ask_once, started=time.time(), target=nodes.stuck, preload=())
    assert [child.state for child in outcome.children] == [NodeState.STOPPED] * 2
    assert (tmp_path / "run/nodes/n0/asked").exists()


def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with supervisor(out, 2, 100_000, "stuck") as process:
        wait_until(lambda: pid_of(out, "n0") and pid_of(out, "n1"), LIMIT, "two nodes")
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3  # two nodes and their fork server
        process.kill()
        process.wait()
        wait_until(lambda: not any(process.is_running() for process in family), LIMIT, "the children's end")


def test_only_the_same_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, 1, 2)
    make_plan(out, 1, NodeConfig(rounds=2))  # no seed given: the run's own
    record = json.loads((out / "swarm.json").read_text())
    del record["config"]["trainer"]["stop_grace"]
    (out / "swarm.json").write_text(json.dumps(record))
    make_plan(out, 1, NodeConfig(rounds=2))  # written before there was such a setting
    record["config"]["frobnicate"] = 1
    (out / "swarm.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"of another version .*'frobnicate'.* gossamer node --state .*nodes/n0"):
        make_plan(out, 1, NodeConfig(rounds=2))
    del record["config"]["frobnicate"]
    (out / "swarm.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"nodes, sampling\.local"):
        make_plan(out, 2, NodeConfig(seed=1, rounds=2, sampling={"local": 1}))
    for nearer in ({"rounds": 1}, {"rounds": 2, "budget": {"compute": 9}}):
        with pytest.raises(UserError, match="holds a run with other settings"):
            make_plan(out, 1, NodeConfig(seed=1, **nearer))
    (out / "swarm.json").write_text('{"swarm": ')
    with pytest.raises(UserError, match="cannot be read"):
        make_plan(out, 1, NodeConfig(seed=1, rounds=2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="no run of a swarm"):
        make_plan(tmp_path / "other", 1, NodeConfig())


def test_a_run_may_be_given_more_rounds(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, 1, 2)
    run(out, 1, 5)
    assert rounds_of(out, "n0") == [1, 2, 3, 4, 5]
    make_plan(out, 1, NodeConfig(seed=1))  # none at all is further still


def test_a_run_that_never_began_blocks_no_other(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError):
        run(out, 1, 5, target=nodes.misconfigured)
    plan = make_plan(out, 2, NodeConfig(seed=7, rounds=3, sampling={"local": 1}))
    assert (plan.nodes, plan.seed, plan.config.rounds) == (2, 7, 3)


def test_the_summary_says_what_ran_and_when(tmp_path: Path) -> None:
    began = datetime.now(UTC)
    run(tmp_path / "run", 1, 2)
    ran = json.loads((tmp_path / "run" / "summary.json").read_text())["run"]
    assert (ran["seed"], ran["nodes"], ran["config"]["rounds"]) == (1, 1, 2)
    assert ran["agent"] == agent()
    assert began.replace(microsecond=0) <= datetime.fromisoformat(ran["ended"]) <= datetime.now(UTC)


def test_the_folders_of_nodes_are_their_owners_alone(tmp_path: Path) -> None:
    run(tmp_path / "run", 1, 1)
    assert stat.S_IMODE((tmp_path / "run" / "nodes" / "n0").stat().st_mode) == 0o700


@pytest.mark.slow  # a second supervisor for another signal: test_node_signals has it, fast
def test_a_terminal_that_goes_away_stops_a_run_as_a_person_does(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with supervisor(out, 2, 100_000, "quick") as process:
        wait_until(lambda: len(rounds_of(out, "n1")) >= 3, LIMIT, "the second node's rounds")
        os.killpg(process.pid, signal.SIGHUP)  # as a terminal does: to the whole group
        assert process.wait(LIMIT) == 128 + signal.SIGHUP
    assert all((out / "nodes" / name / "stopped").exists() for name in ("n0", "n1"))


@pytest.mark.slow
def test_the_fork_server_has_the_libraries_no_thread_beside_its_own_and_no_cuda(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "tests.fakes.count_threads", str(tmp_path)], check=True, timeout=100)
    assert (tmp_path / "threads").read_text() == "1 True True"
