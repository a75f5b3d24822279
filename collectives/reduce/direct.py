"""All-reduce by direct exchange: each member owns a slice, reduces everybody's values of it, and sends the result.

    member i                                          owner j of slice j
      chunk k of slice j of its values   --2k-->      add in the members' order; encode once
      its result, slice j, chunk k       <--2k+1--    to everybody

Two steps however many members, each byte sent once on the shortest way, and one rounding for
16-bit floats; it needs a link between any two members.

**Bounded memory without deadlock.** A member reduces its next chunk r when all contributions to it are here. Until then
it sends, chunk s of all slices in turn, but at most `window` chunks ahead of r; then it waits. It has room for
contributions to chunks r to r + window - 1, results always have their place. Let m be a member whose r is least. A
member that owes it chunk r is not waiting to reduce, since it would first have sent r (its own r is no less, and it
sends at least one ahead). Nor is it waiting to send s <= r, since every receiver has room for that. So m's chunk comes,
and some r grows.
"""

import torch

from collectives.mesh.port import PendingReceive, Port
from collectives.reduce.codecs import BLOCK, Feedback
from collectives.reduce.kernels import Reduction, Scratch, Span, add_up, chunks, cut, finish
from collectives.reduce.tensors import memory
from protocol.identity import NodeId

# Contributions that a member has room for. Long links need it: 64 MiB is 5 Gbit/s over 100 ms. At least
# four chunks, so that one is reduced while others come, also among many members.
WINDOW_BYTES = 64 << 20
MIN_WINDOW = 4
MOST_BYTES = 256 << 20  # of that room: from 64 members on chunks are smaller, so that four of each fit


