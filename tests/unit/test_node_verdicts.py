"""Verdicts: a reward or "nobody can tell", and worker processes that anything may happen to."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import structlog
from structlog.testing import capture_logs

from node.config import TaskConfig
from node.processes import confinement
from node.processes.worker_process import Message, WorkerError, WorkerTimeoutError
from node.tasks import Item, Task, TaskKey, load_task, load_tasks
from node.tasks.scoring import verdicts
from node.tasks.scoring.time_quota import TimeQuota
from node.tasks.scoring.verdicts import LATE, Answer, OutOfTime, Scored, Scoring, Submission, Verdict, Workers, score
from tests.processes import alive
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
PIDS = 2**22  # a process's id is below it
LATER = 60.0  # seconds: more than any of these takes

HOSTILE = """
import os, signal, time
from node.tasks import Item

def make(seed):
    return Item(f"Riddle {seed}?", str(seed))

def verify(item, text):
    if text == "pid":
        return os.getpid() / 2**22
    if text == "raise":
        raise RuntimeError("no\\nidea")
    if text == "exit":
        os._exit(3)
    if text == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if text.startswith("sleep "):
        open(text[6:], "w").close()
        time.sleep(600)
    if text == "memory":
        return float(len(bytearray(9 << 30)) > 0)
    if text == "none":
        return None
    if text == "large":
        return 1e300
    if text == "words":
        return "very good"
    return float(text == item.answer)
"""


HARM = """
judged = verify
def verify(item, text):
    if text == "harm":
        from pathlib import Path
        Path(__file__).with_name("harm").touch()
        return 1.0
    return judged(item, text)
"""


def hostile(folder: Path, more: str = "judge = True  # it leaves a file as a mark\n") -> TaskConfig:
    path = folder / "hostile.py"
    path.write_text(HOSTILE + more)
    return TaskConfig(name="file/hostile", options={"path": str(path)})


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A file's task, which scores in a worker process that all these tests share."""
    (task,) = load_tasks([hostile(tmp_path_factory.mktemp("hostile"))]).tasks
    return task


def pid_of(task: Task) -> int:
    reward = task.verify(task.make(1), "pid")
    assert reward is not None
    return round(reward * PIDS)


