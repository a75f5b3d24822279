"""An all-reduce from values to a result, by the algorithm that the members' plan names.

Few values travel with the agreement itself (`reduce_inline`), and every member does the whole sum. A member's share,
which it sends when it initiates an operation, goes to everybody when the operation starts. Values that fit in there
cost no message of their own and no second round trip; everybody adds them up in the members' order, so the bits are the
same. They are not encoded: there is nothing to gain.
"""

from collections.abc import Mapping

import torch

from collectives.errors import Aborted
from collectives.mesh.port import Port
from collectives.reduce import direct, ring
from collectives.reduce.codecs import Feedback
from collectives.reduce.kernels import Reduction, Scratch, combine, finish, start
from collectives.reduce.tensors import memory
from collectives.reduce.topology import RING_BYTES, SumPlan
from protocol.identity import NodeId


def reduce(
    port: Port,
    job: Reduction,
    flat: torch.Tensor,
    scratch: Scratch,
    *,
    plan: SumPlan,
    feedback: Feedback | None = None,
) -> torch.Tensor:
    """Return the members' values reduced: 1-D, scratch, the same bits at every member.

    Args:
        port: the way to the other members.
        job: from `kernels.describe`, the same at every member.
        flat: this member's own values, from `tensors.flatten`; they are only read.
        scratch: where the result's memory comes from; give the result back once it is published.
        plan: the same at every member.
        feedback: this tensor's residual; the caller commits or aborts it with the operation.

    Raises:
        Aborted, DeadlineExceeded: the port was cancelled or is out of time.
        BadArgument: the feedback does not fit.
    """
    if plan.by_ring and may_go_by_ring(job, flat.nbytes):
        return ring.all_reduce(port, job, flat, scratch, tour=plan.tour)
    values = flat
    counts = job.coder is not None and job.weights[port.own] > 0
    if feedback is not None and counts:
        values = feedback.start(flat, job.op, job.work)
    collected = feedback if counts else None
    return direct.all_reduce(port, job, values, scratch, capacity=plan.capacity, feedback=collected)


def may_go_by_ring(job: Reduction, nbytes: int) -> bool:
    """Tell whether a ring may serve: large values whose partial sums travel as they are, in the tensor's own type."""
    return nbytes >= RING_BYTES and job.coder is None and job.work is job.dtype


def pack_values(values: torch.Tensor) -> bytes:
    """Return the bytes of a flat tensor, to be a share or the end of one."""
    return bytes(memory(values))


def _unpack(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    """Return the values of a share, as a copy."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def reduce_inline(job: Reduction, count: int, shares: Mapping[NodeId, bytes]) -> torch.Tensor:
    """Return the reduced values of all members' shares, `count` in each.

    Raises:
        Aborted: a share has another length; its sender's digest said otherwise.
    """
    wanted = count * job.dtype.itemsize
    for member in job.order:
        if len(shares[member]) != wanted:
            text = f"member {member} sent {len(shares[member])} bytes of values where {wanted} were due"
            raise Aborted(text, member)
    result = torch.empty(count, dtype=job.dtype)
    work = result if job.work is job.dtype else torch.empty(count, dtype=job.work)
    counted = [member for member in job.order if job.weights[member]]
    start(_unpack(shares[counted[0]], job.dtype), job.weights[counted[0]], work)
    for member in counted[1:]:
        combine(job.op, work, _unpack(shares[member], job.dtype), job.weights[member])
    finish(job.op, work, job.total, result)
    return result
