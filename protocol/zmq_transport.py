"""The transport on ZeroMQ: one bound ROUTER, one DEALER for each peer that we dialled.

What libzmq does not do by itself, and is done here:
- CURVE without a ZAP handler lets anybody in: the handler starts before the bind, and
  `ZAP_ENFORCE_DOMAIN` refuses when it is missing.
- A routing id is chosen by nobody we trust: an inbound link is the `User-Id` that ZAP
  attached to the frame, which is the CURVE key that the other end proved.
- Socket monitors tell when a handshake is done and when a dialled connection broke. A
  broken DEALER is closed; whether and when to dial again is membership's decision.
- High-water marks count messages, not bytes, so they are low and frames are bounded.
"""

import errno
import socket
from collections import OrderedDict, deque
from contextlib import suppress
from dataclasses import dataclass

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from protocol.envelope import MAX_FRAME_BYTES
from protocol.errors import BadAddress, PortInUse
from protocol.identity import Identity
from protocol.interfaces import advertised_host, bindable_host
from protocol.records import Address, Endpoint
from protocol.transport import Arrived, Closed, Link, NetworkEvent, Opened, Refused
from protocol.zap import DOMAIN, ZapHandler

# Frames somewhat too large still arrive, to be counted; libzmq drops the connection of anything larger.
MAX_WIRE_FRAME_BYTES = 2 * MAX_FRAME_BYTES
QUEUE_MESSAGES = 128  # a link's queue each way: a round's groups of 16 nodes in one burst
SOCKET_BUDGET = 32  # frames taken from one socket before the others get their turn
POLL_BUDGET = 128  # frames taken in one poll, so that timers and publications are never starved
MAX_ROUTES = 1024  # keys whose inbound connection we remember, least recently heard forgotten first

_OPTIONS = {
    zmq.LINGER: 0,
    zmq.IMMEDIATE: 1,
    zmq.MAXMSGSIZE: MAX_WIRE_FRAME_BYTES,
    zmq.SNDHWM: QUEUE_MESSAGES,
    zmq.RCVHWM: QUEUE_MESSAGES,
    zmq.HANDSHAKE_IVL: 5_000,
    zmq.HEARTBEAT_IVL: 5_000,
    zmq.HEARTBEAT_TIMEOUT: 15_000,
    zmq.RECONNECT_IVL: 100,
    zmq.RECONNECT_IVL_MAX: 2_000,
}
_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

Socket = zmq.Socket[bytes]


@dataclass(slots=True)
class _Dialled:
    link: Link
    socket: Socket
    monitor: Socket


