"""The operations: what each says before it starts, does while it runs, and publishes when it counted.

    digest   must be equal at all members: a difference is a `Mismatch`
    share    this member's own few bytes, which all get when it starts
    perform  the work, on scratch; the same result at every member
    publish  on commit only: the result into the caller's buffer

Arguments are checked when a job is made, before anything is sent.
"""

import struct
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from collectives.agreement.events import Perform
from collectives.agreement.messages import Digest
from collectives.agreement.views import OpId
from collectives.errors import Aborted, BadArgument, CollectiveError
from collectives.mesh.data_plane import DataPlane
from collectives.mesh.port import Port
from collectives.mesh.shared_memory import OFFER_BYTES, Bay, MemoryOffer
from collectives.reduce import all_reduce as allreduce
from collectives.reduce import gather, shared
from collectives.reduce.all_reduce import may_go_by_ring, pack_values, reduce_inline
from collectives.reduce.codecs import Feedback, coder_for
from collectives.reduce.kernels import Reduction, Scratch, check_weight, describe
from collectives.reduce.shared import Pieces
from collectives.reduce.tensors import (
    DTYPES,
    TensorLike,
    check_target,
    dtype_name,
    flatten,
    fresh,
    publish,
    publish_pieces,
)
from collectives.reduce.topology import PROBE_BYTES, SumPlan, goes_inline, links_of
from collectives.shared_state.state import SharedState, share_of
from collectives.shared_state.transfer import SyncOutcome, sync
from collectives.steps import Claim
from collectives.types import Codec, Op, SyncStrategy
from protocol.identity import NodeId

_HEAD = struct.Struct(">d8s")  # of an all-reduce's share: the weight, and the mark of this member's plan
_LARGE = struct.Struct(">Qd")  # an END's share: the bytes of the step's large sums, and their seconds
_PINGS = 3  # the first waits for a member that is late; the least of the others counts
_SIZES = (1,) * _PINGS + (PROBE_BYTES,)
_SLOTS = 2 * len(_SIZES)  # of one round: each probe and its receipt; those below are for the rows
MAX_STEP_S = 1e9  # of sums in one step
MAX_LARGE = 4096  # sums of a step whose time counts
T = TypeVar("T")


class Job(Protocol[T]):
    """One operation, as its caller asked for it."""

    @property
    def kind(self) -> str:
        """The operation's name, the same at all members."""

    @property
    def digest(self) -> Digest:
        """Fields that must be equal at all members."""

    @property
    def share(self) -> bytes:
        """What this member tells all others."""

    @property
    def inline(self) -> tuple[int, int]:
        """Payload bytes that this member sent and received as shares or in memory, when it has been performed."""

    def perform(self, start: Perform, port: Port) -> T:
        """Do the work, on scratch."""

    def publish(self, outcome: T) -> Any:
        """It counted: put the result where it belongs, and return it."""


@dataclass
class Known:
    """A communicator's store for its operations. `plan` is replaced whole."""

    plan: SumPlan = field(default_factory=SumPlan)
    large: list[tuple[int, float]] = field(default_factory=list)  # bytes and seconds of large sums since the last END
    scratch: Scratch = field(default_factory=Scratch)
    plane: DataPlane | None = None  # whose members may share memory


