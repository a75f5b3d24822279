"""The transport on ZeroMQ: one bound ROUTER, one DEALER for each peer that we dialled.

libzmq leaves to this file and its parts:
- CURVE without a ZAP handler lets anybody in: the handler starts before the bind, and
  `ZAP_ENFORCE_DOMAIN` refuses when it is missing (`inbound`).
- Socket monitors tell when a connection came, finished its handshake, or broke.
- High-water marks count whole messages, not bytes. What is received is measured below libzmq, and connections that make
  it hold too much are cut (`connections`). What is sent waits in `send_queues`.
"""

import socket
import time
from collections import deque
from contextlib import suppress

from protocol.credentials.records import Address, Endpoint
from protocol.events import Closed, Link, NetworkEvent, RefusedEarly
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.limits.networks import Scope
from protocol.limits.send_queues import SendQueues
from protocol.transport import Make
from protocol.transport.addresses import Resolver
from protocol.transport.inbound import Inbound, Refuses, ZapHandler, refuse_nobody
from protocol.transport.outbound import DialledLinks
from protocol.transport.sockets import POLL_FRAMES, SocketMaker, Sources, Taken, within_descriptors
from protocol.transport.tcp import TcpWatch

# A flood is noticed within this time: 31 MB on a line of 1 Gbit/s. A review of 100 connections takes 1 ms.
REVIEW_INTERVAL_S = 0.25


