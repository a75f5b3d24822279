"""Links between nodes in virtual time.

A link is like a TCP connection: what is sent on it arrives in order, or the link closes and all
that was on its way is lost. A blocked direction holds what is sent until it is open again or the
link closes. `disorder` is the chance that a message is overtaken by later ones, or comes twice,
which no such link would do.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any

MIN_DELAY = 0.001
MAX_DELAY = 0.02
NOTICE = 0.1  # an end learns within this that its link closed


@dataclass
class SimulatedLink:
    """Two directions, by the sender's number; `open` until it is cut."""

    open: bool = True
    free_at: dict[int, float] = field(default_factory=dict)  # when each direction may deliver again
    held: dict[int, list[Any]] = field(default_factory=dict)


class SimulatedNetwork:
    """Carries messages between numbered nodes; `deliver`, `linked` and `unlinked` are the nodes' ends of it."""

    def __init__(
        self,
        rng: Random,
        disorder: float,
        deliver: Callable[[int, int, Any], None],
        linked: Callable[[int, int], None],
        unlinked: Callable[[int, int], None],
    ) -> None:
        self.now = 0.0
        self.disorder = disorder
        self._rng = rng
        self._deliver = deliver
        self._linked = linked
        self._unlinked = unlinked
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = count()
        self._links: dict[tuple[int, int], SimulatedLink] = {}
        self._blocked: set[tuple[int, int]] = set()
        self._closed_until: dict[tuple[int, int], float] = {}  # no new link before both ends know of the last one's end

    def at(self, when: float, act: Callable[..., None], *arguments: Any) -> None:
        """Do something at a time to come."""
        heapq.heappush(self._queue, (when, next(self._count), act, arguments))

    def run(self, until: float) -> None:
        """Let time pass."""
        queue = self._queue
        while queue and queue[0][0] <= until:
            self.now, _, act, arguments = heapq.heappop(queue)
            act(*arguments)
        self.now = until

    def connect(self, member: int, other: int) -> None:
        """Link two nodes, unless they are linked or one direction is blocked."""
        pair = (min(member, other), max(member, other))
        blocked = (member, other) in self._blocked or (other, member) in self._blocked
        if pair in self._links or blocked or self.now <= self._closed_until.get(pair, -1.0):
            return
        link = self._links[pair] = SimulatedLink()
        for end, far in (pair, pair[::-1]):
            self.at(self._arrival(link, far), self._up, link, end, far)

    def send(self, source: int, to: int, message: Any) -> None:
        """Put a message on the link, if there is one."""
        link = self._links.get((min(source, to), max(source, to)))
        if link is None:
            return
        if (source, to) in self._blocked:
            link.held.setdefault(source, []).append(message)
            return
        if self.disorder and self._rng.random() < self.disorder:
            late = self.now + self._rng.uniform(0.0, 0.5)
            self.at(late, self._arrive, link, source, to, message)
            if self._rng.random() < 0.5:
                return
        self.at(self._arrival(link, source), self._arrive, link, source, to, message)

    def cut(self, member: int, other: int) -> None:
        """Close a link: what is on it is lost, and both ends learn of it."""
        pair = (min(member, other), max(member, other))
        link = self._links.pop(pair, None)
        if link is None:
            return
        link.open = False
        self._closed_until[pair] = max(self.now + NOTICE, *link.free_at.values())
        for end, far in ((member, other), (other, member)):
            due = max(self.now + self._rng.uniform(0.0, NOTICE), link.free_at.get(far, 0.0))
            self.at(due, self._unlinked, end, far)

    def vanish(self, node: int, others: range, *, silently: bool) -> None:
        """Close all links of a node that is no more; `silently`, as when the machine lost power: nobody is told."""
        for other in others:
            pair = (min(node, other), max(node, other))
            if silently and pair in self._links:
                self._blocked.add((node, other))
            else:
                self.cut(node, other)

    def block(self, source: int, to: int) -> None:
        """Hold up one direction."""
        self._blocked.add((source, to))

    def heal(self) -> None:
        """Open all directions."""
        self._blocked.clear()
        for (member, other), link in self._links.items():
            for source, to in ((member, other), (other, member)):
                for message in link.held.pop(source, ()):
                    self.at(self._arrival(link, source), self._arrive, link, source, to, message)

    def _arrival(self, link: SimulatedLink, source: int) -> float:
        due = max(self.now + self._rng.uniform(MIN_DELAY, MAX_DELAY), link.free_at.get(source, 0.0))
        link.free_at[source] = due
        return due

    def _up(self, link: SimulatedLink, end: int, far: int) -> None:
        if link.open:
            self._linked(end, far)

    def _arrive(self, link: SimulatedLink, source: int, to: int, message: Any) -> None:
        if link.open:
            self._deliver(source, to, message)
