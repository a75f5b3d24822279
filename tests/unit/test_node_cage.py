"""Cages: what code in one can reach, and that nothing of it is left; as root, as another uid, under Docker's filter."""

import ctypes
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from node.processes import cage, call_supervisor, confinement
from node.processes.cage import Cage, variables
from node.processes.call_supervisor import PROCESSES, CageError, CallSupervisor
from node.processes.confinement import MACHINES, calls, unconfinable
from node.processes.worker_process import remove_folder
from tests.processes import alive

ROOT = Path(__file__).parents[2]
NOBODY = 65534
KEY = "the node's secret key"
MARK = f"of-{os.getpid()}"  # in the command lines of what this process's tests start

pytestmark = pytest.mark.skipif(bool(unconfinable()), reason=unconfinable())
C = "import ctypes, os, socket, sys; libc = ctypes.CDLL(None, use_errno=True)\n"
DENIED = "assert {} >= 0, os.strerror(ctypes.get_errno())"

# What a text must not be able to do: code that raises nothing if it can.
HARM = {
    "read the node's folder": "open({key!r}).read()",
    "list the node's folder": "import os; os.listdir({folder!r})",
    "list the home": "import os; os.listdir({home!r})",
    "read who has a password": "open('/etc/shadow').read()",
    "read the node's environment": "open('/proc/{node}/environ', 'rb').read()",
    "read the node's command line": "open('/proc/{node}/cmdline').read()",
    "list the worker's descriptors": "import os; os.listdir(f'/proc/{{os.getppid()}}/fd')",
    "find a secret variable": "import os; os.environ['GOSSAMER_TEST_TOKEN']",
    "lock the node's folder": "import fcntl; fcntl.flock(open({key!r}), fcntl.LOCK_EX)",
    "write a file": "open({folder!r} + '/harm', 'w')",
    "write beside its folder": "open('../harm', 'w')",
    "make a folder": "import os; os.mkdir({folder!r} + '/harm')",
    "link a file into its folder": "import os; os.link({key!r}, 'linked')",
    "write shared memory": "open('/dev/shm/harm', 'w')",
    "change a mode": "import os; os.chmod({key!r}, 0o777)",
    "open a TCP socket": "import socket; socket.socket()",
    "open a UDP socket": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "open a Unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "open a netlink socket": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "open datagram sockets": "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "reach a service from a pair": "import socket; socket.socketpair()[0].connect('\\0gossamer')",
    "signal the node": "import os; os.kill({node}, 0)",
    "trace the node": C + DENIED.format("libc.ptrace(16, {node}, 0, 0)"),
    "take a descriptor of the worker's": C + DENIED.format("libc.syscall(438, os.pidfd_open(os.getppid()), 3, 0)"),
    "take a descriptor of the node's": C + DENIED.format("libc.syscall(438, os.pidfd_open({node}), 0, 0)"),
    "read the worker's memory": C + DENIED.format("libc.process_vm_readv(os.getppid(), None, 0, None, 0, 0)"),
    "leave its session": "import os; os.setsid()",
    "leave its process group": "import os; os.setpgid(0, 0)",
    "make a user namespace": C + DENIED.format("libc.unshare(0x10000000)"),
    "make a namespace by clone": C + DENIED.format("libc.syscall({clone}, 0x10000011, 0, 0, 0, 0)"),
    "mount a file system": C + DENIED.format("libc.mount(b't', b'/mnt', b'tmpfs', 0, None)"),
    "change its root": "import os; os.chroot('.')",
    "add a key": C + DENIED.format("libc.syscall({add_key}, b'user', b'gossamer', b'abc', 3, -4)"),
    "attach memory that others share": C
    + "libc.shmat.restype = ctypes.c_void_p; assert libc.shmat({shm}, None, 0) != 2**64 - 1",
    "remove memory that others share": C + DENIED.format("libc.shmctl({shm}, 0, None)"),
    "wake who waits for a semaphore": C + DENIED.format("libc.semop({sem}, (ctypes.c_short * 3)(0, 1, 0), 1)"),
    "set a semaphore": C + DENIED.format("libc.semctl({sem}, 0, 16, 5)"),
    "send to a queue": C + DENIED.format("libc.msgsnd({msg}, bytes([1] * 16), 8, 0)"),
    "remove a queue": C + DENIED.format("libc.msgctl({msg}, 0, None)"),
    "watch the node's folder": C
    + DENIED.format("libc.inotify_add_watch(libc.inotify_init1(0), {folder!r}.encode(), 2)"),
    "take the machine's asynchronous I/O": C + DENIED.format("libc.syscall({io_setup}, 1000, bytes(8))"),
    "change a file's attributes": C + DENIED.format("libc.syscall(469, -100, {key!r}.encode(), bytes(24), 24, 0)"),
    "do what is newer than its filter": C + DENIED.format("libc.syscall(467, -100, b'/', 0, None, 0)"),
    "take a disk without writing": "import os; os.posix_fallocate(open('taken', 'wb').fileno(), 0, 100)",
    "flush what others write": C + DENIED.format("libc.syscall({sync})"),
    "flush a file system": C + DENIED.format("libc.syncfs(os.open('.', 0))"),
    "make others wait for a file": "import fcntl; fcntl.fcntl(open('own', 'w'), fcntl.F_SETLEASE, fcntl.F_WRLCK)",
    "watch a folder": "import fcntl, os; fcntl.fcntl(os.open('.', 0), fcntl.F_NOTIFY, fcntl.DN_CREATE)",
    "take the user's descriptors": "import socket; a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [0])",
    "queue all of a user's signals": C
    + "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [40])\n"
    + "info = bytes([40, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]) + bytes(116)\n"
    + f"for _ in range(2_000): {DENIED.format('libc.syscall({sigqueue}, os.getpid(), 40, info)')}",
    "open a message queue": C + DENIED.format("libc.mq_open(b'/gossamer', 0o102, 0o600, None)"),
    "make shared memory": C + DENIED.format("libc.shmget(0, 4096, 0o1600)"),
    "make a file in memory": "import os; os.memfd_create('a')",
    "load a program into the kernel": C + DENIED.format("libc.syscall({bpf}, 0, None, 0)"),
    "handle page faults": C + DENIED.format("libc.syscall({userfaultfd}, 0)"),
    "open io_uring": C + DENIED.format("libc.syscall(425, 8, bytes(120))"),
    "lower the node's priority": "import os; os.setpriority(os.PRIO_PROCESS, {node}, 19)",
    "become root": "import os; os.setuid(0)",
    "raise its limits": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))",
    "write a large file": "open('large', 'wb').truncate(1 << 30)",
    "take much memory": "import mmap; mmap.mmap(-1, 1 << 45)",
}

