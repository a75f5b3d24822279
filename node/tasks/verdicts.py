"""Verdicts: what an answer earns, or that it cannot be scored here.

A verdict is a reward in [0, 1], or None. None means *unscorable*: the scorer ran out of time or memory, died, raised,
or could not tell. An unscorable answer is not trained on and not published, and it costs nobody: it does not earn 0.

Our own scorers take little time by construction, and score in this process. Other people's code, a file or a package,
scores in worker processes with limits on memory and on the time for each text (`Workers`). The first text starts one
worker. After a call whose scoring took longer than `SLOW_S` there is one more, up to the machine's cores.

A worker is a program that takes a channel (`node.processes.worker_process`). It replies to its first message once it is
ready, or with {"error": why not}. It replies to each later message with {"reward": ...}, in [0, 1], or {"error": ...}.
`python -m node.tasks.verdicts CHANNEL LIFE` is the worker for tasks of a file or a package.
"""

import os
import resource
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import structlog

from node.config import AnswerMode, TaskConfig
from node.errors import UserError, one_line
from node.processes.machine import usable_cores
from node.processes.worker_process import Message, WorkerError, WorkerProcess, connect, receive, send
from node.tasks import Item, Task, TaskKey

Verdict = float | None

LOAD_S = 300.0  # a busy machine may take a minute to import what a task needs
SCORE_S = 20.0  # for one text; a usual one takes less than a millisecond
SLOW_S = 1.0  # after a call whose scoring took longer, one more worker is started
MAX_BYTES = 8 << 30  # of a worker's data: as much as a verifier with a model of its own may want
MOST_WORKERS = 8
PATIENCE_S = 120.0  # seconds that scoring a node's own answers may take in a round
QUOTED = 200  # characters of a reason in the log

log = structlog.get_logger()


class Answer(NamedTuple):
    """A text to be scored as an answer to an item of a task."""

    task: Task
    item: Item
    text: str


def score(answers: Sequence[Answer], seconds: float = PATIENCE_S) -> list[Verdict]:
    """Return the verdict on each answer; None where it is unscorable, or was not reached within `seconds`.

    Never raises: what a task raises is one line in the log.
    """
    deadline = time.monotonic() + seconds
    verdicts: list[Verdict] = []
    for task, found in groupby(answers, key=lambda one: one.task):
        pairs = [(one.item, one.text) for one in found]
        if (many := batch_verifier_of(task)) is not None:
            verdicts += many(pairs, deadline)
        else:
            verdicts += [_in_place(task, item, text, deadline) for item, text in pairs]
    return verdicts


class BackgroundScoring:
    """Scores answers on a thread of its own, for tasks that score in worker processes.

    It takes a few answers at a time, so that it begins few more once nobody waits for them.
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers
        self._verdicts: list[Verdict] = []
        self._given_up = threading.Event()
        self._done = threading.Event()
        threading.Thread(target=self._run, name="scoring", daemon=True).start()

    def wait(self, seconds: float) -> list[Verdict] | None:
        """Return the verdicts; if they take longer than `seconds`, stop scoring and return None."""
        if self._done.wait(seconds):
            return self._verdicts
        self._given_up.set()
        return None

    def _run(self) -> None:
        for at in range(0, len(self._answers), MOST_WORKERS):
            if self._given_up.is_set():
                return
            self._verdicts += score(self._answers[at : at + MOST_WORKERS])
        self._done.set()


def batch_verifier_of(task: Task) -> Callable[[Sequence[tuple[Item, str]], float], list[Verdict]] | None:
    """Return a task's `verify_many`, which scores many texts in worker processes; None if it has none.

    It takes the items with their texts, and a deadline (s, monotonic).
    """
    return getattr(task, "verify_many", None)


def _in_place(task: Task, item: Item, text: str, deadline: float) -> Verdict:
    if time.monotonic() > deadline:
        return None
    try:
        return task.verify(item, text)
    except Exception as error:  # noqa: BLE001  # a third party's task may raise anything; its failure is not the round's
        warn_unscorable(task.key.name, one_line(error) or type(error).__name__)
        return None


def warn_unscorable(task: str, reason: str) -> None:
    """Tell the log that an answer to a question of this task is unscorable, and why."""
    log.warning("unscorable", task=task, reason=reason[:QUOTED])


class Workers:
    """The worker processes of one task: started with the first text, each replaced when it dies.

    Args:
        task: its name, for the log.
        module: the worker's, run as `python -m`.
        first: the message that makes one ready.
        seconds: for one text.
    """

    def __init__(self, task: str, module: str, first: Message, seconds: float = SCORE_S) -> None:
        self._task = task
        self._module = module
        self._first = first
        self._seconds = seconds
        self._lanes = [_Lane()]
        # A worker dies with the thread that starts it, so these threads stay.
        self._threads = ThreadPoolExecutor(MOST_WORKERS, f"scoring {task}")
        weakref.finalize(self, _close, self._lanes, self._threads)

    def begin(self) -> Message:
        """Start a worker and return what it replied to its first message.

        Raises:
            WorkerError: it ended, or was not ready in time.
        """
        return self._threads.submit(self._start, self._lanes[0]).result()

    def score(self, requests: Sequence[Message], deadline: float) -> list[Verdict]:
        """Return the verdict on each request; None for those not begun by `deadline` (s, monotonic)."""
        lanes = self._lanes[: max(1, len(requests))]
        shares = [
            self._threads.submit(self._work, lane, requests[at :: len(lanes)], deadline)
            for at, lane in enumerate(lanes)
        ]
        verdicts: list[Verdict] = [None] * len(requests)
        longest = 0.0
        for at, share in enumerate(shares):
            verdicts[at :: len(lanes)], seconds = share.result()
            longest = max(longest, seconds)
        if longest > SLOW_S and len(self._lanes) < min(MOST_WORKERS, usable_cores()):
            self._lanes.append(_Lane())
        return verdicts

    def _work(self, lane: "_Lane", requests: Sequence[Message], deadline: float) -> tuple[list[Verdict], float]:
        """Return the verdicts, and how long (s) their scoring took, without the start of a worker."""
        verdicts: list[Verdict] = []
        seconds = 0.0
        for request in requests:
            with lane.lock:
                if time.monotonic() > deadline:
                    verdicts.append(None)
                    continue
                said = self._ready(lane)
                began = time.monotonic()
                if lane.worker is not None:
                    said = self._ask(lane, lane.worker, request)
                seconds += time.monotonic() - began
            verdicts.append(self._verdict(said))
        return verdicts, seconds

    def _ready(self, lane: "_Lane") -> Message:
        """Start a worker if the lane has none; return {"error": why not} if that fails."""
        if lane.worker is not None:
            return {}
        try:
            return self._start(lane)
        except (WorkerError, OSError) as error:
            return {"error": str(error)}

    def _ask(self, lane: "_Lane", worker: WorkerProcess, request: Message) -> Message:
        try:
            return worker.call(request, self._seconds)
        except WorkerError as error:
            lane.worker = None
            return {"error": str(error)}

    def _verdict(self, said: Message) -> Verdict:
        reward = said.get("reward")
        if isinstance(reward, int | float) and 0 <= reward <= 1:
            return float(reward)
        unknown = "its task cannot tell" if reward is None else f"a reward of {reward!r}"
        warn_unscorable(self._task, " ".join(str(said.get("error", unknown)).split()))
        return None

    def _start(self, lane: "_Lane") -> Message:
        """Start a worker and return its first reply; unless that is {"error": why not}, the lane keeps the worker."""
        path = os.pathsep.join(filter(None, sys.path))
        worker = WorkerProcess([sys.executable, "-P", "-m", self._module], {"PYTHONPATH": path})
        try:
            said = worker.call(self._first, LOAD_S)
        except TypeError:  # options that cannot be written as JSON
            worker.kill()
            raise
        if "error" in said:
            worker.kill()
        else:
            lane.worker = worker
        return said


@dataclass(slots=True)
class _Lane:
    """A place for a worker, which answers one request at a time."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    worker: WorkerProcess | None = None


