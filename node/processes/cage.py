"""Cages: a call in a process of its own that leaves nothing behind (Landlock, seccomp, rlimits, a process group).

For code that runs a stranger's text. A worker loads the code and runs no text itself. For each call it forks a process,
reads one answer, and ends all that the process has started. Such a process

    reads              the system's programs and libraries, Python, its packages, and the files of loaded modules: no
                       home, no node's folder, nothing of /proc, and no variable that the worker does not have
    writes             a folder made for this call, which is its working folder, its home and its TMPDIR
    opens no socket    but pairs of streams, which `asyncio` needs; no descriptor passes through them
    reaches no other   process: no tracing, no signals, no descriptors, keys, namespaces, mounts, shared memory; it has
                       no lease on a file, which would make others wait
    is somebody else   where the worker is root: another uid, of no group. It has no capability, unless Python lies in a
                       folder that root alone may enter: then it has one, to read what is named above
    is limited         in seconds, processor time, files, their size, and, with all that it has started, in processes,
                       memory and disk (`node.processes.call_supervisor`)
    answers            by a channel of its own, with one message of bounded length

**All that it has started ends with the call.** seccomp denies setsid and setpgid, so its descendants stay in its
process group. SIGKILL to a group is atomic against fork: the kernel lets no process with a pending signal fork. The
worker adopts orphans, so it can wait until the group is empty. A namespace of processes was the alternative; Docker's
default filter and Ubuntu's AppArmor forbid unprivileged ones.

A cage is whole if `Cage.lacks` finds nothing. It needs no rights, and Linux 6.12, or root on Linux 6.2.

What a cage does not do: a function that runs a text in its own process, as with `exec`, believes what the text makes of
that process. So the text decides its own answer, and no other's.
"""

import ctypes
import functools
import json
import math
import os
import resource
import signal
import site
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn, TypeVar

from node.processes.call_supervisor import NO_ANSWER, CageError, CallSupervisor
from node.processes.confinement import (
    CAP_DAC_READ_SEARCH,
    CHANGED,
    CHANGES,
    DISTURBING,
    IOCTL_DEV,
    READ_FILE,
    READS,
    TRUNCATE,
    WRITE_FILE,
    ConfinementError,
    calls,
    deny_calls,
    deny_calls_and_tell,
    landlock_abi,
    renounce_privileges,
    restrict_files,
    ruleset,
    set_capabilities,
    unconfinable,
)
from node.processes.worker_process import HEADER, Message, adopt_orphans, die_with_parent, end_as, remove_folder

T = TypeVar("T")

PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_CAP_AMBIENT = 4, 8, 47
PR_CAP_AMBIENT_RAISE = 2
WALL = 0x40000000  # of waitpid: children that were made by clone(2) without SIGCHLD, too
SIGNALS_ABI = 6  # of Landlock: a process signals none outside of its cage

FIRST_UID = 0x70000000  # of uids that nobody has; in a container that has fewer, NOBODY
NOBODY = 65534
FILES = 256  # that one of its processes may have open
FILE_BYTES = 32 << 20  # of one file
SIGNALS = 1_000  # that wait, of all processes of its uid: with more, others could queue none
ENTERED = b"\0"  # its first byte, with the listener of its forks
TRIAL_S = 20.0  # for the trial of a cage, which starts Python in it: a busy machine may need seconds
CLOSE_RANGE = 436  # the system call
UNCLEAN = 77  # exit status of a process that cannot be forked again

# Denied in a cage, beside what confinement denies.
CAGED: Final = calls(
    "connect 42 203, bind 49 200, listen 50 201, accept 43 202, accept4 288 242, ptrace 101 117, "
    "process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, process_madvise 440, setsid 112 157, "
    "setpgid 109 154, unshare 272 97, setns 308 268, keyctl 250 219, add_key 248 217, request_key 249 218, "
    "mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, open_tree 428, move_mount 429, fsopen 430, "
    "fsconfig 431, fsmount 432, fspick 433, mount_setattr 442, bpf 321 280, perf_event_open 298 241, "
    "userfaultfd 323 282, memfd_create 319 279, memfd_secret 447, mq_open 240 180, mq_unlink 241 181, "
    "name_to_handle_at 303 264, open_by_handle_at 304 265, fanotify_init 300 262, inotify_init 253 -, "
    "inotify_init1 294 26, inotify_add_watch 254 27, syslog 103 116, personality 135 92, "
    "io_uring_enter 426, io_uring_register 427, quotactl 179 60, acct 163 89, fallocate 285 47, sync 162 81, "
    "syncfs 306 267"
)  # fallocate(2) takes a disk faster than anybody looks
# Denied once the cage has sent its listener. A uid has a quota of descriptors on their way: who fills it stops others.
IN_FLIGHT: Final = calls("sendmsg 46 211, sendmmsg 307 269")