# What ordinary code rewards do.
USE = {
    "write and read files": "open('a.py', 'w').write('x = 1'); import sys; sys.path.append('.'); import a; assert a.x",
    "use temporary files": "import tempfile; tempfile.NamedTemporaryFile().write(b'a'); tempfile.mkdtemp()",
    "run a program": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1)'], check=True)",
    "run a shell": "import subprocess; subprocess.run('cat < /dev/null > a; ls', shell=True, check=True)",
    "end a program": "import subprocess; p = subprocess.Popen(['sleep', '60']); p.kill(); p.wait()",
    "wait asynchronously": "import asyncio; asyncio.run(asyncio.sleep(0))",
    "run threads": "from concurrent.futures import ThreadPoolExecutor as P; P().submit(int).result()",
    "import a library": "import decimal, sqlite3, unittest, fractions",
    "find a time zone": "import zoneinfo, datetime; datetime.datetime.now().astimezone()",
    "talk between threads": "import socket; a, b = socket.socketpair(); a.send(b'x'); assert b.recv(1) == b'x'",
    "lock a file of its own": "import fcntl; fcntl.lockf(open('own', 'w'), fcntl.LOCK_EX)",
    "draw at random": "import os, random, secrets; open('/dev/urandom', 'rb').read(1); secrets.token_hex()",
}


HELD = {"PermissionError", "AssertionError", "OSError", "ValueError", "KeyError"}


def numbers() -> dict[str, int]:
    """The numbers of some system calls here."""
    table = calls(
        "clone 56 220, add_key 248 217, bpf 321 280, userfaultfd 323 282, io_setup 206 0, sigqueue 129 138, sync 162 81"
    )
    return {name: pair[MACHINES[os.uname().machine].place] for name, pair in table.items()}


