"""All-reduce on a ring: reduce-scatter, then all-gather; each member talks to its two neighbours only.

The values are cut into n segments. Member p of the tour starts the sum of segment p - 1; each next
member adds its own and passes it on, until member p, n - 1 steps later, has the whole of segment p:

    step t < n - 1      p sends its partial sum of segment p - 1 - t
    step n - 1          p finishes segment p, and sends it
    step n - 1 + s      p passes on segment p - s as it came

Steps run into one another, a chunk at a time. So the order of a segment's sum is that of the tour,
from its owner's successor to its owner. Partial sums travel in the values' own type, and no codec
encodes them: it would do so at every hop, and its error would grow with the members.

A segment's partial sum and, later, its result use the same memory: the result exists only after
every member has received the partial sum.
"""

from collections.abc import Sequence

import torch

from collectives.mesh.port import PendingReceive, Port
from collectives.reduce.kernels import Reduction, Scratch, Span, chunks, combine, cut, finish, start
from collectives.reduce.tensors import memory
from protocol.identity import NodeId

# Times the usual chunk: each is on its way n times as often as in the direct exchange, so its fixed cost weighs more
# (64 MiB between 8 processes: 2 MiB takes 0.92 times as long as 1 MiB).
CHUNK = 2


def all_reduce(
    port: Port, job: Reduction, values: torch.Tensor, scratch: Scratch, *, tour: Sequence[NodeId] = ()
) -> torch.Tensor:
    """Return the reduced values, from `scratch`, with the same bits at every member.

    Args:
        port: the way to the other members; only two of them are used.
        job: the same at every member; without a codec, and its work type is that of the values.
        values: this member's own, 1-D.
        scratch: where the result's memory comes from.
        tour: the members in the order of the ring, agreed by all; empty: in `job.order`.

    Raises:
        Aborted, DeadlineExceeded: the port was cancelled or is out of time.
    """
    return _Ring(port, job, values, scratch, tuple(tour) or job.order).run()


class _Ring:
    def __init__(
        self, port: Port, job: Reduction, values: torch.Tensor, scratch: Scratch, tour: tuple[NodeId, ...]
    ) -> None:
        self._port, self._job, self._values = port, job, values
        self._members = len(tour)
        self._place = tour.index(port.own)
        self._left, self._right = tour[self._place - 1], tour[(self._place + 1) % self._members]
        self._segments = [list(chunks(span, CHUNK * job.chunk)) for span in cut(values.numel(), [1.0] * self._members)]
        self._most = max(map(len, self._segments))  # chunks of a segment: numbers the slots
        self._result = scratch.take(values.numel(), job.dtype)
        self._coming: dict[int, PendingReceive] = {}

    def run(self) -> torch.Tensor:
        for step in range(1, 2 * self._members - 1):
            for c, span in enumerate(self._segments[self._segment(step)]):
                slot = self._slot(step, c)
                self._coming[slot] = self._port.expect(self._left, slot, memory(self._result[slice(*span)]))
        for step in range(self._members):
            for c, span in enumerate(self._segments[self._segment(step)]):
                self._add(step, c, span)
        for step in range(self._members, 2 * self._members - 1):
            for c, span in enumerate(self._segments[self._segment(step)]):
                self._pass_on(step, c, span)
        self._port.flush()
        return self._result

    def _segment(self, step: int) -> int:
        """Return the segment that is dealt with at a step; steps of the second half count from the own one."""
        return (self._place - 1 - step) % self._members

    def _slot(self, step: int, c: int) -> int:
        return step * self._most + c

    def _add(self, step: int, c: int, span: Span) -> None:
        job, work, own = self._job, self._result[slice(*span)], self._values[slice(*span)]
        weight = job.weights[self._port.own]
        if step == 0:
            start(own, weight, work)
        else:
            self._port.wait(self._coming.pop(self._slot(step, c)))
            combine(job.op, work, own, weight)
        if step == self._members - 1:
            finish(job.op, work, job.total, work)
        if self._members > 1:
            self._port.send(self._right, self._slot(step + 1, c), memory(work))

    def _pass_on(self, step: int, c: int, span: Span) -> None:
        self._port.wait(self._coming.pop(self._slot(step, c)))
        if step < 2 * self._members - 2:
            self._port.send(self._right, self._slot(step + 1, c), memory(self._result[slice(*span)]))