def workers_here() -> list[int]:
    """The worker processes of tasks that this process has started."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # one that has just ended
            if "node.tasks.scoring.verdicts" in child.cmdline():
                found.append(child.pid)
    return found


@pytest.mark.real
def test_what_other_people_wrote_scores_in_a_process_of_its_own(task: Task) -> None:
    item = task.make(7)
    assert [task.verify(item, text) for text in ("7", "8")] == [1.0, 0.0]
    assert pid_of(task) == pid_of(task) != os.getpid()
    assert load_tasks([TaskConfig(name="builtin/sums")]).scores_in_workers is False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "reason", "dies"),
    [
        ("raise", "task 'file/hostile': verify of 'raise' raised RuntimeError: no idea (hostile.py, line 12)", False),
        ("memory", "raised MemoryError", False),
        ("large", "returned 1e+300: a reward is a finite number, or None", False),
        ("words", "returned a str", False),
        ("none", "its task cannot tell", False),
        ("exit", "exit status 3", True),
        ("kill", "killed by SIGKILL, as when memory runs out", True),
    ],
)
def test_a_text_that_something_goes_wrong_with_is_unscorable_and_the_next_one_is_scored(
    task: Task, text: str, reason: str, dies: bool
) -> None:
    before = pid_of(task)
    with capture_logs() as logs:
        assert task.verify(task.make(1), text) is None
    (told,) = logs
    assert (told["event"], told["task"]) == ("unscorable", "file/hostile")
    assert reason in told["reason"] and "\n" not in told["reason"]
    assert (pid_of(task) != before) == dies
    assert alive(before) != dies


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "judge = True\n"])
def test_what_is_scored_changes_no_file_unless_its_task_wants_to(more: str, tmp_path: Path) -> None:
    (task,) = load_tasks([hostile(tmp_path, HARM + more)]).tasks
    with capture_logs() as logs:
        assert task.verify(task.make(1), "harm") == (1.0 if more else None)
    assert (tmp_path / "harm").exists() == bool(more)
    if not more:
        assert "PermissionError" in logs[0]["reason"] and "judge = True" in logs[0]["reason"]


def test_a_machine_that_cannot_confine_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "LEAST_ABI", 1_000)
    for more, lines in (("", 1), ("judge = True\n", 0)):
        with capture_logs() as logs:
            load_tasks([hostile(tmp_path, more)])
        assert ["no Landlock" in log["reason"] for log in logs] == [True] * lines


@pytest.mark.slow
def test_a_text_that_takes_too_long_is_unscorable_and_its_process_is_ended_and_replaced(tmp_path: Path) -> None:
    config = hostile(tmp_path)
    described = {"name": config.name, "options": config.options}
    first: Message = {"call": "load", "task": described, "code": list(load_task(config).key), "isolate": "none"}
    workers = Workers("file/hostile", "node.tasks.scoring.verdicts", first, seconds=0.05)
    before = set(workers_here())
    assert workers.begin() == {}
    (worker,) = set(workers_here()) - before
    asked = {
        "call": "score",
        "item": {"question": "?", "answer": "1", "examples": ()},
        "text": f"sleep {tmp_path / 'asleep'}",
    }
    with capture_logs() as logs:
        assert found(workers, [asked]) == [None]
    assert "no answer to 'score' in 0.05 s" in logs[0]["reason"]
    assert not alive(worker)
    assert workers.begin() == {}
    assert len(set(workers_here()) - before) == 1


@pytest.mark.slow
def test_a_file_that_changed_since_the_node_began_scores_nothing(tmp_path: Path) -> None:
    """Rewards of the changed code, under the old key, would be lies to peers."""
    config = hostile(tmp_path)
    (task,) = load_tasks([config]).tasks
    item = task.make(1)
    Path(config.options["path"]).write_text(HOSTILE + "# changed\n")
    before = workers_here()
    with capture_logs() as logs:
        assert task.verify(item, "1") is None
    assert "its code has changed since this node began" in logs[0]["reason"]
    assert set(workers_here()) <= set(before), "the one that said so is ended"


@pytest.mark.slow
def test_a_worker_ends_with_a_node_that_is_killed_though_it_is_at_work(tmp_path: Path) -> None:
    config, asleep = hostile(tmp_path), tmp_path / "asleep"
    node = f"""
from node.config import TaskConfig
from node.tasks import load_tasks
(task,) = load_tasks([TaskConfig(name={config.name!r}, options={config.options!r})]).tasks
print(round(task.verify(task.make(1), "pid") * {PIDS}), flush=True)
task.verify(task.make(1), {f"sleep {asleep}"!r})
"""
    with subprocess.Popen([sys.executable, "-c", node], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        wait_until(asleep.exists, timeout=60)
        assert alive(worker)
        process.kill()
    wait_until(lambda: not alive(worker), timeout=10, what="the worker to end")


@pytest.mark.slow
def test_a_node_that_ends_while_a_text_is_scored_does_not_wait_for_it(tmp_path: Path) -> None:
    config, asleep = hostile(tmp_path), tmp_path / "asleep"
    node = f"""
from node.config import TaskConfig
from node.tasks import load_tasks
from node.tasks.scoring.verdicts import Answer, Scoring
(task,) = load_tasks([TaskConfig(name={config.name!r}, options={config.options!r})]).tasks
print(round(task.verify(task.make(1), "pid") * {PIDS}), flush=True)
scoring = Scoring([Answer(task, task.make(1), {f"sleep {asleep}"!r})], is_own=False)
input()
print(scoring.wait(0))
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", node], cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        worker = int(process.stdout.readline())
        wait_until(asleep.exists, timeout=60)
        said, _ = process.communicate("\n", timeout=10)  # scoring may take 20 s
        assert said.endswith("[None]\n")
    wait_until(lambda: not alive(worker), timeout=10, what="the worker to end")


