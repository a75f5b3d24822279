"""The DEALERs with which we dial, one a peer. A broken one is closed; when to dial again is membership's decision.

A host name is resolved first (see `addresses.Resolver`). Its addresses are tried one after the other until one answers,
in the order that the system prefers (RFC 6724).
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import zmq
from zmq.utils import z85

from protocol.credentials.records import Address, Endpoint
from protocol.events import Arrived, Closed, Link, NetworkEvent, Opened, RefusedEarly, TurnedAway
from protocol.limits.networks import Scope, scope_of
from protocol.transport.addresses import Resolver, is_address, source_towards
from protocol.transport.sockets import (
    HANDSHAKE_FAILED,
    POLL_FRAMES,
    RECEIVE_QUEUE_MESSAGES,
    SOCKET_FRAMES,
    InFlight,
    Monitor,
    Socket,
    SocketMaker,
    Sources,
    Taken,
    take_messages,
)
from protocol.transport.tcp import TcpWatch

_CHANGES = zmq.EVENT_CONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


@dataclass(slots=True, eq=False)
class _Dialled:
    link: Link
    socket: Socket
    monitor: Monitor
    scope: Scope
    addresses: deque[Endpoint] = field(default_factory=deque)  # to try, the present one first
    number: int | None = None  # its TCP connection
    is_open: bool = False  # whether the other end has proved the key
    in_flight: InFlight = field(default_factory=InFlight)


class DialledLinks:
    """Opens and closes the links that we dial, and turns what comes into `events`."""

    def __init__(
        self,
        maker: SocketMaker,
        sources: Sources,
        watch: TcpWatch,
        resolver: Resolver,
        events: deque[NetworkEvent],
    ) -> None:
        self._maker = maker
        self._sources = sources
        self._watch = watch
        self._resolver = resolver
        self._events = events
        self._dialled: dict[Link, _Dialled] = {}

    def dial(self, address: Address, scope: Scope = Scope.LOOPBACK) -> None:
        """Begin to open a link; see `Transport.dial`."""
        link = Link(address.key, dialled=True)
        if link in self._dialled:
            return
        named = not is_address(address.endpoint.host)
        dealer = self._maker.make(zmq.DEALER, ipv6=named or address.endpoint.is_ipv6)
        dealer.curve_serverkey = z85.encode(address.key)
        dialled = _Dialled(link, dealer, self._maker.watch(dealer, _CHANGES | HANDSHAKE_FAILED), scope)
        self._dialled[link] = dialled
        self._sources.add(dealer, partial(self._ready, dialled))
        self._sources.add(dialled.monitor.socket, partial(self._take_changes, dialled))
        if not named:
            self._connect(dialled, [address.endpoint])
        elif not self._resolver.ask(dialled, address.endpoint):
            self._drop(dialled)

    def take_resolved(self) -> None:
        """Dial the addresses of names that were looked up."""
        for asker, endpoints in self._resolver.take():
            if isinstance(asker, _Dialled) and self._dialled.get(asker.link) is asker:
                self._connect(asker, [endpoint for endpoint in endpoints if scope_of(endpoint.host) >= asker.scope])

    def __contains__(self, link: Link) -> bool:
        return link in self._dialled

    def send(self, link: Link, frame: bytes) -> Taken:
        """Hand over a frame."""
        dialled = self._dialled.get(link)
        return Taken.GONE if dialled is None else dialled.in_flight.send(dialled.socket, frame)

    def hang_up(self, link: Link) -> None:
        """Close a link."""
        if (dialled := self._dialled.get(link)) is not None:
            self._close(dialled)

    def take_frames(self, most: int) -> list[Link]:
        """Read up to `most` frames of each link; return those of which there are no more."""
        return [dialled.link for dialled in list(self._dialled.values()) if self._take_frames(dialled, most)]

    def close(self, linger_ms: int = 0) -> None:
        """Close every link; libzmq keeps what it holds for so long, until its context ends."""
        for dialled in list(self._dialled.values()):
            self._close(dialled, linger_ms)

    def _connect(self, dialled: _Dialled, endpoints: list[Endpoint]) -> None:
        try:
            # Without a route to an address, libzmq would try again and again.
            endpoints = [endpoint for endpoint in endpoints if source_towards(endpoint.host) is not None]
            if endpoints:
                dialled.addresses.extend(endpoints)
                dialled.socket.connect(str(endpoints[0]))
        except zmq.ZMQError:  # libzmq refuses the endpoint: we treat it as a peer that does not answer
            endpoints = []
        if not endpoints:
            self._drop(dialled)

    def _try_next(self, dialled: _Dialled) -> None:
        """Try the next address, if there is one, as the present one does not answer."""
        if len(dialled.addresses) < 2:
            return
        with suppress(zmq.ZMQError):  # libzmq gave it up by itself
            dialled.socket.disconnect(str(dialled.addresses[0]))
        dialled.addresses.rotate(-1)
        try:
            dialled.socket.connect(str(dialled.addresses[0]))
        except zmq.ZMQError:
            self._drop(dialled)

    def _ready(self, dialled: _Dialled) -> None:
        self._take_frames(dialled, min(SOCKET_FRAMES, POLL_FRAMES - len(self._events)), is_ready=True)

    def _take_frames(self, dialled: _Dialled, most: int, *, is_ready: bool = False) -> bool:
        return take_messages(dialled.socket, partial(self._take, dialled), most, is_ready=is_ready)

    def _take(self, dialled: _Dialled) -> None:
        part = dialled.socket.recv(zmq.DONTWAIT, copy=False)
        sizes = [len(part), *_rest(dialled.socket)] if part.more else [len(part)]
        if dialled.number is not None and not self._watch.took(dialled.number, dialled.link, sizes):
            return
        malformed = len(sizes) > 1
        self._events.append(RefusedEarly("malformed", dialled.link) if malformed else Arrived(dialled.link, part.bytes))

    def _take_changes(self, dialled: _Dialled) -> None:
        while (change := dialled.monitor.take()) is not None:
            match change.event:
                case zmq.EVENT_CONNECTED:
                    dialled.number = self._watch.connected(change.value, dialled.monitor.has_ended, dialled.link)
                case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    dialled.is_open = True
                    host = self._watch.host(dialled.number) if dialled.number is not None else ""
                    self._events.append(Opened(dialled.link, host))
                case zmq.EVENT_CLOSED:
                    self._try_next(dialled)
                case zmq.EVENT_DISCONNECTED:
                    self._take_frames(dialled, RECEIVE_QUEUE_MESSAGES)  # what came before the break is still good
                    if dialled.number is not None:
                        # Without a proven key nobody is charged: a record may have named somebody else's service.
                        self._watch.gone(dialled.number, None if dialled.is_open else "", time.monotonic())
                    self._drop(dialled)
                case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    self._events.append(TurnedAway(dialled.link))
                    self._drop(dialled)
                case _:  # the handshake failed: the other end does not hold the key
                    self._drop(dialled)

    def _drop(self, dialled: _Dialled) -> None:
        self._close(dialled)
        self._events.append(Closed(dialled.link))

    def _close(self, dialled: _Dialled, linger_ms: int = 0) -> None:
        del self._dialled[dialled.link]
        if dialled.number is not None:
            self._watch.forget(dialled.number)
        for owned in (dialled.socket, dialled.monitor.socket):
            self._sources.drop(owned)
        dialled.socket.disable_monitor()
        dialled.monitor.close()
        dialled.socket.close(linger_ms)


def _rest(source: Socket) -> Iterator[int]:
    while source.rcvmore:
        yield len(source.recv(copy=False))