class AllReduce:
    """All members' values combined."""

    kind = "all_reduce"

    def __init__(
        self,
        known: Known,
        members: Collection[NodeId],
        x: TensorLike,
        *,
        op: Op,
        out: TensorLike | None,
        weight: float,
        codec: Codec,
        feedback: Feedback | None = None,
    ) -> None:
        """`members` are those there are now, as far as is known. Call `end` when it is over. Raises `BadArgument`."""
        self._known = known
        self._op, self._codec, self._feedback = op, codec, feedback
        dtype_name(x, DTYPES)
        self._target = check_target(x, out)
        self._values = flatten(x)
        if feedback is not None and coder_for(codec, self._values.dtype) is not None:
            feedback.check(self._values.numel(), op)
        self.inline = (0, 0)
        self._pooled = False
        self._large: tuple[int, float] | None = None  # bytes and seconds, of a sum that a ring may serve
        self.digest: Digest = (
            ("dtype", dtype_name(x)),
            ("count", self._values.numel()),
            ("op", op.value),
            ("codec", codec.value),
        )
        head = _HEAD.pack(check_weight(weight), known.plan.mark)
        inline = feedback is None and goes_inline(
            1 + len(head) + self._values.nbytes, len(members)
        )  # 1: a flag of the communicator's
        may_share = (
            known.plane is not None
            and coder_for(codec, self._values.dtype) is None
            and self._values.nbytes >= shared.LEAST_BYTES
        )
        self._lease = known.plane.lease_memory(frozenset(members)) if may_share and known.plane is not None else None
        if self._lease is not None:
            head += self._lease.offer.encode()
        self.share = head + pack_values(self._values) if inline else head

    def perform(self, start: Perform, port: Port) -> torch.Tensor | Pieces:
        """Reduce: by way of the shares if all put their values there, in memory if all can, else by the port."""
        shares = start.shares
        if self._feedback is not None:
            self._feedback.abort()  # what it collected for a call that was called off
        heads = {member: _read_head(member, share) for member, share in shares.items()}
        weights = {member: weight for member, (weight, _) in heads.items()}
        job = describe(start.view.members, self._values.dtype, self._op, weights, self._codec)
        if all(len(share) == _HEAD.size + self._values.nbytes for share in shares.values()):
            values = {member: share[_HEAD.size :] for member, share in shares.items()}
            self.inline = self._values.nbytes, self._values.nbytes * (len(values) - 1)
            return reduce_inline(job, self._values.numel(), values)
        bays = self._bays(start, job)
        if bays is not None:
            pieces = shared.all_reduce(port, job, self._values, bays)
            self.inline = pieces.sent, pieces.received
            return pieces
        self._pooled = True
        plan = self._known.plan
        if {mark for _, mark in heads.values()} != {plan.mark} or not plan.suits(job.order):
            plan = SumPlan()
        began = time.perf_counter()
        result = allreduce.reduce(port, job, self._values, self._known.scratch, plan=plan, feedback=self._feedback)
        if may_go_by_ring(job, self._values.nbytes):
            self._large = self._values.nbytes, time.perf_counter() - began
        return result

    def _bays(self, start: Perform, job: Reduction) -> Mapping[NodeId, Bay] | None:
        """Return where all have room for this operation; None, at all members, if it cannot go by shared memory."""
        offered = {member: share[_HEAD.size :] for member, share in start.shares.items()}
        if self._lease is None or any(len(offer) != OFFER_BYTES for offer in offered.values()):
            return None
        bays = self._lease.bays({member: MemoryOffer.decode(offered[member]) for member in job.order})
        if bays is None and self._known.plane is not None:
            self._known.plane.hand_over_memory(frozenset(job.order))
        return bays if shared.fits(job, self._values.numel()) else None

    def publish(self, outcome: torch.Tensor | Pieces) -> TensorLike:
        """Fill the caller's buffer."""
        parts = outcome.parts if isinstance(outcome, Pieces) else (((0, outcome.numel()), outcome),)
        publish_pieces(parts, self._target)
        if self._feedback is not None:
            self._feedback.commit()
        if self._pooled and isinstance(outcome, torch.Tensor):
            self._known.scratch.give(outcome)
        if self._large is not None and len(self._known.large) < MAX_LARGE:  # without steps, nobody takes them out
            self._known.large.append(self._large)
        return self._target

    def end(self) -> None:
        """It is over here, whatever came of it: others may use this member's memory for another operation."""
        if self._lease is not None:
            self._lease.end()


def _read_head(member: NodeId, share: bytes) -> tuple[float, bytes]:
    """Return the weight and the plan's mark of a share. Raises `Aborted`, and blames its sender."""
    try:
        weight, mark = _HEAD.unpack_from(share)
        return check_weight(weight), mark
    except (struct.error, BadArgument) as error:
        raise Aborted(f"member {member} sent a share that is none: {error}", member) from None


