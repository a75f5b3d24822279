"""`Communicator`: a member of a group, as its owner uses it.

    comm = Communicator.connect("run-1", ["tcp://10.0.0.1:7700"], "tcp://0.0.0.0:0", secret=secret)
    comm.wait_for(3)
    while training:
        done = comm.run(lambda comm: comm.all_reduce(gradient(batch)).value, state)
        apply(done.value)
    comm.leave()

`run` keeps members in step whatever happens. Without it, `pending` tells of newcomers, `admit` lets them in, and the
error of each call says what to do.

Blocking calls run on the caller's thread; the control thread and the streams' threads do the rest.
"""

import os
import random
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

from collectives.agreement.agreement import Agreement
from collectives.agreement.events import ADMIT, Begin, CallVerdict, Perform
from collectives.agreement.fields import MAX_MEMBERS
from collectives.agreement.views import ADMIT_TAG, RENDEZVOUS_TAG, OpId, View
from collectives.calls import (
    FLAGS,
    AgreedPending,
    Committed,
    Handle,
    HandlesInFlight,
    PendingCall,
    check_timeout,
    error_of,
    finish_call,
    last_moment,
    waiting,
)
from collectives.driver import HAS_LEFT, JOIN_S, GroupDriver, Observer, Status
from collectives.errors import CALLED_OFF, BadArgument, CommunicatorClosed, DeadlineExceeded
from collectives.mesh.addresses import Address
from collectives.mesh.data_plane import DataPlane
from collectives.mesh.handshake import SESSION_BYTES, Party, anybody, group_id, group_key
from collectives.mesh.mesh import Mesh
from collectives.mesh.port import Port
from collectives.operations import (
    AllGather,
    AllReduce,
    Barrier,
    Broadcast,
    EndOfStep,
    Job,
    Known,
    Rendezvous,
    Sync,
)
from collectives.reduce.codecs import Feedback
from collectives.reduce.tensors import TensorLike
from collectives.shared_state.state import SharedState
from collectives.step_runner import StepRunner
from collectives.types import (
    WAN,
    Codec,
    GroupTiming,
    Health,
    Op,
    Protection,
    ReduceResult,
    StepResult,
    SyncResult,
    SyncStrategy,
)
from protocol.identity import Identity, NodeId

T = TypeVar("T")

MAX_TAG = 2**32 - 1  # of a caller's own tags; calls without a tag have larger ones
MAX_STEP = 2**63 - 1
MAX_STREAMS = 128
PENDING_S = 2.0  # how long an operation's answer to `pending` stands, for members that are a bit late
_SYNC, _BARRIER, _STEP = 2**33, 2**33 + 1, 2**33 + 2