class ZmqTransport:
    """Implements `Transport`; see the module's comment."""

    def __init__(
        self,
        identity: Identity,
        listen: Endpoint | None,
        limits: Limits | None = None,
        refuses: Refuses = refuse_nobody,
    ) -> None:
        """Bind to `listen`, or to nothing for a node that only dials; keep out the CURVE keys that `refuses` names.

        Raises:
            PortInUse: somebody listens there.
            BadAddress: this machine has no such address.
        """
        self._events: deque[NetworkEvent] = deque()
        self._sources = Sources(lambda: self._events.append(RefusedEarly("internal")))
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self._sources.add(self._wake_in.fileno(), self._woken)
        self._maker = SocketMaker(identity)
        self._zap = ZapHandler(self._maker.context, refuses, self._refused)
        self._sources.add(self._zap.socket, self._zap.answer)
        self._watch = TcpWatch(within_descriptors(limits or Limits()), self._events)
        self._queues = SendQueues(limits or Limits(), time.monotonic())
        self._resolver = Resolver(self.wake)
        self._dialled = DialledLinks(self._maker, self._sources, self._watch, self._resolver, self._events)
        self._inbound: Inbound | None = None
        self._next_review = 0.0
        self._linger_ms = 0  # for what libzmq holds when we close
        if listen is not None:
            try:
                self._inbound = Inbound(
                    listen, self._maker, self._sources, self._watch, self._events, self._queues.drop
                )
            except BaseException:
                self.close()
                raise

    @property
    def endpoint(self) -> Endpoint | None:
        """Where others can dial us."""
        return self._inbound.endpoint if self._inbound is not None else None

    def dial(self, address: Address, scope: Scope = Scope.LOOPBACK) -> None:
        """See `Transport.dial`."""
        self._dialled.dial(address, scope)

    def hang_up(self, link: Link) -> None:
        """See `Transport.hang_up`. Frames that libzmq has taken, such as a goodbye, are on their way."""
        self._queues.drop(link)
        if link.dialled:
            self._dialled.hang_up(link)
        elif self._inbound is not None:
            self._inbound.hang_up(link)

    def serve(self, make: Make) -> None:
        """See `Transport.serve`."""
        self._queues.make = make

    def send(self, link: Link, frame: bytes) -> bool:
        """See `Transport.send`."""
        sockets = self._sockets(link)
        if sockets is None:
            return False
        if self._queues.is_open:
            taken = sockets.send(link, frame)
            if taken is not Taken.FULL:
                return taken is Taken.YES
        elif link not in sockets:
            return False
        if not self._queues.put(link, frame):
            self._events.append(RefusedEarly("queue_full", link))
            return False
        self._flush()
        return True

    def fill(self, link: Link) -> None:
        """See `Transport.fill`."""
        sockets = self._sockets(link)
        if sockets is not None and link in sockets:
            self._queues.fill(link)
            self._flush()

    @property
    def is_clear(self) -> bool:
        """Whether no event waits to be handled, and no frame to be sent."""
        return not self._events and self._queues.is_open

    @property
    def until_review(self) -> float:
        """Seconds until the next review. Nothing need be read before: floods are noticed at reviews."""
        return max(0.0, self._next_review - time.monotonic())

    def charge(self, link: Link, points: float) -> None:
        """See `Transport.charge`."""
        self._watch.charge(link, points, time.monotonic())

    def poll(self, timeout: float) -> list[NetworkEvent]:
        """See `Transport.poll`."""
        if self._events:
            timeout = 0.0
        elif len(self._watch):
            timeout = min(timeout, self.until_review)
        if self._queues.is_open:
            self._sources.poll(timeout)
        else:
            self._sources.poll(min(timeout, self._queues.wait(time.monotonic())))
            self._flush()
        if time.monotonic() >= self._next_review:
            self._sources.guard(self._review)
            self._next_review = time.monotonic() + REVIEW_INTERVAL_S
        events = [self._events.popleft() for _ in range(min(POLL_FRAMES, len(self._events)))]
        for event in events:
            if isinstance(event, Closed):
                self._queues.drop(event.link)  # the next connection with this key has to begin with a hello
        return events

    def flush(self, timeout: float) -> None:
        """Send what waits, for so many seconds at most, before `close`. What comes meanwhile is dropped."""
        deadline = time.monotonic() + timeout
        while not self._queues.is_empty and (left := deadline - time.monotonic()) > 0:
            self.poll(left)
        self._linger_ms = max(0, int(1000 * (deadline - time.monotonic())))

    def wake(self) -> None:
        """See `Transport.wake`."""
        with suppress(BlockingIOError, OSError):  # full: a wake-up waits already; closed: nobody waits for one
            self._wake_out.send(b"\0")

    def close(self) -> None:
        """See `Transport.close`."""
        self._watch.close()
        self._dialled.close(self._linger_ms)
        if self._inbound is not None:
            self._inbound.close(self._linger_ms)
        self._zap.socket.close()
        self._maker.context.destroy(linger=self._linger_ms)  # waits for what libzmq holds, so long at most
        self._wake_in.close()
        self._wake_out.close()

    def _sockets(self, link: Link) -> DialledLinks | Inbound | None:
        return self._dialled if link.dialled else self._inbound

    def _flush(self) -> None:
        """Hand waiting frames to the sockets, until these take no more."""
        now = time.monotonic()
        while (turn := self._queues.next(now)) is not None:
            link, frame = turn
            sockets = self._sockets(link)
            match sockets.send(link, frame) if sockets is not None else Taken.GONE:
                case Taken.YES:
                    self._queues.sent(link, now)
                case Taken.FULL:
                    self._queues.full(link, now)
                case Taken.GONE:
                    self._queues.drop(link)

    def _review(self) -> None:
        """Measure, read, judge: the order is explained in `connections`."""
        self._watch.measure()
        most = max(0, 2 * POLL_FRAMES - len(self._events))
        if self._inbound is not None and self._inbound.take_frames(most):
            self._watch.drained(None)
        for emptied in self._dialled.take_frames(most):
            self._watch.drained(emptied)
        for link in self._watch.review(time.monotonic()):
            if not link.dialled and self._inbound is not None:
                self._inbound.ended(link)

    def _woken(self) -> None:
        self._wake_in.recv(4096)  # does not block, as a poll found it ready; what is left wakes the next poll
        self._dialled.take_resolved()

    def _refused(self, key: bytes) -> None:
        self._events.append(RefusedEarly("graylisted"))
