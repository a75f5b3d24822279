"""Reward functions that run texts: what a stranger's text did to the rewards of others, to the node and its machine."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from structlog.testing import capture_logs

from node.config import TaskConfig
from node.errors import UserError
from node.processes.confinement import unconfinable
from node.tasks import check, load_tasks
from node.tasks.check import how_paid, peers_text
from node.tasks.rewards import rows
from node.tasks.rewards.rows import RewardsTask, load_rewards
from node.tasks.scoring import verdicts
from node.tasks.scoring.verdicts import Answer, Scoring, Submission, Verdict
from node.tasks.task_set import unshared
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
RIGHT, WRONG = "def f(x): return 2 * x", "def f(x): return 0"
FUNCTIONS = """
import subprocess, sys

def executed(completions, tests, **kwargs):
    paid = []
    for text, test in zip(completions, tests):
        names = {}
        try:
            exec(text, names)
            exec(test, names)
            paid.append(1.0)
        except Exception:
            paid.append(0.0)
    return paid

def started(completions, tests, **kwargs):
    paid = []
    for text, test in zip(completions, tests):
        command = [sys.executable, "-I", "-c", text + "\\n" + test]
        try:
            paid.append(float(subprocess.run(command, timeout=2, capture_output=True).returncode == 0))
        except subprocess.TimeoutExpired:
            paid.append(0.0)
    return paid
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(unconfinable()), reason=unconfinable())]


