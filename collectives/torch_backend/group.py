"""torch's `ProcessGroup`: its collectives, sends and receives, each by a port of the members' data streams."""

import hashlib
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from collectives.agreement.views import NOWHERE, OpId
from collectives.communicator import Communicator
from collectives.driver import JOIN_S
from collectives.errors import Aborted, BadArgument, CollectiveError, DeadlineExceeded
from collectives.mesh.shared_memory import OFFER_BYTES, Lease, MemoryOffer
from collectives.mesh.socket_port import MAX_SALT, SALT_SHIFT, SocketPort
from collectives.reduce import direct, gather, shared
from collectives.reduce.kernels import Reduction, Scratch, add_up, combine, describe, finish, start, work_dtype
from collectives.reduce.tensors import DTYPES, memory, on_cpu, packed, publish, publish_pieces, set_apart
from collectives.threads import join_all
from collectives.torch_backend.ends import is_failing, wait_until_taken, worlds
from collectives.torch_backend.work import Work, queued, seconds_of, threads, untraced
from collectives.types import Codec, Op
from protocol.identity import NodeId

NAME = "gossamer"
DEVICES = ("cpu", "cuda")
FIRST_TAG = 2**63  # above all of a communicator's tags
MEETING = OpId(NOWHERE, 0, 0, 0)  # the turn of a world that never changes
LEAST_SHARED_BYTES = 16 << 10  # of a tensor; below, a message is as fast
SHOWN_TO_ALL = ("allgather", "all_gather_single", "barrier")  # in which each rank gives all the same block, and waits
BLOCK_FOR_ALL = ("allgather", "all_gather_single", "gather")  # operations in which each rank gives one block
OFFER_SLOT = (1 << SALT_SHIFT) - 1
LAST_WORD_S = 1.0  # in which a rank's word why it ended may come after its end
LOOK_S = 0.001  # between looks for a message from any source

_TorchGroup: Any = dist.ProcessGroup  # whose stubs have every signature that torch ever had
_OPS = {
    dist.ReduceOp.SUM: Op.SUM,
    dist.ReduceOp.AVG: Op.AVG,
    dist.ReduceOp.PRODUCT: Op.PROD,
    dist.ReduceOp.MIN: Op.MIN,
    dist.ReduceOp.MAX: Op.MAX,
}
_OF_BOOLS = {Op.SUM: Op.MAX, Op.MAX: Op.MAX, Op.PROD: Op.MIN, Op.MIN: Op.MIN}


class BackendError(Aborted, RuntimeError):
    """An operation of a process group failed, and the group is broken: `enter` in a step of `run`, or start anew."""


