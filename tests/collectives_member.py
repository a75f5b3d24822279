"""A member of a group as a process, for tests that kill it. It answers over a pipe and does what it is told.

Members are forked from a server that has everything imported, so one starts in well under a second.

The parent sends a command, a tuple of a name and arguments; the child's answer is ("ok", result) or
("error", type, text). ("holding", state) comes unasked when the child has reached the state that
`hold` named: there it stays, until it is killed. Nothing of this is in the product: the child wraps
the jobs and the observer of its own process.
"""

import ctypes
import gc
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil

from collectives import CollectiveError, Communicator, Op, SharedState
from collectives import operations as jobs_of
from collectives.agreement.events import Begin, Heard, Send
from collectives.agreement.messages import Commit
from collectives.mesh import data_plane, shared_memory
from collectives.types import LAN
from node.processes.machine import return_freed_memory

CLONE_NEWNET = 0x40000000
STATE_COUNT = 300_000  # 2.4 MB: three chunks
STATES = ("idle", "initiate", "reduce", "reduced", "commit", "transfer", "admission")
WORKERS = multiprocessing.get_context("forkserver")


def vector(member, step, count):
    """What a member contributes: integers, so that any order of adding gives the same bits."""
    seed = int.from_bytes(hashlib.sha256(f"{member}/{step}".encode()).digest()[:8], "big")
    return np.random.default_rng(seed).integers(-1000, 1000, count).astype(np.float64)


def state_at(revision, history="state"):
    """What the shared state of `_mix` is at a revision of one history, whoever made it."""
    return vector(history, revision, STATE_COUNT)


def digest(x):
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()


class _Holder:
    """Stops this process, thread by thread, where the parent wants to meet it."""

    def __init__(self, pipe):
        self.pipe = pipe
        self.state = ""
        self.sent = 0

    def stop(self, state):
        """Say so, and never go on."""
        if self.state == state:
            self.state = "reached"
            self.pipe.send(("holding", state))
            while True:
                signal.pause() if threading.current_thread() is threading.main_thread() else time.sleep(3600)

    def observe(self, what):
        """On the control thread, before an event is handled or an action carried out."""
        match what:
            case Begin(kind="all_reduce"):
                self.stop("initiate")
            case Heard(_, Commit(_, view)):
                self.stop("commit" if view is None else "admission")
            case Send(_, Commit(_, view)):
                self.sent += 1
                if self.sent % 2 == 0:  # a coordinator that told one of several
                    self.stop("commit" if view is None else "admission")
            case _:
                pass


class _HoldingPort:
    """A port whose third wait is where the process stops."""

    def __init__(self, port, holder, state):
        self._port, self._holder, self._state, self._waits = port, holder, state, 0

    def __getattr__(self, name):
        return getattr(self._port, name)

    def wait(self, ticket):
        self._waits += 1
        if self._waits == 3:
            self._holder.stop(self._state)
        self._port.wait(ticket)

    def serve(self, handler):
        def answer(source, question):
            self._waits += 1
            if self._waits == 3:
                self._holder.stop(self._state)
            return handler(source, question)

        self._port.serve(answer)


def _wrap(holder):
    reduce, sync = jobs_of.AllReduce.perform, jobs_of.Sync.perform

    def hold_reduce(self, start, port):
        result = reduce(self, start, _HoldingPort(port, holder, "reduce"))
        holder.stop("reduced")
        return result

    jobs_of.AllReduce.perform = hold_reduce
    write = shared_memory.Counter.write

    def hold_write(counter, value):  # in shared memory no port is waited for: the third chunk is where it stops
        if value == 3:
            holder.stop("reduce")
        write(counter, value)

    shared_memory.Counter.write = hold_write
    jobs_of.Sync.perform = lambda self, start, port: sync(self, start, _HoldingPort(port, holder, "transfer"))


def run(pipe):
    """The child's main loop."""
    _let_memory_go()
    holder = _Holder(pipe)
    _wrap(holder)
    comm = state = None
    while True:
        try:
            command, *arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            if command == "connect":
                seeds, options = arguments
                if not options.pop("shares_memory", True):
                    data_plane.is_possible = lambda: False
                options = {"timing": LAN, **options}
                comm = Communicator.connect("chaos", seeds, observer=holder.observe, **options)
                state = SharedState({"w": vector(comm.node_id, "state", STATE_COUNT) if seeds else state_at(0)})
                result = comm.address, comm.node_id
            elif command == "enter":
                result = _enter(*arguments)
            elif command == "mix":
                result = _mix(comm, state, *arguments)
            elif command == "hold":
                (holder.state,) = arguments
                result = None
                if holder.state == "idle":
                    pipe.send(("ok", None))
                    holder.stop("idle")
            else:
                result = _ACTIONS[command](comm, *arguments)
            pipe.send(("ok", result))
        except CollectiveError as error:
            pipe.send(("error", type(error).__name__, str(error)))