class AllGather:
    """Everybody's values, in the members' order."""

    kind = "all_gather"
    share = b""
    inline = (0, 0)

    def __init__(self, known: Known, x: TensorLike) -> None:
        self._known, self._x = known, x
        self._flat = flatten(x)
        self._members = 1
        self.digest: Digest = (("dtype", dtype_name(x)), ("count", self._flat.numel()))

    def perform(self, start: Perform, port: Port) -> torch.Tensor:
        """Send to all, receive from all."""
        self._members = len(start.view.members)
        return gather.all_gather(port, start.view.members, self._flat, self._known.scratch)

    def publish(self, outcome: torch.Tensor) -> TensorLike:
        """Return a new buffer, with the members along a new first dimension."""
        result = fresh(self._x, (self._members, *self._x.shape))
        publish(outcome, result)
        self._known.scratch.give(outcome)
        return result


class Broadcast:
    """The root's values at everybody."""

    kind = "broadcast"
    share = b""
    inline = (0, 0)

    def __init__(self, known: Known, x: TensorLike, root: NodeId) -> None:
        self._known, self._root = known, root
        self._target = check_target(x, None)
        self._flat = flatten(x)
        self.digest: Digest = (("dtype", dtype_name(x)), ("count", self._flat.numel()), ("root", root))

    def perform(self, start: Perform, port: Port) -> torch.Tensor:
        """Send, or receive. Raises `BadArgument` at every member if the root is none of them."""
        if self._root not in start.view.ids:
            raise BadArgument(f"root {self._root} is no member: give one of {', '.join(start.view.members)}")
        return gather.broadcast(port, start.view.members, self._flat, self._root, self._known.scratch)

    def publish(self, outcome: torch.Tensor) -> TensorLike:
        """Fill the caller's buffer."""
        publish(outcome, self._target)
        self._known.scratch.give(outcome)
        return self._target


class Barrier:
    """Nothing but the agreement."""

    kind = "barrier"
    digest: Digest = ()
    share = b""
    inline = (0, 0)

    def perform(self, start: Perform, port: Port) -> None:
        """Everybody called it: that is all."""

    def publish(self, outcome: None) -> None:
        """Nothing to publish."""


class Rendezvous:
    """All say where they are in their steps."""

    kind = "rendezvous"
    inline = (0, 0)

    def __init__(self, known: Known, claim: Claim, has_state: bool) -> None:
        self._known = known
        self.share = claim.encode()
        self.digest: Digest = (("state", "given" if has_state else "not given"),)
        self.op: OpId | None = None

    def perform(self, start: Perform, port: Port) -> dict[NodeId, Claim]:
        """Read what all say."""
        self.op = start.op
        return {member: _read_claim(member, share) for member, share in start.shares.items()}

    def publish(self, outcome: dict[NodeId, Claim]) -> dict[NodeId, Claim]:
        """Return it; a plan begins anew with those who are here."""
        self._known.plan = SumPlan()
        self._known.large.clear()
        return outcome


def _read_claim(member: NodeId, share: bytes) -> Claim:
    try:
        return Claim.decode(share)
    except CollectiveError as error:
        raise Aborted(f"member {member}: {error}", member) from None


class EndOfStep:
    """All have come to the end of a step; once all called, `op` names it, and `members` take it."""

    kind = "step"
    inline = (0, 0)

    def __init__(self, known: Known, number: int) -> None:
        self._known = known
        self._plan = known.plan
        large, known.large = known.large, []
        self.share = _LARGE.pack(sum(nbytes for nbytes, _ in large), sum(seconds for _, seconds in large))
        self.digest: Digest = (("step", number),)
        self.op: OpId | None = None
        self.members: tuple[NodeId, ...] = ()

    def perform(self, start: Perform, port: Port) -> OpId:
        """Note its name: without that this member has not sent OperationDone, and it cannot count."""
        self.op, self.members = start.op, start.view.members
        large = [_read_large(member, share) for member, share in start.shares.items()]
        nbytes, seconds = min(nbytes for nbytes, _ in large), max(seconds for _, seconds in large)
        self._plan = self._plan.after(self.members, nbytes, seconds)
        return start.op

    def publish(self, outcome: OpId) -> OpId:
        """Return its name; the plan is that of the next step."""
        self._known.plan = self._plan
        return outcome