# A folder of scratch: all but devices and sockets, which are made by mknod(2) and bind(2).
MAKE_CHAR, MAKE_SOCK, MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
SCRATCH: Final = READS | CHANGES & ~(MAKE_CHAR | MAKE_SOCK | MAKE_BLOCK)

SYSTEM: Final = (
    *(f"{root}{name}" for root in ("/usr/", "/usr/local/", "/") for name in ("bin", "sbin", "lib", "lib32", "lib64")),
    *("/usr/libexec", "/usr/share", "/usr/include", "/usr/local/share", "/usr/local/include", "/nix/store"),
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/etc/timezone", "/etc/passwd"),
    *("/etc/group", "/etc/nsswitch.conf", "/etc/mime.types", "/etc/alternatives", "/etc/ssl/certs"),
    *("/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat"),
    "/sys/devices/system/cpu",
)
OF_A_PREFIX = ("bin", "lib", "lib32", "lib64", "include", "share", "pyvenv.cfg")  # of Python, or a virtual environment

# Variables that a worker with cages has of the node's: no secrets.
KEPT_VARIABLES: Final = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_",
    "TZ",
    "LD_LIBRARY_PATH",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "PYTHON",
    "OMP_",
    "MKL_",
    "OPENBLAS_",
    "HF_",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "TORCH_",
    "CUDA_",
)
SECRET = ("KEY", "TOKEN_", "_TOKEN", "SECRET", "PASS", "CREDENTIAL", "AUTH")
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)  # so that it can be forked


def variables(own: Iterable[str]) -> dict[str, str | None]:
    """Return what a worker with cages gets in place of a node's `own` variables; None for one that it does not get."""
    taken = [
        name for name in own if not name.startswith(KEPT_VARIABLES) or any(sign in name.upper() for sign in SECRET)
    ]
    return {**dict.fromkeys(taken), **ONE_THREAD, "TOKENIZERS_PARALLELISM": "false"}


