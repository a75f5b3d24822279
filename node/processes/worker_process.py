"""Worker processes: code that must not run in the node itself, and how both sides speak.

vLLM runs in one (`node.engines.vllm_worker`), since it may need other packages than the node; rewards of other
people's task sets and questions that depend on the hash seed do too, with limits on their time and memory.

The two sides share a socket pair: one request, then one reply, in frames of four bytes of length (big-endian) and that
much JSON. A request has an id of its own, drawn at random, and its reply has the same one. The node drops every other
frame, so one that a text has forged answers no later request. A reply may come with a channel to another process. There
are no error replies: a worker that fails ends with a traceback in its log.

    node
      guard       leads a session, which a Ctrl-C in the terminal does not reach, and adopts its orphans
        worker    calls `connect`, which forks it from the guard
          ...     what it has started, in whatever session

**What a worker has started ends with it.** The guard waits until the worker ends, the node kills it, or the node itself
ends, by kill -9 even. Then it kills everything below itself until it is alone, and ends as the worker did. A list of
processes that the node takes would not do: one whose parent ends meanwhile is missing there.

The node's side is `WorkerProcess`; a worker calls `connect`, then `receive` and `reply` of what that returns. It may
run under another interpreter than the node, so nothing but the standard library is imported here.
"""

import ctypes
import json
import os
import resource
import secrets
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

HEADER = struct.Struct(">I")
MAX_FRAME = 1 << 28  # bytes; a thousand completions of 8,192 tokens with their log-probabilities nearly fill it
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# Asks a guard to end all, and ends a process that has not called `connect` yet. Launchers and service managers, which
# signal all processes of a job, send others.
END_ALL = signal.SIGVTALRM
END_S = 10.0  # seconds from SIGKILL to the end; a process that the kernel holds for a broken device takes longer
LAUNCHED = frozenset(  # variables of a launcher that starts several processes
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
)
LAST_LINES = 3  # of the log, quoted in an error
LAST_CHARACTERS = 400


Message = dict[str, Any]
Deadline = Callable[[], float]
"""Returns a time on the monotonic clock, each time anew."""


def send(channel: socket.socket, message: Message) -> None:
    """Write one frame."""
    data = json.dumps(message).encode()
    channel.sendall(HEADER.pack(len(data)) + data)


def receive(channel: socket.socket, deadline: Deadline | None = None, most: int = MAX_FRAME) -> Message:
    """Read one frame of at most `most` bytes, until `deadline` at most.

    Raises:
        EOFError: the other side is gone.
        TimeoutError: the deadline has passed.
        ValueError: what arrived is no frame of this protocol.
    """
    (size,) = HEADER.unpack(_read(channel, HEADER.size, deadline))
    if size > most:
        raise ValueError(f"a frame of {size} bytes")
    try:
        message = json.loads(_read(channel, size, deadline))
    except RecursionError:
        raise ValueError("a frame of lists within lists") from None
    if not isinstance(message, dict):
        raise ValueError("a frame that holds no message")
    return message


def _read(channel: socket.socket, size: int, deadline: Deadline | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            left = deadline() - time.monotonic()
            if left <= 0:  # though more may have come: whoever writes without end is late, too
                raise TimeoutError
            channel.settimeout(left)
        try:
            chunk = channel.recv(min(size - len(data), 1 << 20))
        except TimeoutError:
            continue  # the deadline may be later by now
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def ask(channel: socket.socket, request: Message, deadline: Deadline, most: int = MAX_FRAME) -> tuple[Message, int]:
    """Send a request; return the reply to it, and how many frames came before it that answer something else.

    Raises as `receive` does.
    """
    request_id = secrets.token_hex(8)
    channel.settimeout(max(deadline() - time.monotonic(), 1e-3))
    send(channel, {**request, "request_id": request_id})
    dropped = 0
    while (reply := receive(channel, deadline, most)).pop("request_id", None) != request_id:
        dropped += 1
    return reply, dropped


class Requests:
    """The answering end of a channel: requests, one after another, and a reply to each."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self._id: Any = None  # of the newest request

    def receive(self) -> Message:
        """Wait for a request; raise as `receive` does."""
        request = receive(self.channel)
        self._id = request.pop("request_id", None)
        return request

    def reply(self, message: Message) -> None:
        """Reply to the newest request."""
        send(self.channel, {**message, "request_id": self._id})


def connect(channel: int, life: int, *, folder: Path | None = None) -> Requests:
    """Become a guard, and return in a process forked from it, the worker: its end of the channel.

    The guard ends all when the pipe `life` ends, which only the node holds open and nobody writes to. Then it removes
    `folder`.

    Signals to stop or to save are for the node, though service managers and Slurm send them to all processes of a job.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    adopt_orphans()
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, END_ALL):
        signal.signal(number, lambda *_: None)  # a byte in the pipe tells the guard
    if (worker := os.fork()) != 0:
        os.close(channel)  # the node must see it end when the worker does
        _guard(worker, life, woken, folder)
    die_with_parent()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, END_ALL):
        signal.signal(number, signal.SIG_DFL)
    for pipe in (woken, wakes, life):
        os.close(pipe)
    return Requests(socket.socket(fileno=channel))


