"""How the lines between members decide the way of a sum: direct exchange, or a ring along a measured tour.

    inline    the values travel with the agreement: see `all_reduce.reduce_inline`
    shared    all members share memory and there is no codec: see `shared`, chosen by what they offer with their calls
    direct    every member owns a slice: see `direct`
    ring      two neighbours each: see `ring`

The first two are chosen by size and place. Between the last two a `SumPlan` decides. It begins with direct exchange. In
steps of `Communicator.run` the members find out whether a ring is faster, without being asked to:

    COUNT     add up the sums that go by sockets, until measuring costs little beside them (`MEASURE_AFTER`)
    MEASURE   before the next step: probe each line, and agree on all
    RING      `TRIED` steps by the ring
    DIRECT    `TRIED` steps by direct exchange, with slices that follow the lines; then COUNT again,
              by the ring if it took at most `GAIN` of the time

Steps are timed, because a model of single lines is wrong where several share one: between two halves that one line
joins it would choose direct exchange, which takes 1.6 times as long as the ring (`benchmarks.unlike_lines`). The facts
of a step come from all members' END, so a plan is the same at all. Each call carries its plan's mark; where marks
differ, the call goes direct. A rendezvous, and a member that is lost, make a plan begin anew.

The ring takes values that may travel as partial sums without loss: no codec, and no 16-bit floats.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import permutations
from statistics import median

from protocol.identity import NodeId

# A share goes from each member to the coordinator and, with all others', to every member: n^2 times its
# size leaves the coordinator. 512 KiB in all is 5 ms of a 1 Gbit/s link, what two more round trips
# with their wake-ups cost on a LAN; one share at most half of what `messages` let it be.
INLINE_TOTAL_BYTES = 512 << 10
INLINE_SHARE_BYTES = 32 << 10

RING_BYTES = 1 << 20  # below this a ring's 2 (n - 1) waits in turn weigh more than the lines
RING_MEMBERS = 32  # with more, waits in turn and n - 1 probes in turn take too long
PROBE_BYTES = 4 << 20  # a third of a second at 100 Mbit/s: past slow start, and soon over
# Bytes of sums, for each member. A member probes n - 1 lines with 4 MiB, which is what a sum of 2 MiB n sends:
# so measuring adds some 3 % to what is sent.
MEASURE_AFTER = 64 << 20
TRIED = 3  # steps of each kind, of which the median counts
GAIN = 2 / 3  # a ring that saves less than a third is not worth the steps that tell: they vary by a fifth
EXACT_MEMBERS = 8  # 7! = 5,040 tours: some 20 ms

SLOWEST, FASTEST = 1.0, 1e15  # bytes a second that a member may tell of

Links = Mapping[tuple[NodeId, NodeId], float]  # bytes a second from one member to another


class PlanPhase(Enum):
    """The next thing that a plan needs."""

    COUNT = "count"
    MEASURE = "measure"
    RING = "ring"
    DIRECT = "direct"


@dataclass(frozen=True)
class SumPlan:
    """How large sums go, and what is known for a better plan. The same at all members."""

    phase: PlanPhase = PlanPhase.COUNT
    tour: tuple[NodeId, ...] = ()  # the order of a ring; empty: not measured
    capacity: tuple[float, ...] = ()  # bytes a second of each member, by id, which slices follow; empty: equal
    by_ring: bool = False
    reduced: int = 0  # bytes of sums since the last measurement
    rates: tuple[float, ...] = ()  # seconds a byte of the steps that were tried

    @property
    def mark(self) -> bytes:
        """Return what tells one way from another: 8 bytes."""
        return hashlib.sha256(repr((self.tour, self.capacity, self.by_ring)).encode()).digest()[:8]

    def suits(self, members: Sequence[NodeId]) -> bool:
        """Tell whether the plan was made for these members."""
        return not self.tour or sorted(self.tour) == sorted(members)

    def measured(self, members: Sequence[NodeId], links: Links) -> "SumPlan":
        """Return the plan once all lines are known; where one is not, the way stays and the count begins anew."""
        new_tour = tour(members, links)
        if not new_tour:
            return replace(self, phase=PlanPhase.COUNT, reduced=0)
        return SumPlan(PlanPhase.RING, new_tour, capacities(members, links), by_ring=True)

    def after(self, members: Sequence[NodeId], nbytes: int, seconds: float) -> "SumPlan":
        """Return the plan after a step that counts, whose large sums of `nbytes` in all took `seconds`."""
        if not self.suits(members):
            return SumPlan()
        if not nbytes:
            return self
        if self.phase in (PlanPhase.COUNT, PlanPhase.MEASURE):
            reduced = self.reduced + nbytes
            is_due = 3 <= len(members) <= RING_MEMBERS and reduced >= MEASURE_AFTER * len(members)
            return replace(self, phase=PlanPhase.MEASURE if is_due else PlanPhase.COUNT, reduced=reduced)
        rates = (*self.rates, seconds / nbytes)
        if len(rates) < TRIED:
            return replace(self, rates=rates)
        if len(rates) < 2 * TRIED:
            return replace(self, phase=PlanPhase.DIRECT, by_ring=False, rates=rates)
        gains = median(rates[:TRIED]) <= GAIN * median(rates[TRIED:])
        return SumPlan(PlanPhase.COUNT, self.tour, self.capacity, by_ring=gains)


def goes_inline(nbytes: int, members: int) -> bool:
    """Tell whether a tensor of `nbytes` travels with the agreement of that many members."""
    return nbytes <= INLINE_SHARE_BYTES and nbytes * members**2 <= INLINE_TOTAL_BYTES


def links_of(order: Sequence[NodeId], rows: Sequence[Sequence[float]]) -> Links:
    """Return the links that the members' rows tell of, bytes a second to each in `order`; nonsense is left out."""
    return {
        (source, target): bandwidth
        for source, row in zip(order, rows, strict=True)
        for target, bandwidth in zip(order, row, strict=True)
        if source != target and SLOWEST <= bandwidth <= FASTEST
    }