class Cage:
    """Makes calls in cages, one at a time. This process must have one thread, and must not have used a GPU.

    Args:
        folder: where it makes a folder for each call; one that others can enter and not list.
        files: to be read beside those that are named above.
    """

    def __init__(self, folder: Path, files: Iterable[str] = ()) -> None:
        tempfile.gettempdir()  # it looks for the folder by writing to it, once
        adopt_orphans()
        self._folder = folder
        self._files = tuple(files)
        self._uid = _other_uid() if os.geteuid() == 0 else None
        self._reads = not all(map(_is_open, (sys.executable, os.__file__)))
        self._is_whole = False
        self._allowed: list[tuple[str, int]] | None = None

    def call(self, answer: Callable[[], Message], seconds: float, most: int, patience: float = 0.0) -> Message:
        """Return what `answer` returns in a cage.

        Args:
            answer: called there; what it raises is an end without an answer.
            seconds: that it may take.
            most: bytes of the answer.
            patience: seconds more, as far as its processes wait for a processor.

        Raises:
            CageTimeoutError: the call took too long.
            CageError: it took too much, or its process ended without an answer of this form.
        """
        if self._allowed is None:
            self._allowed = [*_allowed(self._files)]
        scratch = Path(tempfile.mkdtemp(dir=self._folder))
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            self._answer(theirs, scratch, answer, seconds)
        with suppress(OSError):  # it has done so itself
            os.setpgid(pid, pid)
        theirs.close()
        failure: CageError | None = None
        message: Message = {}
        supervisor = CallSupervisor(pid, scratch, _memory(), seconds, patience)
        try:
            with ours:
                message = self._answered(ours, supervisor, most)
        except CageError as error:
            failure = error
        finally:
            ended = _end(pid)
            remove_folder(scratch)
        if failure:
            raise type(failure)(f"{failure}{ended}")
        return message

    def lacks(self) -> str:
        """Return what a cage lacks on this machine to be whole; empty if it is."""
        if reason := unconfinable():
            return reason
        if self._uid is None and os.geteuid() == 0:
            return "root cannot take another uid here"
        if self._uid in (None, NOBODY) and landlock_abi() < SIGNALS_ABI:
            return "the kernel is of before Linux 6.12, and lets a text send signals to others of its uid"
        self._is_whole = True
        try:
            lacks = str(self.call(_tried, TRIAL_S, 1 << 16)["lacks"])
        except (CageError, OSError) as error:
            lacks = f"a trial failed: {error}"
        self._is_whole = not lacks
        return lacks

    def _answered(self, channel: socket.socket, supervisor: CallSupervisor, most: int) -> Message:
        """Return the message of a call, which has sent its listener before."""
        supervisor.wait(channel.fileno())
        _, descriptors, *_ = socket.recv_fds(channel, 1, 1)
        try:
            supervisor.listener = next(iter(descriptors), None)
            message = _read(channel, supervisor, most)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        if self._is_whole and supervisor.is_blind:
            raise CageError("its processes cannot be counted: /proc hides them")
        return message

    def _answer(self, channel: socket.socket, scratch: Path, answer: Callable[[], Message], seconds: float) -> NoReturn:
        try:
            os.setpgid(0, 0)
            try:
                self._enter(channel, scratch, seconds)
            except (ConfinementError, OSError):
                if self._is_whole:
                    os._exit(1)
                channel.send(ENTERED)
            data = json.dumps(answer()).encode()
            channel.sendall(HEADER.pack(len(data)) + data)
        except BaseException:  # noqa: BLE001  # it may raise anything, and exit
            os._exit(1)
        os._exit(0)

    def _enter(self, channel: socket.socket, scratch: Path, seconds: float) -> None:
        """Become a caged process, and send the listener of its forks.

        Raises:
            ConfinementError, OSError: the rest of it cannot be had.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD, signal.SIGIO):
            signal.signal(caught, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.closerange(3, channel.fileno())
        if libc.syscall(CLOSE_RANGE, channel.fileno() + 1, ctypes.c_uint(0xFFFFFFFF), 0) < 0:
            raise ConfinementError("descriptors cannot be closed")
        if self._uid is not None:
            os.chown(scratch, self._uid, self._uid)
        os.chdir(scratch)
        os.environ.update(HOME=str(scratch), TMPDIR=str(scratch))
        tempfile.tempdir = str(scratch)
        _limit(seconds)
        handled = READS | CHANGES | (IOCTL_DEV if landlock_abi() >= 5 else 0)
        allowed = [*(self._allowed or ()), (str(scratch), SCRATCH), (os.devnull, READ_FILE | WRITE_FILE | TRUNCATE)]
        renounce_privileges(libc)
        rules = ruleset(libc, handled, allowed)
        if self._uid is not None:
            _become(libc, self._uid)
        set_capabilities(libc, 1 << CAP_DAC_READ_SEARCH if self._reads else 0, inherited=True)
        if self._reads:  # so that programs have it, too; this process may have none
            libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_READ_SEARCH, 0, 0)
        restrict_files(libc, rules)
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        listener = deny_calls_and_tell(libc, CHANGED | DISTURBING | CAGED)
        socket.send_fds(channel, [ENTERED], [listener])
        os.close(listener)
        deny_calls(libc, IN_FLIGHT)


def make_folder() -> Path:
    """Make a folder for cages; raise `OSError`."""
    folder = Path(tempfile.mkdtemp(prefix="gossamer-cage-"))
    folder.chmod(0o711)
    return folder


@functools.cache
def lacking() -> str:
    """Return what a cage lacks on this machine to be whole, as another process finds it once; empty if it is whole."""
    environment = os.environ | variables(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "node.processes.cage"],
            env={name: value for name, value in environment.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=2 * TRIAL_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"a trial failed: {error}"
    return "a trial failed" if done.returncode != 0 else done.stdout.strip()


def fork_clean(load: Callable[[], T]) -> T | None:
    """Return what `load` returns, in a process forked for it, or None in this one, where that cannot be forked again.

    That is so if it has several threads then, uses a GPU, or shares memory that it writes. What `load` raises is raised
    in the new process.
    """
    pid = os.fork()
    if pid == 0:
        die_with_parent()
        adopt_orphans()
        loaded = load()
        if is_clean():
            return loaded
        os._exit(UNCLEAN)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return None if code == UNCLEAN else end_as(code)


def is_clean() -> bool:
    """Tell whether this process can be forked: it has one thread, uses no GPU, and a fork can change nothing of it.

    A fork writes into memory that is mapped as shared, such as a lock of `multiprocessing`.
    """
    torch = sys.modules.get("torch")
    if len(list(Path("/proc/self/task").iterdir())) > 1 or (torch is not None and torch.cuda.is_initialized()):
        return False
    return not any(line.split()[1].startswith("rw-s") for line in Path("/proc/self/maps").read_text().splitlines())


def _other_uid() -> int | None:
    """Return a uid that this process, which is root, can take and that no other worker has; None if there is none."""
    for uid in (FIRST_UID + os.getpid(), NOBODY):
        pid = os.fork()
        if pid == 0:
            try:
                os.setresuid(uid, uid, uid)
                os._exit(0)
            finally:
                os._exit(1)
        if os.waitpid(pid, 0)[1] == 0:
            return uid
    return None


def _become(libc: ctypes.CDLL, uid: int) -> None:
    """Take another uid, of no group; capabilities stay for now."""
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _is_open(file: str) -> bool:
    """Tell whether everybody may read a file, and enter the folders that it is in."""
    path = Path(file).resolve()
    try:
        return bool(path.stat().st_mode & stat.S_IROTH) and all(
            parent.stat().st_mode & stat.S_IXOTH for parent in path.parents
        )
    except OSError:
        return False


def _allowed(files: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield what a caged process may read: paths with rights."""
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    packages = [*site.getsitepackages(), site.getusersitepackages(), str(Path(__file__).parents[1])]
    folders = {*SYSTEM, *(f"{prefix}/{name}" for prefix in prefixes for name in OF_A_PREFIX), *packages}
    for folder in folders:
        yield folder, READS
    beneath = tuple(f"{folder}/" for folder in folders)
    loaded = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    for file in {*files, *(path for path in loaded if isinstance(path, str))}:
        if not file.startswith(beneath) and Path(file).is_file():
            yield file, READ_FILE