def _read_large(member: NodeId, share: bytes) -> tuple[int, float]:
    """Return the bytes and seconds of a member's large sums. Raises `Aborted`, and blames it."""
    if len(share) != _LARGE.size:
        raise Aborted(f"member {member} sent {len(share)} bytes at the end of a step, not {_LARGE.size}", member)
    nbytes, seconds = _LARGE.unpack(share)
    if not 0 <= seconds <= MAX_STEP_S:
        raise Aborted(f"member {member} says that its sums took {seconds} s", member)
    return nbytes, seconds


class Sync:
    """Shared state brought to the one that holds."""

    kind = "sync_state"
    digest: Digest = ()
    inline = (0, 0)

    def __init__(self, state: SharedState, strategy: SyncStrategy) -> None:
        self._state, self._strategy = state, strategy
        self.share = share_of(state, strategy)

    def perform(self, start: Perform, port: Port) -> SyncOutcome:
        """Fetch what differs; serve what others lack."""
        return sync(port, port.own, start.shares, self._state, self._strategy)

    def publish(self, outcome: SyncOutcome) -> SyncOutcome:
        """Swap what was fetched into the caller's tensors."""
        outcome.publish()
        return outcome


class Measure:
    """All lines between the members, probed in turn, and the plan that follows from them."""

    kind = "measure"
    digest: Digest = ()
    share = b""
    inline = (0, 0)

    def __init__(self, known: Known) -> None:
        self._known = known

    def perform(self, start: Perform, port: Port) -> SumPlan:
        """Probe the own lines, and tell all others; every member gets the same rows."""
        order = start.view.members
        row = torch.tensor(probe(port, order), dtype=torch.float64)
        rows = gather.all_gather(port, order, row, Scratch()).view(len(order), len(order))
        return self._known.plan.measured(order, links_of(order, rows.tolist()))

    def publish(self, outcome: SumPlan) -> None:
        """Use it from now on."""
        self._known.plan = outcome


def probe(port: Port, order: Sequence[NodeId]) -> list[float]:
    """Return the bytes a second from this member to each of `order`, 0 to itself; all call this.

    Raises:
        Aborted, DeadlineExceeded: the port was cancelled or is out of time.
    """
    own = list(order).index(port.own)
    bandwidth = [0.0] * len(order)
    # A member's receipts are given on a thread of their own: what it waits for itself must not delay them.
    receipts = threading.Thread(target=_give_receipts, args=(port, order, own), name="gossamer-probe", daemon=True)
    receipts.start()
    for distance in range(1, len(order)):
        target = (own + distance) % len(order)
        *trips, took = (
            _send_one(port, order[target], distance * _SLOTS + 2 * i, size) for i, size in enumerate(_SIZES)
        )
        bandwidth[target] = PROBE_BYTES / max(took - min(trips[1:]), 1e-6)
    receipts.join()
    port.flush()
    return bandwidth


def _send_one(port: Port, target: NodeId, slot: int, size: int) -> float:
    """Return the seconds from sending a payload to having its receipt."""
    receipt = port.expect(target, slot + 1, memoryview(bytearray(1)))
    began = time.perf_counter()
    port.send(target, slot, memoryview(bytes(size)))
    port.wait(receipt)
    return time.perf_counter() - began


def _give_receipts(port: Port, order: Sequence[NodeId], own: int) -> None:
    with suppress(CollectiveError):  # the prober sees the error, too
        for distance in range(1, len(order)):
            source = order[own - distance]
            for i, size in enumerate(_SIZES):
                slot = distance * _SLOTS + 2 * i
                port.wait(port.expect(source, slot, memoryview(bytearray(size))))
                port.send(source, slot + 1, memoryview(b"\0"))