def capacities(order: Sequence[NodeId], links: Links) -> tuple[float, ...]:
    """Return each member's bytes a second: the lesser of what it can send to all others and receive from them."""
    return tuple(
        min(
            sum(links[member, other] for other in order if other != member),
            sum(links[other, member] for other in order if other != member),
        )
        for member in order
    )


def tour(order: Sequence[NodeId], links: Links) -> tuple[NodeId, ...]:
    """Return the members in the order of a ring, from `order[0]` on; empty if a link is unknown.

    The ring's pace is that of its slowest edge, so that counts first, and the sum of all second. With few members every
    tour is tried; with more, the one that goes to the nearest member each time, from each member.
    """
    order = tuple(order)
    if any((a, b) not in links for a in order for b in order if a != b):
        return ()
    if len(order) < 3:
        return order
    if len(order) <= EXACT_MEMBERS:
        rings = ((order[0], *rest) for rest in permutations(order[1:]))
    else:
        rings = (_to_the_nearest(first, order, links) for first in order)
    best = min(rings, key=lambda ring: _cost(ring, links))
    at = best.index(order[0])
    return best[at:] + best[:at]


def _to_the_nearest(first: NodeId, order: Sequence[NodeId], links: Links) -> tuple[NodeId, ...]:
    ring, left = [first], [member for member in order if member != first]
    while left:
        nearest = max(left, key=lambda member: links[ring[-1], member])
        left.remove(nearest)
        ring.append(nearest)
    return tuple(ring)


def _cost(ring: Sequence[NodeId], links: Links) -> tuple[float, float]:
    """Return seconds for a byte: over the slowest edge, and over all."""
    edges = [1 / links[member, after] for member, after in zip(ring, [*ring[1:], ring[0]], strict=True)]
    return max(edges), sum(edges)
