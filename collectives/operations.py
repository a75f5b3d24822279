"""The operations: what each says before it starts, does while it runs, and publishes when it counted.

    digest   must be equal at all members: a difference is a `Mismatch`
    share    this member's own few bytes, which all get when it starts
    perform  the work, on scratch; the same result at every member
    publish  on commit only: the result into the caller's buffer

Arguments are checked when a job is made, before anything is sent.
"""

import struct
from collections.abc import Collection, Mapping
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
from collectives.reduce import direct, gather, shared
from collectives.reduce.codecs import Feedback, coder_for
from collectives.reduce.inline import goes_inline, pack_values, reduce_inline
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
from collectives.shared_state.state import SharedState, share_of
from collectives.shared_state.transfer import SyncOutcome, sync
from collectives.steps import Claim
from collectives.types import Codec, Op, SyncStrategy
from protocol.identity import NodeId

_HEAD = struct.Struct(">d")  # of an all-reduce's share: the weight
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
    """A communicator's store for its operations."""

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
        self.digest: Digest = (
            ("dtype", dtype_name(x)),
            ("count", self._values.numel()),
            ("op", op.value),
            ("codec", codec.value),
        )
        head = _HEAD.pack(check_weight(weight))
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
        weights = {member: _read_head(member, share) for member, share in shares.items()}
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
        return direct.all_reduce(port, job, self._values, self._known.scratch, feedback=self._feedback)

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
        return self._target

    def end(self) -> None:
        """It is over here, whatever came of it: others may use this member's memory for another operation."""
        if self._lease is not None:
            self._lease.end()


def _read_head(member: NodeId, share: bytes) -> float:
    """Return the weight of a share. Raises `Aborted`, and blames its sender."""
    try:
        return check_weight(*_HEAD.unpack_from(share))
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

    def __init__(self, claim: Claim, has_state: bool) -> None:
        self.share = claim.encode()
        self.digest: Digest = (("state", "given" if has_state else "not given"),)
        self.op: OpId | None = None

    def perform(self, start: Perform, port: Port) -> dict[NodeId, Claim]:
        """Read what all say."""
        self.op = start.op
        return {member: _read_claim(member, share) for member, share in start.shares.items()}

    def publish(self, outcome: dict[NodeId, Claim]) -> dict[NodeId, Claim]:
        """Return it."""
        return outcome


def _read_claim(member: NodeId, share: bytes) -> Claim:
    try:
        return Claim.decode(share)
    except CollectiveError as error:
        raise Aborted(f"member {member}: {error}", member) from None


class EndOfStep:
    """All have come to the end of a step; once all called, `op` names it, and `members` take it."""

    kind = "step"
    share = b""
    inline = (0, 0)

    def __init__(self, number: int) -> None:
        self.digest: Digest = (("step", number),)
        self.op: OpId | None = None
        self.members: tuple[NodeId, ...] = ()

    def perform(self, start: Perform, port: Port) -> OpId:
        """Note its name: without that this member has not sent OperationDone, and it cannot count."""
        self.op, self.members = start.op, start.view.members
        return start.op

    def publish(self, outcome: OpId) -> OpId:
        """Return its name."""
        return outcome


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
