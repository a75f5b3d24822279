"""The ROUTER that peers dial: who may connect, who is on a connection, what came over it, and how to answer.

A peer chooses its routing id, so we do not trust that. The `User-Id` that ZAP (ZeroMQ RFC 27) attached to a frame tells
its link: it is the CURVE key that the other end proved. Without a ZAP handler, CURVE encrypts but lets anybody in. Our
handler answers on our own thread, and lets in CURVE only, with any key that is not graylisted. Later, the signed record
in the hello tells to which node the key belongs.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import zmq

from protocol.credentials.records import Endpoint
from protocol.events import Arrived, Link, NetworkEvent, RefusedEarly
from protocol.lru import Recent
from protocol.transport.addresses import bindable_host, cannot_listen, own_hosts
from protocol.transport.sockets import (
    HANDSHAKE_FAILED,
    POLL_FRAMES,
    SOCKET_FRAMES,
    InFlight,
    SocketMaker,
    Sources,
    Taken,
    has_message,
    take_messages,
)
from protocol.transport.tcp import TcpWatch

DOMAIN = b"gossamer"
_ENDPOINT = "inproc://zeromq.zap.01"
_VERSION = b"1.0"
_REFUSED = b"refused"

MAX_KEYS = 1024  # keys whose `Link` is kept, so that it is not made again for each frame

# A refusal by ZAP (EVENT_HANDSHAKE_FAILED_AUTH) was counted where it was decided.
_FAILURES: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "handshake_unfinished",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "handshake_malformed",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "",
}

Refuses = Callable[[bytes], bool]


def refuse_nobody(key: bytes) -> bool:
    """The rule where nobody keeps scores."""
    return False


class ZapHandler:
    """The one ZAP handler of a ZeroMQ context; start it before the first bind."""

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", refuses: Refuses, refused: Callable[[bytes], None]
    ) -> None:
        """Keep out the keys (32 bytes) for which `refuses` is true; `refused` is called with each."""
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_ENDPOINT)
        self._refuses = refuses
        self._refused = refused

    def answer(self) -> None:
        """Answer every request that waits."""
        while has_message(self.socket):
            request = self.socket.recv_multipart(zmq.DONTWAIT)
            reply = decide(request, self._refuses)
            self.socket.send_multipart(reply)
            if reply[3] == _REFUSED:
                self._refused(request[6])


def decide(request: list[bytes], refuses: Refuses) -> list[bytes]:
    """Return the reply to one ZAP request: version, request id, status, text, user id, metadata."""
    if len(request) != 7 or request[0] != _VERSION:
        return [_VERSION, request[1] if len(request) > 1 else b"", b"500", b"bad request", b"", b""]
    _, request_id, domain, _, _, mechanism, key = request
    if domain != DOMAIN or mechanism != b"CURVE" or len(key) != 32:
        return [_VERSION, request_id, b"400", b"CURVE only", b"", b""]
    if refuses(key):
        return [_VERSION, request_id, b"400", _REFUSED, b"", b""]  # libzmq would reject a status of our own
    return [_VERSION, request_id, b"200", b"OK", key.hex().encode(), b""]


@dataclass(slots=True)
class _Route:
    """A connection by its routing id, and what is on its way there."""

    id: bytes
    in_flight: InFlight = field(default_factory=InFlight)


class Inbound:
    """Binds, and turns what comes into `events`."""

    def __init__(
        self,
        listen: Endpoint,
        maker: SocketMaker,
        sources: Sources,
        watch: TcpWatch,
        events: deque[NetworkEvent],
        replaced: Callable[[Link], None],
    ) -> None:
        """Bind to `listen`; `replaced` is called with each link that gets a newer connection.

        Raises:
            PortInUse: somebody listens there.
            BadAddress: this machine has no such address.
        """
        bound = Endpoint(bindable_host(listen.host), listen.port)
        self._watch = watch
        self._events = events
        self._replaced = replaced
        self._routes: dict[Link, _Route] = {}  # to the newest connection of each link, while that lasts
        self._links: Recent[str, Link] = Recent(MAX_KEYS)  # by user id
        self._failure: str | None = None  # of the handshake whose connection ends next
        self._router = maker.make(zmq.ROUTER, ipv6=bound.is_ipv6)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.CURVE_SERVER, 1)
        self._router.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        self._router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self._monitor = maker.watch(self._router, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | HANDSHAKE_FAILED)
        try:
            self._router.bind(str(bound))
        except zmq.ZMQError as error:
            self.close()
            raise cannot_listen(listen, error.errno, error.strerror) from None
        port = Endpoint.parse(self._router.getsockopt_string(zmq.LAST_ENDPOINT)).port
        self.endpoint = Endpoint(own_hosts(listen.host)[0], port)
        sources.add(self._monitor.socket, self.take_changes)
        sources.add(self._router, self._ready)

    def __contains__(self, link: Link) -> bool:
        return link in self._routes

    def send(self, link: Link, frame: bytes) -> Taken:
        """Hand over a frame for the link's newest connection."""
        route = self._routes.get(link)
        if route is None:
            return Taken.GONE
        taken = route.in_flight.send(self._router, frame, route.id)
        if taken is Taken.GONE:
            del self._routes[link]  # a review reports that it closed, once its last frame is read
        elif taken is Taken.YES:
            self._watch.answered(link)
        return taken

    def hang_up(self, link: Link) -> None:
        """End the link's connection."""
        self.ended(link)
        self._watch.hang_up(link)

    def ended(self, link: Link) -> None:
        """Forget the route of a link whose newest connection ended."""
        self._routes.pop(link, None)

    def take_changes(self) -> None:
        """Follow which connections came and went."""
        while (change := self._monitor.take()) is not None:
            match change.event:
                case zmq.EVENT_ACCEPTED:
                    self._watch.accepted(change.value, self._monitor.has_ended, time.monotonic())
                case zmq.EVENT_DISCONNECTED:
                    # libzmq reports a failed handshake, and then, with nothing in between, the end of its connection.
                    self._watch.gone(self._watch.inbound(change.value), self._failure, time.monotonic())
                    self._failure = None
                case failed:
                    self._failure = _FAILURES[failed]

    def take_frames(self, most: int, *, is_ready: bool = False) -> bool:
        """Read up to `most` frames; True if there are no more."""
        self.take_changes()  # first, so that the connection of each frame is known
        return take_messages(self._router, self._take, most, is_ready=is_ready)

    def close(self, linger_ms: int = 0) -> None:
        """Close both sockets; libzmq keeps what it holds for so long, until its context ends."""
        self._router.disable_monitor()
        self._monitor.close()
        self._router.close(linger_ms)

    def _ready(self) -> None:
        self.take_frames(min(SOCKET_FRAMES, POLL_FRAMES - len(self._events)), is_ready=True)

    def _take(self) -> None:
        routing_id, part = self._router.recv(zmq.DONTWAIT), self._router.recv(copy=False)
        link = self._link(str(part.get("User-Id")))
        sizes = [len(part), *self._rest()] if part.more else [len(part)]
        number = self._watch.inbound(int(part.get(zmq.SRCFD)))
        if not self._watch.took(number, link, sizes):
            return
        route = self._routes.get(link)
        # A connection that is gone gets no route: nothing would tell us when to forget it.
        if (route is None or route.id != routing_id) and self._watch.carries(number, link):
            self._replaced(link)
            self._routes[link] = _Route(routing_id)
        self._events.append(Arrived(link, part.bytes) if len(sizes) == 1 else RefusedEarly("malformed", link))

    def _rest(self) -> Iterator[int]:
        while self._router.rcvmore:
            yield len(self._router.recv(copy=False))

    def _link(self, user_id: str) -> Link:
        link = self._links.get(user_id)
        if link is None:
            link = Link(bytes.fromhex(user_id), dialled=False)
            self._links.set(user_id, link)
        return link