def caged(*texts: tuple[dict[str, str], float], uid: int | None = None, filtered: bool = False) -> dict[str, Any]:
    """Return what came of calls in cages of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fakes.caged", str(os.geteuid() if uid is None else uid), str(filtered), MARK],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={name: value for name, value in (os.environ | variables(os.environ)).items() if value is not None},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["lacks"], found["left"]) == ("", [])
    return found["calls"]


@pytest.fixture
def system_v() -> Iterator[dict[str, int]]:
    """Shared memory, a semaphore and a queue that everybody may use."""
    libc = ctypes.CDLL(None)
    made = {"shm": libc.shmget(0, 4096, 0o1666), "sem": libc.semget(0, 1, 0o1666), "msg": libc.msgget(0, 0o1666)}
    yield made
    libc.shmctl(made["shm"], 0, None)
    libc.semctl(made["sem"], 0, 0)
    libc.msgctl(made["msg"], 0, None)


@pytest.mark.real
@pytest.mark.parametrize(("uid", "filtered"), [(None, False), (NOBODY, False), (None, True)])
def test_what_is_in_a_cage_reaches_nothing_of_the_node_and_can_do_what_code_rewards_do(
    uid: int | None,
    filtered: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    system_v: dict[str, int],
) -> None:
    if uid is not None and os.geteuid() != 0:
        pytest.skip("only root can take another uid")
    folder = tmp_path / "node"
    folder.mkdir()
    (folder / "identity.key").write_text(KEY)
    for path in (folder, folder / "identity.key"):
        os.chown(path, os.geteuid() if uid is None else uid, -1)
    monkeypatch.setenv("GOSSAMER_TEST_TOKEN", KEY)
    places = {"key": str(folder / "identity.key"), "folder": str(folder), "home": str(Path.home()), "node": os.getpid()}
    harm = {name: code.format(**places, **numbers(), **system_v) for name, code in HARM.items()}
    (found,) = caged(({**USE, **harm}, 60.0), uid=uid, filtered=filtered)
    for place in ("here", "program"):
        assert {name for name in HARM if found[place][name] not in HELD} == set(), found[place]
        assert {name: found[place][name] for name in USE} == dict.fromkeys(USE, "reached")
    assert [path.name for path in folder.iterdir()] == ["identity.key"]


DENIED_CALLS = """
accept accept4 acct add_key bind bpf chmod chown chroot connect fallocate fanotify_init fchmod fchmodat fchmodat2 fchown
fchownat fremovexattr fsconfig fsetxattr fsmount fsopen fspick futimesat inotify_add_watch inotify_init inotify_init1
io_setup io_uring_enter io_uring_register io_uring_setup ioprio_set kcmp keyctl lchown listen lremovexattr lsetxattr
memfd_create memfd_secret migrate_pages mount mount_setattr move_mount move_pages mq_open mq_unlink msgctl msgget msgrcv
msgsnd name_to_handle_at open_by_handle_at open_tree perf_event_open personality pidfd_getfd pivot_root prlimit64
process_madvise process_vm_readv process_vm_writev ptrace quotactl removexattr request_key sched_setaffinity
sched_setattr sched_setparam sched_setscheduler semctl semget semop semtimedop sendmmsg sendmsg setns setpgid
setpriority setsid setxattr shmat shmctl shmget socket sync syncfs syslog umount2 unshare userfaultfd
utime utimensat utimes
"""  # by their names, so that none leaves the lists of the product unseen


@pytest.mark.real
@pytest.mark.parametrize("uid", [None, NOBODY])
def test_a_process_in_a_cage_cannot_be_dumped_and_each_call_of_the_list_is_denied(uid: int | None) -> None:
    if uid is not None and os.geteuid() != 0:
        pytest.skip("only root can take another uid")
    lists = confinement.CHANGED | confinement.DISTURBING | confinement.OF_A_PROCESS | cage.CAGED | cage.IN_FLIGHT
    here = {name: lists[name][MACHINES[os.uname().machine].place] for name in DENIED_CALLS.split()}
    allowed = (
        C + "arguments = [ctypes.c_long(-1)] * 4\n"
        f"said = [name for name, number in {here}.items() if number >= 0\n"
        "        if libc.syscall(number, *arguments) >= 0 or ctypes.get_errno() != 13]"
    )
    (found,) = caged(({"allowed": allowed, "dumpable": C + "said = libc.prctl(3, 0, 0, 0, 0)"}, 60.0), uid=uid)
    assert found["here"] == {"allowed": [], "dumpable": 0}
    assert found["program"]["allowed"] == []


@pytest.mark.real
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_cage_that_is_said_to_be_whole_answers_nothing_if_it_cannot_be_entered(is_whole: bool) -> None:
    code = f"""
from node.processes.cage import Cage, make_folder
from node.processes.call_supervisor import CageError
from node.processes.worker_process import remove_folder
folder = make_folder()
cage = Cage(folder)
if {is_whole}:
    assert cage.lacks() == ""
def refuse(*_):
    raise OSError
Cage._enter = refuse
try:
    print(cage.call(lambda: {{"reward": 1}}, 20.0, 100))
except CageError as error:
    print(error)
remove_folder(folder)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert done.stdout == ("it ended without an answer\n" if is_whole else "{'reward': 1}\n")


