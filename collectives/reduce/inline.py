"""An all-reduce of few values: they travel with the agreement itself, and every member does the whole sum.

A member's share, which it sends when it initiates an operation, goes to everybody when the operation starts. Values
that fit in there cost no message of their own and no second round trip. Everybody adds them up in the members' order:
the bits are the same. They are not encoded, for there is nothing to gain.
"""

from collections.abc import Mapping

import torch

from collectives.errors import Aborted
from collectives.reduce.kernels import Reduction, combine, finish, start
from collectives.reduce.tensors import memory
from protocol.identity import NodeId

# A share goes from each member to the coordinator and, with all others', to every member: n^2 times its
# size leaves the coordinator. 512 KiB in all is 5 ms of a 1 Gbit/s link, what two more round trips
# with their wake-ups cost on a LAN; one share at most half of what `messages` let it be.
INLINE_TOTAL_BYTES = 512 << 10
INLINE_SHARE_BYTES = 32 << 10


def goes_inline(nbytes: int, members: int) -> bool:
    """Tell whether a tensor of `nbytes` travels with the agreement of that many members."""
    return nbytes <= INLINE_SHARE_BYTES and nbytes * members**2 <= INLINE_TOTAL_BYTES


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
