"""Verdicts: what an answer earns, or that it cannot be scored here.

A verdict is a reward, a finite number, or None. None means *unscorable*: the scorer ran out of memory, died, raised,
could not tell, or returned what is no reward, or this machine had no time for it. An unscorable answer is not trained
on and not published, and it costs nobody: it does not earn 0.

A text of this node's own that takes too long earns 0 (`OutOfTime`): a program that loops for ever is wrong. Before
that it is scored once more, alone, in a new worker that has just scored another text. Time in which it waited for a
processor does not count. It trains this node and is not published, since a faster peer may find another reward. A
peer's text that takes too long is unscorable.

Our own scorers take little time by construction, and score in this process. Other people's code, a file or a package,
scores in worker processes with limits on memory and on the time for each text (`Workers`). This node's own answers have
workers of their own, so none waits for a peer's text. What peers' texts take is charged to quotas
(`node.tasks.scoring.time_quota`). Of peers' texts, those whose quota lies within another go last. A text is
unscorable if it outlasts its quota, and late if the quota is spent before its turn. The first text of a new worker
may wait for what is imported then: it is charged only if it takes all the time that a text has, or if its quota lies
within another.

A peer's text is always a call of its own. It is scored in a cage (`node.tasks.scoring.caged`) unless its task says that
it only reads texts, or the task set is one of verifiers. A node's own texts of reward functions are one call a round,
as in TRL. If that call raises, ends its worker, or takes longer than a part of its texts may (`TOGETHER`), each text is
scored alone.

A worker is a program that takes a channel (`node.processes.worker_process`). It replies to its first message once it is
ready, or with {"error": why not}. It replies to each later message with {"reward": a number or null} or {"error": why
not}; "parts" beside a reward are what each of several functions paid, by the "names" of its first reply. To a request
with a "batch" it replies with such a reply for each of it, as "scored". To a request "start" it replies with the
channel of an episode (`node.tasks.scoring.fork_server`).

Somebody's text may have written any reply. So its form is checked (`reward_of`), and a reply that is to no request, or
to an earlier one, is dropped and counted.

`python -m node.tasks.scoring.verdicts CHANNEL LIFE` is the worker for tasks of a file or a package.
"""

import itertools
import math
import os
import queue
import re
import resource
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import structlog

from node.config import TaskConfig
from node.errors import UserError, one_line, printable
from node.processes.cage import lacking, make_folder, variables
from node.processes.confinement import ConfinementError, confine, unconfinable
from node.processes.machine import available_memory, usable_cores
from node.processes.worker_process import (
    Message,
    Requests,
    WorkerError,
    WorkerProcess,
    WorkerTimeoutError,
    connect,
    yield_memory,
)
from node.tasks import Isolate, Item, Task, TaskKey, Wrapper, is_reward
from node.tasks.environments.episodes import StartEpisode, play_again, start_of
from node.tasks.scoring.caged import CODE_CHANGED, CageWork, serve_in_cages
from node.tasks.scoring.fork_server import ForkServer, adopt_from_here, answer_apart, fork_episode
from node.tasks.scoring.time_quota import TimeQuota

Verdict = float | None
LATE: Final = "late"  # in place of a verdict: the text had to wait too long to be scored
MaybeLate = Verdict | Literal["late"]


class Submission(NamedTuple):
    """A text to be scored as an answer to an item; in an episode, after the texts said `before` it.

    Worker processes charge what it takes to `quota`, if it has one.
    """

    item: Item
    text: str
    before: tuple[str, ...] = ()
    quota: TimeQuota | None = None


Submit = Callable[[Sequence[Submission], bool], "list[Future[Verdict]]"]
"""A task's `submit`: it queues texts for worker processes. The second argument says whether they are this node's own,
which have workers of their own and may share a call."""
Together = Callable[[Sequence[Submission]], list[Verdict]]
"""A task's `verify_together`: one call for several of this node's own texts, in this process. It may raise."""