DAEMON = """
import os, time
for signal in range(1, 32):
    try:
        __import__("signal").signal(signal, __import__("signal").SIG_IGN)
    except (OSError, ValueError):
        pass
read, write = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.write(write, str(os.getpid()).encode())
        os.closerange(0, 3)
        time.sleep(600)
    os._exit(0)
said = int(os.read(read, 100))
"""
BOMB = """
import os, time
if os.fork() == 0:
    os.closerange(0, 3)
    while True:
        try:
            os.fork()
        except OSError:
            pass
time.sleep(0.5)
said = os.getuid()
"""


@pytest.mark.real
@pytest.mark.parametrize("uid", [None, NOBODY])
def test_all_that_a_call_has_started_ends_with_it_daemons_and_fork_bombs_too(uid: int | None) -> None:
    if uid is not None and os.geteuid() != 0:
        pytest.skip("only root can take another uid")
    daemon, late, bomb = caged(
        ({"daemon": DAEMON}, 20.0), ({"late": DAEMON + "time.sleep(60)"}, 1.0), ({"bomb": BOMB}, 20.0), uid=uid
    )
    assert late == "it took too long"
    assert not alive(daemon["here"]["daemon"]) and not alive(daemon["program"]["daemon"])
    assert isinstance(bomb["program"]["bomb"], int) or bomb["program"]["bomb"] == "BlockingIOError"  # another's bomb
    left = [process.info for process in psutil.process_iter(["cmdline"]) if MARK in (process.info["cmdline"] or [])]
    assert left == []


FORKS = """
import os, resource, time
count = 0
try:
    while count < 500:
        if os.fork() == 0:
            os.closerange(0, 3)
            time.sleep(600)
        count += 1
except BlockingIOError:
    pass
said = [count, resource.getrlimit(resource.RLIMIT_NPROC)[0]]
"""
TAKES = """
import os, time
read, write = os.pipe()
for _ in range(4):
    if os.fork() == 0:
        taken = b"x" * (300 << 20)
        os.write(write, b"x")
        time.sleep(600)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("uid", [None, NOBODY])
def test_processes_and_memory_of_a_call_have_a_bound_together_and_others_of_its_uid_are_not_counted(
    uid: int | None,
) -> None:
    if uid is not None and os.geteuid() != 0:
        pytest.skip("only root can take another uid")
    forks, takes = caged(({"": FORKS}, 20.0), ({"": TAKES}, 20.0), uid=uid)
    assert forks["program"][""] == [PROCESSES - 2, resource.getrlimit(resource.RLIMIT_NPROC)[0]]
    assert takes == "its processes took too much memory"


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_a_call_ends_where_what_cannot_be_counted_of_it_takes_most_of_the_machine(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = {"memory": [100, 24], "disk": [100, 24]}
    left["disk" if what == "memory" else "memory"] = [100, 25]
    monkeypatch.setattr(call_supervisor, "available_memory", lambda: left["memory"].pop(0))
    monkeypatch.setattr(call_supervisor, "free_disk", lambda folder: left["disk"].pop(0))
    monkeypatch.setattr(call_supervisor, "LOOK_S", 0.0)
    read, write = os.pipe()
    with pytest.raises(CageError, match=f"this machine was about to run out of {what}"):
        CallSupervisor(os.getpgrp(), tmp_path, 1 << 50, 60).wait(read)
    os.close(read)
    os.close(write)


def test_the_memory_of_a_calls_processes_counts_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_supervisor, "_of_group", lambda group: [call_supervisor._Process(1, 60)] * 2)
    monkeypatch.setattr(call_supervisor, "LOOK_S", 0.0)
    read, write = os.pipe()
    for most, reason in ((119, "its processes took too much memory"), (120, "it took too long")):
        with pytest.raises(CageError, match=reason):
            CallSupervisor(os.getpgrp(), tmp_path, most, 0.1).wait(read)
    os.close(read)
    os.close(write)


def test_where_seccomp_tells_of_no_forks_a_call_ends_once_it_has_too_many_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_supervisor, "LOOK_S", 0.0)
    read, write = os.pipe()
    for most, reason in ((0, "it started too many processes"), (1 << 20, "it took too long")):
        monkeypatch.setattr(call_supervisor, "PROCESSES", most)
        with pytest.raises(CageError, match=reason):
            CallSupervisor(os.getpgrp(), tmp_path, 1 << 50, 1).wait(read)
    os.close(read)
    os.close(write)


@pytest.mark.slow
def test_a_cage_whose_processes_proc_hides_is_not_whole() -> None:
    code = """