def _enter(namespace):
    """Go into a network namespace, with every thread that is started from now on."""
    with Path("/var/run/netns", namespace).open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


def _reduce(comm, step, count, timeout):
    """Reduce in place; say who contributed, the result's hash, and whether an aborted buffer is as it was."""
    x = vector(comm.node_id, step, count)
    return _outcome(lambda: comm.all_reduce(x, op=Op.SUM, timeout=timeout).contributors, x)


def _outcome(call, x):
    before = digest(x)
    try:
        facts = call()
    except CollectiveError as error:
        return type(error).__name__, digest(x) == before, str(error)
    return "commit", facts, digest(x)


def _mix(comm, state, step, counts, timeout, history="state", leaves_after=None):
    """Synchronise `state` while vectors of `counts` elements are reduced; say what came of each, as `_reduce` does.

    If that committed the state goes one revision on, in `history`, unless that is "". After `leaves_after` s it leaves.
    """
    if leaves_after is not None:
        threading.Timer(leaves_after, comm.leave).start()
    vectors = [vector(comm.node_id, f"{step}/{tag}", count) for tag, count in enumerate(counts)]
    calls = [lambda: comm.sync_state(state, timeout=timeout).revision]
    calls += [
        lambda tag=tag, x=x: comm.all_reduce(x, op=Op.SUM, tag=tag, timeout=timeout).contributors
        for tag, x in enumerate(vectors)
    ]
    with ThreadPoolExecutor(len(calls)) as pool:
        answers = list(pool.map(_outcome, calls, [state.tensors["w"], *vectors]))
    if history and answers[0][0] == "commit":
        state.revision += 1
        state.tensors["w"][:] = state_at(state.revision, history)
    return answers


def _sync(comm, fill, count, timeout):
    state = SharedState({"w": np.full(count, float(fill))}, revision=0)
    before = digest(state.tensors["w"])
    try:
        result = comm.sync_state(state, timeout=timeout)
    except CollectiveError as error:
        return type(error).__name__, digest(state.tensors["w"]) == before, str(error)
    return "commit", result.contributors, digest(state.tensors["w"])


def _let_memory_go():
    """Let glibc give large blocks back when they are freed, and keep one heap for all threads, not 8 a processor."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 128 << 10)  # M_MMAP_THRESHOLD: fixed from now on
    libc.mallopt(-8, 1)  # M_ARENA_MAX


def _keep_the_lock(comm, seconds):
    """Keep Python's lock from now on, as a long call of C may."""
    threading.Thread(target=ctypes.PyDLL(None).usleep, args=(int(seconds * 1e6),)).start()


def _memory(comm):
    """Return the bytes that this process uses, without what the C library keeps of freed memory."""
    gc.collect()
    return_freed_memory()
    return psutil.Process().memory_info().rss


def _shares_memory(comm):
    """Tell whether the next reduction here can be one in shared memory."""
    lease = comm.data_plane.lease_memory(frozenset(comm.members))
    if lease is None or lease.bay is None:
        return False
    lease.end()
    return True


def _fork(comm):
    """Fork a process that does nothing, as a loader of data may; return its id."""
    if (forked := os.fork()) == 0:
        signal.pause()
    return forked


def _admit(comm, timeout):
    try:
        comm.admit(timeout=timeout)
    except CollectiveError as error:
        return type(error).__name__
    return "commit"


_ACTIONS = {
    "reduce": _reduce,
    "sync": _sync,
    "admit": _admit,
    "keep_the_lock": _keep_the_lock,
    "memory": _memory,
    "fork": _fork,
    "shares_memory": _shares_memory,
    "wait_for": lambda comm, members, timeout: comm.wait_for(members, timeout),
    "members": lambda comm: comm.members,
    "pending": lambda comm: comm.pending(),
    "leave": lambda comm: comm.leave(),
}


class Member:
    """The parent's end of a child."""

    def __init__(self):
        self.pipe, theirs = WORKERS.Pipe()
        self.process = WORKERS.Process(target=run, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.address = self.node_id = ""

    def connect(self, seeds=(), **options):
        self.address, self.node_id = self.ask("connect", list(seeds), options)

    def tell(self, command, *arguments):
        self.pipe.send((command, *arguments))

    def hear(self, timeout=40):
        """Return the child's next message."""
        assert self.pipe.poll(timeout), f"{self.node_id} says nothing"
        return self.pipe.recv()

    def answer(self, timeout=40):
        kind, *rest = self.hear(timeout)
        assert kind == "ok", rest
        return rest[0]

    def ask(self, command, *arguments):
        self.tell(command, *arguments)
        return self.answer()

    def signal(self, number):
        os.kill(self.process.pid, number)

    def end(self):
        with suppress(OSError):
            self.process.kill()
        self.process.join(10)
        self.pipe.close()
