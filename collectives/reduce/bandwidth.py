"""How fast links are: estimated from what they carried, and by probes where that says too little.

Each member knows its own outgoing links. What it says of them is agreed (gathered from all, in
`optimize_topology`) before anybody acts on it: members that chose by their own estimates would
not choose alike.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from collectives.reduce.choice import Link
from protocol.identity import NodeId

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
        """Note that a link took `seconds` of being busy for so many bytes."""
        if nbytes >= LEAST_BYTES and seconds > 0:
            _observe(self._bandwidth, to, nbytes / seconds, now, nbytes / PROBE_BYTES)

    def answered(self, to: NodeId, round_trip: float, now: float) -> None:
        """Note the seconds that a small message and its answer took."""
        if round_trip >= 0:
            _observe(self._delay, to, round_trip / 2, now, 1.0)

    def link(self, to: NodeId) -> Link | None:
        """Return what is known of a link, None if too little."""
        bandwidth, delay = self._bandwidth.get(to), self._delay.get(to)
        return None if bandwidth is None else Link(bandwidth.value, delay.value if delay is not None else 0.0)

    def forget(self, member: NodeId) -> None:
        """Drop what is known of a member that left."""
        self._bandwidth.pop(member, None)
        self._delay.pop(member, None)

    def row(self, order: Sequence[NodeId]) -> bytes:
        """Return the outgoing links to `order`, 16 bytes each, zeros where unknown."""
        links = [self.link(member) or Link(0.0, 0.0) for member in order]
        return b"".join(_ROW.pack(link.bandwidth, link.delay) for link in links)


def matrix(order: Sequence[NodeId], rows: Mapping[NodeId, bytes]) -> dict[tuple[NodeId, NodeId], Link]:
    """Return the links that all members' rows tell of; what makes no sense is left out."""
    links = {}
    for source, row in rows.items():
        if source in order and len(row) == _ROW.size * len(order):
            for target, (bandwidth, delay) in zip(order, _ROW.iter_unpack(row), strict=True):
                if source != target and 0 < bandwidth < float("inf") and 0 <= delay < float("inf"):
                    links[source, target] = Link(bandwidth, delay)
    return links


def _observe(averages: dict[NodeId, _Average], to: NodeId, value: float, now: float, weight: float) -> None:
    """Weigh what was known by how old it is, and the new value by how much it rests on."""
    known = averages.get(to)
    if known is None:
        averages[to] = _Average(value, now, weight)
        return
    kept = known.weight * 0.5 ** (max(0.0, now - known.seen) / HALF_LIFE_S)
    averages[to] = _Average((known.value * kept + value * weight) / (kept + weight), now, kept + weight)