import psutil
from node.processes.cage import Cage, make_folder
from node.processes.worker_process import remove_folder
psutil.pids = lambda: []
folder = make_folder()
print(Cage(folder).lacks())
remove_folder(folder)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert done.stdout == "a trial failed: its processes cannot be counted: /proc hides them\n"


SAYS = """
import os, struct
for number in range(3, 64):
    try:
        os.write(number, {})
    except OSError:
        pass
os._exit(0)
"""


@pytest.mark.slow
def test_an_answer_has_a_bound_and_a_form_and_a_call_has_limits_and_the_next_one_is_as_the_first() -> None:
    framed = "struct.pack('>I', len({0})) + {0}"
    codes = [
        SAYS.format(framed.format("b'[1]'")),
        SAYS.format(framed.format("b'no JSON'")),
        SAYS.format(framed.format(f"b'{'[' * 50_000}'")),
        SAYS.format("struct.pack('>I', 1 << 30)"),
        "import os; os._exit(0)",
        "import ctypes; ctypes.string_at(0)",
        "import time; time.sleep(60)",
        "import os\nfor n in range(10**6): open(f'{n}', 'wb').write(b'x' * (8 << 20))",
        "import os\nfor n in range(10**6): os.mkdir(f'{n}')",
        "import os\nfor _ in range(10**6):\n    os.mkdir('d' * 200)\n    os.chdir('d' * 200)",
        "import os\nos.makedirs('a/b/c')\nos.mkdir('a/closed', 0)\nos.symlink('/', 'root')\nsaid = os.getcwd()",
        "import os\nsaid = os.listdir('.')",
    ]
    *ended, full, fresh = caged(*(({"": code}, 1.0 if "sleep" in code else 10.0) for code in codes))
    assert ended == [
        *["its answer is no message"] * 3,
        "its answer is too long",
        "it ended without an answer",
        "it ended without an answer (killed by SIGSEGV)",
        "it took too long",
        *["it filled its folder"] * 2,
        "its folder cannot be looked into",
    ]
    assert full["program"][""].startswith("/")
    assert fresh["here"][""] == []


def test_a_folder_is_removed_whatever_its_depth_and_modes(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    back = os.open(".", os.O_RDONLY)
    os.chdir(folder)
    try:
        for _ in range(60):
            Path("d" * 100).mkdir()
            Path("file").touch()
            os.chdir("d" * 100)
    finally:
        os.fchdir(back)
        os.close(back)
    (folder / "link").symlink_to(tmp_path)
    (folder / "closed").mkdir(0)
    (folder / "into").symlink_to("closed")
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_with_cages_gets_no_secrets_of_the_nodes_environment() -> None:
    kept = {"PATH": "/bin", "LC_ALL": "C", "HF_HUB_OFFLINE": "1", "PYTHONPATH": "/a"}
    secrets = {"HF_TOKEN": "a", "AWS_SECRET_ACCESS_KEY": "b", "WANDB_API_KEY": "c", "DATABASE_URL": "d"}
    given = (kept | secrets) | variables(kept | secrets)
    assert {name: given[name] for name in kept} == kept
    assert {name: given[name] for name in secrets} == dict.fromkeys(secrets)


def test_a_cage_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cage, "adopt_orphans", lambda: None)
    monkeypatch.setattr(cage, "landlock_abi", lambda: 5)
    monkeypatch.setattr(cage, "_other_uid", lambda: None)
    monkeypatch.setattr(cage.os, "geteuid", lambda: 1000)
    assert "before Linux 6.12" in Cage(tmp_path).lacks()
    monkeypatch.setattr(cage.os, "geteuid", lambda: 0)
    assert "cannot take another uid" in Cage(tmp_path).lacks()
    monkeypatch.setattr(cage, "_other_uid", lambda: NOBODY)  # as other workers have
    assert "before Linux 6.12" in Cage(tmp_path).lacks()
    monkeypatch.setattr(confinement, "LEAST_ABI", 1_000)
    assert "no Landlock" in Cage(tmp_path).lacks()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("does", "is_forked"),
    [
        ("", True),
        ("threading.Thread(target=threading.Event().wait, daemon=True).start()", False),
        ("kept.append(multiprocessing.Lock())", False),
        ("kept.append(mmap.mmap(-1, 4096))", False),
    ],
)
def test_a_process_with_threads_or_shared_memory_is_not_forked_for_a_call(does: str, is_forked: bool) -> None:
    code = f"""
import mmap, multiprocessing, os, threading
from node.processes.cage import fork_clean
began, kept = os.getpid(), []
def load():
    {does}
    return "loaded"
loaded = fork_clean(load)
print(loaded, os.getpid() == began, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert done.stdout == ("loaded False\n" if is_forked else "None True\n")
