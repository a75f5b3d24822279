"""Matrices: two checks of what a swarm is for, over many sizes, lines and crowds.

Everything arrives: each node publishes one item, and every other node gets it before it is stale. This takes at most
`ALL_TO_ALL` times as long as a line takes for the bytes, and `SLACK_S`.

Everybody gets in: public nodes meet nodes behind NAT, which can dial and cannot be dialled. Some of those listen all
the same, and tell addresses of IPv4, IPv6 or both that a firewall closes. From the first minute on none is without a
peer, and what each publishes reaches all.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from protocol.limits.limits import Limits
from protocol.limits.timing import WAN
from protocol.simulator.adversaries import SimulatedIdentity
from protocol.simulator.scenarios import Invariant
from protocol.simulator.simulation import Simulation
from protocol.transport.memory import Conditions

ALL_TO_ALL, ONE_TO_ALL = 1.5, 2.0  # times what a line takes for the bytes
SLACK_S = 10.0  # for round trips, and the first announcements
SETTLE_S = 20.0
CONDITIONS = Conditions(0.02, 0.05)
LINES = {1: 125e3, 10: 1.25e6, 100: 12.5e6, 1000: 125e6}  # Mbit/s: bytes a second
SIZES = (10_000, 100_000, 1_000_000, 5_000_000, 16_000_000)
ADMITTED_S = 60.0
FAMILIES = "4", "6", "46"


class ArrivalRow(NamedTuple):
    """A row of the first matrix: nodes, bytes an item, and Mbit/s a line."""

    nodes: int
    size: int
    line: int


class Crowd(NamedTuple):
    """A row of the second: public nodes, which may be in one network, and nodes behind NAT, maybe of one address.

    `in_vain` are the families, "4", "6" or "46", of addresses at which those behind NAT listen in vain.
    """

    public: int
    nat: int
    one_address: bool = False
    one_network: bool = False
    in_vain: str = ""

    @property
    def nodes(self) -> int:
        """How many there are."""
        return self.public + self.nat


ROWS = [ArrivalRow(nodes, size, line) for nodes in (2, 8, 16) for size in SIZES for line in LINES] + [
    ArrivalRow(64, 100_000, line) for line in LINES
]
CROWDS = [
    Crowd(1, 14),
    Crowd(1, 30),
    Crowd(5, 95),
    Crowd(20, 480),
    Crowd(1, 8, one_address=True),
    Crowd(1, 2, True),
    Crowd(1, 63, one_address=True),
    Crowd(40, 0, one_network=True),
    Crowd(1, 20, in_vain="4"),
    *(Crowd(public, nat, in_vain=families) for public, nat in ((1, 40), (3, 60), (20, 480)) for families in FAMILIES),
    Crowd(1, 8, one_address=True, in_vain="46"),
    Crowd(40, 0),
]


def arrival(seed: int, row: ArrivalRow, publishers: int | None = None) -> Invariant:
    """Let the first `publishers` nodes (default: all) publish one item each, and see whether all get them in time."""
    conditions = Conditions(CONDITIONS.min_delay, CONDITIONS.max_delay, line=LINES[row.line])
    simulation = Simulation(seed, conditions, timing=WAN, identity=SimulatedIdentity)
    for name in range(row.nodes):
        simulation.start(name)
        simulation.run(0.2)
    simulation.run(SETTLE_S)
    content = random.Random(seed)
    names = range(row.nodes if publishers is None else publishers)
    began = simulation.network.now
    items = {simulation.publish(name, content.randbytes(row.size)) for name in names}
    due = len(items) * (row.nodes - 1)
    ideal = (len(items) - (len(names) == row.nodes)) * row.size / LINES[row.line]
    bound = min(simulation.limits.max_item_age_s, (ALL_TO_ALL if publishers is None else ONE_TO_ALL) * ideal + SLACK_S)
    got = 0
    while got < due and simulation.network.now < began + bound:
        simulation.run(min(1.0, began + bound - simulation.network.now))
        got = sum(len(node.ids & items) for node in simulation.nodes.values())
    took = simulation.network.now - began
    return Invariant(
        got == due,
        f"{row.nodes} nodes, {len(items)} items of {row.size / 1e6:g} MB, lines of {row.line} Mbit/s:"
        f" {got} of {due} arrived in {took:.0f} s (ideal {ideal:.1f} s, bound {bound:.0f} s)",
    )


def admittance(seed: int, crowd: Crowd, seconds: float, limits: Limits | None = None) -> Iterator[Invariant]:
    """Let a crowd come, the public nodes first, and see whether everybody is in and hears of everybody."""
    simulation = Simulation(seed, CONDITIONS, limits, timing=WAN, identity=SimulatedIdentity)
    behind = range(crowd.public, crowd.public + crowd.nat)
    for name in range(crowd.public):
        simulation.seen_at[name] = f"60.0.7.{name + 1}" if crowd.one_network else _address(name)
        simulation.start(name)
        simulation.run(0.2)
    for name in behind:
        simulation.seen_at[name] = _address(crowd.public if crowd.one_address else name)
        hosts = {"4": simulation.seen_at[name], "6": f"2003:{name:x}::5"}
        simulation.in_vain[name] = tuple(hosts[family] for family in crowd.in_vain)
        simulation.start(name, dialable=False)
        simulation.run(0.05)
    text = f"{crowd.public} public nodes and {crowd.nat} behind NAT" + (" of one address" if crowd.one_address else "")
    text += ", in one network" if crowd.one_network else ""
    text += f" that listen in vain (IPv{' and IPv'.join(crowd.in_vain)})" if crowd.in_vain else ""
    most = links = 0
    for minute in range(1, math.ceil(seconds / ADMITTED_S) + 1):
        simulation.run(ADMITTED_S)
        alone = sum(not node.core.membership.peers for node in simulation.nodes.values())
        if minute == 1:
            yield Invariant(alone == 0, f"{text}: {alone} without a peer after a minute")
        most = max(most, alone)
        links = max(
            sum(bool(peer.record.endpoints) for peer in simulation.nodes[name].core.membership.links.peers.values())
            for name in range(crowd.public)
        )
    yield Invariant(most == 0, f"{text}: {most} without a peer at some minute of {seconds:.0f} s")
    room = simulation.limits.max_peers
    yield Invariant(
        links <= room, f"{text}: {links} links of a public node with those that can be dialled (bound {room})"
    )
    items = {simulation.publish(name, b"of %d" % name): name for name in simulation.nodes}
    simulation.run(ADMITTED_S)
    lacking = sum(
        item not in ids
        for node in simulation.nodes.values()
        for ids in (node.ids,)
        for item, signer in items.items()
        if signer != node.name
    )
    yield Invariant(
        lacking == 0, f"{text}: {lacking} of {len(items) * (len(items) - 1)} copies did not arrive in a minute"
    )


def _address(number: int) -> str:
    """Return a public address, each in a network of its own."""
    return f"{60 + number // 200}.{number % 200}.7.9"


class Matrix(NamedTuple):
    """A line on what it tries, its rows, and the checks of a row, given a seed and how many seconds to watch."""

    what: str
    rows: Sequence[ArrivalRow] | Sequence[Crowd]
    checks: Callable[[int, Any, float], Iterable[Invariant]]


MATRICES = {
    "everything-arrives": Matrix(
        "2 to 64 nodes publish 10 kB to 16 MB each on lines of 1 to 1000 Mbit/s",
        ROWS,
        lambda seed, row, _: (arrival(seed, row),),  # it takes as long as it takes
    ),
    "everybody-gets-in": Matrix(
        "1 to 40 public nodes and up to 480 behind NAT meet, some of which listen in vain", CROWDS, admittance
    ),
}