LOAD_S = 300.0  # a busy machine may take a minute to import what a task needs
SCORE_S = 20.0  # for one text; a usual one takes less than a millisecond
SLOW_S = 1.0  # a worker that was busy for longer while other texts wait gets another beside it
MAX_BYTES = 8 << 30  # of a worker's data: as much as a verifier with a model of its own may want
LEAST_BYTES = 2 << 30  # of it, however little memory is free
MOST_WORKERS = 8
STARVED = 7.0  # times its own time that an own text may wait for a processor
SAY_S = 30.0  # between two lines that own answers are being scored
CONFINED = "(it is confined unless it says `judge = True`) "
IN_CAGE = '(in a cage: say isolate = "none" if it only reads texts) '
CAGE_S = 10.0  # beside a text's own time: to make a cage, to end all in it and to remove its folder
QUOTED = 200  # characters of a reason in the log
MAX_REPLY = 1 << 20  # bytes of a reply to a text
# A round's texts in one call may take the seconds of so many texts, or of every so manieth of them. A text that hangs
# costs as much.
TOGETHER = 4

log = structlog.get_logger()


class Scored(float):
    """A reward that several functions made together; `parts` are their own rewards, by their names."""

    __slots__ = ("parts",)
    parts: Mapping[str, float]

    def __new__(cls, reward: float, parts: Mapping[str, float]) -> "Scored":
        scored = super().__new__(cls, reward)
        scored.parts = parts
        return scored


class OutOfTime(float):
    """The reward 0 of an own text that took too long, twice: see above."""

    __slots__ = ()


class Answer(NamedTuple):
    """A text to be scored as an answer to an item of a task; in an episode, after the texts said `before` it.

    Worker processes charge what it takes to `quota`, if it has one.
    """

    task: Task
    item: Item
    text: str
    before: tuple[str, ...] = ()
    quota: TimeQuota | None = None

    @property
    def asked(self) -> Submission:
        """The answer without its task."""
        return Submission(self.item, self.text, self.before, self.quota)

    def judged(self) -> Verdict:
        """Return the verdict, found in this process; raise what the task raises."""
        start = start_of(self.task)
        if start is None:
            return self.task.verify(self.item, self.text)
        return play_again(start, self.item, (*self.before, self.text))


def score(answers: Sequence[Answer], seconds: float = math.inf) -> list[Verdict]:
    """Return the verdict on each of this node's own answers; None where it is unscorable, or not there in `seconds`.

    Without `seconds` it waits as long as each text may take in its worker. Never raises: what a task raises is one line
    in the log.
    """
    return late_as_none(Scoring(answers, is_own=True).wait(seconds))


def late_as_none(verdicts: Sequence[MaybeLate]) -> list[Verdict]:
    """Return verdicts, with None for those that were late."""
    return [None if verdict == LATE else verdict for verdict in verdicts]


class Scoring:
    """The scoring of some answers: those for worker processes are queued at once, the others are scored in `wait`.

    Args:
        answers: to score.
        is_own: whether they are this node's own.
    """

    def __init__(self, answers: Sequence[Answer], is_own: bool) -> None:
        self._answers = answers
        self._is_own = is_own
        self._queued: list[Future[Verdict] | None] = [None] * len(answers)
        for places in _by_task(answers):
            for place, future in zip(places, _submitted([answers[place] for place in places], is_own), strict=True):
                self._queued[place] = future

    def wait(self, seconds: float) -> list[MaybeLate]:
        """Return the verdict on each answer, after `seconds` at most.

        An answer that is being scored then is unscorable. One whose turn did not come, or whose quota was spent
        before, is `LATE`: it is not scored.
        """
        deadline = time.monotonic() + seconds
        in_place = self._in_place(deadline)
        waiting = [future for future in self._queued if future is not None]
        while (left := deadline - time.monotonic()) > 0 and (late := wait_for(waiting, min(left, SAY_S)).not_done):
            if left > SAY_S and self._is_own:
                log.info("scoring", answers=len(self._answers), left=len(late))
        return [
            in_place[place] if future is None else _outcome(answer, future)
            for place, (answer, future) in enumerate(zip(self._answers, self._queued, strict=True))
        ]

    def _in_place(self, deadline: float) -> dict[int, MaybeLate]:
        """Return the verdicts that are found in this process, by place."""
        verdicts: dict[int, MaybeLate] = {}
        for places in _by_task(self._answers):
            if self._queued[places[0]] is None:
                answers = [self._answers[place] for place in places]
                together = getattr(answers[0].task, "verify_together", None) if self._is_own else None
                verdicts.update(zip(places, _all_in_place(answers, together, deadline), strict=True))
        return verdicts