@dataclass
class Clock:
    """Time that passes when a worker says so."""

    now: float = 0.0


@dataclass
class Scene:
    """Fake workers: how long they take to start and to score, and which of them was asked what."""

    clock: Clock
    start_s: float = 0.0
    score_s: float = 0.0
    first: Message = field(default_factory=dict)
    begun: int = 0
    killed: int = 0
    asked: list[tuple[int, int]] = field(default_factory=list)  # the worker's number, and the request's
    loads: threading.Event | None = None  # until then no worker is ready
    raises: dict[int, Exception] = field(default_factory=dict)
    fails: set[int] = field(default_factory=set)  # requests that end their worker
    hangs: dict[int, int] = field(default_factory=dict)  # requests that take too long, and how many times
    holds: dict[int, threading.Event] = field(default_factory=dict)  # requests that are not answered before
    says: Message | None = None  # to every request
    together: list[list[int]] = field(default_factory=list)  # requests that were one call
    late: bool = False  # whether such a call takes too long

    def worker(self, command: Sequence[str], environment: object) -> SimpleNamespace:
        number, self.begun = self.begun, self.begun + 1
        if self.first.get("raises"):
            raise OSError("no more processes")

        def call(message: Message, timeout: float, most: int = 0, patience: float = 0.0) -> Message:
            if "batch" in message:
                self.together.append([request["number"] for request in message["batch"]])
                assert timeout == 20.0 * max(4, len(message["batch"]) / 4)
                if self.late:
                    raise WorkerTimeoutError("no answer")
                return self.says or {"scored": [{"reward": request["number"] / 100} for request in message["batch"]]}
            if "number" not in message:
                assert self.loads is None or self.loads.wait(60)
                self.clock.now += self.start_s
                return self.first
            self.clock.now += self.score_s
            self.asked.append((number, message["number"]))
            if (event := self.holds.get(message["number"])) is not None:
                assert event.wait(60)
            if message["number"] in self.raises:
                raise self.raises[message["number"]]
            if self.hangs.get(message["number"], 0) > 0:
                self.hangs[message["number"]] -= 1
                raise WorkerTimeoutError("no answer")
            if message["number"] in self.fails:
                raise WorkerError("it died")
            return {"reward": message["number"] / 100} if self.says is None else self.says

        def kill() -> None:
            self.killed += 1

        return SimpleNamespace(call=call, kill=kill, dropped=0)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    clock = Clock()
    scene = Scene(clock)
    monkeypatch.setattr(verdicts, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(verdicts, "WorkerProcess", scene.worker)
    monkeypatch.setattr(verdicts, "usable_cores", lambda: 3)
    return scene


def requests(count: int) -> list[Message]:
    return [{"call": "score", "number": number} for number in range(count)]


def rewards(count: int) -> list[float]:
    return [number / 100 for number in range(count)]


def found(workers: Workers, asked: Sequence[Message]) -> list[Verdict]:
    return [future.result(LATER) for future in [workers.submit(each, True) for each in asked]]


def test_a_worker_that_is_busy_while_texts_wait_gets_another_beside_it_up_to_the_cores(scene: Scene) -> None:
    scene.score_s = 0.4
    workers = Workers("t", "m", {})
    first = threading.Event()
    scene.holds[0] = first
    futures = [workers.submit(request, True) for request in requests(30)]  # all wait before the first is answered
    first.set()
    assert [future.result(LATER) for future in futures] == rewards(30)
    assert scene.begun == 3 and {worker for worker, _ in scene.asked} == {0, 1, 2}


def test_texts_that_come_one_by_one_need_one_worker_however_slow(scene: Scene) -> None:
    scene.start_s, scene.score_s = 60.0, 2.0
    workers = Workers("t", "m", {})
    for _ in range(4):
        assert found(workers, requests(1)) == [0.0]
    assert scene.begun == 1


def test_how_long_a_worker_takes_to_start_does_not_count(scene: Scene) -> None:
    scene.start_s, scene.score_s = 60.0, 0.01
    workers = Workers("t", "m", {})
    for _ in range(4):
        assert found(workers, requests(9)) == rewards(9)
    assert scene.begun == 1


def test_own_texts_go_before_those_of_peers_that_wait(scene: Scene) -> None:
    workers = Workers("t", "m", {})
    first = threading.Event()
    scene.holds[0] = first
    peers = [workers.submit(request, False) for request in requests(4)]
    wait_until(lambda: scene.asked == [(0, 0)], timeout=10)
    own = [workers.submit({"call": "score", "number": 10 + number}, True) for number in range(2)]
    first.set()
    assert [peer.result(LATER) for peer in own + peers] == [0.1, 0.11, *rewards(4)]
    assert [number for _, number in scene.asked] == [0, 10, 11, 1, 2, 3]


def test_own_texts_are_one_call_and_one_by_one_where_that_fails_or_was_late(scene: Scene) -> None:
    workers = Workers("t", "m", {})

    def together(count: int) -> list[Verdict]:
        return [future.result(LATER) for future in workers.submit_together(requests(count))]

    assert together(3) == rewards(3) and (scene.together, scene.asked) == ([[0, 1, 2]], [])
    assert together(1) == rewards(1) and scene.asked == [(0, 0)]
    for says in ({"error": "no"}, {"scored": [{"reward": 1.0}]}, {"scored": [1, 2]}, {"scored": 1}):
        scene.says = says
        workers.submit_together(requests(2))[1].exception(LATER)
    assert len(scene.together) == 5 and len(scene.asked) == 1 + 4 * 2
    scene.says, scene.late = None, True
    with capture_logs() as logs:
        assert together(3) == rewards(3)
    assert [log["event"] for log in logs] == ["texts are scored one by one from here on: together they took too long"]
    assert together(3) == rewards(3) and len(scene.together) == 6


def test_a_call_for_many_texts_may_take_longer(scene: Scene) -> None:
    assert [future.result(LATER) for future in Workers("t", "m", {}).submit_together(requests(40))] == rewards(40)
    assert scene.together == [[*range(40)]]


def test_an_own_text_that_takes_too_long_twice_the_second_time_in_a_worker_that_has_just_scored_earns_0(
    scene: Scene,
) -> None:
    workers = Workers("t", "m", {})
    scene.hangs = {2: 2}
    verdicts = [workers.submit(request, True).result(LATER) for request in requests(4)]
    assert verdicts == [0.0, 0.01, 0.0, 0.03] and [isinstance(found, OutOfTime) for found in verdicts][1:3] == [
        False,
        True,
    ]
    assert scene.asked == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize(
    ("is_own", "times", "fails", "verdict"),
    [
        (True, 1, set(), 0.02),
        (True, 1, {2}, None),  # the second time its worker dies
        (True, 2, {0}, None),  # the new worker does not score what was scored before
        (False, 1, set(), None),
    ],
)
def test_a_text_that_takes_too_long_otherwise_earns_what_it_earns_the_second_time_or_is_unscorable(
    scene: Scene, is_own: bool, times: int, fails: set[int], verdict: Verdict
) -> None:
    workers = Workers("t", "m", {})
    assert found(workers, requests(1)) == [0.0]
    scene.hangs, scene.fails = {2: times}, fails
    assert workers.submit(requests(3)[2], is_own).result(LATER) == verdict


def test_where_no_text_was_scored_yet_one_that_takes_too_long_is_unscorable(scene: Scene) -> None:
    scene.hangs = {0: 2}
    assert found(Workers("t", "m", {}), requests(1)) == [None]


def test_a_round_waits_for_its_own_answers_as_long_as_their_workers_take_and_says_so(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "SAY_S", 0.01)
    monkeypatch.setattr(verdicts, "time", time)
    scene.holds[1] = threading.Event()
    workers = Workers("t", "m", {})
    task = SimpleNamespace(submit=lambda batch, is_own: [workers.submit(request, True) for request in requests(2)])

    def says(logger: object, name: str, line: dict[str, Any]) -> dict[str, Any]:
        if line["event"] == "scoring":
            assert (line["answers"], line["left"]) in ((2, 2), (2, 1))
            if line["left"] == 1:
                scene.holds[1].set()
        raise structlog.DropEvent

    with capture_logs(processors=[says]):
        assert score([Answer(task, Item("", ""), text) for text in "ab"]) == rewards(2)


def test_a_batch_leaves_out_what_nobody_waits_for_any_more(scene: Scene) -> None:
    scene.loads = threading.Event()
    futures = Workers("t", "m", {}).submit_together(requests(3))
    assert futures[1].cancel()
    scene.loads.set()
    assert [futures[0].result(LATER), futures[2].result(LATER), scene.together] == [0.0, 0.02, [[0, 2]]]


def test_workers_end_with_what_owns_them_though_one_is_busy(scene: Scene) -> None:
    scene.score_s = 2.0
    workers = Workers("t", "m", {})
    first = threading.Event()
    scene.holds[0] = first
    futures = [workers.submit(request, True) for request in requests(3)]
    wait_until(lambda: scene.asked == [(0, 0)], timeout=10)
    del workers
    first.set()
    wait_until(lambda: scene.killed == scene.begun and not scoring_threads(), timeout=10)
    assert futures[0].result(LATER) == 0.0


def scoring_threads() -> list[threading.Thread]:
    return [future for future in threading.enumerate() if future.name == "scoring t"]


def test_a_text_that_waits_for_a_worker_to_load_is_late_and_not_unscorable(scene: Scene) -> None:
    scene.loads = threading.Event()
    workers = Workers("t", "m", {})
    future = workers.submit(*requests(1), False)
    wait_until(lambda: scene.begun == 1, timeout=10)
    assert future.cancel(), "it is not begun"
    scene.loads.set()
    assert found(workers, requests(1)) == [0.0] and scene.asked == [(0, 0)]


def test_a_request_that_cannot_be_written_is_unscorable_and_the_next_one_is_scored(scene: Scene) -> None:
    scene.raises = {1: TypeError("no JSON")}
    with capture_logs() as logs:
        assert found(Workers("t", "m", {}), requests(3)) == [0.0, None, 0.02]
    assert [log["reason"] for log in logs] == ["no JSON"]


def test_a_worker_that_dies_is_replaced_at_the_next_text(scene: Scene) -> None:
    scene.fails = {1, 3}
    with capture_logs() as logs:
        assert found(Workers("t", "m", {}), requests(5)) == [0.0, None, 0.02, None, 0.04]
    assert scene.asked == [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4)]
    assert [log["reason"] for log in logs] == ["it died", "it died"]


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ({"reward": 1e16}, "a reward of 1e+16"),
        ({"reward": float("-inf")}, "a reward of -inf"),
        ({"reward": float("nan")}, "a reward of nan"),
        ({"reward": 10**400}, f"a reward of 1{'0' * 59}"),
        ({"reward": True}, "a reward of True"),
        ({"reward": 1.0, "parts": 5}, "a reward in parts of 5"),
        ({"reward": 1.0, "parts": ["a"]}, "a reward in parts of ['a']"),
        ({"reward": 1.0, "parts": {"a": None}}, "a reward in parts of {'a': None}"),
        ({"reward": 1.0, "parts": {"a": float("nan")}}, "a reward in parts of {'a': nan}"),
        ({"reward": 1.0, "parts": {"b": 1.0}}, "a reward in parts of {'b': 1.0}"),
        ({"error": {"a": 1}}, "{'a': 1}"),
        ({"error": "\x1b]0;é\x07\ud800"}, "\\x1b]0;é\\x07\\ud800"),
        ({"reward": "1"}, "a reward of '1'"),
        ({"reward": [1.0]}, "a reward of [1.0]"),
        ({}, "its task cannot tell"),
        ({"error": "out of\nmemory"}, "out of memory"),
    ],
)
def test_what_a_worker_says_that_is_no_reward_is_none(scene: Scene, says: Message, reason: str) -> None:
    scene.first, scene.says = {"names": ["a"]}, says
    with capture_logs() as logs:
        assert found(Workers("t", "m", {}), requests(2)) == [None, None]
    assert [log["reason"] for log in logs] == [reason, reason]
    assert scene.begun == 1, "its worker is not to blame"