def _guard(worker: int, life: int, woken: int, folder: Path | None) -> NoReturn:
    """Wait until the worker ends or `life` does, or for `END_ALL`; then end all that is below, and end as it did.

    A process group other than its own holds only what is below: a signal to it is atomic against fork.
    """
    status = None
    while status is None:
        ready, _, _ = select.select([life, woken], [], [])
        if life in ready or END_ALL in os.read(woken, 1 << 12):
            break
        status = _bury(worker, status, os.WNOHANG)
    while below := descendants_of(os.getpid()):
        for process in below:
            with suppress(ProcessLookupError):
                if (group := os.getpgid(process)) != os.getpgrp():
                    os.killpg(group, signal.SIGKILL)
                os.kill(process, signal.SIGKILL)
        status = _bury(worker, status, 0)
    if folder is not None:
        with suppress(OSError):
            remove_folder(folder)
    if status is None:  # elsewhere than on Linux, where nothing tells what is below
        os.killpg(0, signal.SIGKILL)
    else:
        end_as(os.waitstatus_to_exitcode(status))
    raise AssertionError("it has ended")


def remove_folder(folder: Path) -> None:
    """Remove a folder with all in it, whatever its depth, the length of its paths and the modes of its folders.

    Folders within are moved up into `folder`, so that every path is short. Nobody may be at work in it.
    """
    while inner := [subfolder for subfolder in folder.iterdir() if _is_folder(subfolder)]:
        for subfolder in inner:
            for entry in list(_opened(subfolder).iterdir()):
                if _is_folder(entry):
                    _opened(entry).rename(folder / secrets.token_hex(16))
                else:
                    entry.unlink()
            subfolder.rmdir()
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _is_folder(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)


def _opened(folder: Path) -> Path:
    """Return a folder that this process may read and move."""
    if folder.stat().st_mode & stat.S_IRWXU != stat.S_IRWXU:
        folder.chmod(stat.S_IRWXU)
    return folder


def _bury(worker: int, status: int | None, options: int) -> int | None:
    """Bury the children that have ended, or the first that does; return the worker's status, `status` until it ends."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, options))[0]:
            status = ended[1] if ended[0] == worker else status
            options = os.WNOHANG
    return status


def end_as(code: int) -> NoReturn:
    """End this process with an exit code, or by a signal if that is negative."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the worker has left one, if it is to
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def die_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Let what this process's children have started become its own children when these end; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def yield_memory() -> None:
    """Let the kernel end this process and what it starts, and not the node, where memory runs out; on Linux alone.

    A limit on a process's data holds for neither shared memory nor several processes together.
    """
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


class PatientDeadline:
    """A deadline, later by the time for which the threads of some processes wait for a processor.

    Threads that have ended are not counted, and none is where the kernel does not tell.

    Args:
        seconds: until it.
        patience: seconds by which it is later at most.
        processes: returns their ids.
    """

    def __init__(self, seconds: float, patience: float, processes: Callable[[], Iterable[int]]) -> None:
        self._end = time.monotonic() + seconds
        self._patience = patience
        self._processes = processes
        self._before = _starved(processes()) if patience else 0.0
        self.is_starved = False  # whether the last call found that the processes had waited for all of `patience`

    def __call__(self) -> float:
        """Return it, on the monotonic clock."""
        if not self._patience or time.monotonic() < self._end:
            return self._end
        waited = max(0.0, _starved(self._processes()) - self._before)
        self.is_starved = waited >= self._patience
        return self._end + min(self._patience, waited)


