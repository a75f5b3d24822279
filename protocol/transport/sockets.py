"""ZeroMQ's sockets as this node makes them, and the poller that says which of them has something."""

import errno
import resource
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from enum import Enum, auto
from itertools import count
from typing import NamedTuple

import structlog
import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from protocol.identity import Identity
from protocol.limits.connections import MAX_WIRE_FRAME_BYTES
from protocol.limits.limits import Limits

Socket = zmq.Socket[bytes]

log = structlog.get_logger()

# libzmq's queues are bounded in messages and not in bytes, so we keep them short. What is to be sent waits in
# `protocol.limits.send_queues`, what is received in the kernel. Of frames below `TRACKED_BYTES`, libzmq is handed
# `SEND_QUEUE_MESSAGES` a link at a time (1 MiB). Of larger ones it is handed one chunk: it sends these without a copy,
# and reports when it is done. The kernel's buffer grows with the line and keeps that busy meanwhile. What libzmq was
# handed cannot be cancelled, and our short messages wait behind it.
SEND_QUEUE_MESSAGES = 64
RECEIVE_QUEUE_MESSAGES = 32
TRACKED_BYTES = 16 << 10
IN_FLIGHT_BYTES = 128 << 10
SOCKET_FRAMES = 32  # frames read from one socket before the others have their turn
POLL_FRAMES = 128  # frames read in one poll, so that timers and publications are never starved
HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
# Plain numbers, as an operation on enumeration members takes half as long as the call that needs it.
_POLLIN = int(zmq.POLLIN)
_PART = int(zmq.DONTWAIT | zmq.SNDMORE)
# A connection takes two descriptors, a dialled link three sockets; the rest of the process opens files, too.
MAX_DESCRIPTORS = 1 << 16
MAX_SOCKETS = 4096

_OPTIONS = {
    zmq.LINGER: 0,
    zmq.IMMEDIATE: 1,
    zmq.MAXMSGSIZE: MAX_WIRE_FRAME_BYTES,
    zmq.SNDHWM: SEND_QUEUE_MESSAGES,
    zmq.RCVHWM: RECEIVE_QUEUE_MESSAGES,
    zmq.BACKLOG: 512,
    zmq.CONNECT_TIMEOUT: 3_000,
    zmq.HANDSHAKE_IVL: 5_000,
    # A connection that leads nowhere is ended by the kernel. Not by ZMTP's own heartbeats: libzmq 4.3.5 ends the whole
    # process when one falls due on a connection that was reset while its receive queue was full (its issue 4364).
    zmq.HEARTBEAT_IVL: 0,
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 5,
    zmq.TCP_KEEPALIVE_INTVL: 5,
    zmq.TCP_KEEPALIVE_CNT: 2,
    zmq.TCP_MAXRT: 15_000,  # also ends a connection whose receive window stays shut
    zmq.RECONNECT_IVL: 100,
    zmq.RECONNECT_IVL_MAX: 2_000,
}


def has_message(socket: Socket) -> bool:
    """Tell whether a socket has something to receive. This is cheaper than an attempt that raises."""
    return int(socket.getsockopt(zmq.EVENTS)) & _POLLIN != 0


def take_messages(socket: Socket, take: Callable[[], None], most: int, *, is_ready: bool = False) -> bool:
    """Call `take`, which receives one message without waiting, up to `most` times; True if no more are left.

    `is_ready` says that a poll found a message just now, so that nothing is asked before the first call.
    """
    try:
        for _ in range(most):
            if not is_ready and not has_message(socket):
                return True
            is_ready = False
            take()
    except zmq.Again:  # libzmq does not promise that what a poll finds is still there
        return True
    return False