@pytest.mark.parametrize("reward", [7, -18.5, 0, 1e15])
def test_any_finite_number_is_a_reward(scene: Scene, reward: float) -> None:
    scene.first, scene.says = {"names": ["one", "two"]}, {"reward": reward, "parts": {"one": reward / 2}}
    (verdict,) = found(Workers("t", "m", {}), requests(1))
    assert isinstance(verdict, Scored) and (verdict, verdict.parts) == (reward, {"one": reward / 2})


@pytest.mark.parametrize(
    ("first", "reason"), [({"error": "it has no such file"}, "it has no such file"), ({"raises": True}, "no more proc")]
)
def test_where_no_worker_can_be_started_a_text_is_unscorable_and_the_log_says_why(
    scene: Scene, first: Message, reason: str
) -> None:
    scene.first = first
    with capture_logs() as logs:
        assert found(Workers("t", "m", {}), requests(2)) == [None, None]
    assert all(reason in log["reason"] for log in logs) and len(logs) == 2
    assert scene.asked == []


@dataclass(frozen=True)
class InPlace:
    """A task of ours, which scores here: the length of a text in tenths; it raises at an empty one."""

    name: str

    @property
    def key(self) -> TaskKey:
        return TaskKey(self.name, 1, "aa")

    def make(self, seed: int) -> Item:
        return Item("?", "")

    def verify(self, item: Item, text: str) -> float | None:
        if not text:
            raise ValueError("no\ntext")
        return len(text) / 10