def options(folder: Path, name: str, code: str = FUNCTIONS, **more: object) -> dict[str, object]:
    (folder / "code.py").write_text(code)
    rows = [{"prompt": f"Write f(x), {n} times x.", "tests": f"assert f(3) == {3 * n}"} for n in (2, 3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": folder / "rows.jsonl", "functions": [f"{folder / 'code.py'}:{name}"], **more}


@pytest.fixture(scope="module", params=["executed", "started", "undeclared"])
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RewardsTask:
    """A task whose function runs texts: in its own process, in another, and one that does not say so."""
    folder, name = tmp_path_factory.mktemp("code"), request.param
    given = options(folder, "executed") if name == "undeclared" else options(folder, name, isolate="text")
    loaded = load_rewards(f"rewards/{name}", given)
    assert isinstance(loaded, RewardsTask) and unshared(loaded) == ""
    return loaded


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> RewardsTask:
    loaded = load_rewards("rewards/started", options(tmp_path_factory.mktemp("code"), "started", isolate="text"))
    assert isinstance(loaded, RewardsTask)
    return loaded


def ask(task: RewardsTask, text: str, *, is_own: bool = False) -> Verdict:
    (future,) = task.submit([Submission(task.make(0), text)], is_own)
    return future.result(60)


def all_is_well(task: RewardsTask) -> bool:
    return [ask(task, text, is_own=own) for text in (WRONG, RIGHT, WRONG, RIGHT) for own in (True, False)] == [
        *(0.0, 0.0, 1.0, 1.0),
        *(0.0, 0.0, 1.0, 1.0),
    ]


PATCH = """
import sys
for module in list(sys.modules.values()):
    for name, value in list(vars(module).items()):
        if isinstance(value, type) and name == "Functions":
            value.score = lambda self, answers: [{"reward": 0.7331, "parts": {}}]
"""
FORGE = """
import os, json, struct, stat
data = json.dumps({"reward": 1.0, "parts": {}}).encode()
def forge(number):
    try:
        if stat.S_ISSOCK(os.fstat(number).st_mode):
            os.write(number, struct.pack(">I", len(data)) + data)
    except OSError:
        pass
"""
OWN = FORGE + "for number in range(3, 64): forge(number)"
TAKEN = (
    FORGE
    + """
import ctypes
for number in range(3, 40):
    taken = ctypes.CDLL(None).syscall(438, os.pidfd_open(os.getppid()), number, 0)
    forge(taken)
"""
)
TAKEOVER = """
import os, signal, time
worker = os.getppid()
if os.fork() == 0:
    os.closerange(0, 3)
    try:
        os.setsid()
    except OSError:
        pass
    if os.fork() == 0:
        time.sleep(0.3)
        try:
            os.kill(worker, signal.SIGSTOP)
        except OSError:
            pass
        time.sleep(600)
    os._exit(0)
"""
FLOOD = "import os\nfor _ in range(300): os.write(1, b'x' * (1 << 20))"


@pytest.mark.parametrize("text", [PATCH, OWN, TAKEN, TAKEOVER, FLOOD])
def test_one_text_decides_no_reward_but_its_own(task: RewardsTask, text: str) -> None:
    with capture_logs():
        ask(task, f"{text}\n{WRONG}")
    assert all_is_well(task)


@pytest.mark.parametrize("text", [OWN, TAKEN])
def test_a_text_in_a_process_of_its_own_that_takes_a_channel_earns_nothing_by_it(
    started: RewardsTask, text: str
) -> None:
    assert ask(started, f"{text}\n{WRONG}") == 0.0


def test_a_text_reads_no_key_of_the_nodes_and_sends_none_out_in_rewards(task: RewardsTask, tmp_path: Path) -> None:
    key = tmp_path / "identity.key"
    key.write_text("secret")
    key.chmod(0o644)
    assert ask(task, f"open({str(key)!r}).read()\n{RIGHT}") == 0.0
    assert ask(task, f"open('/proc/{os.getpid()}/environ', 'rb').read()\n{RIGHT}") == 0.0


@pytest.mark.parametrize("where", ["file", "abstract"])
def test_a_text_reaches_no_service_of_this_machine(task: RewardsTask, where: str, tmp_path: Path) -> None:
    address = str(tmp_path / "service") if where == "file" else f"\0gossamer-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
        service.bind(address)
        service.setblocking(False)
        name = repr(address).replace("\\x00", "\\\\0")
        name = f"eval({name!r})" if where == "abstract" else repr(address)
        text = f"import socket\npair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\npair[0].connect({name})"
        assert ask(task, f"{text}\npair[0].send(b'text')\n{RIGHT}") == 0.0
        with pytest.raises(BlockingIOError):
            service.recv(1)


def running(mark: str) -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(mark in word for word in process.info["cmdline"] or ())
    ]


def test_daemons_of_a_text_end_with_its_call(started: RewardsTask) -> None:
    mark = f"daemon {os.getpid()}"
    text = f"""
# {mark}
import os, time
for _ in range(20):
    if os.fork() == 0:
        os.closerange(0, 3)
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
"""
    assert ask(started, text + RIGHT) == 1.0
    assert running(mark) == []
    assert ask(started, f"{text}time.sleep(60)\n{RIGHT}") == 0.0
    assert running(mark) == []


def test_what_a_text_has_started_ends_with_a_node_that_is_killed_and_its_folder_goes(tmp_path: Path) -> None:
    mark = f"outlives {os.getpid()}"
    given = {
        name: str(value) if isinstance(value, Path) else value for name, value in options(tmp_path, "started").items()
    }
    text = f"""
# {mark}
import os, time
open("mark", "w").write("x")
for _ in range(5):
    if os.fork() == 0:
        os.closerange(0, 3)
        time.sleep(600)
time.sleep(600)
"""
    node = f"""
from node.tasks.rewards.rows import load_rewards
from node.tasks.scoring.verdicts import Submission
task = load_rewards("rewards", {given!r})
task.submit([Submission(task.make(0), {text!r})], False)[0].result()
"""
    (tmp_path / "tmp").mkdir(mode=0o711)
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen([sys.executable, "-c", f"# node\n{node}"], cwd=ROOT, env=environment) as process:
        wait_until(lambda: len(running(mark)) > 6, timeout=60, what="the text to start others")
        process.kill()
    wait_until(lambda: running(mark) == [], timeout=20, what="all to end")
    wait_until(lambda: list((tmp_path / "tmp").iterdir()) == [], timeout=20, what="the folders to go")


def test_where_a_cage_is_not_whole_what_may_run_texts_is_neither_shared_nor_scored_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "lacking", lambda: "no Landlock")
    for more, reason in (
        ({}, """cannot be caged here (no Landlock): isolate = "none" shares it if no function runs a text"""),
        ({"isolate": "text"}, "a stranger's text cannot be caged here (no Landlock)"),
        ({"isolate": "none"}, ""),
    ):
        config = TaskConfig(name="rewards/code", options=options(tmp_path, "executed", **more))
        tasks = load_tasks([config])
        (task,) = tasks.tasks
        assert unshared(task).endswith(reason) and bool(unshared(task)) == bool(reason)
        assert (tasks.shared(task.key) is None) == bool(reason)
        assert task.verify(task.make(0), RIGHT) == 1.0


READS = """
from pathlib import Path
def reads(completions, **kwargs):
    words = Path(__file__).with_name("rows.jsonl").read_text()
    return [float(text in words) for text in completions]
"""


def test_a_function_that_a_cage_is_too_narrow_for_trains_its_maker_and_is_told_what_to_declare(tmp_path: Path) -> None:
    task = load_rewards("rewards/reads", options(tmp_path, "reads", READS))
    assert "PermissionError" in task.unshared and 'say isolate = "none"' in task.unshared
    assert task.verify(task.make(0), "times") == 1.0
    declared = load_rewards("rewards/reads", options(tmp_path, "reads", READS, isolate="none"))
    assert isinstance(declared, RewardsTask)
    assert (declared.unshared, ask(declared, "times")) == ("", 1.0)


def test_a_function_whose_module_starts_threads_is_loaded_anew_in_each_cage(tmp_path: Path) -> None:
    threads = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    task = load_rewards("rewards/threads", options(tmp_path, "executed", threads + FUNCTIONS, isolate="text"))
    assert isinstance(task, RewardsTask)
    ask(task, f"{PATCH}\n{WRONG}")
    assert all_is_well(task)
    (said,) = peers_text(task, task.make(0))
    assert re.fullmatch(r"a peer's text takes \d\S* ms, in a cage that loads the code anew", said.line)