def allow_many_descriptors() -> int:
    """Raise the soft limit of open files to the hard one, and return how many there may be.

    Many systems start a process with a soft limit of 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def within_descriptors(limits: Limits) -> Limits:
    """Return limits by which inbound connections take half of this process's descriptors at most, two for each."""
    most = allow_many_descriptors() // 4
    if limits.max_connections <= most:
        return limits
    return replace(limits, max_connections=most, max_prefix_connections=min(limits.max_prefix_connections, most // 4))


class Taken(Enum):
    """The fate of a frame that a socket was handed."""

    YES = auto()
    FULL = auto()  # try again later
    GONE = auto()  # nobody is there


class InFlight:
    """The large frames of one link that libzmq was handed and has not encrypted yet: bounded in bytes."""

    def __init__(self) -> None:
        self._frames: deque[tuple[zmq.MessageTracker, int]] = deque()
        self._size = 0

    def has_room(self) -> bool:
        """Tell whether libzmq may be handed one more."""
        while self._frames and self._frames[0][0].done:
            self._size -= self._frames.popleft()[1]
        return self._size < IN_FLIGHT_BYTES

    def send(self, socket: Socket, frame: bytes, *route: bytes) -> Taken:
        """Hand a frame to a socket, after the parts of `route`."""
        if len(frame) >= TRACKED_BYTES and not self.has_room():
            return Taken.FULL
        try:
            for part in route:
                socket.send(part, _PART)
            if len(frame) < TRACKED_BYTES:
                socket.send(frame, zmq.DONTWAIT)
            else:
                tracker = socket.send(frame, zmq.DONTWAIT, copy=False, track=True)
                self._frames.append((tracker, len(frame)))
                self._size += len(frame)
        except zmq.Again:
            return Taken.FULL
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            return Taken.GONE
        return Taken.YES


class SocketMaker:
    """Makes sockets in a context of its own, with our CURVE keys and every bound that libzmq offers."""

    def __init__(self, identity: Identity) -> None:
        self.context: zmq.Context[Socket] = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        self._public = z85.encode(identity.curve_key)
        self._secret = z85.encode(identity.curve_secret)
        self._names = count()

    def make(self, kind: int, *, ipv6: bool) -> Socket:
        """Return a new socket."""
        socket = self.context.socket(kind)
        for option, value in _OPTIONS.items():
            socket.setsockopt(option, value)
        socket.setsockopt(zmq.IPV6, int(ipv6))
        socket.copy_threshold = TRACKED_BYTES
        socket.curve_publickey = self._public
        socket.curve_secretkey = self._secret
        return socket

    def watch(self, watched: Socket, events: int) -> "Monitor":
        """Return a monitor of the `events` of `watched`."""
        name = f"inproc://monitor-{next(self._names)}"
        watched.monitor(name, events)
        socket = self.context.socket(zmq.PAIR)
        socket.linger = 0
        # A bounded queue would block libzmq's only I/O thread while our own thread is busy.
        socket.rcvhwm = 0
        socket.connect(name)
        return Monitor(socket)


class Change(NamedTuple):
    """Something that happened to a connection; `value` is its descriptor where the event has one."""

    event: int
    value: int


class Monitor:
    """The events of a socket's connections, in their order."""

    def __init__(self, socket: Socket) -> None:
        self.socket = socket
        self._changes: deque[Change] = deque()
        self._ended: Counter[int] = Counter()  # by descriptor: how many ends of connections are among the changes

    def take(self) -> Change | None:
        """Return the next change, None if there is none yet."""
        if not self._changes:
            self._read()
        if not self._changes:
            return None
        change = self._changes.popleft()
        if change.event == zmq.EVENT_DISCONNECTED:
            self._ended[change.value] -= 1
        return change

    def has_ended(self, descriptor: int) -> bool:
        """Tell whether the newest connection with this descriptor has ended by now.

        This is called for each connection, and thousands may come at once: so it searches nothing.
        """
        self._read()
        return self._ended[descriptor] > 0

    def close(self) -> None:
        """Close the socket that the events come over."""
        self.socket.close()
        self._changes.clear()
        self._ended.clear()

    def _read(self) -> None:
        while not self.socket.closed and has_message(self.socket):
            event = parse_monitor_message(self.socket.recv_multipart(zmq.DONTWAIT))
            change = Change(int(event["event"]), int(event["value"]))
            self._changes.append(change)
            if change.event == zmq.EVENT_DISCONNECTED:
                self._ended[change.value] += 1


class Sources:
    """The sockets and file descriptors that a poll waits for, each with the function to call when it is ready."""

    def __init__(self, failed: Callable[[], None]) -> None:
        """Begin without any; `failed` is called when a handler runs into a defect."""
        self._failed = failed
        self._poller = zmq.Poller()
        self._handlers: dict[Socket | int, Callable[[], None]] = {}

    def add(self, source: Socket | int, handler: Callable[[], None]) -> None:
        """Wait for the source too."""
        self._poller.register(source, zmq.POLLIN)
        self._handlers[source] = handler

    def drop(self, source: Socket | int) -> None:
        """Wait for it no longer."""
        self._poller.unregister(source)
        del self._handlers[source]

    def poll(self, timeout: float) -> None:
        """Wait up to `timeout` seconds, and call the handler of every source that is ready."""
        for source, _ in self._poller.poll(max(0, int(timeout * 1000 + 0.999))):
            handler = self._handlers.get(source)  # a handler before it may have dropped it
            if handler is not None:
                self.guard(handler)

    def guard(self, act: Callable[[], None]) -> None:
        """Call `act`. A defect in it is logged and reported to `failed`; the only network thread goes on."""
        try:
            act()
        except Exception:  # whatever is wrong with us, and with what is at the other end
            log.exception("internal error", event_type="transport")
            self._failed()