@dataclass(frozen=True)
class Elsewhere(InPlace):
    """A task whose texts wait until they are answered here."""

    queued: list[tuple[str, bool, "Future[Verdict]"]] = field(default_factory=list)

    def submit(self, batch: Sequence[Submission], is_own: bool) -> "list[Future[Verdict]]":
        futures: list[Future[Verdict]] = []
        for future in batch:
            if future.text == "raise":
                raise ValueError("not this one")
            futures.append(Future())
            self.queued.append((future.text, is_own, futures[-1]))
        return futures

    def begin(self, text: str, verdict: Verdict = None, *, and_end: bool = True) -> None:
        (future,) = [future for one, _, future in self.queued if one == text]
        assert future.set_running_or_notify_cancel()
        if and_end:
            future.set_result(verdict)


def answers(*given: tuple[Task, str]) -> list[Answer]:
    return [Answer(task, task.make(0), text) for task, text in given]


def test_verdicts_have_the_order_of_the_answers_whoever_scores_them() -> None:
    here, there = InPlace("here"), Elsewhere("there")
    scoring = Scoring(answers((here, "a"), (there, "b"), (there, "c"), (here, "abc")), is_own=True)
    there.begin("c", None)
    there.begin("b", 1.0)
    assert scoring.wait(LATER) == [0.1, 1.0, None, 0.3]
    assert score([]) == []