def _by_task(answers: Sequence[Answer]) -> list[list[int]]:
    """Return the places of each task's answers."""
    places: dict[int, list[int]] = {}
    for place, answer in enumerate(answers):
        places.setdefault(id(answer.task), []).append(place)
    return list(places.values())


def submit_of(task: Task) -> Submit | None:
    """Return what queues a task's texts for its worker processes; None if the task scores in this process."""
    return getattr(task, "submit", None)


def is_to_be_confined(task: Task) -> bool:
    """Tell whether a task's code is kept from the network and from writing files."""
    return not getattr(task, "judge", False)


def _submitted(answers: Sequence[Answer], is_own: bool) -> "Sequence[Future[Verdict] | None]":
    """Queue answers to one task; None for each if the task scores in this process."""
    submit = submit_of(answers[0].task)
    if submit is None:
        return [None] * len(answers)
    try:
        return submit([answer.asked for answer in answers], is_own)
    except Exception as error:  # noqa: BLE001  # as in `_in_place`
        return [already(_raised(answer, error)) for answer in answers]


def _outcome(answer: Answer, future: "Future[Verdict]") -> MaybeLate:
    if future.cancel():
        return LATE
    if future.done():
        return future.result()
    warn_unscorable(answer.task.key.name, "it took too long")
    return None


def _all_in_place(answers: Sequence[Answer], together: Together | None, deadline: float) -> list[MaybeLate]:
    if together is not None and len(answers) > 1 and time.monotonic() <= deadline:
        with suppress(Exception):  # one of the texts may be why: alone it is told
            return [*together([answer.asked for answer in answers])]
    return [_in_place(answer, deadline) for answer in answers]


def _in_place(answer: Answer, deadline: float) -> MaybeLate:
    if time.monotonic() > deadline:
        return LATE
    try:
        return answer.judged()
    except Exception as error:  # noqa: BLE001  # a task may raise anything; its failure is not the round's
        return _raised(answer, error)


def _raised(answer: Answer, error: Exception) -> Verdict:
    warn_unscorable(answer.task.key.name, one_line(error) or type(error).__name__)
    return None


def already(verdict: Verdict) -> "Future[Verdict]":
    """Return a future of a verdict that is known without a worker."""
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return future


_reasons: dict[str, str] = {}  # by task, the latest


def warn_unscorable(task: str, reason: str) -> None:
    """Tell the log that an answer to a question of this task is unscorable, and why; a text may have written that."""
    _reasons[task] = printed = printable(reason[:QUOTED])
    log.warning("unscorable", task=task, reason=printed)


def latest_reason(task: str) -> str:
    """Return why an answer to a question of this task was unscorable most lately in this process."""
    return _reasons.get(task, "it had to wait too long")


class Workers:
    """The worker processes of one task, each replaced when it dies.

    The first text starts one. There is another once a worker was busy for `SLOW_S` while texts wait, up to the
    machine's cores. All end with this object, and with the node.

    Args:
        task: its name, for the log.
        module: the worker's, run as `python -m`.
        first: the message that makes one ready.
        seconds: for one text.
    """

    def __init__(self, task: str, module: str, first: Message, seconds: float = SCORE_S) -> None:
        self._lanes = _Lanes(task, module, first, seconds)
        weakref.finalize(self, self._lanes.close)

    def begin(self) -> Message:
        """Start a worker and return what it replied to its first message.

        Raises:
            WorkerError: it ended, or was not ready in time.
        """
        future: Future[Message] = Future()
        self._lanes.put(_OWN, lambda lane: lane.first_reply(), future)
        return future.result()

    def ask(self, request: Message, seconds: float) -> Message:
        """Return a worker's reply to a request of the node's own.

        Raises:
            WorkerError: there is no worker, it ended, or it did not reply within `seconds` once its turn came.
        """
        future: Future[Message] = Future()
        self._lanes.put(_OWN, lambda lane: lane.reply(request, seconds), future)
        return future.result()

    def restart_with(self, first: Message) -> None:
        """Let workers that are started from now on get this first message."""
        self._lanes.first = first

    def open(self, request: Message) -> socket.socket:
        """Return the channel of a process that a worker forks for `request`; wait while a worker loads.

        Raises:
            WorkerError: there is no worker, or it cannot.
        """
        future: Future[socket.socket] = Future()
        self._lanes.put(_OWN, lambda lane: lane.opened(request), future)
        return future.result()

    def submit(self, request: Message, is_own: bool, quota: TimeQuota | None = None) -> "Future[Verdict]":
        """Queue a request; the verdict on it is None if anything goes wrong.

        It is cancelled if its `quota` is spent before its turn.
        """
        future: Future[Verdict] = Future()
        order = _OWN if is_own else _PEERS if quota is None or quota.within is None else _NEWCOMERS
        self._lanes.put(order, lambda lane: lane.verdict(request, is_own, quota), future, quota)
        return future

    def submit_together(self, requests: Sequence[Message]) -> "list[Future[Verdict]]":
        """Queue own requests as one call; each alone if there is one, or once such a call was late."""
        if len(requests) < 2 or not self._lanes.together:
            return [self.submit(request, is_own=True) for request in requests]
        futures: list[Future[Verdict]] = [Future() for _ in requests]
        self._lanes.put(_OWN, lambda lane: lane.verdicts(requests, futures), Future())
        return futures


