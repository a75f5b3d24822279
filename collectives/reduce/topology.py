"""The ring's order: a short tour of all members by measured links.

The cost of an edge is the time for one megabyte over it. With few members every tour is tried;
with more, a greedy asymmetric tour (`networkx`) improved by threshold accepting from a fixed seed, so that
equal measurements give the same tour at every member.
"""

from collections.abc import Sequence
from itertools import permutations

import networkx as nx
from networkx.algorithms import approximation

from collectives.reduce.choice import Links
from protocol.identity import NodeId

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