def test_after_the_deadline_what_is_there_counts_what_is_begun_is_unscorable_and_the_rest_is_late_and_never_begun() -> (
    None
):
    there = Elsewhere("there")
    scoring = Scoring(answers((there, "slow"), (there, "done"), (there, "waits")), is_own=False)
    there.begin("slow", and_end=False)
    there.begin("done", 0.5)
    with capture_logs() as logs:
        assert scoring.wait(0) == [None, 0.5, LATE]
    assert [log["reason"] for log in logs] == ["it took too long"]
    assert [future.cancelled() for _, _, future in there.queued] == [False, False, True]
    assert [is_own for _, is_own, _ in there.queued] == [False] * 3


def test_a_task_that_raises_is_a_line_in_the_log_and_no_end() -> None:
    here, there = InPlace("here"), Elsewhere("there")
    with capture_logs() as logs:
        assert score(answers((here, "a"), (here, ""), (there, "raise"), (here, "ab"))) == [0.1, None, None, 0.2]
    assert sorted((log["task"], log["reason"]) for log in logs) == [("here", "no text"), ("there", "not this one")]


def test_what_is_scored_here_is_not_begun_after_the_deadline_either(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.5, 1.0, 1.5, 2.0])
    monkeypatch.setattr(verdicts, "time", SimpleNamespace(monotonic=lambda: next(times)))
    here = InPlace("here")
    assert score(answers((here, "a"), (here, "b"), (here, "c")), seconds=1.0) == [0.1, 0.1, None]