_Job = Callable[["_WorkerThread"], Any]
_Waiting = tuple[int, int, _Job | None, "Future[Any]", TimeQuota | None]
_CLOSE, _OWN, _PEERS, _NEWCOMERS = range(4)  # the order in which a lane takes what waits


def reward_of(reply: Message, functions: Collection[str]) -> Verdict:
    """Return the reward in a worker's reply, None where it says that it cannot tell.

    Args:
        reply: the worker's.
        functions: names that parts may have.

    Raises:
        ValueError: the reply is of another form; the text says how.
    """
    reward, parts = reply.get("reward"), reply.get("parts", {})
    if reward is None:
        return None
    if isinstance(reward, bool) or not is_reward(reward):
        raise ValueError(f"a reward of {reward!r:.60}")
    if not (isinstance(parts, dict) and parts.keys() <= {*functions} and all(map(_is_part, parts.values()))):
        raise ValueError(f"a reward in parts of {parts!r:.60}")
    return Scored(reward, parts) if parts else float(reward)


def _is_part(part: object) -> bool:
    return is_reward(part) and not isinstance(part, bool)


class _Lanes:
    """Threads that take requests from one queue; each has its own worker process.

    The threads hold no reference to `Workers`. A worker dies with the thread that starts it, so the threads stay.
    """

    def __init__(self, task: str, module: str, first: Message, seconds: float) -> None:
        self.task = task
        self.module = module
        self.first = first
        self.seconds = seconds
        self.together = True  # whether own texts may share a call
        self.scored: Message | None = None  # the latest request of the node's own that was answered
        self.waiting: queue.PriorityQueue[_Waiting] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._count = 0
        self._dropped = 0
        self._lock = threading.Lock()

    def put(self, order: int, job: "_Job | None", future: "Future[Any]", quota: TimeQuota | None = None) -> None:
        self.waiting.put((order, next(self._numbers), job, future, quota))
        self.grow(1)

    def grow(self, most: int) -> None:
        """Add a lane unless there are `most`."""
        with self._lock:
            if self._count < most:
                threading.Thread(target=_WorkerThread(self).run, name=f"scoring {self.task}", daemon=True).start()
                self._count += 1

    def drop(self, replies: int) -> None:
        """Count replies that answered no request, and tell the log."""
        if replies:
            with self._lock:
                self._dropped += replies
            log.warning("replies to no request are dropped", task=self.task, now=replies, all=self._dropped)

    def close(self) -> None:
        """End the lanes, each after its current request; each passes this on to the next."""
        self.waiting.put((_CLOSE, next(self._numbers), None, Future(), None))