def _memory() -> float:
    """Return how many bytes the processes of a call may have together: the data of one, beside what a fork has."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    data, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return math.inf if data == resource.RLIM_INFINITY else data + (resident - shared) * resource.getpagesize()


def _limit(seconds: float) -> None:
    own_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    data, _ = resource.getrlimit(resource.RLIMIT_DATA)
    for name, most in (
        (resource.RLIMIT_AS, resource.RLIM_INFINITY if data == resource.RLIM_INFINITY else own_bytes + data),
        (resource.RLIMIT_CPU, math.ceil(seconds) + 1),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_SIGPENDING, SIGNALS),
        (resource.RLIMIT_NOFILE, FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        _, bound = resource.getrlimit(name)
        most = (
            most if bound == resource.RLIM_INFINITY else min(most, bound) if most != resource.RLIM_INFINITY else bound
        )
        resource.setrlimit(name, (most, most))


def _read(channel: socket.socket, supervisor: CallSupervisor, most: int) -> Message:
    """Read the one message of a call."""
    data = bytearray()
    while len(data) < HEADER.size or len(data) < HEADER.size + HEADER.unpack_from(data)[0]:
        supervisor.wait(channel.fileno())
        chunk = channel.recv(1 << 16)
        if not chunk:
            raise CageError(NO_ANSWER)
        data += chunk
        if len(data) >= HEADER.size and HEADER.unpack_from(data)[0] > most:
            raise CageError("its answer is too long")
    try:
        message = json.loads(data[HEADER.size :])
    except (ValueError, RecursionError):
        raise CageError("its answer is no message") from None
    if not isinstance(message, dict):
        raise CageError("its answer is no message")
    return message


def _end(pid: int) -> str:
    """End all that a call has started, and wait for it; say how its first process ended, if that is worth a word."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    ending = ""
    while True:
        try:
            ended, status = os.waitpid(-pid, WALL)
        except ChildProcessError:
            return ending
        if ended == pid and os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
            ending = f" (killed by {signal.Signals(os.WTERMSIG(status)).name})"


def _tried() -> Message:
    """Say what this process, which should be in a cage, can do all the same."""
    done = subprocess.run([sys.executable, "-I", "-c", ""], check=False, capture_output=True)
    if done.returncode != 0:
        return {"lacks": "Python cannot be started in it"}
    for what, attempt in (
        ("it can open a socket", lambda: socket.socket(socket.AF_UNIX)),
        ("it can leave its group", os.setsid),
        ("it can read /proc", lambda: Path("/proc/self/maps").read_bytes()),
        ("it can write beside its folder", lambda: Path(tempfile.gettempdir(), "../beside").touch()),
    ):
        with suppress(OSError):
            attempt()
            return {"lacks": what}
    Path(tempfile.gettempdir(), "own").write_text("")
    if os.fork() == 0:
        time.sleep(60)  # the end of the call is its end
        os._exit(0)
    return {"lacks": ""}


if __name__ == "__main__":
    folder = make_folder()
    print(Cage(folder).lacks())  # noqa: T201  # its answer
    remove_folder(folder)
