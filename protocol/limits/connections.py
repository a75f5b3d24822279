"""Which TCP connections are cut, and why: what libzmq does not defend by itself. Pure, no sockets.

libzmq bounds its queues in whole messages. The parts of a message that never ends pile up
without a bound, so each connection is measured twice: the bytes that the kernel received for
it, less those still unread in the kernel, and the bytes that came out in whole messages. The
difference is what libzmq holds. The rules, in the order of a connection's life:

    what peers of the prefix did is more than it may, lately   -> "prefix_refused"
    over the prefix's rate of handshakes                      -> "handshake_flood"
    over the cap of connections, of a prefix or in all: the oldest one that we never
      answered makes room, or the new one goes                -> "too_many_connections"
    a key has a newer inbound connection                      -> "superseded"
    not answered for hello_s, or sent unanswered_bytes unanswered: only a valid
      hello gets an answer                                    -> "no_hello"
    the socket was read until it was empty, and libzmq still
      holds more than one frame of this connection            -> "endless_message"
    the connections of a prefix that we answered, or those
      that we never did, are over its rate of messages or
      bytes: the heaviest of these                            -> "prefix_flood"
    all together hold too much: the heaviest                  -> "backlog"

The driver measures every connection (`measure`), then reads the sockets (`took`, `drained`),
then asks (`review`). In that order a message that was complete when we measured has been
delivered when we judge, however slow the machine is.

A cut connection stays in the table until its end was seen (`gone`) and once more until the
next review, because frames of it may still be queued: they are not delivered.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from protocol.config import Limits
from protocol.events import Link
from protocol.limits.peer_scores import ScoreBoard
from protocol.limits.rate_limits import Prefixes
from protocol.wire.envelope import MAX_FRAME_BYTES

# Frames somewhat too large still arrive, to be counted; libzmq drops the connection of anything larger.
MAX_WIRE_FRAME_BYTES = 2 * MAX_FRAME_BYTES

# Time in which we did not look is not held against anybody: a blocked process wakes up to old hellos.
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
    """One TCP connection. `prefix` is empty for one that we dialled: no cap applies to it. `payer` is its network."""

    number: int
    prefix: str
    payer: str
    link: Link | None = None
    answered: bool = False
    received: int = 0  # by the kernel, at the last measurement
    unread: int = 0  # of those, not yet taken by libzmq
    delivered: int = 0  # in whole messages, as wire bytes
    growth: int = 0  # received between the last two measurements
    messages: int = 0  # that came since the last review
    age: float = 0.0
    heard: bool = False  # a message came since what libzmq holds was last found small
    drained: bool = False  # its socket was empty once since the last measurement
    cut: bool = False
    gone: bool = False
    gone_before: bool = False  # at the last measurement already

    @property
    def held(self) -> int:
        """Bytes that libzmq holds of it, in queued messages and in one that is not complete."""
        return max(0, self.received - self.unread - self.delivered)


@dataclass(slots=True)
class Review:
    """Connections to cut; links that are gone, their last frame read; `ended` are these and those that we cut."""

    cuts: list[ConnectionCut] = field(default_factory=list)
    closed: list[Link] = field(default_factory=list)
    ended: list[Link] = field(default_factory=list)


class Connections:
    """See the module's comment. A connection's `number` is never given twice. `now` is steady, in seconds."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._prefixes = Prefixes(limits)
        self._scores = ScoreBoard(
            limits.prefix_graylist_score,
            limits.score_half_life_s,
            limits.max_prefixes,
            limits.prefix_first_wait_s,
            limits.prefix_last_wait_s,
        )
        self._table: dict[int, Connection] = {}  # oldest first
        self._current: dict[Link, Connection] = {}  # the newest of each link
        self._open: Counter[str] = Counter()  # neither cut nor gone, by prefix
        self._reviewed: float | None = None

    def __len__(self) -> int:
        return len(self._table)

    def accepted(self, number: int, prefix: str, now: float) -> list[ConnectionCut]:
        """Somebody connected to us; return what is to be cut for it."""
        new = self._table[number] = Connection(number, prefix, prefix)
        self._open[prefix] += 1
        if self._scores.is_refused(prefix, now):
            return [self._cut(new, "prefix_refused")]
        if not self._prefixes.may_connect(prefix, now):
            return [self._cut(new, "handshake_flood")]
        if self._open[prefix] > self._limits.max_prefix_connections:
            return [self._make_room(new, prefix)]
        if self._open.total() - self._open[""] > self._limits.max_connections:
            return [self._make_room(new, None)]
        return []

    def connected(self, number: int, link: Link, prefix: str) -> None:
        """We are connected to a node that we dialled, in the network `prefix`."""
        self._table[number] = self._current[link] = Connection(number, "", prefix, link, answered=True)
        self._open[""] += 1

    def is_anonymous(self, number: int) -> bool:
        """Tell whether an inbound connection has not sent a message yet."""
        connection = self._table.get(number)
        return connection is not None and connection.link is None

    def took(self, number: int, link: Link, parts: Iterable[int]) -> tuple[bool, list[ConnectionCut]]:
        """A whole message came, of these part sizes. Return whether it is wanted, and what to cut for it."""
        connection = self._table.get(number)
        if connection is None or (connection.link is not None and connection.link != link):
            return True, []  # the last words of another connection that had the same file descriptor
        connection.delivered += sum(map(wire_bytes, parts))
        connection.heard = True
        connection.messages += 1
        if connection.cut:
            return False, []
        if connection.link is not None:
            return True, []
        connection.link = link
        older = self._current.get(link)
        self._current[link] = connection
        if older is None or older.cut or older.gone:
            return True, []
        return True, [self._cut(older, "superseded")]

    def carries(self, number: int, link: Link) -> bool:
        """Tell whether this connection is the link's newest."""
        connection = self._current.get(link)
        return connection is not None and connection.number == number

    def answered(self, link: Link) -> None:
        """We sent a frame over the link."""
        if (connection := self._current.get(link)) is not None:
            connection.answered = True

    def charge(self, link: Link, points: float, now: float) -> str:
        """The holder of a link broke the rules, for so many points: its prefix pays.

        Return the prefix if it is refused from now on, else nothing.
        """
        connection = self._current.get(link)
        return self.charge_network(connection.payer, points, now) if connection is not None else ""

    def charge_network(self, prefix: str, points: float, now: float) -> str:
        return prefix if self._scores.penalise(prefix, points, now) is not None else ""

    def hung_up(self, link: Link) -> list[ConnectionCut]:
        """We want no more of the link; return what is to be cut, which is no offence of theirs."""
        connection = self._current.get(link)
        return [] if connection is None or connection.cut or connection.gone else [self._cut(connection, "")]

    def gone(self, number: int) -> Connection:
        """A connection ended; return what was known of it."""
        connection = self._table[number]
        self._close(connection)
        connection.gone = True
        if connection.link is None:
            del self._table[number]
        return connection

    def forget(self, number: int) -> None:
        """Remove a connection from the table, whatever became of it."""
        connection = self._table.pop(number, None)
        if connection is not None:
            self._close(connection)
            if connection.link is not None and self._current.get(connection.link) is connection:
                del self._current[connection.link]

    def numbers(self) -> Iterator[int]:
        return (number for number, connection in self._table.items() if not (connection.cut or connection.gone))

    def begin(self) -> None:
        for connection in self._table.values():
            connection.drained = False
            connection.gone_before = connection.gone

    def measure(self, number: int, received: int, unread: int) -> None:
        """The kernel received `received` bytes so far, of which `unread` wait in its buffer."""
        connection = self._table[number]
        connection.growth = received - connection.received
        connection.received, connection.unread = received, unread
        # All that was delivered had been received; a larger count means that frames of a predecessor were counted here.
        connection.delivered = min(connection.delivered, received)

    def drained(self, link: Link | None) -> None:
        """A socket was read until it was empty: that of a dialled link, or the one of all inbound links."""
        inbound = (connection for connection in self._table.values() if connection.prefix)
        for connection in inbound if link is None else filter(None, [self._current.get(link)]):
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
        result.cuts += self._judge_prefixes(now)
        result.cuts += self._judge_backlog()
        return result

    def _fault(self, connection: Connection) -> str:
        limits, taken = self._limits, connection.received - connection.unread
        if not connection.answered and (connection.age > limits.hello_s or taken > limits.unanswered_bytes):
            return "no_hello"
        if connection.drained and connection.held > MAX_WIRE_FRAME_BYTES + limits.slack_bytes:
            return "endless_message"
        if connection.drained and connection.heard and connection.held <= limits.slack_bytes:
            connection.delivered += connection.held  # heartbeats, or the beginning of a next message
            connection.heard = False
        return ""

    def _sweep(self, connection: Connection, result: Review) -> None:
        if not (connection.gone_before and (connection.drained or not connection.prefix)):
            return
        current = connection.link is not None and self._current.get(connection.link) is connection
        self.forget(connection.number)
        if current and connection.link is not None:
            result.ended.append(connection.link)
            if not connection.cut:
                result.closed.append(connection.link)

    def _judge_prefixes(self, now: float) -> list[ConnectionCut]:
        # Strangers cost nothing: what they send is counted apart, or their numbers would end the link of a peer.
        crowds: dict[tuple[str, bool], list[Connection]] = {}
        for connection in self._table.values():
            if connection.prefix and not (connection.cut or connection.gone):
                crowds.setdefault((connection.prefix, connection.answered), []).append(connection)
        cuts = []
        for (prefix, answered), crowd in crowds.items():
            messages, size = sum(c.messages for c in crowd), sum(c.growth for c in crowd)
            if not self._prefixes.may_send(prefix, messages, size, now, answered=answered):
                # The larger of its two shares of what they all sent.
                heaviest = max(crowd, key=lambda c: max(c.messages / max(1, messages), c.growth / max(1, size)))
                cuts.append(self._cut(heaviest, "prefix_flood"))
            for connection in crowd:
                connection.messages = 0
        return cuts

    def _judge_backlog(self) -> list[ConnectionCut]:
        still = [c for c in self._table.values() if not (c.cut or c.gone)]
        if sum(connection.held for connection in still) <= self._limits.max_backlog_bytes:
            return []
        return [self._cut(max(still, key=lambda connection: connection.held), "backlog")]

    def _make_room(self, new: Connection, prefix: str | None) -> ConnectionCut:
        for connection in self._table.values():
            crowd = connection.prefix == prefix if prefix is not None else connection.prefix
            if crowd and not (connection.cut or connection.gone or connection.answered):
                return self._cut(connection, "too_many_connections")
        return self._cut(new, "too_many_connections")

    def _cut(self, connection: Connection, reason: str) -> ConnectionCut:
        self._close(connection)
        connection.cut = True
        return ConnectionCut(connection.number, reason, connection.link)

    def _close(self, connection: Connection) -> None:
        if not (connection.cut or connection.gone):
            self._open[connection.prefix] -= 1
            if not self._open[connection.prefix]:
                del self._open[connection.prefix]