class _WorkerThread:
    """A thread with a worker, which answers one request at a time."""

    def __init__(self, lanes: _Lanes) -> None:
        self._lanes = lanes
        self._worker: WorkerProcess | None = None
        self._loaded: Message | Exception = {}  # the worker's first reply, or why there is no worker
        self._names: Collection[str] = ()  # of a task's functions
        self._busy = 0.0  # seconds of scoring since nothing waited
        self._more = 0.0  # seconds that a text gets beside its own, where each has a cage
        self._is_new = False  # whether the worker has scored nothing yet

    def run(self) -> None:
        waiting = self._lanes.waiting
        while True:
            *_, job, future, quota = waiting.get()
            if job is None:
                self._lanes.close()
                break
            if self._worker is None:
                self._start()  # while it loads, the text can still be cancelled
            if quota is not None and quota.is_spent(time.monotonic()):
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job(self))
            except Exception as error:  # noqa: BLE001  # for the caller that waits
                future.set_exception(error)
            if waiting.empty():
                self._busy = 0.0
            elif self._busy > SLOW_S:
                self._busy = 0.0
                with suppress(RuntimeError):  # no thread can be started: those that are there go on
                    self._lanes.grow(min(MOST_WORKERS, usable_cores()))
        self._end()

    def _start(self) -> None:
        """Start a worker; this thread keeps it unless it replies {"error": why not}."""
        environment = variables(os.environ) if self._lanes.first.get("isolate") == "text" else {}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        try:
            self._worker = WorkerProcess([sys.executable, "-P", "-m", self._lanes.module], environment)
            self._loaded = reply = self._worker.call(self._lanes.first, LOAD_S)
            self._is_new = True
            self._names = reply.get("names", ())
            self._more = reply["loads_for"] + CAGE_S if "loads_for" in reply else 0.0
        except (WorkerError, OSError, TypeError) as error:  # TypeError: options that cannot be written as JSON
            self._loaded = error
        if isinstance(self._loaded, Exception) or "error" in self._loaded:
            self._end()

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def first_reply(self) -> Message:
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded

    def reply(self, request: Message, seconds: float) -> Message:
        try:
            return self._there().call(request, seconds)
        except WorkerError:
            self._end()
            raise

    def opened(self, request: Message) -> socket.socket:
        worker = self._there()
        try:
            return worker.call_for_channel(request, self._lanes.seconds)
        except WorkerError:
            if worker.killed:
                self._end()
            raise

    def _there(self) -> WorkerProcess:
        if self._worker is None:
            raise WorkerError(str(self._loaded if isinstance(self._loaded, Exception) else self._loaded["error"]))
        return self._worker

    def verdicts(self, requests: Sequence[Message], futures: "Sequence[Future[Verdict]]") -> None:
        """Settle `futures` by one call for all requests; by a call for each where that fails."""
        live = [
            (request, future)
            for request, future in zip(requests, futures, strict=True)
            if future.set_running_or_notify_cancel()  # it is wanted still, and can be cancelled no more
        ]
        if not live:
            return
        replies = self._asked_together([request for request, _ in live])
        for at, (request, future) in enumerate(live):
            if replies is not None:
                future.set_result(self._read(replies[at]))
            else:
                self._lanes.put(_OWN, partial(_WorkerThread._settle, request=request, future=future), Future())

    def _settle(self, request: Message, future: "Future[Verdict]") -> None:
        future.set_result(self.verdict(request, is_own=True))

    def _asked_together(self, requests: Sequence[Message]) -> list[Message] | None:
        """Return the reply to each of some requests in one call; None if the call failed."""
        if self._worker is None:
            return None
        fields = [{name: request[name] for name in request if name != "call"} for request in requests]
        request, began = {"call": requests[0]["call"], "batch": fields}, time.monotonic()
        seconds = self._lanes.seconds * max(TOGETHER, len(requests) / TOGETHER)
        try:
            scored = self.reply(request, seconds).get("scored")
        except WorkerTimeoutError:
            self._lanes.together = False
            log.warning(
                "texts are scored one by one from here on: together they took too long",
                task=self._lanes.task,
                texts=len(requests),
                seconds=seconds,
            )
            return None
        except Exception:  # noqa: BLE001  # alone, each says what it is
            return None
        finally:
            self._busy += time.monotonic() - began
        if not isinstance(scored, list) or len(scored) != len(requests):
            return None
        self._lanes.scored = requests[0]
        return scored if all(isinstance(reply, dict) for reply in scored) else None

    def verdict(self, request: Message, is_own: bool, quota: TimeQuota | None = None) -> Verdict:
        reply = self._asked(request, is_own, quota)
        if is_own and reply.get("late"):
            reply = self._asked_again(request)
            if reply.get("late") and self._lanes.scored is not None:
                return OutOfTime()
        return self._read(reply)

    def _asked_again(self, request: Message) -> Message:
        """Ask once more, of a new worker that has scored what was scored before: so it has loaded all that it needs."""
        self._end()
        self._start()
        if self._worker is not None and self._lanes.scored is not None:
            with suppress(WorkerError):
                self.reply(self._lanes.scored, LOAD_S)
        return self._asked(request, is_own=True)

    def _read(self, reply: Message) -> Verdict:
        try:
            verdict = reward_of(reply, self._names)
            reason = reply.get("error", "its task cannot tell")
        except ValueError as error:
            verdict, reason = None, error
        if verdict is None:
            warn_unscorable(self._lanes.task, " ".join(str(reason).split()))
        return verdict

    def _asked(self, request: Message, is_own: bool, quota: TimeQuota | None = None) -> Message:
        if self._worker is None:
            return {"error": str(self._loaded)} if isinstance(self._loaded, Exception) else self._loaded
        began, dropped, seconds = time.monotonic(), self._worker.dropped, self._lanes.seconds
        is_free, self._is_new = self._is_new and (quota is None or quota.within is None), False
        if quota is not None and not is_free:
            seconds = min(seconds, quota.left(began))
            quota.begin(began)
        patience = STARVED * seconds if is_own else 0.0
        fields = {**request, "seconds": seconds, "patience": patience} if self._more else request
        try:
            reply = self._worker.call(fields, seconds + self._more, MAX_REPLY, patience)
            self._lanes.drop(self._worker.dropped - dropped)
            if is_own and "error" not in reply:
                self._lanes.scored = request
            return reply
        except Exception as error:  # noqa: BLE001  # it ended, or the request cannot be written as JSON
            self._end()
            return {"error": str(error), "late": isinstance(error, WorkerTimeoutError)}
        finally:
            now = time.monotonic()
            self._busy += now - began
            if quota is not None and is_free and now - began >= seconds:
                quota.begin(began)
                is_free = False
            if quota is not None and not is_free:
                quota.end(now)


