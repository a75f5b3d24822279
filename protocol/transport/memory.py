"""A network in memory under a virtual clock, with every fault that a scenario needs, from one random source.

To a core, this network behaves like TCP and ZeroMQ:
- Frames on a connection arrive in order or not at all. Both ends learn that it closed, also when a process is killed. A
  node that redials replaces the older connection at the other end.
- Across a cut, and to a machine that vanished, frames are lost without a sign. Then the kernel acts: a connection with
  one dead direction closes at both ends after `KEEPALIVE_S`.
- A node has one line, of `Conditions.line` bytes a second each way, for all its connections. What it sends waits in the
  queues of the ZeroMQ transport (`protocol.limits.send_queues`). Frames are received first come, first served. They
  wait at the receiver; with TCP they would wait at the senders.
- A paused process reads nothing. Up to `QUEUE_BYTES` wait on each of its connections, then a peer's `send` returns
  False. If the process is stopped (SIGSTOP), its connections close after `KEEPALIVE_S`. If only its interpreter is
  blocked, its kernel still acknowledges what comes, and they stay.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from protocol.credentials.records import Address
from protocol.events import Accepted, Arrived, Closed, Link, NetworkEvent, Opened
from protocol.limits.limits import Limits
from protocol.limits.networks import Scope
from protocol.limits.send_queues import SendQueues
from protocol.transport import Make

KEEPALIVE_S = 15.0  # as the ZeroMQ transport's sockets have it
QUEUE_BYTES = 4 << 20  # as kernels and libzmq keep for a process that reads nothing


@dataclass(frozen=True, slots=True)
class Conditions:
    """The network's effect on frames: one-way delay bounds in seconds, and the share that is lost.

    TCP loses nothing on a live connection. Loss stands for everything that makes a frame
    vanish without the link closing: full queues, stalled processes, overloaded hosts.
    `line` is what a node's own line carries, in bytes a second, each way.
    Nodes are spread over `regions` in turn; between two regions a frame takes `far_delay` longer.
    """

    min_delay: float = 0.005
    max_delay: float = 0.05
    loss: float = 0.0
    regions: int = 1
    far_delay: float = 0.0
    line: float = math.inf

    @property
    def longest_delay(self) -> float:
        """The most that a frame takes, in seconds."""
        return self.max_delay + (self.far_delay if self.regions > 1 else 0.0)


@dataclass(slots=True)
class NetworkCut:
    """Frames from side i to side j vanish if (i, j) is in `ways`; a key that is not in `sides` is on side 0."""

    sides: Mapping[bytes, int]
    ways: frozenset[tuple[int, int]]

    def stops(self, sender: bytes, receiver: bytes) -> bool:
        """Tell whether what `sender` sends to `receiver` vanishes."""
        return (self.sides.get(sender, 0), self.sides.get(receiver, 0)) in self.ways


@dataclass(slots=True, eq=False)
class _End:
    """One end of a connection. Once it is closed, it drops its reference to the other, so that both are freed."""

    owner: "MemoryTransport"
    link: Link
    other: "_End | None" = None
    last: float = 0.0  # when the newest event reaches this end
    shut: bool = False
    waiting: int = 0  # bytes that a paused owner has not read


class MemoryNetwork:
    """Carries events between `MemoryTransport`s; `now` is the virtual time in seconds.

    `watch` is called with every frame that a node hands over, before it is lost or delayed.
    """

    def __init__(self, conditions: Conditions, rng: random.Random, watch: Callable[[bytes], None]) -> None:
        self.conditions = conditions
        self.now = 0.0
        self._rng = rng
        self._watch = watch
        self.firewalled: set[str] = set()  # endpoints at which nobody answers a dial
        self._transports: dict[bytes, MemoryTransport] = {}
        self._listening: dict[str, MemoryTransport] = {}
        self._attached = 0
        self._order = 0
        self._pending: list[tuple[float, int, _End, NetworkEvent]] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._cut: NetworkCut | None = None

    def attach(self, transport: "MemoryTransport") -> int:
        """Plug a node in and return its region."""
        self._transports[transport.key] = transport
        if transport.listen is not None:
            self._listening[transport.listen] = transport
        self._attached += 1
        return self._attached % self.conditions.regions

    def detach(self, transport: "MemoryTransport", *, refuses: bool) -> None:
        """Remove a node. From now on it `refuses` dials, or does not answer them."""
        if self._transports.get(transport.key) is transport:
            del self._transports[transport.key]
        if refuses and transport.listen is not None:
            del self._listening[transport.listen]

    def find(self, address: Address) -> "MemoryTransport | None":
        """Return the holder of the address's key if it listens there (or did so, when it vanished)."""
        transport = self._listening.get(str(address.endpoint))
        return transport if transport is not None and transport.key == address.key else None

    def split(self, cut: NetworkCut) -> None:
        """Begin a partition: connections across it close after `KEEPALIVE_S`."""
        self._cut = cut
        self.after(KEEPALIVE_S, lambda: self._close_across(cut))

    def heal(self) -> None:
        """End the partition."""
        self._cut = None

    def _close_across(self, cut: NetworkCut) -> None:
        if self._cut is not cut:
            return
        for transport in list(self._transports.values()):
            transport.close_links(lambda end: self.severed(end.owner.key, end.link.key))

    def stops(self, sender: bytes, receiver: bytes) -> bool:
        """Tell whether what `sender` sends to `receiver` vanishes just now."""
        return self._cut is not None and self._cut.stops(sender, receiver)

    def severed(self, address: bytes, other: bytes) -> bool:
        """Tell whether two nodes are cut off from each other, one way or both."""
        return self._cut is not None and (self._cut.stops(address, other) or self._cut.stops(other, address))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something later."""
        self._order += 1
        heapq.heappush(self._timers, (self.now + seconds, self._order, action))

    def carry(self, end: _End, frame: Arrived, left: float) -> None:
        """Let a frame that has `left` its sender's line by then reach `end` after a while, or get lost."""
        self._watch(frame.frame)
        conditions = self.conditions
        if conditions.loss and self._rng.random() < conditions.loss:
            return
        if self._cut is not None and self._cut.stops(end.link.key, end.owner.key):
            return
        self.post(end, frame, left, len(frame.frame))

    def post(self, end: _End, event: NetworkEvent, left: float = 0.0, size: int = 0) -> None:
        """Let `event`, of `size` bytes, reach `end` after a while; events at one end keep their order."""
        conditions = self.conditions
        delay = conditions.min_delay + (conditions.max_delay - conditions.min_delay) * self._rng.random()
        if end.other is not None and end.other.owner.region != end.owner.region:
            delay += conditions.far_delay
        end.last = at = max(max(self.now, left) + delay, end.last)
        if conditions.line == math.inf:
            self._deliver(at, end, event)
        else:
            self.after(at - self.now, lambda: self._deliver(end.owner.receive(size), end, event))

    def _deliver(self, at: float, end: _End, event: NetworkEvent) -> None:
        self._order += 1
        heapq.heappush(self._pending, (at, self._order, end, event))

    def next_time(self) -> float:
        """Return when the next thing happens, infinity if nothing is on its way."""
        at = self._pending[0][0] if self._pending else float("inf")
        return min(at, self._timers[0][0]) if self._timers else at

    def deliver_due(self) -> list["MemoryTransport"]:
        """Hand over what is due by `now`; return the transports whose nodes have something to read, in order."""
        while self._timers and self._timers[0][0] <= self.now:
            heapq.heappop(self._timers)[2]()
        reached: dict[MemoryTransport, None] = {}
        while self._pending and self._pending[0][0] <= self.now:
            _, _, end, event = heapq.heappop(self._pending)
            if end.owner.take(end, event):
                reached[end.owner] = None
        return list(reached)


