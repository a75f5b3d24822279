"""Which TCP connections are cut, and why: what libzmq does not defend by itself. Pure, no sockets.

libzmq bounds its queues in whole messages, and not the parts of a message that never ends. So each connection is
measured twice: the bytes that the kernel received for it, less those still unread in the kernel, and the bytes that
came out in whole messages. libzmq holds the difference. The rules, in the order of a connection's life:

    its prefix began more handshakes than it may, or its     -> "handshake_flood"
      nodes committed offences, each of which costs some
    there are too many connections of a prefix, or in all    -> "too_many_connections": the oldest that we never
                                                                answered, or else the new one
    its key has a newer inbound connection                   -> "superseded"
    we did not answer it for `hello_s`, or until it sent     -> "no_hello": we answer nothing but a valid hello
      `unanswered_bytes`
    its socket was read until it was empty, and libzmq       -> "endless_message"
      still holds more than one frame of it
    libzmq holds too much of its prefix in parts of messages -> "backlog": the heaviest
      that are not complete, or of all together

The transport measures every connection (`measure`), then reads the sockets (`took`, `drained`), then asks for a verdict
(`review`). In that order, a message that was complete at the measurement has been read at the verdict, however slow the
machine is. A connection that was cut stays in the table until its end was seen (`gone`), and then until the next
review: frames of it may still be queued, and are not delivered.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from protocol.events import Link
from protocol.limits.limits import Limits
from protocol.limits.rate_limits import TokenBuckets
from protocol.wire.envelope import MAX_FRAME_BYTES

# Frames somewhat too large still arrive, to be counted; libzmq drops the connection of anything larger.
MAX_WIRE_FRAME_BYTES = 2 * MAX_FRAME_BYTES

# What a point costs the offender's network (see `peer_scores.PENALTIES`). After five refused keys it may begin no more
# for a while: seconds, as others live there, but more for each offence of those who go on.
POINT_HANDSHAKES = 5.0

# The most that a connection's age grows between two reviews: if we were blocked, its hello may wait unread.
MAX_STEP_S = 1.0

# ZMTP 3.1 with CURVE (RFC 26): each part is a command "\x07MESSAGE", a nonce (8), and a box of the
# flags (1) and the part, with an authenticator (16); around it a flag and a length of 1 or 8 bytes.
_PART_BYTES = 8 + 8 + 16 + 1
_SHORT_PART = 255


def wire_bytes(part: int) -> int:
    """Return how many bytes a message part of `part` bytes takes on the wire."""
    sealed = part + _PART_BYTES
    return sealed + (2 if sealed <= _SHORT_PART else 9)


@dataclass(frozen=True, slots=True)
class ConnectionCut:
    """End the connection with this number; `link` where its key is known. Count it by `reason`."""

    number: int
    reason: str
    link: Link | None


@dataclass(slots=True)
class Connection:
    """One TCP connection, with a node in the network `prefix`. Caps apply only to those that we did not dial."""

    number: int
    prefix: str
    link: Link | None = None
    answered: bool = False
    received: int = 0  # by the kernel, at the last measurement
    unread: int = 0  # of those, not yet taken by libzmq
    acknowledged: int = 0  # of what we sent, at the last measurement
    moves: bool = False  # whether bytes came since the measurement before, or left that waited in the kernel
    delivered: int = 0  # in whole messages, as wire bytes
    age: float = 0.0
    heard: bool = False  # a message came since `delivered` was last corrected (`_fault`)
    drained: bool = False  # its socket was empty once since the last measurement
    cut: bool = False
    gone: bool = False
    gone_before: bool = False  # at the last measurement already

    @property
    def is_inbound(self) -> bool:
        return self.link is None or not self.link.dialled

    @property
    def is_open(self) -> bool:
        return not (self.cut or self.gone)

    @property
    def held(self) -> int:
        """Bytes that libzmq holds of it, in queued messages and in one that is not complete."""
        return max(0, self.received - self.unread - self.delivered)


@dataclass(slots=True)
class Review:
    """The verdict: connections to cut, and links whose last frame was read.

    `closed` are links that ended by themselves; `ended` includes those that we cut. Bytes move over those in `moving`.
    """

    cuts: list[ConnectionCut] = field(default_factory=list)
    closed: list[Link] = field(default_factory=list)
    ended: list[Link] = field(default_factory=list)
    moving: list[Link] = field(default_factory=list)


class Connections:
    """See the module's comment. A connection's `number` is never given twice. `now` is steady, in seconds."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        most = limits.max_remembered
        self._handshakes: TokenBuckets[str] = TokenBuckets(
            limits.prefix_handshakes_per_second, limits.prefix_handshakes_burst, most
        )
        self._table: dict[int, Connection] = {}  # oldest first
        self._current: dict[Link, Connection] = {}  # the newest of each link
        self._reviewed: float | None = None

    def __len__(self) -> int:
        return len(self._table)

    def accepted(self, number: int, prefix: str, now: float) -> list[ConnectionCut]:
        """Add a connection that came in; return which connections to cut for it."""
        new = self._table[number] = Connection(number, prefix)
        if not self._handshakes.take(prefix, 1, now):
            return [self._cut(new, "handshake_flood")]
        inbound = [connection for connection in self._table.values() if connection.is_inbound and connection.is_open]
        of_prefix = [connection for connection in inbound if connection.prefix == prefix]
        limits = self._limits
        for crowd, most in ((of_prefix, limits.max_prefix_connections), (inbound, limits.max_connections)):
            if len(crowd) > most:  # the new one is the last of those that we did not answer
                oldest = next(connection for connection in crowd if not connection.answered)
                return [self._cut(oldest, "too_many_connections")]
        return []

    def connected(self, number: int, link: Link, prefix: str) -> None:
        """Add a connection to a node that we dialled, in the network `prefix`."""
        self._table[number] = self._current[link] = Connection(number, prefix, link, answered=True)

    def is_anonymous(self, number: int) -> bool:
        """Tell whether an inbound connection has not sent a message yet."""
        connection = self._table.get(number)
        return connection is not None and connection.link is None

    def took(self, number: int, link: Link, parts: Iterable[int]) -> tuple[bool, list[ConnectionCut]]:
        """Count a whole message with these part sizes. Return whether it is to be delivered, and what to cut for it."""
        connection = self._table.get(number)
        if connection is None or (connection.link is not None and connection.link != link):
            # The last words of another connection that had the same file descriptor. If it never spoke before, its
            # network is not known any more, and no limit would hold for it: it is not heard.
            return link.dialled or link in self._current, []
        connection.delivered += sum(map(wire_bytes, parts))
        connection.heard = True
        if connection.cut:
            return False, []
        if connection.link is not None:
            return True, []
        connection.link = link
        older = self._current.get(link)
        self._current[link] = connection
        return True, [self._cut(older, "superseded")] if older is not None and older.is_open else []

    def carries(self, number: int, link: Link) -> bool:
        """Tell whether this connection is the link's newest."""
        connection = self._current.get(link)
        return connection is not None and connection.number == number

    def answered(self, link: Link) -> None:
        """Note that we sent a frame over the link."""
        if (connection := self._current.get(link)) is not None:
            connection.answered = True

    def charge(self, link: Link, points: float, now: float) -> None:
        """Charge the prefix of a link's holder for an offence."""
        if (connection := self._current.get(link)) is not None:
            self.charge_network(connection.prefix, points, now)

    def charge_network(self, prefix: str, points: float, now: float) -> None:
        self._handshakes.of(prefix, now).spend(points * POINT_HANDSHAKES)

    def hung_up(self, link: Link) -> list[ConnectionCut]:
        """Return what to cut for a link that we hang up. It is no offence of the other end."""
        connection = self._current.get(link)
        return [self._cut(connection, "")] if connection is not None and connection.is_open else []

    def gone(self, number: int) -> Connection:
        """Note that a connection ended; return what was known of it."""
        connection = self._table[number]
        connection.gone = True
        if connection.link is None:
            del self._table[number]
        return connection

    def forget(self, number: int) -> None:
        """Remove a connection from the table."""
        connection = self._table.pop(number, None)
        if connection is not None and connection.link is not None and self._is_current(connection):
            del self._current[connection.link]

    def _is_current(self, connection: Connection) -> bool:
        return connection.link is not None and self._current.get(connection.link) is connection

    def numbers(self) -> Iterator[int]:
        return (number for number, connection in self._table.items() if connection.is_open)

    def begin(self) -> None:
        for connection in self._table.values():
            connection.drained = False
            connection.gone_before = connection.gone

    def measure(self, number: int, received: int, unread: int, acknowledged: int = 0, unsent: int = 0) -> None:
        """Note that the kernel received `received` bytes so far, of which `unread` wait in its buffer.

        The other end acknowledged so many of ours, and `unsent` wait in the kernel for the line, or on it.
        """
        connection = self._table[number]
        leave = unsent > 0 and acknowledged > connection.acknowledged
        connection.moves = leave or received > connection.received
        connection.acknowledged = acknowledged
        connection.received, connection.unread = received, unread
        # No more can be delivered than was received. If the count is larger, it has frames of an earlier connection.
        connection.delivered = min(connection.delivered, received)

    def drained(self, link: Link | None) -> None:
        """Note that a socket was read until it was empty: that of a dialled link, or (None) of all inbound links."""
        for connection in self._table.values():
            if connection.is_inbound if link is None else self._current.get(link) is connection:
                connection.drained = True

    def review(self, now: float) -> Review:
        """Judge every connection; see the module's comment."""
        elapsed = 0.0 if self._reviewed is None else min(MAX_STEP_S, now - self._reviewed)
        self._reviewed = now
        result = Review()
        for connection in list(self._table.values()):
            if connection.gone:
                self._sweep(connection, result)
            elif not connection.cut:
                connection.age += elapsed
                if reason := self._fault(connection):
                    result.cuts.append(self._cut(connection, reason))
                elif connection.moves and connection.link is not None:
                    result.moving.append(connection.link)
        result.cuts += self._judge_backlog()
        return result

    def _fault(self, connection: Connection) -> str:
        limits, taken = self._limits, connection.received - connection.unread
        if not connection.answered and (connection.age > limits.hello_s or taken > limits.unanswered_bytes):
            return "no_hello"
        if connection.drained and connection.held > MAX_WIRE_FRAME_BYTES + limits.slack_bytes:
            return "endless_message"
        if connection.drained and connection.heard and connection.held <= limits.slack_bytes:
            connection.delivered += connection.held  # a handshake, a heartbeat, or the beginning of a next message
            connection.heard = False
        return ""

    def _sweep(self, connection: Connection, result: Review) -> None:
        if not (connection.gone_before and (connection.drained or not connection.is_inbound)):
            return
        is_current = self._is_current(connection)
        self.forget(connection.number)
        if is_current and connection.link is not None:
            result.ended.append(connection.link)
            if not connection.cut:
                result.closed.append(connection.link)

    def _judge_backlog(self) -> Iterator[ConnectionCut]:
        """Cut the heaviest until no prefix has too much in incomplete messages, nor all have too much together."""
        crowds: defaultdict[str, list[Connection]] = defaultdict(list)
        for connection in self._table.values():
            if connection.is_open and connection.held:
                crowds[""].append(connection)
                if connection.drained:
                    crowds[connection.prefix].append(connection)
        for prefix, crowd in crowds.items():
            most = self._limits.prefix_backlog_bytes if prefix else self._limits.max_backlog_bytes
            crowd.sort(key=lambda connection: connection.held)
            held = sum(connection.held for connection in crowd if connection.is_open)
            while held > most:
                heaviest = crowd.pop()
                if heaviest.is_open:
                    held -= heaviest.held
                    yield self._cut(heaviest, "backlog")

    def _cut(self, connection: Connection, reason: str) -> ConnectionCut:
        connection.cut = True
        return ConnectionCut(connection.number, reason, connection.link)