@untraced
class ProcessGroupGossamer(_TorchGroup):
    """One rank's part in one process group. Its members do not change."""

    # torch asks a group's backend for these before it uses them, also where another group is of NCCL.
    supports_splitting = supports_shrinking = supports_time_estimate = False

    def __init__(self, comm: Communicator, name: str, members: Sequence[NodeId], turn: OpId, timeout: float) -> None:
        """`members` are in the order of their ranks; `turn` and `name` are the same at all of them."""
        self.members = tuple(members)
        self.comm = comm
        self.turn = turn
        super().__init__(self.members.index(comm.node_id), len(members))
        self.broken: BackendError | None = None
        self._is_broken = threading.Event()
        view = comm.view if turn != MEETING else None  # others may see a later one, which some have left
        self.mark, self._epoch = (view.mark, view.epoch) if view is not None else (NOWHERE, 0)
        self._name = name
        self._timeout = self._time_left = timeout  # of the operations; of the collective that is under way
        self._ids = frozenset(members)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._from_anybody: dict[int, Work] = {}  # by tag: the last receive from any source
        self._ports: set[SocketPort] = set()
        self._waiting: SimpleQueue[tuple[Work, Callable[[], None]] | None] = SimpleQueue()
        self._under_way = 0
        self._turn = threading.Lock()  # of the thread that carries a collective out
        self._turn_of = 0  # that thread
        self._thread: threading.Thread | None = None
        self._coalesced: list[Work] | None = None
        self._scratch = Scratch()
        self._jobs: dict[tuple[torch.dtype, Op], Reduction] = {}
        self._lease: Lease | None = None
        self._room: shared.Room | None = None
        self._room_calls = 0
        self._is_shut = False
        self._process = os.getpid()
        if turn == MEETING:
            comm.data_plane.outlive_views()
        # Calls off all that follows: a rank that finds the group broken ends this one.
        self._all = comm.data_plane.open(self._op("all"), self._ids, math.inf, self._called_off)

    # --- who it is -----------------------------------------------------------------------------

    def getBackendName(self) -> str:  # noqa: N802  # torch's name
        """See torch."""
        return NAME

    def getRank(self) -> int:  # noqa: N802
        """See torch."""
        return self.members.index(self.comm.node_id)

    def getSize(self) -> int:  # noqa: N802
        """See torch."""
        return len(self.members)

    @property
    def group_name(self) -> str:
        """The name that torch knows it by."""
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def _device_types(self) -> list[torch.device]:
        """The devices that it takes tensors of; torch's checkpoints and collectives of objects ask for them."""
        return [torch.device(kind) for kind in DEVICES if kind == "cpu" or torch.cuda.is_available()]

    def _get_backend(self, device: torch.device) -> "ProcessGroupGossamer":
        return self

    # --- collectives ---------------------------------------------------------------------------

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Work:
        """Reduce each tensor in place."""
        op, factor = read_op(opts)

        def work() -> None:
            for each in tensors:
                self._all_reduce(each, op, factor)

        return self._run(tensors, opts, work)

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> Work:
        """Reduce each tensor in place."""
        return self.allreduce(tensors, opts)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> Work:
        """Fill each tensor with the root's."""
        root = self.members[opts.rootRank]

        def work() -> None:
            for each in tensors:
                self._broadcast(each, root)

        return self._run(tensors, opts, work)

    def reduce(self, tensors: list[torch.Tensor], opts: Any) -> Work:
        """Reduce to the root; the others' tensors are as they were."""
        op, factor = read_op(opts)

        def work() -> None:
            for each in tensors:
                reduced = self._reduce_blocks("reduce", {self.members[opts.rootRank]: each}, op, factor)
                if self.rank() == opts.rootRank:
                    _land(reduced.view(-1), each)

        return self._run(tensors, opts, work)

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> Work:
        """Fill each list with everybody's tensor."""

        def work() -> None:
            for outs, own in zip(outputs, inputs, strict=True):
                self._exchange(
                    "allgather", dict.fromkeys(self.members, own), dict(zip(self.members, outs, strict=True))
                )

        return self._run(outputs, opts, work, inputs)

    def allgather_coalesced(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> Work:
        """Fill one list a rank with that rank's tensors."""
        return self.allgather([list(outs) for outs in zip(*outputs, strict=True)], inputs, opts)

    def all_gather_single(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> Work:
        """Fill `output` with everybody's tensor, one after the other."""
        return self._run([output], opts, lambda: self._gather_into(output, tensor), [tensor])

    def all_gather_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> Work:
        """The same for each pair."""

        def work() -> None:
            for output, tensor in zip(outputs, inputs, strict=True):
                self._gather_into(output, tensor)

        return self._run(outputs, opts, work, inputs)

    def gather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any) -> Work:
        """Fill the root's list with everybody's tensor."""
        root = self.members[opts.rootRank]

        def work() -> None:
            outs = dict(zip(self.members, outputs[0], strict=True)) if self.rank() == opts.rootRank else {}
            self._exchange("gather", {root: inputs[0]}, outs)

        return self._run(outputs, opts, work, inputs)

    def scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any) -> Work:
        """Fill everybody's tensor with its place in the root's list."""
        root = self.members[opts.rootRank]

        def work() -> None:
            given = dict(zip(self.members, inputs[0], strict=True)) if self.rank() == opts.rootRank else {}
            self._exchange("scatter", given, {root: outputs[0]})

        return self._run(outputs, opts, work, inputs)

    def reduce_scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any = None) -> Work:
        """Fill each rank's tensor with its place of the lists, reduced, whatever the lengths."""
        op, factor = read_op(opts)

        def work() -> None:
            for output, blocks in zip(outputs, inputs, strict=True):
                given = dict(zip(self.members, blocks, strict=True))
                _land(self._reduce_blocks("reduce_scatter", given, op, factor).view(-1), output)

        return self._run(outputs, opts, work, inputs)

    def reduce_scatter_single(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> Work:
        """Fill each rank's tensor with its part of `tensor`, reduced."""
        return self.reduce_scatter_single_coalesced([output], [tensor], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> Work:
        """The same for each pair."""
        blocks = [list(tensor.reshape(-1).chunk(self.size())) for tensor in inputs]
        for output, parts in zip(outputs, blocks, strict=True):
            if [part.numel() for part in parts] != [output.numel()] * self.size():
                raise BadArgument(f"the input must be {self.size()} times as long as the output")
        return self.reduce_scatter([output.view(-1) for output in outputs], blocks, opts)

    def alltoall(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None) -> Work:
        """Give each rank its place in the list, whatever the lengths."""

        def work() -> None:
            given, outs = (dict(zip(self.members, each, strict=True)) for each in (inputs, outputs))
            self._exchange("alltoall", given, outs, is_uneven=True)

        return self._run(outputs, opts, work, inputs)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_splits: list[int],
        input_splits: list[int],
        opts: Any = None,
    ) -> Work:
        """Give each rank its rows of `tensor`: `input_splits` of them, or equally many."""
        outs = _rows(output, output_splits, self.size())
        return self.alltoall(outs, _rows(tensor, input_splits, self.size()), opts)

    def barrier(self, opts: Any = None) -> Work:
        """Wait for all."""
        token = torch.zeros(1, dtype=torch.uint8)

        def work() -> None:
            self._exchange("barrier", dict.fromkeys(self.members, token), {m: token.clone() for m in self.members})

        return self._run([], opts, work)

    _allgather_base = all_gather_single  # the names that torch had before 2.13
    _reduce_scatter_base = reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: torch.device) -> Work:
        works, self._coalesced = self._coalesced or [], None
        return self._run([], None, lambda: [work.wait() for work in works], on_a_thread=True)

    # --- one to one ----------------------------------------------------------------------------

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> Work:
        """Send to a rank. Over once it is handed to the kernel."""
        self._check_open()
        receiver = self.members[to]
        values = _flat(tensors[0])
        port = self._begin(self._channel(self.comm.node_id, receiver, tag), {receiver}, (), self._timeout)
        port.send(receiver, 0, memory(values))
        port.when_sent(lambda: self._close(port))  # also where nobody waits for it

        def finish() -> None:
            with self._until_over(port):
                port.flush()

        return self._point(tensors, finish, keep=values)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Work:
        """Receive from a rank."""
        self._check_open()
        return self._point(tensors, self._receive(tensors[0], self.members[source], tag))

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int) -> Work:
        """Receive from whoever sends first."""
        self._check_open()
        until = time.monotonic() + self._timeout
        earlier = self._from_anybody.get(tag)

        def finish() -> None:
            if earlier is not None:
                earlier.wait()
            source = self._await_sender(tag, until)
            over.source = self.members.index(source)
            self._receive(tensors[0], source, tag)()
            if self._from_anybody.get(tag) is over:
                del self._from_anybody[tag]

        over = self._from_anybody[tag] = self._point(tensors, finish)
        return over

    def _await_sender(self, tag: int, until: float) -> NodeId:
        """Return a member that has sent something that nobody has received yet."""
        plane, others = self.comm.data_plane, [member for member in self.members if member != self.comm.node_id]
        while True:
            self._check()
            nobody_is_left = all(plane.has_finished(member) for member in others)
            for member in others:
                channel = self._channel(member, self.comm.node_id, tag)
                if plane.has_early(self._op(channel, self._counts[channel]), member):
                    return member
            if nobody_is_left:
                raise self._break(Aborted("all other ranks have ended, and none has sent anything"))
            if time.monotonic() >= until:
                raise self._break(DeadlineExceeded("no rank sent anything in time"))
            time.sleep(LOOK_S)

    def _receive(self, tensor: torch.Tensor, source: NodeId, tag: int) -> Callable[[], None]:
        """Begin to receive from a rank; what is returned waits for it."""
        into = _landing(tensor)
        port = self._begin(self._channel(source, self.comm.node_id, tag), {source}, (), self._timeout)
        ticket = port.expect(source, 0, memory(into))

        def finish() -> None:
            with self._until_over(port):
                port.wait(ticket)
            _land(into, tensor)

        return finish

    def _channel(self, source: NodeId, to: NodeId, tag: int) -> str:
        return f"{source} {to} {tag}"

    def _point(self, tensors: list[torch.Tensor], finish: Callable[[], None], keep: Any = None) -> Work:
        made = queued(tensors)

        def work() -> None:
            made()
            finish()

        over = Work(tensors, work, keep)
        if self._coalesced is not None:
            self._coalesced.append(over)
        return over

    # --- how an operation runs -----------------------------------------------------------------

    def _run(
        self, tensors: Any, opts: Any, work: Callable[[], Any], inputs: Any = (), *, on_a_thread: bool = False
    ) -> Work:
        """Carry an operation out: in its turn, or now if its caller waits for it anyway and nothing is under way.

        A callback's operation is carried out now, too. `tensors` are what the work gives; `inputs` are what it reads
        besides.
        """
        self._check_open()
        timeout = getattr(opts, "timeout", None)
        over = Work(tensors, None, None)
        made = queued([tensors, inputs])

        def timed() -> None:
            with self._lock:
                self._time_left = seconds_of(timeout) or self._timeout
            made()
            work()
            queued(tensors)()

        if self._turn_of == threading.get_ident():  # a callback of the collective whose turn it is, or a signal's
            self._carry_out(over, timed)
            return over
        with self._lock:
            self._under_way += 1
            if on_a_thread or getattr(opts, "asyncOp", True) or self._under_way > 1:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name="gossamer-torch", daemon=True)
                    self._thread.start()
                self._waiting.put((over, timed))
                return over
            self._turn.acquire()  # it is free, or about to be
        self._take_turn(over, timed)
        return over

    def _work(self) -> None:
        while (next_one := self._waiting.get()) is not None:
            self._turn.acquire()
            self._take_turn(*next_one)

    def _take_turn(self, over: Work, work: Callable[[], None]) -> None:
        self._turn_of = threading.get_ident()
        try:
            self._carry_out(over, work)
        finally:
            self._turn_of = 0
            with self._lock:
                self._under_way -= 1
            self._turn.release()
        self._release()

    def _carry_out(self, over: Work, work: Callable[[], None]) -> None:
        error: BaseException | None = None
        before = self._counts[""]
        try:
            self._check()
            with torch.no_grad():
                work()
        except BadArgument as failed:  # if nothing was sent, the others' call is this rank's next one
            error = failed if self._counts[""] == before else self._break(failed)
        except CollectiveError as failed:
            error = self._break_in_a_call(failed)
        except BaseException as failed:  # noqa: BLE001  # it belongs to whoever waits
            error = failed
            self._break(Aborted(f"{type(failed).__name__} at this rank: {failed}"))
        over.end(error)  # its callbacks run in this call, and so do the operations that they call

    def _op(self, channel: str, n: int = 0) -> OpId:
        """Return the name of the n-th operation of a channel of this group."""
        what = f"{self._name}|{channel}|{self.turn.n}|{self.turn.mark.hex()}|{','.join(self.members)}"
        tag = FIRST_TAG + (int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "big") >> 2)
        return OpId(self.mark, self._epoch, tag, n)

    def _begin(self, channel: str, with_whom: set[NodeId], arguments: tuple[Any, ...], timeout: float) -> SocketPort:
        """Open the port of the channel's next operation; its slots say what the arguments are."""
        self._check()
        with self._lock:
            n = self._counts[channel]
            self._counts[channel] += 1
        asked = _hash(arguments)
        if self._room is not None and not channel:
            self._room.note(self.comm.node_id, n + 1, asked)
        salt = asked % (MAX_SALT + 1)
        deadline = time.monotonic() + timeout
        members = with_whom | {self.comm.node_id}
        port = self.comm.data_plane.open(self._op(channel, n), members, deadline, self._called_off, salt)
        with self._lock:
            self._ports.add(port)
            broken = self.broken
        if broken is not None:
            port.cancel(str(broken))
        return port

    @contextmanager
    def _until_over(self, port: SocketPort) -> Iterator[None]:
        try:
            yield
        except CollectiveError as error:
            raise self._break_in_a_call(error) from error
        finally:
            self._close(port)

    def _close(self, port: SocketPort) -> None:
        with self._lock:
            self._ports.discard(port)
        self.comm.data_plane.close_port(port)

    @contextmanager
    def _port(self, *arguments: Any) -> Iterator[SocketPort]:
        port = self._begin("", set(self.members), arguments, self._time_left)
        with self._until_over(port):
            yield port

    # --- when it breaks ------------------------------------------------------------------------

    def _check(self) -> None:
        if self.broken is None and self.turn == MEETING:
            lost = self.comm.data_plane.lost(self._ids)
            if lost and not self._is_broken.wait(LAST_WORD_S):
                self._break(Aborted(f"the connection with {_names(lost)} is lost"))
        elif self.broken is None:
            view = self.comm.view
            if view is None or view.mark != self.mark:
                lost = self._ids - view.ids if view is not None else frozenset()
                without = f" without {_names(lost)}" if lost else ""
                self._break(Aborted(f"the group goes on{without}: its members have to meet again"))
        if self.broken is not None:
            raise self.broken

    def _check_open(self) -> None:
        """Raise `BackendError` if no operation can be called here any more."""
        if self._is_shut:
            raise BackendError("the process group was destroyed: make another one")
        self._check()

    def _called_off(self, by: NodeId, why: str) -> None:
        self._break(Aborted(f"called off by member {by}: {why}"), tell=False)

    def _break_in_a_call(self, why: CollectiveError) -> BackendError:
        """Break the group, as `_break` does. Of ranks that end one after the other, the first one's reason counts."""
        if isinstance(why, Aborted) and self.turn == MEETING:
            self._is_broken.wait(LAST_WORD_S)
        return self._break(why)

    def _break(self, why: CollectiveError, *, tell: bool = True) -> BackendError:
        """Let all operations, here and elsewhere, end with `why`."""
        with self._lock:
            if self.broken is not None:
                return self.broken
            text = str(why)
            for rank, member in enumerate(self.members):
                text = text.replace(f"member {member}", f"rank {rank} ({member})")
            self.broken = BackendError(text)
            self._is_broken.set()
            ports = list(self._ports)
        for port in ports:
            port.cancel(text)
        if tell:
            self.comm.data_plane.call_off(self._all, self._ids, text)
        return self.broken

    def shutdown(self) -> None:
        """End the group in order: carry out what was called, and leave a fixed world once all ranks have what was sent.

        torch calls it in `destroy_process_group`. Where an exception is on its way, nothing is waited for.
        """
        self._end(in_order=not is_failing())

    def abort(self) -> None:
        """End the group now: its operations raise, here and at the other ranks."""
        if os.getpid() == self._process:
            self._break(Aborted("the process group was aborted"))
        self._end(in_order=False)

    def _end(self, *, in_order: bool) -> None:
        if os.getpid() != self._process:  # a fork: the threads, and what others read of this rank, are its parent's
            return
        self._is_shut = True
        self._waiting.put(None)
        in_order = in_order and self.turn == MEETING  # else the step's verdict has said what was carried out
        try:
            if in_order and self._thread is not None and self._thread is not threading.current_thread():
                self._thread.join()  # each of its operations has a time-out
            if in_order and self.broken is None and self in worlds:
                wait_until_taken(self.comm.data_plane, self.members, self._timeout)
        finally:
            self._release()
            with self._lock:
                unread = [port for port in self._ports if port.receives]  # of receives that nobody waited for
                self._ports.difference_update(unread)
            for port in [*unread, self._all]:
                self.comm.data_plane.close_port(port)
            if self in worlds:
                worlds.remove(self)
                if in_order:
                    self.comm.leave()
                    join_all(list(threads), JOIN_S)
                else:  # Python waits for it at its end: this rank's error is to come before theirs
                    threading.Thread(target=self.comm.leave, name="gossamer-leave", daemon=False).start()

    def _release(self) -> None:
        """Give the shared memory back once nothing here reads it any more."""
        with self._lock:
            if self._is_shut and self._under_way == 0:
                lease, self._lease, self._room = self._lease, None, None
                if lease is not None:
                    lease.end()

    # --- what they are made of -----------------------------------------------------------------

    def _all_reduce(self, tensor: torch.Tensor, op: Op, factor: float) -> None:
        flat = _flat(tensor)
        numbers, op = _as_numbers(flat, op)
        if factor != 1.0:
            numbers.mul_(factor)
        arguments = "allreduce", op.value, str(numbers.dtype), numbers.numel()
        job = self._job(numbers.dtype, op)
        if self._shows(numbers.nbytes):
            shown = self._show(numbers, arguments)
            work = torch.empty(numbers.numel(), dtype=job.work)
            add_up(job, lambda member: shown[member].view(numbers.dtype), work)
            finish(op, work, job.total, numbers)
            _land(flat, tensor)
            return
        with self._port(*arguments) as port:
            room = self._room_of(port, numbers.nbytes) if shared.fits(job, numbers.numel()) else None
            if room is not None:
                publish_pieces(room.all_reduce(port, job, numbers, _hash(arguments)).parts, numbers)
            else:
                direct.all_reduce(port, job, numbers, self._scratch, into=numbers)
        _land(flat, tensor)

    def _job(self, dtype: torch.dtype, op: Op) -> Reduction:
        job = self._jobs.get((dtype, op))
        if job is None:
            job = describe(self.members, dtype, op, dict.fromkeys(self.members, 1.0), Codec.NONE)
            self._jobs[dtype, op] = job
        return job

    def _shows(self, length: int) -> bool:
        """Tell whether an operation in which each rank gives all `length` bytes goes by `_show`."""
        return self._room is not None and shared.is_small(self.size(), length)

    def _show(self, values: torch.Tensor, arguments: tuple[Any, ...]) -> dict[NodeId, torch.Tensor]:
        """Show all ranks some values, and return everybody's, as bytes: they hold until the next operation."""
        assert self._room is not None
        self._check()
        until = time.monotonic() + self._time_left
        with self._lock:
            self._counts[""] += 1
            number = self._counts[""]

        def check(member: NodeId) -> None:
            self._check()
            self._all.check(member)
            if time.monotonic() >= until:
                raise DeadlineExceeded(f"member {member} wrote too little in time: allow more, or call it again")

        return self._room.show(self.comm.node_id, values.view(torch.uint8), number, _hash(arguments), check)

    def _room_of(self, port: SocketPort, length: int, *, waits_for_all: bool = True) -> shared.Room | None:
        """Return the memory that the ranks share, for `length` bytes.

        A small operation that does not wait for all is neither made to wait, nor in shared memory.
        """
        if length >= LEAST_SHARED_BYTES or waits_for_all:
            self._look_for_room(port)
        return self._room if length >= LEAST_SHARED_BYTES else None

    def _look_for_room(self, port: SocketPort) -> None:
        """Ask all ranks, in the first, second, fourth, eighth... call, whether they have each other's memory by now."""
        self._room_calls += 1
        is_turn = self._room_calls & (self._room_calls - 1) == 0
        if self._room is not None or not is_turn or self.size() == 1:
            return
        if self._lease is not None:
            self._lease.end()
        plane = self.comm.data_plane
        self._lease = plane.lease_memory(self._ids)
        own = b"" if self._lease is None else self._lease.offer.encode()
        buffers = {member: bytearray(1 + OFFER_BYTES) for member in self.members if member != self.comm.node_id}
        tickets = [port.expect(member, OFFER_SLOT, memoryview(into)) for member, into in buffers.items()]
        for member in buffers:
            port.send(member, OFFER_SLOT, memoryview(bytes([len(own) > 0]) + own.ljust(OFFER_BYTES, b"\0")))
        for ticket in tickets:
            port.wait(ticket)
        port.flush()
        if self._lease is None or not all(into[0] for into in buffers.values()):
            return  # not all are here, or their streams are not there yet
        offers = {member: MemoryOffer.decode(bytes(into[1:])) for member, into in buffers.items()}
        bays = self._lease.bays({**offers, self.comm.node_id: self._lease.offer})
        if bays is None:
            plane.hand_over_memory(self._ids)
        else:
            self._room = shared.Room(bays)

    def _broadcast(self, tensor: torch.Tensor, root: NodeId) -> None:
        flat = _flat(tensor)
        data, own = flat.view(torch.uint8), self.comm.node_id
        arguments = "broadcast", root, str(flat.dtype), flat.numel()
        with self._port(*arguments) as port:
            can_show = shared.can_show(self.size(), flat.nbytes)
            room = self._room_of(port, flat.nbytes, waits_for_all=False) if can_show else None
            if room is not None:
                lengths = {member: flat.nbytes if member == root else 0 for member in self.members}
                wanted = {root: data} if root != own else {}
                room.move(port, data if root == own else data[:0], wanted, lengths, _hash(arguments))
            else:
                result = gather.broadcast(port, self.members, data, root, self._scratch)
                if root != own:
                    data.copy_(result)
                self._scratch.give(result)
        if root != own:
            _land(flat, tensor)

    def _gather_into(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        flat = output.view(-1) if output.is_contiguous() else output.reshape(-1).clone()
        parts = list(flat.chunk(self.size())) if flat.numel() else [flat] * self.size()
        if [part.numel() for part in parts] != [tensor.numel()] * self.size():
            raise BadArgument(f"the output must be {self.size()} times as long as the input")
        self._exchange(
            "all_gather_single", dict.fromkeys(self.members, tensor), dict(zip(self.members, parts, strict=True))
        )
        _land(flat, output)

    def _exchange(
        self,
        kind: str,
        given: dict[NodeId, torch.Tensor],
        outs: dict[NodeId, torch.Tensor],
        *,
        is_uneven: bool = False,
    ) -> None:
        """Send to each member what is given for it, and receive what is to come from each; own to own is a copy."""
        own = self.comm.node_id
        blocks = {member: _flat(tensor) for member, tensor in given.items()}
        into = {member: _landing(tensor) for member, tensor in outs.items()}
        example = next(iter({**blocks, **into}.values()))
        length = () if is_uneven else (example.numel(),)
        arguments = kind, str(example.dtype), *length
        if kind in SHOWN_TO_ALL and self._shows(example.nbytes):
            everybodys = self._show(blocks[own], arguments)
            for member, where in into.items():
                where.view(torch.uint8).copy_(everybodys[member])
            for member, tensor in outs.items():
                _land(into[member], tensor)
            return
        with self._port(*arguments) as port:
            can_show = kind in BLOCK_FOR_ALL and shared.can_show(self.size(), example.nbytes)
            waits = kind in SHOWN_TO_ALL
            room = self._room_of(port, example.nbytes, waits_for_all=waits) if can_show else None
            if room is None:
                self._send_and_receive(port, blocks, into)
            else:
                shown = next(iter(blocks.values())).view(torch.uint8)
                wanted = {member: where.view(torch.uint8) for member, where in into.items() if member != own}
                room.move(port, shown, wanted, dict.fromkeys(self.members, example.nbytes), _hash(arguments))
            if own in blocks and own in into:
                into[own].copy_(blocks[own])
        for member, tensor in outs.items():
            _land(into[member], tensor)

    def _send_and_receive(
        self, port: SocketPort, blocks: Mapping[NodeId, torch.Tensor], into: Mapping[NodeId, torch.Tensor]
    ) -> None:
        own = self.comm.node_id
        tickets = [port.expect(member, 0, memory(where)) for member, where in into.items() if member != own]
        for member in _after(own, self.members):
            if member in blocks:
                port.send(member, 0, memory(blocks[member]))
        for ticket in tickets:
            port.wait(ticket)
        port.flush()

    def _reduce_blocks(self, kind: str, given: dict[NodeId, torch.Tensor], op: Op, factor: float) -> torch.Tensor:
        """Send each member its block, and return everybody's blocks for this one, reduced in the ranks' order.

        A member that gives itself no block has nothing to reduce: what is returned means nothing.
        """
        own = self.comm.node_id
        example = given.get(own, next(iter(given.values())))
        op = _as_numbers(_in_a_row(example), op)[1]
        blocks = {member: _as_numbers(_flat(tensor), op)[0] for member, tensor in given.items()}
        if factor != 1.0:
            blocks = {member: block * factor for member, block in blocks.items()}
        mine = blocks.get(own)
        lengths = [block.numel() for block in given.values()]
        arguments = kind, op.value, str(example.dtype), *lengths
        with self._port(*arguments) as port:
            if kind == "reduce_scatter" and mine is not None and len(set(lengths)) == 1:  # as it is at all ranks
                job, count = self._job(mine.dtype, op), self.size() * mine.numel()
                room = self._room_of(port, count * mine.itemsize) if shared.fits(job, count) else None
                if room is not None:
                    parts = [blocks[member] for member in self.members]
                    return _as_before(room.reduce_scatter(port, job, parts, _hash(arguments)), example)
            came = {m: torch.empty_like(mine) for m in self.members if m != own} if mine is not None else {}
            tickets = {member: port.expect(member, 0, memory(where)) for member, where in came.items()}
            for member in _after(own, self.members):
                if member in blocks:
                    port.send(member, 0, memory(blocks[member]))
            if mine is None:
                port.flush()
                return example
            came[own] = mine
            work = torch.empty(mine.numel(), dtype=work_dtype(mine.dtype, op))
            for rank, member in enumerate(self.members):
                if member != own:
                    port.wait(tickets[member])
                if rank == 0:
                    start(came[member], 1.0, work)
                else:
                    combine(op, work, came[member], 1.0)
            port.flush()
        result = torch.empty_like(mine)
        finish(op, work, float(len(self.members)), result)
        return _as_before(result, example)


def _names(members: Collection[NodeId]) -> str:
    return ", ".join(f"member {member}" for member in sorted(members))


@lru_cache(maxsize=1024)
def _hash(arguments: tuple[Any, ...]) -> int:
    """Return 32 bits that stand for what an operation was asked for."""
    return int.from_bytes(hashlib.sha256(repr(arguments).encode()).digest()[:4], "big")


# --- tensors ---


def _in_a_row(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values, 1-D and contiguous, on their device: the tensor's own memory where that is possible."""
    if tensor.device.type not in DEVICES or tensor.is_sparse:
        raise BadArgument(
            f"a {tensor.layout} tensor on {tensor.device}: the backend takes dense tensors on {' or '.join(DEVICES)}"
        )
    flat = packed(tensor.detach().contiguous().resolve_conj().resolve_neg().view(-1))
    return set_apart(flat) if flat.is_cpu or flat.is_inference() else flat


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values, 1-D and contiguous, on the CPU: the tensor's own memory where that is possible."""
    return on_cpu(_in_a_row(tensor))


def _landing(tensor: torch.Tensor) -> torch.Tensor:
    """Return memory of the CPU to receive a tensor's values to: its own where that is possible; then `_land`."""
    return (
        _flat(tensor) if tensor.is_cpu and tensor.is_contiguous() else torch.empty(tensor.numel(), dtype=tensor.dtype)
    )


def _land(flat: torch.Tensor, tensor: torch.Tensor) -> None:
    if flat.data_ptr() != tensor.data_ptr() and flat.numel():
        publish(flat, tensor)


def _as_numbers(flat: torch.Tensor, op: Op) -> tuple[torch.Tensor, Op]:
    """Return the same memory as numbers that can be reduced: of complex ones both parts, of truth values 0 and 1."""
    if flat.dtype is torch.bool:
        if op not in _OF_BOOLS:
            raise BadArgument(f"{op.value} of truth values: use SUM or MAX for any, PRODUCT or MIN for all")
        return flat.view(torch.uint8), _OF_BOOLS[op]
    if flat.is_complex():
        if op not in (Op.SUM, Op.AVG):
            raise BadArgument(f"all_reduce does not support {op.value} on complex tensors")
        return torch.view_as_real(flat).view(-1), op
    if flat.dtype not in DTYPES.values():
        raise BadArgument(f"{flat.dtype} cannot be reduced: convert it to one of {', '.join(DTYPES)}")
    return flat, op


def _as_before(numbers: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Undo `_as_numbers`: return the numbers in the type and shape of `tensor`."""
    if tensor.is_complex():
        numbers = torch.view_as_complex(numbers.view(-1, 2))
    return numbers.view(torch.bool if tensor.dtype is torch.bool else numbers.dtype).view(tensor.shape)


def _rows(tensor: torch.Tensor, splits: Sequence[int], count: int) -> list[torch.Tensor]:
    """Return the rows that go to, or come from, each rank."""
    if splits:
        if len(splits) != count or sum(splits) != tensor.shape[0]:
            raise BadArgument(f"splits {list(splits)} do not fit {tensor.shape[0]} rows and {count} ranks")
        return list(torch.split(tensor, list(splits)))
    if tensor.shape[0] % count:
        raise BadArgument(f"Tensor's dim 0 does not divide equally across group size: {tensor.shape[0]} by {count}")
    return list(torch.split(tensor, tensor.shape[0] // count)) if tensor.shape[0] else [tensor] * count


def _after(own: NodeId, members: Sequence[NodeId]) -> list[NodeId]:
    """Return the others, from the next one on: so not all send to the same one first."""
    at = members.index(own)
    return [*members[at + 1 :], *members[:at]]


def read_op(opts: Any) -> tuple[Op, float]:
    """Return how to reduce, and what to multiply each contribution with."""
    asked = opts.reduceOp if opts is not None else dist.ReduceOp.SUM
    for theirs, ours in _OPS.items():
        if asked == theirs:
            return ours, 1.0
    if asked == dist.ReduceOp.PREMUL_SUM:
        state: Any = asked.__getstate__()
        return Op.SUM, float(state[1])
    name = next((name for name, op in dist.ReduceOp.RedOpType.__members__.items() if asked == op), str(asked))
    raise BadArgument(f"ReduceOp.{name}: the backend has SUM, AVG, PRODUCT, MIN, MAX and PREMUL_SUM")