class Communicator:
    """One member of a group that reduces, gathers and shares state. Thread-safe; use `connect` to make one."""

    def __init__(self, driver: GroupDriver, identity: Identity, address: str, *, of_one_machine: bool = False) -> None:
        """Wrap a control thread that runs. `connect` does that."""
        self._driver = driver
        self._of_one_machine = of_one_machine
        self._address = address
        self._node_id = identity.node_id
        self._known = Known(plane=driver.exchange)
        self._in_flight = HandlesInFlight()
        self._agreed_pending = AgreedPending()
        self._step_runner: StepRunner[Communicator] = StepRunner(driver.timing.hang)
        # So that no thread or socket stays when it is dropped without `leave`, or the program ends.
        self._finalizer = weakref.finalize(self, _end, driver, self._in_flight)

    @classmethod
    def connect(  # noqa: PLR0913  # keywords that outside code relies on
        cls,
        group: str,
        seeds: Iterable[str] = (),
        listen: str = "tcp://127.0.0.1:0",
        *,
        identity: Identity | None = None,
        may_join: Callable[[NodeId], bool] | None = None,
        secret: str | bytes | None = None,
        protection: Protection | str = Protection.ENCRYPTED,
        streams: int = 1,
        timeout: float = 30.0,
        timing: GroupTiming = WAN,
        observer: Observer | None = None,
    ) -> "Communicator":
        """Found a group, or join one: then wait until its members let this one in, with `admit`.

        A group without `may_join` and `secret` is for one machine: it listens and dials on loopback only.

        Args:
            group: its name, which is never sent; a node that does not know it is refused.
            seeds: addresses of any members, `tcp://HOST:PORT`, each with `?id=NODEID` where that is known;
                without seeds it founds the group.
            listen: where others dial this one; port 0 takes a free one.
            identity: the key that this member is known by; a new one each time if None.
            may_join: tells of a node id, which is proven, whether it may be a member; every other node is refused
                in the handshake, and a member that it admits no more is disconnected. Called often, on the control
                thread: it must be quick, and the same at all members. None: any node that knows the name and the
                secret. Whoever can make up keys that it admits can dissolve the group.
            secret: what members share besides the name, at random and of 16 bytes or more (`secrets.token_hex()`):
                nobody completes a handshake without it.
            protection: "encrypted"; "authenticated": everybody on the way can read what is sent, and nobody can change
                it; or "unauthenticated": tensors can be changed on the way too. All members must want the same.
                Between processes of one user on one machine the kernel sees to it, and they share memory.
            streams: data connections to each member; more for long fat links.
            timeout: seconds to wait at most to be let in.
            timing: how patient members are with each other; the same at all of them.
            observer: told of every event and action of the agreement, on the control thread.

        Raises:
            BadAddress, BadArgument: what was given cannot be used.
            DeadlineExceeded: no seed answered, or nobody let this one in, in time.
        """
        if not 1 <= streams <= MAX_STREAMS:
            raise BadArgument(f"streams = {streams}: give 1 to {MAX_STREAMS}")
        if secret is not None and not secret:
            raise BadArgument("secret is empty: give 16 random bytes or more, or None")
        check_timeout(timeout)
        addresses = [str(Address.parse(seed)) for seed in seeds]
        listening = Address.parse(listen)
        protected = Protection(protection)
        identity = identity or Identity.generate()
        of_one_machine = secret is None and may_join is None
        if of_one_machine:
            _check_loopback([listening, *map(Address.parse, addresses)])
        key = group_key(group, secret.encode() if isinstance(secret, str) else secret)
        exchange = DataPlane(identity.node_id)
        party = Party(identity, key, os.urandom(SESSION_BYTES), protected, may_join or anybody)
        mesh = Mesh(
            party,
            listening,
            streams,
            exchange.add_stream,
            exchange.open_streams,
            unacknowledged_s=timing.silence,
        )
        agreement = Agreement(
            identity.node_id,
            mesh.address,
            group_id(key),
            random.SystemRandom(),
            time.monotonic(),
            seeds=addresses,
            timing=timing,
        )
        driver = GroupDriver(agreement, mesh, exchange, timing, observer)
        driver.start()
        comm = cls(driver, identity, mesh.address, of_one_machine=of_one_machine)
        try:
            comm._driver.wait_inside(timeout)
        except BaseException:
            comm.leave()
            raise
        return comm

    # --- who is here ---------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """The address that others dial: `tcp://HOST:PORT`."""
        return self._address

    @property
    def node_id(self) -> NodeId:
        """This member's id."""
        return self._node_id

    @property
    def members(self) -> tuple[NodeId, ...]:
        """The ids of all members, sorted, this one's included; empty while outside of the group."""
        view = self._status.view
        return view.members if view is not None else ()

    @property
    def world_size(self) -> int:
        """How many members there are; 0 while outside of the group."""
        return len(self.members)

    @property
    def epoch(self) -> int:
        """The number of the group's current view; 0 while outside of the group."""
        view = self._status.view
        return view.epoch if view is not None else 0

    def health(self, timeout: float = 5.0) -> dict[NodeId, Health]:
        """Return when each other member last called, beat and moved bytes, as far as this one knows.

        Raises:
            DeadlineExceeded: this member's own control thread did not answer in time.
            CommunicatorClosed: this member left.
        """
        return self._driver.health(check_timeout(timeout))

    def pending(self) -> bool:
        """Tell whether a newcomer waits that can be let in. It sends nothing, so call it as often as you like.

        Right after an operation every member gets the same answer, so that all admit, or none. One that
        has done nothing for `PENDING_S` is told what is known now.
        """
        agreed = self._agreed_pending
        view = self._status.view
        if view is not None and agreed.mark == view.mark and time.monotonic() - agreed.since < PENDING_S:
            return agreed.pending
        return self._status.pending

    @property
    def _status(self) -> Status:
        return self._driver.status

    def __repr__(self) -> str:
        return f"Communicator({self._node_id} at {self._address}, {self.world_size} members, epoch {self.epoch})"

    # --- changing who is here ------------------------------------------------------------------

    def meet(self, addresses: Iterable[str]) -> None:
        """Dial others, without waiting: two groups of one name that meet become one, as after a split that heals.

        Members of the one that yields have their calls end with `Evicted`. Raises `BadAddress` before it dials, or
        `BadArgument` if the group is for one machine and an address is not of it.
        """
        parsed = [Address.parse(address) for address in addresses]
        if self._of_one_machine:
            _check_loopback(parsed)
        self._driver.meet(parsed)

    def admit(self, timeout: float = 30.0) -> None:
        """Let in those who wait. A member that was left out waits to be let in again.

        Every other member must call it too, or wait in a call that not all have made.

        Raises:
            Aborted, DeadlineExceeded, Evicted, InDoubt: nobody was let in, as far as is known.
        """
        call = self._begin(ADMIT_TAG, ADMIT, (), b"", timeout, self._step_runner.lag(timeout, of_step=False))
        with waiting(self._driver, call):
            finished = call.wait_finish(last_moment(call, self._driver.timing.settling))
        if finished.verdict is not CallVerdict.COMMIT:
            raise error_of(finished)

    def wait_for(self, members: int, timeout: float = 60.0) -> None:
        """Wait until the group has at least so many members, and let in those that come meanwhile.

        All members may call it, or some, while the others wait in another call. Its error also shows a
        process that was started without seeds by mistake, and so founded a group of its own.

        Raises:
            BadArgument: no group has so many members.
            DeadlineExceeded: they did not come in time.
            CommunicatorClosed: this member left.
        """
        if not 1 <= members <= MAX_MEMBERS:
            raise BadArgument(f"members = {members}: give 1 to {MAX_MEMBERS}")
        until = time.monotonic() + check_timeout(timeout)

        def has_changed(now: Status) -> bool:
            return now.size >= members or now.pending or now.view is None  # left out: `admit` asks to be let in

        while self.world_size < members:
            left = until - time.monotonic()
            if left <= 0 or not self._driver.wait_changed(has_changed, left):
                raise DeadlineExceeded(
                    f"{self.world_size} of {members} members after {timeout:g} s: start the others with "
                    f"seeds=[{self.address!r}], and this one with the address of a member if it should have "
                    "joined them, for without seeds it founded a group of its own"
                )
            if self.world_size < members:
                with suppress(*CALLED_OFF):
                    self.admit(until - time.monotonic())

    def leave(self) -> None:
        """Leave the group and close everything; the others go on. Calls in flight end with `CommunicatorClosed`."""
        self._finalizer()

    def __enter__(self) -> "Communicator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    # --- steps ---------------------------------------------------------------------------------

    def run(
        self, step: "Callable[[Communicator], T]", state: SharedState | None = None, timeout: float = 600.0
    ) -> StepResult[T]:
        """Take one step of training together with all members: call `step(comm)` until it counts, for all or for none.

            while training:
                done = comm.run(lambda comm: comm.all_reduce(gradient(batch)).value, state)
                apply(done.value)

        The group's calls are in `step`, the same at all members; the change of the model comes after `run`. Whenever a
        call in it is called off, for whatever reason and wherever, all members come together, agree on which step is
        next, and begin it anew. Newcomers are let in between steps, and are told which one is next. Nothing else may
        call `admit` meanwhile.

        Guarantees:
            A step that `run` returns from counts: every member that stays in the group returns from it with
            the same `number` and `members`, in this call of `run` or, if it was cut off at that moment, the next.
            A step is one view: the contributors to each of its calls are its `members`. If a member is lost between two
            of its calls, the step is taken again.
            Numbers rise by one, but for a member that was out of the group: it goes on where the others are.
            The function may run any number of times for a step, also after all its calls have succeeded. So it must
            compute its calls' arguments each time (a buffer that was reduced in place is no gradient any more),
            change nothing else that outlives it, and let the calls' errors out.

        Args:
            step: what this member does in a step; its result is `value`.
            state: what the members hold in common. A member that is new or behind is given the others' before its first
                step, and so are all when a group begins. `revision` is set to the steps that count. All members give
                one, or none does. Apply a result to it before the next `run`.
            timeout: seconds until the step counts, waiting for slower members and beginning anew included.

        Raises:
            Aborted, DeadlineExceeded, Evicted, InDoubt, NotEnoughPeers: no step has counted within `timeout`;
                the last reason why. `run` may be called again.
            BadArgument, Mismatch: the members' calls do not fit together.
            CommunicatorClosed: this member left.
            Exception: what `step` raised by itself. The others wait until this member calls `run` again,
                leaves, or their calls' time is up.
        """
        return self._step_runner.run(self, self._come_together, step, state, timeout)

    @property
    def stay(self) -> int:
        """How often this member came into the group: more than once if the others went on without it meanwhile."""
        return self._status.stay

    @property
    def outside(self) -> bool:
        """Whether this member is in no group at the moment, and `admit` would wait to be let in."""
        return self._status.view is None

    # --- operations ----------------------------------------------------------------------------

    def all_reduce(  # noqa: PLR0913  # keywords that outside code relies on
        self,
        x: TensorLike,
        op: Op = Op.AVG,
        out: TensorLike | None = None,
        weight: float = 1.0,
        codec: Codec = Codec.NONE,
        tag: int = 0,
        timeout: float = 30.0,
        feedback: Feedback | None = None,
        step: int | None = None,
    ) -> ReduceResult:
        """Combine all members' `x`, with the same bits at every member.

        Args:
            x: a torch tensor or a NumPy array, any shape and layout, CPU or CUDA; overwritten if `out` is None.
            op: how; AVG weighs each member by its `weight`, which may be 0.
            out: where the result goes, of x's shape and type.
            weight: this member's, for AVG.
            codec: how values travel.
            tag: tells operations in flight apart; one call a tag at a time.
            timeout: seconds until it is called off.
            feedback: keeps what a lossy codec loses, for this tensor's next call.
            step: which of the caller's steps this is: a member that calls in another one is told of a `Mismatch`.

        Raises:
            BadArgument: nothing was sent.
            Mismatch: another member called it with other arguments.
            Aborted, DeadlineExceeded, Evicted, InDoubt: the buffer is as it was.
        """
        return self._reducing(x, op, out, weight, codec, _own_tag(tag), timeout, feedback, step)()

    def all_reduce_async(  # noqa: PLR0913
        self,
        x: TensorLike,
        op: Op = Op.AVG,
        out: TensorLike | None = None,
        weight: float = 1.0,
        codec: Codec = Codec.NONE,
        tag: int = 0,
        timeout: float = 30.0,
        feedback: Feedback | None = None,
        step: int | None = None,
    ) -> Handle[ReduceResult]:
        """Start `all_reduce` and return at once. Leave `x` and `out` alone until the handle's `wait` returns."""
        return self._in_flight.start(
            lambda: self._reducing(x, op, out, weight, codec, _own_tag(tag), timeout, feedback, step), timeout
        )

    def all_gather(self, x: TensorLike, tag: int = 0, timeout: float = 30.0, step: int | None = None) -> ReduceResult:
        """Return everybody's `x` (of one type and size) in a new buffer, `contributors` along its first dimension.

        Raises: as `all_reduce`.
        """
        return self._run(_own_tag(tag), AllGather(self._known, x), timeout, step)()

    def broadcast(
        self, x: TensorLike, root: NodeId, tag: int = 0, timeout: float = 30.0, step: int | None = None
    ) -> ReduceResult:
        """Fill everybody's `x` (of one type and size) with the root's.

        Raises: as `all_reduce`; `BadArgument` if `root` is no member.
        """
        return self._run(_own_tag(tag), Broadcast(self._known, x, root), timeout, step)()

    def barrier(self, timeout: float = 30.0, step: int | None = None) -> ReduceResult:
        """Return when every member has called it; the result's `value` is None. Raises: as `all_reduce`."""
        return self._run(_BARRIER, Barrier(), timeout, step)()

    def sync_state(
        self,
        state: SharedState,
        strategy: SyncStrategy = SyncStrategy.ENFORCE_POPULAR,
        timeout: float = 60.0,
        step: int | None = None,
    ) -> SyncResult:
        """Replace `state` by the group's, on commit only and each tensor whole; every member must call it.

        Raises:
            BadArgument: nothing was sent.
            Mismatch: states that cannot go together.
            Aborted, DeadlineExceeded, NotEnoughPeers, Evicted, InDoubt: the state is as it was; what arrived is kept
                for the next call.
        """
        done = self._run(_SYNC, Sync(state, strategy), timeout, step)()
        outcome = done.value
        return SyncResult(
            outcome.revision,
            outcome.bytes_sent,
            outcome.bytes_received,
            outcome.source,
            done.contributors,
            done.seconds,
            outcome.replaced,
        )

    # --- operations without an agreement ---------------------------------------------------------

    @property
    def turn(self) -> OpId | None:
        """The operation that was the last rendezvous of `run`, the same at all members; None before it."""
        return self._step_runner.turn

    def carry_out_in(self, view: bytes) -> None:
        """Say that operations of the step of `run` that is being taken are carried out in the view of this mark.

        Raises `Aborted` if others of the step were carried out in another view: then the step is taken again.
        """
        if self._step_runner.attempt is not None:
            self._step_runner.attempt.carry_out_in(view)

    @property
    def data_plane(self) -> DataPlane:
        """The streams to the other members."""
        return self._driver.exchange

    @property
    def view(self) -> View | None:
        """The view that holds; None outside of the group."""
        return self._status.view

    # --- how an operation runs -----------------------------------------------------------------

    def _come_together(self, job: Rendezvous | EndOfStep, timeout: float) -> ReduceResult:
        return self._run(RENDEZVOUS_TAG if isinstance(job, Rendezvous) else _STEP, job, timeout)()

    def _reducing(  # noqa: PLR0913
        self,
        x: TensorLike,
        op: Op,
        out: TensorLike | None,
        weight: float,
        codec: Codec,
        tag: int,
        timeout: float,
        feedback: Feedback | None,
        step: int | None,
    ) -> Callable[[], ReduceResult]:
        job = AllReduce(self._known, self.members, x, op=op, out=out, weight=weight, codec=codec, feedback=feedback)
        try:
            carry_out = self._run(tag, job, timeout, step)
        except BaseException:
            job.end()
            raise

        def reduce() -> ReduceResult:
            try:
                return carry_out()
            finally:
                job.end()

        return reduce

    def _run(self, tag: int, job: Job[Any], timeout: float, step: int | None = None) -> Callable[[], ReduceResult]:
        """Begin an operation here and now; what is returned carries it out, on any thread."""
        if step is not None and not 0 <= step <= MAX_STEP:
            raise BadArgument(f"step = {step}: give an integer in [0, {MAX_STEP}]")
        digest = (*((("step", step),) if step is not None else ()), *job.digest)
        began = time.perf_counter()
        lag = self._step_runner.lag(timeout, of_step=not isinstance(job, Rendezvous | EndOfStep))
        call = self._begin(tag, job.kind, digest, FLAGS[self._status.pending] + job.share, timeout, lag)
        seen: list[AgreedPending] = []
        attempt = self._step_runner.attempt

        def perform(start: Perform, port: Port) -> Any:
            if attempt is not None:
                attempt.carry_out_in(start.view.mark)
            seen.append(AgreedPending(start.view.mark, any(s[:1] == FLAGS[True] for s in start.shares.values())))
            return job.perform(replace(start, shares={name: s[1:] for name, s in start.shares.items()}), port)

        def carry_out() -> ReduceResult:
            done: Committed[Any] = finish_call(self._driver, call, self._driver.timing.settling, perform)
            self._agreed_pending = replace(seen[-1], since=time.monotonic())
            return ReduceResult(
                job.publish(done.outcome),
                done.finished.contributors,
                done.finished.op.epoch,
                done.bytes_sent + job.inline[0],
                done.bytes_received + job.inline[1],
                time.perf_counter() - began,
            )

        return carry_out

    def _begin(
        self, tag: int, kind: str, digest: tuple[tuple[str, int | str], ...], share: bytes, timeout: float, lag: float
    ) -> PendingCall:
        if self._status.closed or not self._finalizer.alive:
            raise CommunicatorClosed(HAS_LEFT)
        if check_timeout(timeout) <= 0:
            raise DeadlineExceeded(f"timeout = {timeout:g} s leaves no time: allow more")
        return self._driver.begin(Begin(tag, kind, timeout, digest, share, lag))


def _end(driver: GroupDriver, in_flight: HandlesInFlight) -> None:
    driver.stop(goodbye=True)
    in_flight.join(JOIN_S)


def _check_loopback(addresses: Iterable[Address]) -> None:
    for address in addresses:
        if not address.is_loopback:
            raise BadArgument(
                f"{address} is not on loopback, and whoever reaches it could join: give secret=, or may_join="
            )


def _own_tag(tag: int) -> int:
    if not 0 <= tag <= MAX_TAG:
        raise BadArgument(f"tag = {tag}: give an integer in [0, {MAX_TAG}]")
    return tag
