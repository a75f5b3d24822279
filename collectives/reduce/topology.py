"""The members' knowledge of their links, and what follows from it: the ring's order, and the algorithm.

**Measured.** Each member knows its own outgoing links: estimated from what they carried, and by probes where
that says too little. What it says of them is agreed (gathered from all, in `optimize_topology`) before
anybody acts on it: members that chose by their own estimates would not choose alike.

**The ring's order** (`tour`) is a short tour of all members. The cost of an edge is the time for one megabyte
over it. With few members every tour is tried; with more, a greedy asymmetric tour (`networkx`) improved by
threshold accepting from a fixed seed, so that equal measurements give the same tour at every member.

**The algorithm** is a pure function of what all members know alike:

    inline    the values travel with the agreement: see `all_reduce.reduce_inline`
    shared    all members share memory and there is no codec: see `shared`, chosen by what they offer with their calls
    direct    every member owns a slice: see `direct`
    ring      two neighbours each: see `ring`

`goes_inline` is asked before an operation starts, so it knows sizes only. `choose` compares the times of the last two,
by the links as last agreed in `optimize_topology`:

    direct    max over links of (slice_j + slice_i) / bandwidth(i -> j), and over members of what they
              send and receive / their fastest link; plus 2 delays of the slowest link
    ring      2 (n - 1) / n * size / slowest edge of the tour, plus 2 (n - 1) delays of its slowest edge

Where nothing was measured, the links count as equal and fast, and what is left is the processors' work:
the ring moves large values with less of it, because a member serves two streams and not 2 (n - 1).
Values that a codec makes inexact, or that the ring would widen (16-bit floats), then still go direct.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Literal

import networkx as nx
from networkx.algorithms import approximation

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
class LinkSpeed:
    """One direction between two members: bytes a second, and seconds one way."""

    bandwidth: float
    delay: float


Links = Mapping[tuple[NodeId, NodeId], LinkSpeed]


@dataclass(frozen=True)
class Topology:
    """The agreed measurements of links; empty until the members have measured."""

    tour: tuple[NodeId, ...] = ()
    links: Links = field(default_factory=dict)

    def ring_of(self, order: Sequence[NodeId]) -> tuple[NodeId, ...]:
        """Return the tour of exactly these members: those that left are skipped, new ones come last."""
        kept = [member for member in self.tour if member in order]
        return (*kept, *(member for member in order if member not in kept))


def goes_inline(nbytes: int, members: int) -> bool:
    """Tell whether a tensor of `nbytes` travels with the agreement of that many members."""
    return nbytes <= INLINE_SHARE_BYTES and nbytes * members**2 <= INLINE_TOTAL_BYTES


def choose(
    order: Sequence[NodeId], tour: Sequence[NodeId], nbytes: int, links: Links, *, is_exact: bool = True
) -> Algorithm:
    """Return the algorithm that should end first; `tour` is the ring's order.

    `links` must be the same at all members. If a pair is missing, all links count as unknown. `is_exact`: partial sums
    may travel as they are, in the tensor's own type.
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


HALF_LIFE_S = 30.0  # of an observation; a link's load changes in minutes, a single payload says little
# A payload below this measures wake-ups, not the link: it takes under 1 ms at 1 Gbit/s.
LEAST_BYTES = 128 << 10
PROBE_BYTES = 4 << 20  # a third of a second at 100 Mbit/s: past slow start, and soon over
_ROW = struct.Struct(">dd")


@dataclass(slots=True)
class _Average:
    value: float
    seen: float
    weight: float


class Estimates:
    """Exponential averages, by time, of bytes a second and of delays to each member. Pure: times are given."""

    def __init__(self) -> None:
        self._bandwidth: dict[NodeId, _Average] = {}
        self._delay: dict[NodeId, _Average] = {}

    def carried(self, to: NodeId, nbytes: int, seconds: float, now: float) -> None:
        """Note that a link was busy for `seconds` with `nbytes`."""
        if nbytes >= LEAST_BYTES and seconds > 0:
            _observe(self._bandwidth, to, nbytes / seconds, now, nbytes / PROBE_BYTES)

    def answered(self, to: NodeId, round_trip: float, now: float) -> None:
        """Note the seconds that a small message and its answer took."""
        if round_trip >= 0:
            _observe(self._delay, to, round_trip / 2, now, 1.0)

    def link(self, to: NodeId) -> LinkSpeed | None:
        """Return what is known of a link, None if too little."""
        bandwidth, delay = self._bandwidth.get(to), self._delay.get(to)
        return None if bandwidth is None else LinkSpeed(bandwidth.value, delay.value if delay is not None else 0.0)

    def row(self, order: Sequence[NodeId]) -> bytes:
        """Return the outgoing links to `order`, 16 bytes each, zeros where unknown."""
        links = [self.link(member) or LinkSpeed(0.0, 0.0) for member in order]
        return b"".join(_ROW.pack(link.bandwidth, link.delay) for link in links)


def matrix(order: Sequence[NodeId], rows: Mapping[NodeId, bytes]) -> dict[tuple[NodeId, NodeId], LinkSpeed]:
    """Return the links that all members' rows tell of; what makes no sense is left out."""
    links = {}
    for source, row in rows.items():
        if source in order and len(row) == _ROW.size * len(order):
            for target, (bandwidth, delay) in zip(order, _ROW.iter_unpack(row), strict=True):
                if source != target and 0 < bandwidth < float("inf") and 0 <= delay < float("inf"):
                    links[source, target] = LinkSpeed(bandwidth, delay)
    return links


def _observe(averages: dict[NodeId, _Average], to: NodeId, value: float, now: float, weight: float) -> None:
    """Average the new value, by its `weight`, with the known one, by its weight and age."""
    known = averages.get(to)
    if known is None:
        averages[to] = _Average(value, now, weight)
        return
    kept = known.weight * 0.5 ** (max(0.0, now - known.seen) / HALF_LIFE_S)
    averages[to] = _Average((known.value * kept + value * weight) / (kept + weight), now, kept + weight)


TYPICAL_BYTES = 1 << 20
EXACT_MEMBERS = 8  # 7! = 5,040 tours: some 20 ms
SEED = 1


def edge_seconds(links: Links, one: NodeId, other: NodeId) -> float:
    """Return the seconds that a chunk takes from one member to another."""
    link = links[one, other]
    return link.delay + TYPICAL_BYTES / link.bandwidth


def tour(order: Sequence[NodeId], links: Links) -> tuple[NodeId, ...]:
    """Return the members in the order of a ring, from `order[0]` on; unknown links: as they come.

    The ring's pace is that of its slowest edge, so that counts first, and the sum of all second.
    """
    order = tuple(order)
    if len(order) < 3 or any((a, b) not in links for a in order for b in order if a != b):
        return order
    if len(order) <= EXACT_MEMBERS:
        return min(((order[0], *rest) for rest in permutations(order[1:])), key=lambda ring: _cost(ring, links))
    graph = nx.DiGraph()
    graph.add_weighted_edges_from((a, b, edge_seconds(links, a, b)) for a in order for b in order if a != b)
    first = approximation.greedy_tsp(graph, source=order[0])
    better = approximation.threshold_accepting_tsp(graph, first, source=order[0], seed=SEED)
    return min((tuple(found[:-1]) for found in (first, better)), key=lambda ring: _cost(ring, links))


def _cost(ring: Sequence[NodeId], links: Links) -> tuple[float, float]:
    edges = [edge_seconds(links, one, after) for one, after in zip(ring, [*ring[1:], ring[0]], strict=True)]
    return max(edges), sum(edges)
