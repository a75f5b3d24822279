"""The graph that live links make: whether it is connected, and how far apart its nodes are."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

Graph = Mapping[int, Sequence[int]]  # node -> neighbours, both ways


def mutual(views: Mapping[int, Iterable[int]]) -> dict[int, list[int]]:
    """Return the graph of the pairs that have each other in view."""
    members = {node: set(view) for node, view in views.items()}
    return {node: [other for other in view if node in members.get(other, ())] for node, view in views.items()}


def depths(graph: Graph, source: int) -> dict[int, int]:
    """Return how many links each node that can be reached is away from `source` (breadth first)."""
    distances = {source: 0}
    queue = deque([source])
    while queue:
        node = queue.popleft()
        for other in graph[node]:
            if other not in distances:
                distances[other] = distances[node] + 1
                queue.append(other)
    return distances


def unreached(graph: Graph) -> int:
    """Return how many nodes the first one cannot reach: 0 for a connected graph."""
    return len(graph) - len(depths(graph, next(iter(graph)))) if graph else 0


def farthest(graph: Graph, sources: Iterable[int]) -> int:
    """Return the most links between any of `sources` and any node that it reaches."""
    return max((max(depths(graph, source).values()) for source in sources), default=0)
