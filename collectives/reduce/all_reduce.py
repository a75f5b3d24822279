"""An all-reduce from values to a result, by the algorithm that the members' links suggest."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from collectives.mesh.port import Port
from collectives.reduce import direct, ring
from collectives.reduce.choice import Links, capacities, choose
from collectives.reduce.feedback import Feedback
from collectives.reduce.reduction import Reduction, Scratch
from protocol.identity import NodeId


@dataclass(frozen=True)
class Topology:
    """What the members agreed on about their links; empty until they have measured."""

    tour: tuple[NodeId, ...] = ()
    links: Links = field(default_factory=dict)

    def ring_of(self, order: Sequence[NodeId]) -> tuple[NodeId, ...]:
        """Return the tour of exactly these members: those that left are skipped, new ones come last."""
        kept = [member for member in self.tour if member in order]
        return (*kept, *(member for member in order if member not in kept))


def reduce(
    port: Port,
    job: Reduction,
    flat: torch.Tensor,
    scratch: Scratch,
    *,
    topology: Topology | None = None,
    feedback: Feedback | None = None,
) -> torch.Tensor:
    """Return the members' values reduced: 1-D, scratch, the same bits at every member.

    Args:
        port: the way to the other members.
        job: from `reduction.describe`, the same at every member.
        flat: this member's own values, from `tensors.flatten`; they are only read.
        scratch: where the result's memory comes from; give the result back once it is published.
        topology: what the members agreed about their links.
        feedback: this tensor's residual; the caller commits or aborts it with the operation.

    Raises:
        Aborted, DeadlineExceeded: the port was cancelled or is out of time.
        BadArgument: the feedback does not fit.
    """
    topology = topology or Topology()
    values = flat
    counts = job.coder is not None and job.weights[port.own] > 0
    if feedback is not None and counts:
        values = feedback.start(flat, job.op, job.work)
    collected = feedback if counts else None
    tour = topology.ring_of(job.order)
    is_exact = job.coder is None and job.work is job.dtype
    if choose(job.order, tour, flat.nbytes, topology.links, is_exact=is_exact) == "ring":
        return ring.all_reduce(port, job, values, scratch, tour=tour, feedback=collected)
    capacity = capacities(job.order, topology.links)
    return direct.all_reduce(port, job, values, scratch, capacity=capacity, feedback=collected)