class ZmqTransport:
    """Implements `Transport`; see the module's comment."""

    def __init__(self, identity: Identity, listen: Endpoint | None) -> None:
        """Bind to `listen`, or to nothing for a node that only dials.

        Raises:
            PortInUse: somebody listens there.
            BadAddress: this machine has no such address.
        """
        self._public = z85.encode(identity.curve_key)
        self._secret = z85.encode(identity.curve_secret)
        self._context: zmq.Context[Socket] = zmq.Context()
        self._poller = zmq.Poller()
        self._dialled: dict[bytes, _Dialled] = {}
        self._by_socket: dict[Socket, _Dialled] = {}
        self._routes: OrderedDict[bytes, bytes] = OrderedDict()  # CURVE key -> routing id of its newest connection
        self._links: dict[str, Link] = {}
        self._events: deque[NetworkEvent] = deque()
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self._poller.register(self._wake_in, zmq.POLLIN)
        self._zap = ZapHandler(self._context)
        self._poller.register(self._zap.socket, zmq.POLLIN)
        self._router: Socket | None = None
        self._router_monitor: Socket | None = None
        self.endpoint: Endpoint | None = None
        if listen is not None:
            try:
                self._listen(listen)
            except BaseException:
                self.close()
                raise

    def _listen(self, listen: Endpoint) -> None:
        router = self._socket(zmq.ROUTER, listen)
        self._router = router
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self._router_monitor = router.get_monitor_socket(_HANDSHAKE_FAILED)
        try:
            router.bind(str(Endpoint(bindable_host(listen.host), listen.port)))
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(f"{listen} is in use: choose another port, or port 0 for any free one") from None
            raise BadAddress(f"cannot listen on {listen}: {error.strerror}") from None
        bound = Endpoint.parse(router.getsockopt_string(zmq.LAST_ENDPOINT))
        self.endpoint = Endpoint(advertised_host(listen.host), bound.port)
        self._poller.register(router, zmq.POLLIN)
        self._poller.register(self._router_monitor, zmq.POLLIN)

    def _socket(self, kind: int, endpoint: Endpoint) -> Socket:
        made = self._context.socket(kind)
        for option, value in _OPTIONS.items():
            made.setsockopt(option, value)
        made.setsockopt(zmq.IPV6, int(endpoint.is_ipv6))
        made.curve_publickey = self._public
        made.curve_secretkey = self._secret
        return made

    def dial(self, address: Address) -> None:
        """See `Transport.dial`."""
        if address.key in self._dialled:
            return
        link = Link(address.key, dialled=True)
        dealer = self._socket(zmq.DEALER, address.endpoint)
        dealer.curve_serverkey = z85.encode(address.key)
        monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _HANDSHAKE_FAILED)
        dialled = _Dialled(link, dealer, monitor)
        self._dialled[address.key] = dialled
        self._by_socket |= {dealer: dialled, monitor: dialled}
        self._poller.register(dealer, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)
        try:
            dealer.connect(str(address.endpoint))
        except zmq.ZMQError:  # libzmq refuses the endpoint; to its caller that is one more peer that is not there
            self._drop(dialled)

    def hang_up(self, link: Link) -> None:
        """See `Transport.hang_up`. ZeroMQ cannot close one connection of a ROUTER: its route is forgotten."""
        if not link.dialled:
            self._routes.pop(link.key, None)
        elif link.key in self._dialled:
            self._close_dialled(self._dialled[link.key])

    def send(self, link: Link, frame: bytes) -> bool:
        """See `Transport.send`."""
        try:
            if link.dialled:
                if link.key not in self._dialled:
                    return False
                self._dialled[link.key].socket.send(frame, zmq.DONTWAIT)
                return True
            if self._router is None or link.key not in self._routes:
                return False
            self._router.send_multipart([self._routes[link.key], frame], zmq.DONTWAIT)
            return True
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self._routes.pop(link.key, None)
            self._events.append(Closed(link))
            return False

    def poll(self, timeout: float) -> list[NetworkEvent]:
        """See `Transport.poll`."""
        ready = self._poller.poll(0 if self._events else max(0, int(timeout * 1000 + 0.999)))
        for source, _ in ready:
            if source is self._zap.socket:
                self._zap.answer()
            elif source is self._router:
                self._take_from_router(self._router)
            elif source is self._router_monitor:
                self._take_refusals(self._router_monitor)
            elif isinstance(source, zmq.Socket):
                self._take_from_dialled(source)
            else:
                self._sleep_again()
        return [self._events.popleft() for _ in range(min(POLL_BUDGET, len(self._events)))]

    def wake(self) -> None:
        """See `Transport.wake`."""
        with suppress(BlockingIOError, OSError):  # full: a wake-up is pending anyway; closed: nobody waits
            self._wake_out.send(b"\0")

    def close(self) -> None:
        """See `Transport.close`."""
        for dialled in list(self._dialled.values()):
            self._close_dialled(dialled)
        if self._router is not None:
            self._router.disable_monitor()
            self._router.close()
        if self._router_monitor is not None:
            self._router_monitor.close()
        self._zap.socket.close()
        self._context.destroy(linger=0)
        self._wake_in.close()
        self._wake_out.close()

    def _sleep_again(self) -> None:
        with suppress(BlockingIOError):
            while self._wake_in.recv(4096):
                pass

    def _take_from_router(self, router: Socket) -> None:
        for _ in range(SOCKET_BUDGET):
            if len(self._events) >= POLL_BUDGET:
                return
            try:
                routing_id = router.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            part = router.recv(copy=False)
            link = self._inbound_link(str(part.get("User-Id")))
            self._routes[link.key] = routing_id
            self._routes.move_to_end(link.key)
            if part.more:
                self._skip_parts(router)
                self._events.append(Refused("malformed", link))
            else:
                self._events.append(Arrived(link, part.bytes))
        while len(self._routes) > MAX_ROUTES:
            self._routes.popitem(last=False)

    def _inbound_link(self, user_id: str) -> Link:
        link = self._links.get(user_id)
        if link is None:
            if len(self._links) >= MAX_ROUTES:
                self._links.clear()
            link = self._links[user_id] = Link(bytes.fromhex(user_id), dialled=False)
        return link

    def _take_from_dialled(self, source: Socket) -> None:
        dialled = self._by_socket.get(source)
        if dialled is None:  # closed by an event before this one
            return
        if source is dialled.monitor:
            self._take_changes(dialled)
        else:
            self._take_frames(dialled, SOCKET_BUDGET)

    def _take_frames(self, dialled: _Dialled, budget: int) -> None:
        for _ in range(min(budget, POLL_BUDGET - len(self._events))):
            try:
                frame = dialled.socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            if dialled.socket.rcvmore:
                self._skip_parts(dialled.socket)
                self._events.append(Refused("malformed", dialled.link))
            else:
                self._events.append(Arrived(dialled.link, frame))

    def _skip_parts(self, source: Socket) -> None:
        while source.rcvmore:
            source.recv(copy=False)

    def _take_changes(self, dialled: _Dialled) -> None:
        while not dialled.monitor.closed:
            try:
                change = parse_monitor_message(dialled.monitor.recv_multipart(zmq.DONTWAIT))
            except zmq.Again:
                return
            if change["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._events.append(Opened(dialled.link))
            else:
                self._take_frames(dialled, QUEUE_MESSAGES)  # what came before the break is still good
                self._drop(dialled)

    def _take_refusals(self, monitor: Socket) -> None:
        with suppress(zmq.Again):
            while True:
                monitor.recv_multipart(zmq.DONTWAIT)
                self._events.append(Refused("handshake"))

    def _drop(self, dialled: _Dialled) -> None:
        self._close_dialled(dialled)
        self._events.append(Closed(dialled.link))

    def _close_dialled(self, dialled: _Dialled) -> None:
        del self._dialled[dialled.link.key]
        for owned in (dialled.socket, dialled.monitor):
            del self._by_socket[owned]
            self._poller.unregister(owned)
        dialled.socket.disable_monitor()
        dialled.monitor.close()
        dialled.socket.close()
