"""Which algorithm an operation takes: a pure function of what all members know alike.

    inline    the values travel with the agreement: see `small`
    direct    every member owns a slice: see `direct`
    ring      two neighbours each: see `ring`

`goes_inline` is asked before an operation starts, so it knows sizes only. `choose` compares what the
two others would take by the links as they were last measured, agreed in `optimize_topology`:

    direct    max over links of (slice_j + slice_i) / bandwidth(i -> j), and over members of what they
              send and receive / their fastest link; plus 2 delays of the slowest link
    ring      2 (n - 1) / n * size / slowest edge of the tour, plus 2 (n - 1) delays of its slowest edge

Where nothing was measured, the links count as equal and fast, and what is left is the processors' work:
the ring moves large values with less of it, because a member serves two streams and not 2 (n - 1).
Values that a codec makes inexact, or that the ring would widen (16-bit floats), go direct all the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from protocol.identity import NodeId

Algorithm = Literal["direct", "ring"]

# Time of the direct exchange over the ring's with the same links, 64 MiB between 4 and 8 processes on two
# cores: 1.17 and 1.12. Below 4 MiB a segment is less than a payload's size and the ring cannot overlap.
DIRECT_WORK = 1.15
RING_BYTES = 4 << 20

# A share goes from each member to the coordinator and, with all others', to every member: n^2 times its
# size leaves the coordinator. 512 KiB in all is 5 ms of a 1 Gbit/s link, what two more round trips
# with their wake-ups cost on a LAN; one share at most half of what `messages` let it be.
INLINE_TOTAL_BYTES = 512 << 10
INLINE_SHARE_BYTES = 32 << 10


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two members: bytes a second, and seconds one way."""

    bandwidth: float
    delay: float


Links = Mapping[tuple[NodeId, NodeId], Link]


def goes_inline(nbytes: int, members: int) -> bool:
    """Tell whether a tensor of `nbytes` travels with the agreement of that many members."""
    return nbytes <= INLINE_SHARE_BYTES and nbytes * members**2 <= INLINE_TOTAL_BYTES


def choose(
    order: Sequence[NodeId], tour: Sequence[NodeId], nbytes: int, links: Links, *, is_exact: bool = True
) -> Algorithm:
    """Return the algorithm that should end first; `tour` is the ring's order.

    `links` must be the same at all members; a pair that is missing from it counts as unknown, and
    then so does everything. `is_exact`: partial sums may travel as they are, in the tensor's own type.
    """
    if len(order) < 3:
        return "direct"  # with two members a ring is the same exchange, a step later
    work = DIRECT_WORK if is_exact and nbytes >= RING_BYTES else 1.0
    if any((a, b) not in links for a in order for b in order if a != b):
        return "direct" if work == 1.0 else "ring"
    direct = work * _direct_seconds(order, nbytes, links)
    return "direct" if direct <= _ring_seconds(tour or order, nbytes, links) else "ring"


def capacities(order: Sequence[NodeId], links: Links) -> list[float]:
    """Return each member's bytes a second, which the slices of the direct exchange follow; empty: unknown.

    A member's is the lesser of what it can send and what it can receive, to and from all others.
    """
    if len(order) < 2 or any((a, b) not in links for a in order for b in order if a != b):
        return []
    return [
        min(
            sum(links[one, other].bandwidth for other in order if other != one),
            sum(links[other, one].bandwidth for other in order if other != one),
        )
        for one in order
    ]


def _direct_seconds(order: Sequence[NodeId], nbytes: int, links: Links) -> float:
    capacity = capacities(order, links)
    part = {one: nbytes * each / sum(capacity) for one, each in zip(order, capacity, strict=True)}
    pairs = [(a, b) for a in order for b in order if a != b]
    by_link = max((part[a] + part[b]) / links[a, b].bandwidth for a, b in pairs)
    by_member = 0.0
    for one in order:
        others = [other for other in order if other != one]
        moved = sum(part[one] + part[other] for other in others)
        fastest = min(
            max(links[one, other].bandwidth for other in others), max(links[other, one].bandwidth for other in others)
        )
        by_member = max(by_member, moved / fastest)
    return max(by_link, by_member) + 2 * max(links[pair].delay for pair in pairs)


def _ring_seconds(tour: Sequence[NodeId], nbytes: int, links: Links) -> float:
    edges = [links[one, after] for one, after in zip(tour, [*tour[1:], tour[0]], strict=True)]
    steps = 2 * (len(tour) - 1)
    slowest = min(edge.bandwidth for edge in edges)
    return steps * (nbytes / len(tour) / slowest + max(edge.delay for edge in edges))
