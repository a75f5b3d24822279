"""Worker processes: what they have started ends with them, and a frame that answers no request is dropped."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from node.processes.worker_process import (
    HEADER,
    Deadline,
    Message,
    PatientDeadline,
    Requests,
    WorkerError,
    WorkerProcess,
    WorkerTimeoutError,
    ask,
    descendants_of,
    receive,
    send,
)
from tests.processes import alive
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]

# Starts a child, one in a session of its own and a daemon whose parent has ended, and says which; then does as it is
# told. Each program waits for the end of a pipe that nobody closes.
WORKER = """
import os, signal, subprocess, sys, time
from node.processes.worker_process import connect

def daemon():
    told, tells = os.pipe()
    if os.fork() == 0:
        os.setsid()
        os.write(tells, str(program().pid).encode())
        os._exit(0)
    os.wait()
    return int(os.read(told, 20))

def program(**more):
    return subprocess.Popen(["sleep", "600"], **more)

requests = connect(int(sys.argv[1]), int(sys.argv[2]))
while True:
    match requests.receive():
        case {"call": "start"}:
            started = [program().pid, program(start_new_session=True).pid, daemon()]
            requests.reply({"pids": [os.getpid(), *started]})
        case {"call": "exit"}:
            os._exit(3)
        case {"call": "die"}:
            os.kill(os.getpid(), signal.SIGSEGV)
        case {"call": "hang"}:
            time.sleep(600)
"""


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerProcess]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    worker = WorkerProcess([sys.executable, "-c", WORKER], {})
    yield worker
    worker.kill()


def started(worker: WorkerProcess) -> Sequence[int]:
    pids: list[int] = worker.call({"call": "start"}, 60)["pids"]
    assert len(pids) == 4 and all(map(alive, pids))
    return [*pids, worker.pid]


def left(pids: Sequence[int]) -> list[int]:
    return list(filter(alive, pids))


@pytest.mark.slow
def test_what_a_worker_has_started_ends_with_it_in_whatever_session_it_is(worker: WorkerProcess) -> None:
    pids = started(worker)
    worker.kill()
    assert left(pids) == []


@pytest.mark.slow
def test_what_a_worker_has_started_ends_with_a_call_that_takes_too_long(worker: WorkerProcess) -> None:
    pids = started(worker)
    with pytest.raises(WorkerTimeoutError, match="no answer to 'hang'"):
        worker.call({"call": "hang"}, 0.2)
    assert left(pids) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "status", "said"), [("exit", 3, "exit status 3"), ("die", -signal.SIGSEGV, "killed by SIGSEGV")]
)
def test_what_a_worker_has_started_ends_when_it_ends_by_itself_and_its_status_is_told(
    worker: WorkerProcess, call: str, status: int, said: str
) -> None:
    pids = started(worker)
    with pytest.raises(WorkerError, match=said) as error:
        worker.call({"call": call}, 60)
    assert (error.value.status, left(pids)) == (status, [])


@pytest.mark.slow
def test_what_a_worker_has_started_ends_with_a_node_that_is_killed() -> None:
    node = f"""
import sys, time
from node.processes.worker_process import WorkerProcess
worker = WorkerProcess([sys.executable, "-c", {WORKER!r}], {{}})
print(*worker.call({{"call": "start"}}, 60)["pids"], worker.pid, flush=True)
time.sleep(600)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", node], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = list(map(int, process.stdout.readline().split()))
        assert len(pids) == 5 and all(map(alive, pids))
        process.kill()
    wait_until(lambda: left(pids) == [], timeout=10, what="the end of all that the worker had started")


def test_descendants_are_found_parents_first_and_however_long_a_chain_of_forks_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = {1: [2, 3], 2: [4]} | {pid: [pid + 1] for pid in range(4, 5000)}
    monkeypatch.setattr("node.processes.worker_process.children_of", lambda pid: list(table.get(pid, [])))
    assert descendants_of(1) == list(range(2, 5001))
    assert descendants_of(3) == []