@dataclass(frozen=True, slots=True)
class IsolatedTask(Wrapper):
    """A task of other people's code: its questions are made here; its `verify` and its episodes run elsewhere.

    Texts, and episodes to be played again, go to `workers`, peers' to `apart`. This node's own episodes begin by
    `begin`, if it has any. `lacks` is what a cage lacks here for peers' texts; empty if nothing is.
    """

    workers: Workers
    apart: Workers
    lacks: str
    begin: StartEpisode | None

    @property
    def key(self) -> TaskKey:
        return self.base.key

    @property
    def start(self) -> StartEpisode | None:
        """Begins an episode; None if the task has no environment."""
        return self.begin

    @property
    def unshared(self) -> str:
        """Why its groups are not shared with peers; empty if they are."""
        if own := getattr(self.base, "unshared", ""):
            return str(own)
        if self.judge:
            return "it may use the network (judge = True), so nobody else can check what it pays"
        but = "" if self.isolate else ': isolate = "none" shares it if it only reads texts'
        return f"a stranger's text cannot be caged here ({self.lacks}){but}" if self.lacks else ""

    def make(self, seed: int) -> Item:
        return self.base.make(seed)

    def verify(self, item: Item, text: str) -> Verdict:
        return score([Answer(self, item, text)], LOAD_S)[0]

    def submit(self, batch: Sequence[Submission], is_own: bool) -> "list[Future[Verdict]]":
        """Queue texts for worker processes; an episode is played again there."""
        workers = self.workers if is_own else self.apart
        return [
            workers.submit(
                {"call": "score", "item": asdict(answer.item), "text": answer.text, "before": answer.before},
                is_own,
                answer.quota,
            )
            for answer in batch
        ]


