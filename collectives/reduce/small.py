"""All-reduce of few values: they travel with the agreement itself, and every member does the whole sum.

What a member says when it initiates an operation (its share) goes to everybody when the operation
starts. Values that fit in there cost no message of their own and no second round trip; everybody
adds them up in the members' order, so the bits are the same. They are not encoded: there is
nothing to gain.
"""

from collections.abc import Mapping

import torch

from collectives.errors import Aborted
from collectives.reduce.kernels import combine, finish, start
from collectives.reduce.reduction import Reduction
from collectives.reduce.tensors import memory
from protocol.identity import NodeId


def pack(values: torch.Tensor) -> bytes:
    """Return the bytes of a flat tensor, to be a share or the end of one."""
    return bytes(memory(values))


def unpack(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    """Return the values of a share, as a copy."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def all_reduce(job: Reduction, count: int, shares: Mapping[NodeId, bytes]) -> torch.Tensor:
    """Return the reduced values of all members' shares, `count` in each.

    Raises:
        Aborted: a share has another length; its sender's digest said otherwise.
    """
    wanted = count * job.dtype.itemsize
    for member in job.order:
        if len(shares[member]) != wanted:
            raise Aborted(f"member {member} sent {len(shares[member])} bytes of values where {wanted} were due")
    result = torch.empty(count, dtype=job.dtype)
    work = result if job.work is job.dtype else torch.empty(count, dtype=job.work)
    counted = [member for member in job.order if job.weights[member]]
    start(unpack(shares[counted[0]], job.dtype), job.weights[counted[0]], work)
    for member in counted[1:]:
        combine(job.op, work, unpack(shares[member], job.dtype), job.weights[member])
    finish(job.op, work, job.total, result)
    return result
