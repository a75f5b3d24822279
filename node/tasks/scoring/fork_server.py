"""Episodes of other people's environments, each in a process of its own, forked from a worker (a fork server).

    {"call": "start", ...}           to the worker, which has loaded the task and forks; it replies with a channel
    {"call": "step", "text": ...}    on that channel, to the episode's process
    {"observation": text}, {"reward": number} or {"error": why}    its reply

A game that hangs, takes too much memory or crashes costs its own episode. So does a process that hangs as it is forked,
which the worker ends. An episode's process

    is confined          as `node.processes.confinement` does it, where this machine can and the task does not refuse
    has some seconds     for all its steps together, by the node's clock: an environment may set timers of its own
    has bounded memory   the worker's limit holds for each of its processes
    ends                 with its episode, when the node closes the channel, in the middle of a step, too (SIGIO), and
                         with the worker; what it has started and left behind ends when the next one begins
"""

import fcntl
import os
import select
import signal
import socket
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from node.errors import UserError, one_line
from node.processes.confinement import ConfinementError, confine
from node.processes.worker_process import Message, Requests, WorkerError, adopt_orphans, ask, children_of, receive, send
from node.tasks import Item
from node.tasks.environments.episodes import Done, Environment, Observation, step

if TYPE_CHECKING:
    from node.tasks.scoring.verdicts import Workers

BEGIN_S = 10.0  # for a process to be forked and confined, which takes some milliseconds
BEGUN = b"\0"  # its first byte
MAX_ANSWER = 1 << 16  # bytes, fewer than a channel holds
ENDED = "the process of an episode ended: its environment took too long, or too much memory"


_kept: set[int] = set()  # the worker's children that are no orphans


class EpisodeProcess:
    """The node's side of an episode's process: an environment whose steps are done there.

    `step` raises `UserError` if the environment raises, or if its process ends before it answers.
    """

    def __init__(self, name: str, workers: "Workers", request: Message, seconds: float) -> None:
        self._name = name
        self._left = seconds  # for all steps
        self._channel = workers.open(request)
        weakref.finalize(self, self._channel.close)

    def step(self, text: str) -> Observation | Done:
        """Take a turn of the policy."""
        began = time.monotonic()
        try:
            reply, _ = ask(self._channel, {"call": "step", "text": text}, lambda: began + self._left)
        except (EOFError, OSError):
            self._channel.close()
            raise UserError(f"task {self._name!r}: {ENDED}") from None
        self._left -= time.monotonic() - began
        if "error" in reply:
            raise UserError(str(reply["error"]))
        # `node.tasks.environments.episodes.step` looks at what is in them
        return Observation(reply["observation"]) if "observation" in reply else Done(reply["reward"])


@dataclass(frozen=True, slots=True)
class ForkServer:
    """A task's `start`: begins episodes of the task `name` in processes that `workers` fork.

    Args:
        name: of the task.
        workers: fork for each episode.
        limit: seconds of all steps, after which an episode's process is ended.
        seconds: after which the node gives an episode up, loading of the worker included.
    """

    name: str
    workers: "Workers"
    limit: float
    seconds: float

    def __call__(self, item: Item) -> EpisodeProcess:
        """Begin an episode; `UserError` if no process can be started."""
        try:
            return EpisodeProcess(self.name, self.workers, {"call": "start", "item": asdict(item)}, self.limit)
        except WorkerError as error:
            raise UserError(f"task {self.name!r}: {error}") from None


def fork_episode(requests: Requests, begin: Callable[[], Environment], *, confined: bool) -> None:
    """Fork a process for the episode that `begin` begins, and send its channel to the node; in the worker.

    Args:
        requests: the worker's own.
        begin: called at the first step.
        confined: whether the process is confined.
    """
    _end_orphans()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel removes children that have ended
    try:
        theirs, ours = socket.socketpair()
        pid = os.fork()
    except OSError as error:
        requests.reply({"error": f"no process for an episode: {error.strerror}"})
        return
    if pid == 0:
        try:
            requests.channel.close()
            theirs.close()
            _become_episode(confined)
            ours.send(BEGUN)
            _play(Requests(ours), begin)
        finally:
            os._exit(0)  # neither the worker's exit handlers nor its loop
    _kept.add(pid)
    ours.close()
    with theirs:
        if not _has_begun(theirs):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            requests.reply({"error": "the process of an episode hung as it began: a lock was held when it was forked"})
            return
        requests.reply({})
        socket.send_fds(requests.channel, [b"\0"], [theirs.fileno()])


def _has_begun(channel: socket.socket) -> bool:
    """Wait for a forked process's first byte; False if it hangs (another thread held a lock) or has ended."""
    channel.settimeout(BEGIN_S)
    try:
        return channel.recv(len(BEGUN)) == BEGUN
    except OSError:
        return False
    finally:
        channel.settimeout(None)


def answer_apart(requests: Requests, answer: Callable[[], Message], *, confined: bool) -> None:
    """Reply with what `answer` returns, found in a forked process; in the worker. Raises `OSError` if there is none.

    That process has no channel to the node, and its answer counts once it has ended: how it ends says nothing.
    """
    _end_orphans()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ours, theirs = socket.socketpair()
    with ours:
        pid = os.fork()
        if pid == 0:
            try:
                requests.channel.close()
                _become_episode(confined)
                send(theirs, answer())
            finally:
                os._exit(0)
        theirs.close()
        os.waitpid(pid, 0)
        ours.setblocking(False)  # what it has left behind may hold the other end
        try:
            reply = receive(ours, most=MAX_ANSWER)
        except (EOFError, OSError, ValueError):
            reply = {"error": ENDED}
    requests.reply(reply)


def adopt_from_here() -> None:
    """Adopt what later episodes leave behind; in a worker that has loaded its task, whose processes stay."""
    adopt_orphans()
    _kept.update(children_of(os.getpid()))


def _end_orphans() -> None:
    """End what episodes that are over have left behind, such as a program that they ran on the policy's text."""
    children = children_of(os.getpid())
    for orphan in {*children} - _kept:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(orphan, signal.SIGKILL)
            os.waitpid(orphan, 0)
    _kept.intersection_update(children)


def _become_episode(confined: bool) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGIO, signal.SIG_DFL)  # which ends a process
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # else all episodes would draw the same; `random` sees to it itself
    if confined:
        with suppress(ConfinementError):
            confine()


def _play(requests: Requests, begin: Callable[[], Environment]) -> None:
    """Answer steps until the episode ends or the node closes the channel."""
    environment: Environment | None = None
    channel = requests.channel
    fcntl.fcntl(channel, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(channel, fcntl.F_GETFL)
    ended = select.poll()
    ended.register(channel, 0)  # POLLHUP alone
    while True:
        try:
            text = requests.receive()["text"]
        except (EOFError, OSError):
            return
        # During a step nothing comes but the channel's end. From here on the kernel sends SIGIO at that.
        fcntl.fcntl(channel, fcntl.F_SETFL, flags | os.O_ASYNC)
        if ended.poll(0):
            return
        try:
            environment = environment or begin()
            answer = step(environment, text)
            reply: Message = (
                {"observation": answer.text} if isinstance(answer, Observation) else {"reward": answer.reward}
            )
        except MemoryError:
            reply = {"error": "out of memory"}
        except (Exception, SystemExit) as error:  # noqa: BLE001  # it may raise anything, and exit
            reply = {"error": one_line(error) or type(error).__name__}
        fcntl.fcntl(channel, fcntl.F_SETFL, flags)
        requests.reply(reply)
        if "observation" not in reply:
            return