def isolated(task: Task, config: TaskConfig, *, is_here: bool = False) -> IsolatedTask:
    """Return `task`, which `config` names, with its answers scored and its episodes played in worker processes.

    `is_here` says that its class exists in this process only: then its episodes are played here.
    """
    if is_to_be_confined(task) and (reason := unconfinable()):
        log.warning("its code meets strangers' texts and is not confined here", task=task.key.name, reason=reason)
    described = config.model_dump(mode="json", include={"name", "options"})
    first: Message = {"call": "load", "task": described, "code": list(task.key), "isolate": "none"}
    begin = start_of(task)
    if begin is not None and not is_here:
        playing = Workers(
            task.key.name, "node.tasks.scoring.verdicts", first
        )  # no episode waits until a text is scored
        begin = ForkServer(task.key.name, playing, SCORE_S, LOAD_S + SCORE_S)
    isolate: Isolate = getattr(task, "isolate", None)
    is_caged = not (isolate == "none" or is_here or not is_to_be_confined(task))
    lacks = lacking() if is_caged else ""
    declared = {"declared": isolate == "text", "whole": not lacks, "seconds": SCORE_S}
    caged: Message = {**first, "isolate": "text", **declared}
    firsts = (caged if is_caged and isolate == "text" else first, caged if is_caged and not lacks else first)
    own, apart = (Workers(task.key.name, "node.tasks.scoring.verdicts", first) for first in firsts)
    return IsolatedTask(task, own, apart, lacks, begin)


def main() -> None:
    """Load one task, then score for the node at the other end of a channel."""
    from node.tasks import load_task

    requests, request, folder = begin_worker()
    if request["isolate"] == "text":
        _score_in_cages(requests, request, folder)
        return
    try:
        task = load_task(TaskConfig.model_validate(request["task"]))
    except UserError as error:
        requests.reply({"error": one_line(error)})
        return
    if list(task.key) != request["code"]:  # peers would take its rewards for lies
        requests.reply({"error": CODE_CHANGED})
        return
    if start_of(task) is None and is_to_be_confined(task):
        with suppress(ConfinementError):
            confine()
    if start_of(task) is not None:
        adopt_from_here()
    requests.reply({})
    while True:
        answer_one(requests, task)


def _score_in_cages(requests: Requests, request: Message, folder: Path) -> None:
    from node.tasks import load_task

    def load() -> Task:
        return load_task(TaskConfig.model_validate(request["task"]))

    def answer(task: Task, asked: Message) -> Message:
        return _scored(Answer(task, _item(asked["item"]), asked["text"], (*asked["before"],)), confined="")

    named = (request["task"]["options"].get(name, "") for name in ("path", "factory"))
    files = [re.sub(r"(?<=\.py):\w+$", "", path) for path in named if isinstance(path, str)]
    hint = "" if request["declared"] else IN_CAGE
    serve_in_cages(
        requests, CageWork(load, lambda task: {"code": list(task.key)}, answer, request, hint, files), folder
    )


def answer_one(requests: Requests, task: Task) -> None:
    """Reply to one request of the node; what has an environment is played in a process of its own."""
    request = requests.receive()
    item, start, confined = _item(request["item"]), start_of(task), is_to_be_confined(task)
    if request["call"] == "start":
        assert start is not None
        fork_episode(requests, partial(start, item), confined=confined)
        return
    answer = Answer(task, item, request["text"], (*request.get("before", ()),))
    if start is None:
        requests.reply(_scored(answer))
    else:
        answer_apart(requests, partial(_scored, answer), confined=confined)


def begin_worker() -> tuple[Requests, Message, Path]:
    """Become a worker under a bound on memory; return its end of the node's channel, the first message, and a folder.

    The folder is for cages. `sys.argv` has the numbers of channel and life (`node.processes.worker_process`).
    """
    channel, life = map(int, sys.argv[1:3])
    folder = make_folder()
    requests = connect(channel, life, folder=folder)
    yield_memory()
    bound_memory()
    return requests, requests.receive(), folder


def bound_memory() -> None:
    """Bound the data of this process, and of each that it forks, by half of the free memory."""
    bound = min(MAX_BYTES, max(LEAST_BYTES, available_memory() // 2))
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (bound if most == resource.RLIM_INFINITY else min(bound, most), most))


def _item(fields: dict[str, Any]) -> Item:
    return Item(**{**fields, "examples": tuple(map(tuple, fields["examples"]))})


def _scored(answer: Answer, confined: str = CONFINED) -> Message:
    try:
        return {"reward": answer.judged()}
    except MemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # noqa: BLE001  # it may raise anything
        line = one_line(error) or type(error).__name__
        return {"error": f"{confined if 'PermissionError' in line else ''}{line}"}


if __name__ == "__main__":
    main()