@pytest.mark.slow
def test_a_deadline_is_later_by_the_time_for_which_processes_wait_for_a_processor() -> None:
    spin = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile os.getppid() == int(sys.argv[2]): pass"
    core = str(min(os.sched_getaffinity(0)))
    spinning = [subprocess.Popen([sys.executable, "-c", spin, core, str(os.getpid())]) for _ in range(3)]
    try:
        pids = [process.pid for process in spinning]
        began = time.monotonic()
        without, patient = PatientDeadline(0.1, 0.0, lambda: pids), PatientDeadline(0.1, 0.2, lambda: pids)
        assert patient() == pytest.approx(began + 0.1, abs=1.0)
        wait_until(lambda: patient.is_starved or not patient(), timeout=30, what="two of three to wait for 0.2 s")
        assert patient() - without() == pytest.approx(0.2, abs=0.05) and not without.is_starved
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    asleep = PatientDeadline(0.0, 1e6, lambda: [os.getpid(), 2**22])
    assert asleep() - time.monotonic() < 60 and not asleep.is_starved


@pytest.mark.slow
def test_a_worker_does_not_end_with_the_thread_that_started_it() -> None:
    found: list[WorkerProcess] = []
    environment = {"PYTHONPATH": str(ROOT)}
    thread = threading.Thread(target=lambda: found.append(WorkerProcess([sys.executable, "-c", WORKER], environment)))
    thread.start()
    thread.join()
    (worker,) = found
    pids = started(worker)
    worker.kill()
    assert left(pids) == []


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    node, worker = socket.socketpair()
    with node, worker:
        yield node, worker


def soon(seconds: float = 60.0) -> Deadline:
    end = time.monotonic() + seconds
    return lambda: end


def answer(requests: Requests, frames: Sequence[Message]) -> threading.Thread:
    """Read a request, write frames as they are, and reply with the request's own call."""

    def run() -> None:
        request = requests.receive()
        for frame in frames:
            send(requests.channel, frame)
        requests.reply({"of": request["call"]})

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("its_id", [{}, {"request_id": ["0"]}, {"request_id": "0" * 16}])
def test_a_frame_without_the_requests_id_is_dropped_and_shifts_no_later_reply(
    ends: tuple[socket.socket, socket.socket], its_id: Message
) -> None:
    node, worker = ends
    forged = {"of": "forged", **its_id}
    requests = Requests(worker)
    send(worker, forged)
    for call, dropped in (("first", 4), ("second", 3)):
        answering = answer(requests, [forged] * 3)
        assert ask(node, {"call": call}, soon()) == ({"of": call}, dropped)
        answering.join()


def test_a_reply_that_came_twice_answers_nothing_else(ends: tuple[socket.socket, socket.socket]) -> None:
    node, worker = ends
    requests = Requests(worker)

    def twice() -> None:
        for _ in range(2):
            request = requests.receive()
            requests.reply({"of": request["call"]})
            requests.reply({"of": "again"})

    answering = threading.Thread(target=twice, daemon=True)
    answering.start()
    assert ask(node, {"call": "first"}, soon()) == ({"of": "first"}, 0)
    assert ask(node, {"call": "second"}, soon()) == ({"of": "second"}, 1)
    answering.join()


def test_whoever_writes_forged_frames_without_end_is_late(ends: tuple[socket.socket, socket.socket]) -> None:
    node, worker = ends
    data = json.dumps({"of": "forged"}).encode()
    flood = (HEADER.pack(len(data)) + data) * 1000

    def write() -> None:
        try:
            while True:
                worker.sendall(flood)
        except OSError:
            return  # the node has closed its side

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    with pytest.raises(TimeoutError):
        ask(node, {"call": "first"}, soon(0.2))
    node.close()
    writing.join()


@pytest.mark.parametrize(
    ("size", "body", "complaint"),
    [
        (5000, b"[" * 5000, "lists within lists"),
        (5000, b"9" * 5000, "4300"),
        (3, b"[1]", "no message"),
        (1 << 18, b"", "a frame of 262144 bytes"),
    ],
    ids=["deep", "large number", "list", "large"],
)
def test_what_is_no_frame_is_told(
    ends: tuple[socket.socket, socket.socket], size: int, body: bytes, complaint: str
) -> None:
    node, worker = ends
    worker.sendall(HEADER.pack(size) + body)
    with pytest.raises(ValueError, match=complaint):
        receive(node, soon(), 1 << 17)