@dataclass(eq=False)
class MemoryTransport:
    """Implements `Transport` for one node on a `MemoryNetwork`."""

    network: MemoryNetwork
    key: bytes
    listen: str | None
    host: str = ""  # the IP address at which others see it, "" if they cannot tell
    paused: bool = False
    closed: bool = False
    region: int = 0
    _ends: dict[Link, _End] = field(default_factory=dict)
    _events: deque[NetworkEvent] = field(default_factory=deque)
    _silences: int = 0  # how many pauses have ended
    _queues: SendQueues = field(default_factory=lambda: SendQueues(Limits(), 0.0))
    _transmitting: bool = False  # whether our line carries a frame just now
    _received_by: float = 0.0  # when our line has received all that came to it

    def __post_init__(self) -> None:
        self.region = self.network.attach(self)

    @property
    def links(self) -> int:
        """How many connections there are, those included whose handshake is not done."""
        return len(self._ends)

    def dial(self, address: Address, scope: Scope = Scope.LOOPBACK) -> None:
        """See `Transport.dial`."""
        link = Link(address.key, dialled=True)
        if link in self._ends:
            return
        end = self._ends[link] = _End(self, link)
        listener = self.network.find(address)
        if str(address.endpoint) in self.network.firewalled:
            return
        if listener is None:
            self.network.post(end, Closed(link))
        elif not (listener.paused or listener.closed or self.network.severed(self.key, listener.key)):
            end.other = listener.accept(end)
            self.network.post(end, Opened(link, listener.host))

    def accept(self, dialler: _End) -> _End:
        """Make our end of a connection that somebody dialled; it replaces an older one from the same key."""
        link = Link(dialler.owner.key, dialled=False)
        old = self._ends.get(link)
        if old is not None:
            old.shut = True
            self._queues.drop(link)
            self._tell_closed(old)
        end = self._ends[link] = _End(self, link, dialler)
        if dialler.owner.host:
            self.network.post(end, Accepted(link, dialler.owner.host))
        return end

    def hang_up(self, link: Link) -> None:
        """See `Transport.hang_up`."""
        self._queues.drop(link)
        end = self._ends.pop(link, None)
        if end is not None:
            end.shut = True
            self._tell_closed(end)

    def _tell_closed(self, end: _End) -> None:
        other = end.other
        if other is None or other.shut:
            end.other = None
            return
        if self.network.stops(self.key, other.owner.key):
            self.network.after(KEEPALIVE_S, lambda: self.network.post(other, Closed(other.link)))
        else:
            self.network.post(other, Closed(other.link))

    def close_links(self, which: Callable[[_End], bool]) -> None:
        """Close those of our links at this end, as the kernel does when nothing is acknowledged."""
        for end in self._ends.values():
            if which(end):
                self.network.post(end, Closed(end.link))

    def serve(self, make: Make) -> None:
        """See `Transport.serve`."""
        self._queues.make = make

    def send(self, link: Link, frame: bytes) -> bool:
        """See `Transport.send`."""
        end = self._ends.get(link)
        if end is None or end.other is None or not self._reads(end.other, len(frame)):
            return False
        if self.network.conditions.line == math.inf:
            self.network.carry(end.other, Arrived(end.other.link, frame), self.network.now)
            return True
        return self._queues.put(link, frame) and self._begin()

    def fill(self, link: Link) -> None:
        """See `Transport.fill`."""
        end = self._ends.get(link)
        if end is None or end.other is None:
            return
        if self.network.conditions.line < math.inf:
            self._queues.fill(link)
            self._begin()
            return
        while frame := self._queues.make(link):
            if self._reads(end.other, len(frame)):
                self.network.carry(end.other, Arrived(end.other.link, frame), self.network.now)

    def _reads(self, other: _End, size: int) -> bool:
        """Tell whether the other end, or its queues, can take so many bytes."""
        if other.owner.paused:
            if other.waiting + size > QUEUE_BYTES:
                return False
            other.waiting += size
        return True

    def _begin(self) -> bool:
        if not self._transmitting:
            self._transmit()
        return True

    def _transmit(self) -> None:
        """Hand our line, which is free, the frame whose turn it is, and so on until none waits."""
        self._transmitting = True
        if turn := None if self.closed else self._queues.next(self.network.now):
            link, frame = turn
            self._queues.sent(link, self.network.now)
            took = len(frame) / self.network.conditions.line
            if (other := self._ends[link].other) is not None:
                self.network.carry(other, Arrived(other.link, frame), self.network.now + took)
            self.network.after(took, self._transmit)
            return
        self._transmitting = False

    def receive(self, size: int) -> float:
        """Return when a frame that has come to our line has been received by it."""
        self._received_by = max(self.network.now, self._received_by) + size / self.network.conditions.line
        return self._received_by

    def take(self, end: _End, event: NetworkEvent) -> bool:
        """Receive an event at one of our ends; True if there is something to read now."""
        if end.shut or self.closed:
            return False
        if isinstance(event, Closed):
            end.shut, end.other = True, None
            self._ends.pop(end.link, None)
            self._queues.drop(end.link)
        self._events.append(event)
        return not self.paused

    def charge(self, link: Link, points: float) -> None:
        """See `Transport.charge`: no networks are told apart here."""

    def poll(self, timeout: float) -> list[NetworkEvent]:
        """See `Transport.poll`; the simulator, not this call, lets time pass."""
        events = list(self._events)
        self._events.clear()
        return events

    def wake(self) -> None:
        """See `Transport.wake`: nobody waits."""

    def pause(self, *, acknowledges: bool) -> None:
        """Stop reading. Unless the kernel `acknowledges` what comes, all connections close in time."""
        self.paused = True
        if not acknowledges:
            self._fall_silent()

    def _fall_silent(self) -> None:
        silence = self._silences
        self.network.after(KEEPALIVE_S, lambda: self._lose_everybody(silence))

    def _lose_everybody(self, silence: int) -> None:
        for end in self._ends.values() if silence == self._silences else ():
            if end.other is not None:
                self.network.post(end.other, Closed(end.other.link))
            self.network.post(end, Closed(end.link))

    def resume(self) -> None:
        """Go on reading, with everything that came meanwhile."""
        self.paused = False
        self._silences += 1
        for end in self._ends.values():
            end.waiting = 0

    def close(self) -> None:
        """See `Transport.close`. A process that is killed closes its links, too."""
        for link in list(self._ends):
            self.hang_up(link)
        self.closed = True
        self.network.detach(self, refuses=True)

    def vanish(self) -> None:
        """Stop without a sign, as a machine that loses power. Links close at the peers after `KEEPALIVE_S`."""
        self.closed = True
        self._fall_silent()
        self.network.detach(self, refuses=False)
