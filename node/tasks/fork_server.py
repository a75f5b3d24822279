"""Episodes of other people's environments, each in a process of its own, forked from a worker (a fork server).

    {"call": "start", ...}           to the worker, which has loaded the task and forks; it replies with a channel
    {"call": "step", "text": ...}    on that channel, to the episode's process
    {"observation": text}, {"reward": number} or {"error": why}    its reply

A game that hangs, takes too much memory or crashes costs its own episode. An episode's process

    is confined          as `node.processes.confinement` does it, where this machine can and the task does not refuse
    has some seconds     for all its steps together; then the kernel ends it
    has bounded memory   the worker's limit holds for each of its processes
    ends                 with its episode, when the node closes the channel, and with the worker
"""

import os
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
from node.processes.worker_process import Message, WorkerError, receive, send
from node.tasks import Item
from node.tasks.environments import Done, Environment, Observation, step

if TYPE_CHECKING:
    from node.tasks.verdicts import Workers

LEAST_S = 1e-3  # a timer of 0 would be none
ENDED = "the process of an episode ended: its environment took too long, or too much memory"


class EpisodeProcess:
    """The node's side of an episode's process: an environment whose steps are done there.

    `step` raises `UserError` if the environment raises, or if its process ends before it answers.
    """

    def __init__(self, name: str, workers: "Workers", request: Message) -> None:
        self._name = name
        self._channel = workers.open(request)
        weakref.finalize(self, self._channel.close)

    def step(self, text: str) -> Observation | Done:
        """Take a turn of the policy."""
        try:
            send(self._channel, {"call": "step", "text": text})
            said = receive(self._channel)
        except (EOFError, OSError):
            raise UserError(f"task {self._name!r}: {ENDED}") from None
        if "error" in said:
            raise UserError(str(said["error"]))
        return Observation(said["observation"]) if "observation" in said else Done(said["reward"])


@dataclass(frozen=True, slots=True)
class ForkServer:
    """Begins episodes of the task `name` in processes of `workers`: a task's `start`.

    Args:
        name: of the task.
        workers: fork for each episode.
        limit: seconds after which the kernel ends an episode's process.
        seconds: after which the node gives an episode up; a worker that has still to load counts, too.
    """

    name: str
    workers: "Workers"
    limit: float
    seconds: float

    def __call__(self, item: Item) -> EpisodeProcess:
        """Begin an episode; `UserError` if no process can be started."""
        try:
            return EpisodeProcess(
                self.name, self.workers, {"call": "start", "item": asdict(item), "seconds": self.limit}
            )
        except WorkerError as error:
            raise UserError(f"task {self.name!r}: {error}") from None


def fork_episode(channel: socket.socket, begin: Callable[[], Environment], seconds: float, *, confined: bool) -> None:
    """Fork a process for the episode that `begin` begins, and send its channel to the node; in the worker.

    Args:
        channel: the worker's own.
        begin: called at the first step.
        seconds: for `begin` and all steps.
        confined: whether the process is confined.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel clears away those that have ended
    try:
        theirs, ours = socket.socketpair()
        pid = os.fork()
    except OSError as error:
        send(channel, {"error": f"no process for an episode: {error.strerror}"})
        return
    if pid == 0:
        try:
            channel.close()
            theirs.close()
            _become_episode(confined)
            _play(ours, begin, seconds)
        finally:
            os._exit(0)  # neither the worker's exit handlers nor its loop
    ours.close()
    send(channel, {})
    with theirs:
        socket.send_fds(channel, [b"\0"], [theirs.fileno()])


def answer_apart(channel: socket.socket, answer: Callable[[], Message], *, confined: bool) -> None:
    """Reply with what `answer` returns, found in a forked process; in the worker. Raises `OSError` if there is none."""
    pid = os.fork()
    if pid == 0:
        failed = 1
        try:
            _become_episode(confined)
            send(channel, answer())
            failed = 0
        finally:
            os._exit(failed)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        send(channel, {"error": ENDED})


def _become_episode(confined: bool) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # else all episodes would draw the same; `random` sees to it itself
    if confined:
        with suppress(ConfinementError):
            confine()


def _play(channel: socket.socket, begin: Callable[[], Environment], seconds: float) -> None:
    """Answer steps until the end of the episode, or of the node's interest in it."""
    environment: Environment | None = None
    while True:
        try:
            text = receive(channel)["text"]
        except (EOFError, OSError):
            return
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, max(seconds, LEAST_S))
        try:
            environment = environment or begin()
            answer = step(environment, text)
            said: Message = (
                {"observation": answer.text} if isinstance(answer, Observation) else {"reward": answer.reward}
            )
        except MemoryError:
            said = {"error": "out of memory"}
        except (Exception, SystemExit) as error:  # noqa: BLE001  # it may raise anything, and exit
            said = {"error": one_line(error) or type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0)
        seconds -= time.monotonic() - began
        send(channel, said)
        if "observation" not in said:
            return