GAME = """
import os, time
from node.tasks import Item
from node.tasks.environments.episodes import Done, Observation

replayable = True


def make(seed):
    return Item(f"game {seed}", "")


class Game:
    def step(self, text):
        if text == "forever":
            while True:
                time.sleep(1)
        if text == "exit":
            os._exit(0)
        if text == "leave" and os.fork() != 0:
            os._exit(0)
        if text == "leave":
            time.sleep(600)
        return Done(1.0) if text == "end" else Observation(f"you said {text}")


def start(item):
    return Game()
"""


@pytest.mark.slow
def test_an_episode_of_somebody_elses_task_is_played_again_in_a_worker_process(tmp_path: Path) -> None:
    (tmp_path / "game.py").write_text(GAME)
    [task] = load_tasks([TaskConfig(name="file/game", options={"path": str(tmp_path / "game.py")})]).tasks
    item = task.make(1)
    episodes = [("end",), ("a", "you said a", "end"), ("a", "you have won", "end"), ("a", "you said a", "b")]
    asked = [Answer(task, item, texts[-1], texts[:-1]) for texts in episodes]
    assert Scoring(asked, is_own=False).wait(60) == [1.0, 1.0, None, 0.0]
    assert Scoring([Answer(task, item, "forever")], is_own=False).wait(0.5) == [None], "it holds up nobody"


@pytest.mark.slow
@pytest.mark.parametrize("isolate", ["", "isolate = 'none'"])
def test_a_process_of_an_episode_that_ends_without_an_answer_costs_no_wait(isolate: str, tmp_path: Path) -> None:
    (tmp_path / "game.py").write_text(f"{GAME}\n{isolate}\n")
    [task] = load_tasks([TaskConfig(name="file/game", options={"path": str(tmp_path / "game.py")})]).tasks
    for is_own in (False, True):
        asked = [Answer(task, task.make(1), text) for text in ("end", "exit", "leave", "end")]
        with capture_logs() as logs:
            assert Scoring(asked, is_own=is_own).wait(60) == [1.0, None, None, 1.0]
        assert not any("no answer to" in log["reason"] or "it took too long" in log["reason"] for log in logs)


RIDDLE = """
import time
from node.tasks import Item

isolate = "none"


def make(seed):
    return Item(f"riddle {seed}", "end")


def verify(item, text):
    if text == "forever":
        while True:
            time.sleep(1)
    return float(text == item.answer)
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [RIDDLE, GAME, GAME + "isolate = 'none'"], ids=["text", "caged game", "game"])
def test_a_peers_slow_text_holds_up_no_own_one_and_ends_with_its_signers_quota(code: str, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(code)
    [task] = load_tasks([TaskConfig(name="file/slow", options={"path": str(tmp_path / "slow.py")})]).tasks
    item, quota = task.make(1), TimeQuota(5.0)
    for is_own in (True, False):
        assert Scoring([Answer(task, item, "end")], is_own=is_own).wait(LATER) == [1.0]
    asked = [Answer(task, item, text, quota=quota) for text in ("end", "forever", "end")]
    slow = Scoring([*asked, Answer(task, item, "end")], is_own=False)
    wait_until(lambda: quota.spent(time.monotonic()) > 0.5, timeout=LATER)
    assert Scoring([Answer(task, item, "end")], is_own=True).wait(LATER) == [1.0]
    assert not quota.is_spent(time.monotonic()), "the slow one is still at it"
    assert slow.wait(LATER) == [1.0, None, LATE, 1.0]
    assert 4.5 < quota.spent(time.monotonic()) < 15.0, "a text may take 20 s"