class WorkerError(Exception):
    """The worker ended, fell silent or spoke nonsense, and is dead now; the text quotes the end of its log.

    `status` is its exit status, negative for a signal, or None when it had to be killed.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class WorkerTimeoutError(WorkerError):
    """The worker did not answer in time."""


class WorkerProcess:
    """A running worker process, until `kill` or the end of this one.

    Args:
        command: its command line, to which the numbers of two file descriptors are added.
        environment: variables added to this process's own; None takes one out.
        log: file that its output is appended to; without one, a temporary file that nobody else sees.

    Raises:
        OSError: the command cannot be started or the log cannot be written.

    Attributes:
        dropped: how many frames came that answered no request, or an earlier one.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str | None], log: Path | None = None) -> None:
        self.dropped = 0
        self._log: BinaryIO = tempfile.TemporaryFile() if log is None else log.open("a+b")  # noqa: SIM115  # kept
        self._shown = "its output" if log is None else str(log)
        self._channel, channel = socket.socketpair()
        outside_any_group = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
        variables = {**outside_any_group, **environment}
        life, self._life = os.pipe()  # never written to: its end tells the child that this process is gone
        try:
            with channel:
                self._process = subprocess.Popen(
                    [*command, str(channel.fileno()), str(life)],
                    pass_fds=[channel.fileno(), life],
                    env={name: value for name, value in variables.items() if value is not None},
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError:
            self._channel.close()
            self._log.close()
            os.close(self._life)
            raise
        finally:
            os.close(life)

    @property
    def pid(self) -> int:
        """The process's id, which is also its group's."""
        return self._process.pid

    @property
    def killed(self) -> bool:
        """Whether `kill` was called, by this class too."""
        return self._channel.fileno() < 0

    def call(self, message: Message, timeout: float, most: int = MAX_FRAME, patience: float = 0.0) -> Message:
        """Send a request and return the reply to it, of at most `most` bytes; `dropped` counts what is none.

        Time in which the child's processes wait for a processor is added to the timeout, up to `patience` seconds.

        Raises:
            WorkerTimeoutError: no reply within `timeout` seconds; the child has been killed.
            WorkerError: no good reply, or none before `patience` was spent; the child has been killed.
        """
        deadline = PatientDeadline(timeout, patience, lambda: [self.pid, *descendants_of(self.pid)])
        try:
            reply, dropped = ask(self._channel, message, deadline, most)
        except TimeoutError:
            late = self._failed(f"no answer to {message['call']!r} in {timeout:g} s", None)
            raise (late if deadline.is_starved else WorkerTimeoutError(str(late))) from None
        except ValueError as error:
            raise self._failed(f"a malformed answer to {message['call']!r} ({error})", None) from None
        except (EOFError, OSError):
            status = self._status()
            raise self._failed(_describe(status), status) from None
        self.dropped += dropped
        return reply

    def call_for_channel(self, message: Message, timeout: float) -> socket.socket:
        """Send a request and return the channel that the reply comes with, to a process that the child has forked.

        Raises:
            WorkerError: as `call` does; or the child is well, and replied with an error instead, or this process has no
                room for another descriptor.
        """
        reply = self.call(message, timeout)
        if "error" in reply:
            raise WorkerError(str(reply["error"]))
        try:
            data, descriptors, *_ = socket.recv_fds(self._channel, 1, 1)
        except OSError:
            data, descriptors = b"", []
        if not data:
            raise self._failed(f"no channel in answer to {message['call']!r}", None)
        if not descriptors:  # the kernel has closed it
            raise WorkerError("no channel to a process: this process has too many files open (see ulimit -n)")
        return socket.socket(fileno=descriptors[0])

    def wait(self) -> str:
        """Wait until the child ends by itself, and return how, with the end of its log; nothing where it ended well.

        For a thread of its own. After `kill`, what is returned has no meaning.
        """
        status = self._process.wait()
        if status == 0 or self._log.closed:
            return ""
        return f"{_describe(status)}; {self._shown} ends in: {_last_lines(self._log)}"

    def kill(self) -> None:
        """End the child and all that it started, at once; harmless when that is done.

        One that the kernel cannot end within `END_S` is left to it.
        """
        if self.killed:
            return
        self._channel.close()
        self._log.close()
        os.close(self._life)
        self._process.send_signal(END_ALL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        with suppress(ProcessLookupError):  # there is nobody, unless the guard itself was killed, or hangs
            os.killpg(self.pid, signal.SIGKILL)

    def _failed(self, reason: str, status: int | None) -> WorkerError:
        if self.killed:  # by another thread
            return WorkerError("it was ended", status)
        end = _last_lines(self._log)
        self.kill()
        return WorkerError(f"{reason}; {self._shown} ends in: {end}", status)

    def _status(self) -> int | None:
        """Return the status of a child that has closed its side, and so is about to end."""
        try:
            return self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return None


def children_of(pid: int) -> list[int]:
    """Return the processes that one has started, as far as /proc tells."""
    pids: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            pids += map(int, file.read_text().split())
    return pids


def descendants_of(pid: int) -> list[int]:
    """Return the processes that one has started, and those that these have, parents first."""
    pids = children_of(pid)
    for descendant in pids:  # the list grows meanwhile: a chain of forks is longer than Python's stack
        pids += children_of(descendant)
    return pids


def _starved(processes: Iterable[int]) -> float:
    """Return for how many seconds the threads of processes have waited for a processor since they began."""
    nanoseconds = 0
    for process in processes:
        for task in Path(f"/proc/{process}/task").glob("*/schedstat"):
            with suppress(OSError):  # it has ended
                nanoseconds += int(task.read_text().split()[1])
    return nanoseconds / 1e9


def _describe(status: int | None) -> str:
    if status is None:
        return "it closed the channel"
    if status < 0:
        hint = ", as when memory runs out" if status == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-status).name}{hint}"
    return f"exit status {status}"


def _last_lines(log: BinaryIO) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - (1 << 14)))
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-LAST_LINES:])[-LAST_CHARACTERS:] or "nothing"
