"""A network in memory under a virtual clock: delays, losses and dead nodes, all from one random source."""

import heapq
import random
from collections import deque
from dataclasses import dataclass, field

from protocol.records import Address
from protocol.transport import Arrived, Closed, Link, NetworkEvent, Opened


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the network does to frames: one-way delay bounds in seconds, and the share that is lost.

    TCP loses nothing on a live connection. Loss stands for everything that makes a frame
    vanish without the link closing: full queues, stalled processes, overloaded hosts.
    """

    min_delay: float = 0.005
    max_delay: float = 0.05
    loss: float = 0.0


@dataclass(order=True, slots=True)
class _Pending:
    at: float
    order: int
    key: bytes = field(compare=False)
    event: NetworkEvent = field(compare=False)


class MemoryNetwork:
    """Carries events between `MemoryTransport`s; `now` is the virtual time in seconds."""

    def __init__(self, conditions: Conditions, rng: random.Random) -> None:
        self.conditions = conditions
        self.now = 0.0
        self._rng = rng
        self._transports: dict[bytes, MemoryTransport] = {}
        self._listening: dict[str, bytes] = {}
        self._pending: list[_Pending] = []
        self._order = 0
        self._last: dict[tuple[bytes, Link], float] = {}

    def attach(self, transport: "MemoryTransport") -> None:
        """Plug a node in."""
        self._transports[transport.key] = transport
        if transport.listen is not None:
            self._listening[transport.listen] = transport.key

    def detach(self, transport: "MemoryTransport") -> None:
        """Pull a node's plug: its peers see their links close."""
        del self._transports[transport.key]
        if transport.listen is not None:
            del self._listening[transport.listen]

    def find(self, address: Address) -> bool:
        """Tell whether the holder of the address's key listens there."""
        return self._listening.get(str(address.endpoint)) == address.key

    def post(self, key: bytes, event: NetworkEvent, *, lossy: bool = False) -> None:
        """Let `event` reach the holder of `key` after a while; frames of one link keep their order."""
        if lossy and self._rng.random() < self.conditions.loss:
            return
        at = self.now + self._rng.uniform(self.conditions.min_delay, self.conditions.max_delay)
        if isinstance(event, Arrived | Closed):
            lane = (key, event.link)
            at = max(at, self._last.get(lane, 0.0))
            self._last[lane] = at
        self._order += 1
        heapq.heappush(self._pending, _Pending(at, self._order, key, event))

    def next_time(self) -> float:
        """Return when the next event arrives, infinity if nothing is on its way."""
        return self._pending[0].at if self._pending else float("inf")

    def deliver_due(self) -> list["MemoryTransport"]:
        """Hand over what is due by `now`; return the transports that got something, in order."""
        reached: dict[bytes, MemoryTransport] = {}
        while self._pending and self._pending[0].at <= self.now:
            pending = heapq.heappop(self._pending)
            transport = self._transports.get(pending.key)
            if transport is not None:
                transport.take(pending.event)
                reached[pending.key] = transport
        return list(reached.values())


class MemoryTransport:
    """Implements `Transport` for one node on a `MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, key: bytes, listen: str | None) -> None:
        self._network = network
        self.key = key
        self.listen = listen
        self._links: set[Link] = set()
        self._events: deque[NetworkEvent] = deque()
        network.attach(self)

    def dial(self, address: Address) -> None:
        """See `Transport.dial`."""
        link = Link(address.key, dialled=True)
        if link in self._links:
            return
        if not self._network.find(address):
            self._network.post(self.key, Closed(link))
            return
        self._links.add(link)
        self._network.post(self.key, Opened(link))

    def hang_up(self, link: Link) -> None:
        """See `Transport.hang_up`."""
        if link in self._links:
            self._links.discard(link)
            self._network.post(link.key, Closed(Link(self.key, not link.dialled)))

    def send(self, link: Link, frame: bytes) -> bool:
        """See `Transport.send`."""
        if link not in self._links:
            return False
        self._network.post(link.key, Arrived(Link(self.key, not link.dialled), frame), lossy=True)
        return True

    def take(self, event: NetworkEvent) -> None:
        """Receive an event from the network."""
        match event:
            case Arrived(link, _) if not link.dialled:
                self._links.add(link)
            case Arrived(link, _) if link not in self._links:
                return
            case Closed(link):
                self._links.discard(link)
        self._events.append(event)

    def poll(self, timeout: float) -> list[NetworkEvent]:
        """See `Transport.poll`; the simulator, not this call, lets time pass."""
        events = list(self._events)
        self._events.clear()
        return events

    def wake(self) -> None:
        """See `Transport.wake`: nobody waits."""

    def close(self) -> None:
        """See `Transport.close`: what a process that is killed leaves to its peers."""
        for link in sorted(self._links, key=lambda link: (link.key, link.dialled)):
            self.hang_up(link)
        self._network.detach(self)