def all_reduce(
    port: Port,
    job: Reduction,
    values: torch.Tensor,
    scratch: Scratch,
    *,
    feedback: Feedback | None = None,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the reduced values, from `scratch` or in `into`, with the same bits at every member.

    Args:
        port: the way to the other members.
        job: the same at every member.
        values: this member's own, 1-D, of the tensor's type.
        scratch: where the result's memory comes from.
        feedback: the residual of this tensor; the caller commits or aborts it with the operation.
        into: where the results go, like the values. It may be the values themselves, if the caller can lose them on
            failure: a result replaces a value once its owner has that value.

    Raises:
        Aborted, DeadlineExceeded: the port was cancelled or is out of time.
        BadArgument: the feedback does not fit.
    """
    if feedback is None or job.coder is None or job.weights[port.own] <= 0:
        return _Exchange(port, job, values, scratch, None, into).run()
    return _Exchange(port, job, feedback.start(values, job.op, job.work), scratch, feedback, into).run()


class _Exchange:
    def __init__(
        self,
        port: Port,
        job: Reduction,
        values: torch.Tensor,
        scratch: Scratch,
        feedback: Feedback | None,
        into: torch.Tensor | None,
    ) -> None:
        self._port, self._job, self._values, self._feedback = port, job, values, feedback
        self._result = scratch.take(values.numel(), job.dtype) if into is None else into
        slices = cut(values.numel(), len(job.order))
        own = job.order.index(port.own)
        room = MOST_BYTES // (MIN_WINDOW * len(job.order) * job.dtype.itemsize)  # in values
        chunk = max(BLOCK, min(job.chunk, room // BLOCK * BLOCK))
        self._own = list(chunks(slices[own], chunk))
        # Each starts with its neighbour, so that not all send to the same one first.
        self._others: list[tuple[NodeId, list[Span]]] = [
            (job.order[i % len(job.order)], list(chunks(slices[i % len(job.order)], chunk)))
            for i in range(own + 1, own + len(job.order))
        ]
        self._weight = job.weights[port.own]
        self._givers = [member for member in job.order if member != port.own and job.weights[member]]
        held = max(1, len(self._givers)) * chunk * job.dtype.itemsize
        self._window = max(MIN_WINDOW, WINDOW_BYTES // held)
        self._scratch = scratch
        # Rounded up, for rooms hold numbers of up to eight bytes.
        self._room_bytes = -(-self._size(self._own[0]) // 64) * 64 if self._own else 0
        self._rooms = min(self._window, len(self._own)) if self._givers else 0
        self._held = scratch.take(self._rooms * len(self._givers) * self._room_bytes, torch.uint8)
        self._coming: dict[tuple[NodeId, int], PendingReceive] = {}
        self._encoded: dict[tuple[NodeId, int], torch.Tensor] = {}

    def run(self) -> torch.Tensor:
        for member, spans in self._others:
            for k, span in enumerate(spans):
                self._expect_result(member, k, span)
        for k in range(self._rooms):
            self._expect_values(k)
        steps = max((len(spans) for _, spans in self._others), default=0)
        sent = reduced = 0
        while sent < steps or reduced < len(self._own):
            all_reduced = reduced == len(self._own)
            may_send = sent < steps and (all_reduced or sent - reduced < self._window)
            if all_reduced or (may_send and not self._is_here(reduced)):
                self._send_all(sent)
                sent += 1
            else:
                self._reduce(reduced)
                if self._rooms and reduced + self._rooms < len(self._own):
                    self._expect_values(reduced + self._rooms)
                reduced += 1
        for k in range(steps):
            for member, spans in self._others:
                if k < len(spans):
                    self._take_result(member, k, spans[k])
        self._port.flush()
        self._scratch.give(self._held)
        return self._result

    def _size(self, span: Span) -> int:
        """Return the bytes that the values of a span travel in."""
        count, coder = span[1] - span[0], self._job.coder
        return count * self._job.dtype.itemsize if coder is None else coder.size(count)

    def _place(self, giver: NodeId, k: int) -> torch.Tensor:
        """Return the bytes that `giver`'s contribution to own chunk k goes to."""
        room = (k % self._rooms) * len(self._givers) + self._givers.index(giver)
        first = room * self._room_bytes
        return self._held[first : first + self._size(self._own[k])]

    def _expect_values(self, k: int) -> None:
        for giver in self._givers:
            self._coming[giver, 2 * k] = self._port.expect(giver, 2 * k, memory(self._place(giver, k)))

    def _expect_result(self, owner: NodeId, k: int, span: Span) -> None:
        coder = self._job.coder
        into = self._result[slice(*span)]
        if coder is not None:
            into = self._encoded[owner, k] = torch.empty(coder.size(span[1] - span[0]), dtype=torch.uint8)
        self._coming[owner, 2 * k + 1] = self._port.expect(owner, 2 * k + 1, memory(into))

    def _is_here(self, k: int) -> bool:
        return all(self._coming[giver, 2 * k].done() for giver in self._givers)

    def _send_all(self, k: int) -> None:
        for member, spans in self._others:
            if k < len(spans) and self._weight:
                self._send_values(member, k, spans[k])

    def _send_values(self, to: NodeId, k: int, span: Span) -> None:
        values, coder = self._values[slice(*span)], self._job.coder
        if coder is not None:
            wanted = values.to(self._job.work)
            values = coder.encode(wanted)
            if self._feedback is not None:
                got = torch.empty_like(wanted)
                coder.decode(values, got)
                self._feedback.lost(span[0], wanted, got)
        self._port.send(to, 2 * k, memory(values))

    def _reduce(self, k: int) -> None:
        job, span = self._job, self._own[k]
        into = self._result[slice(*span)]
        work = into if job.work is job.dtype else torch.empty(into.numel(), dtype=job.work)
        self._add_up(k, work)
        if job.coder is None or not self._others:
            finish(job.op, work, job.total, into)
            sent = into
        else:
            finish(job.op, work, job.total, work)
            sent = job.coder.encode(work)
            got = torch.empty_like(work)
            job.coder.decode(sent, got)
            if self._feedback is not None and self._weight:
                self._feedback.lost(span[0], work, got, job.total / self._weight if job.op.name == "AVG" else 1.0)
            into.copy_(got)
        for member, _ in self._others:
            self._port.send(member, 2 * k + 1, memory(sent))

    def _add_up(self, k: int, work: torch.Tensor) -> None:
        """Fill `work` with the members' values, combined in their order."""
        job, own = self._job, self._values[slice(*self._own[k])]
        counted = [member for member in job.order if job.weights[member]]
        if work.data_ptr() == own.data_ptr() and self._port.own in counted[2:]:
            own = own.clone()  # the first two are added up where it is
        add_up(job, lambda member: self._contribution(member, k, own), work)

    def _contribution(self, member: NodeId, k: int, own: torch.Tensor) -> torch.Tensor:
        if member == self._port.own:
            return own
        ticket = self._coming.pop((member, 2 * k), None)
        if ticket is not None:
            self._port.wait(ticket)
        data = self._place(member, k)
        if self._job.coder is None:
            return data.view(self._job.dtype)
        values = torch.empty(own.numel(), dtype=self._job.work)
        self._job.coder.decode(data, values)
        return values

    def _take_result(self, owner: NodeId, k: int, span: Span) -> None:
        self._port.wait(self._coming.pop((owner, 2 * k + 1)))
        into = self._result[slice(*span)]
        if self._job.coder is not None:
            values = into if into.dtype is self._job.work else torch.empty(into.numel(), dtype=self._job.work)
            self._job.coder.decode(self._encoded.pop((owner, k)), values)
            if values is not into:
                into.copy_(values)