@pytest.mark.parametrize(("isolate", "where"), [("text", "in a cage"), ("none", "in its worker")])
def test_the_check_says_where_a_peers_text_is_scored_and_how_long_it_takes(
    tmp_path: Path, isolate: str, where: str
) -> None:
    task = load_rewards("rewards/code", options(tmp_path, "executed", isolate=isolate))
    (said,) = peers_text(task, task.make(0))
    assert re.fullmatch(rf"a peer's text takes \d\S* ms, {where}", said.line)
    home = load_rewards("rewards/code", options(tmp_path, "executed", judge=True))
    assert list(peers_text(home, home.make(0))) == []


THREADS = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
CALL, FORK = "a call of its own", "a fork of the loaded code, in a cage"
FRESH = "a fresh process that loads the code, in a cage"


@pytest.mark.parametrize(
    ("code", "more", "own", "peers"),
    [
        (FUNCTIONS, {"isolate": "none"}, "own texts have one call a round", f"a peer's text has {CALL}"),
        (FUNCTIONS, {}, "own texts have one call a round", f"a peer's text has {FORK}"),
        (FUNCTIONS, {"isolate": "text"}, f"an own text has {FORK}", f"a peer's text has {FORK}"),
        (THREADS + FUNCTIONS, {"isolate": "text"}, f"an own text has {FRESH}", f"a peer's text has {FRESH}"),
        (FUNCTIONS, {"judge": True}, "own texts have one call a round", "a peer's text is never scored"),
    ],
)
def test_the_check_says_of_each_function_how_a_text_is_run_and_what_it_costs_and_what_the_cage_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, more: dict[str, object], own: str, peers: str
) -> None:
    task = load_rewards("rewards/code", options(tmp_path, "executed", code, **more))
    for lacks, line in (("", "nothing on this machine"), ("no Landlock", "on this machine: no Landlock")):
        monkeypatch.setattr(check, "lacking", lambda lacks=lacks: lacks)
        of_function, of_cage = how_paid(task)
        assert re.fullmatch(rf"function executed takes \d\S* ms a text: {own}, {peers}", of_function.line)
        assert of_cage.line == f"a cage lacks {line}"


FILE = """
from node.tasks import Item
from node.tasks.environments.episodes import Done, Observation

replayable = True
HEARD = []

def make(seed):
    return Item(f"Riddle {seed}?", "1")

def judged(text):
    names = {}
    exec(text, names)
    HEARD.append(text)
    return names.get("reward", 0.0) / len(HEARD)
"""
VERIFIES = f"""{FILE}
def verify(item, text):
    return judged(text)
"""
PLAYS = f"""{FILE}
class Game:
    def step(self, text):
        return Done(judged(text))

def start(item):
    return Game()
"""
KILLS = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)"


@pytest.mark.parametrize("code", [VERIFIES, PLAYS])
@pytest.mark.parametrize("isolate", ["", 'isolate = "text"'])
def test_a_peers_text_to_a_file_is_scored_in_a_cage_and_its_episode_played_in_one(
    tmp_path: Path, code: str, isolate: str
) -> None:
    (tmp_path / "file.py").write_text(f"{code}\n{isolate}\n")
    key = tmp_path / "identity.key"
    key.write_text("secret")
    (task,) = load_tasks([TaskConfig(name="file/file", options={"path": str(tmp_path / "file.py")})]).tasks
    assert unshared(task) == ""
    texts = [
        "reward = 2.0",
        f"reward = float(open({str(key)!r}).read() == 'secret')",
        f"{KILLS}\nreward = 2.0",
        "reward = 1.0",
        "reward = 2.0",
    ]
    answers = [Answer(task, task.make(1), text) for text in texts]
    with capture_logs() as logs:
        assert Scoring(answers, is_own=False).wait(60) == [1.0, None, None, 0.5, 1.0], (
            "each is the first after the trial"
        )
    assert ("say isolate = " in logs[0]["reason"]) == (not isolate)


def test_a_file_says_what_it_does_with_texts_and_one_that_needs_the_network_is_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "lacking", lambda: "no Landlock")
    path = tmp_path / "file.py"
    config = TaskConfig(name="file/file", options={"path": str(path)})
    for says, reason in (
        ("", "a stranger's text cannot be caged here (no Landlock): isolate = "),
        ('isolate = "text"', "a stranger's text cannot be caged here (no Landlock)"),
        ('isolate = "none"', ""),
        ("judge = True", "it may use the network"),
        ('unshared = "mine"', "mine"),
    ):
        path.write_text(f"{VERIFIES}\n{says}\n")
        (task,) = load_tasks([config]).tasks
        assert unshared(task).startswith(reason) and bool(unshared(task)) == bool(reason)
        assert task.verify(task.make(1), "reward = 2.0") == 1.0
    path.write_text(f"{VERIFIES}\nisolate = 'never'\n")
    with pytest.raises(UserError, match="its isolate is 'never': it is 'none' or 'text'"):
        load_tasks([config])