def _close(lanes: Sequence[_Lane], threads: ThreadPoolExecutor) -> None:
    for lane in lanes:
        if lane.worker is not None:
            lane.worker.kill()
    threads.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class IsolatedTask:
    """A task of other people's code: its questions are made here, and its `verify` runs in worker processes."""

    base: Task
    workers: Workers

    @property
    def key(self) -> TaskKey:
        return self.base.key

    @property
    def answer_mode(self) -> AnswerMode:
        """The form in which `verify` looks for an answer."""
        return getattr(self.base, "answer_mode", "whole")

    @property
    def size(self) -> int | None:
        """How many rows the task has; None if it makes a question of any seed."""
        return getattr(self.base, "size", None)

    @property
    def test_ids(self) -> frozenset[bytes] | None:
        """The ids of the task's own test questions; None if it has none of its own."""
        return getattr(self.base, "test_ids", None)

    def make(self, seed: int) -> Item:
        return self.base.make(seed)

    def verify(self, item: Item, text: str) -> Verdict:
        return self.verify_many([(item, text)], time.monotonic() + LOAD_S)[0]

    def verify_many(self, answers: Sequence[tuple[Item, str]], deadline: float) -> list[Verdict]:
        """Return the verdict on each text; None for those not begun by `deadline` (s, monotonic)."""
        requests: list[Message] = [{"call": "score", "item": asdict(item), "text": text} for item, text in answers]
        return self.workers.score(requests, deadline)


def isolated(task: Task, config: TaskConfig) -> IsolatedTask:
    """Return `task`, which `config` names, with its answers scored in worker processes."""
    described = config.model_dump(mode="json", include={"name", "options"})
    first: Message = {"call": "load", "task": described, "key": list(task.key)}
    return IsolatedTask(task, Workers(task.key.name, "node.tasks.verdicts", first))


def main() -> None:
    """Load one task, then score for the node at the other end of a channel."""
    from node.tasks import load_task

    channel = connect(*map(int, sys.argv[1:3]))
    _bound_memory()
    request = receive(channel)
    try:
        task = load_task(TaskConfig.model_validate(request["task"]))
    except UserError as error:
        send(channel, {"error": one_line(error)})
        return
    if list(task.key) != request["key"]:  # peers would take its rewards for lies
        send(channel, {"error": "its code has changed since this node began: start the node again"})
        return
    send(channel, {})
    while True:
        request = receive(channel)
        send(channel, _scored(task, _item(request["item"]), request["text"]))


def _bound_memory() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MAX_BYTES if most == resource.RLIM_INFINITY else min(MAX_BYTES, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def _item(fields: dict[str, Any]) -> Item:
    return Item(**{**fields, "examples": tuple(map(tuple, fields["examples"]))})


def _scored(task: Task, item: Item, text: str) -> Message:
    try:
        return {"reward": task.verify(item, text)}
    except MemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # noqa: BLE001  # it may raise anything
        return {"error": one_line(error) or type(error).__name__}


if __name__ == "__main__":
    main()
