"""A second descriptor of a TCP connection that libzmq owns: to measure it and to end it.

No other file goes below libzmq's interface.

Why: libzmq says neither how many bytes of a connection it holds nor from which address the connection came, and cannot
be told to end one connection of a ROUTER. So a message that never ends could take all memory, and 512 strangers of one
network all connections. `protocol.limits.connections` has the rules.

How: libzmq names each connection by its file descriptor, and we hold a duplicate of that. Through it the kernel tells
the other end's address and how much came, and `shutdown` ends the connection; libzmq takes that for the peer's doing.
The duplicate stays open after libzmq closed its own descriptor. So we can still ask who ended the connection, and do
not mistake a later connection with the same number for it.

Why the duplicate cannot be of another socket of this process: libzmq (4.3.5, one I/O thread) reports the beginning of
a connection before its end, and the end before it closes the descriptor. If the number had been given to another
socket before our `dup`, the end would have been reported by then. So we look for the end after the `dup`, and keep no
duplicate of what has ended (`_look`).

Where TCP_INFO is not in Linux's layout, connections are counted and cut, but not measured. This file would be
unnecessary if libzmq could bound the bytes of an unfinished message over all its parts, and end one peer of a ROUTER.
"""

import os
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import count
from typing import NamedTuple

from protocol.events import Accepted, Closed, Link, Moving, NetworkEvent, RefusedEarly
from protocol.limits.connections import ConnectionCut, Connections
from protocol.limits.limits import Limits
from protocol.limits.networks import counts_as
from protocol.limits.peer_scores import PENALTIES

# struct tcp_info of Linux, stable since 4.2: the state, milliseconds since data came, bytes acknowledged and received.
_STATE_AT, _LAST_DATA_AT, _ACKNOWLEDGED_AT, _RECEIVED_AT = 0, 52, 120, 128
_INFO_BYTES = 136
_ESTABLISHED = 1
# The kernel ends a connection that leads nowhere after 15 s, and its state says so; a broken one at once.
_SILENT_MS = 5_000
_LINUX = sys.platform == "linux"


class Measured(NamedTuple):
    """Bytes `received` by the kernel since the connection began, of which `unread` wait in its buffer.

    Of ours, so many are `acknowledged`, and `unsent` wait in the kernel for the line, or on it.
    """

    received: int
    unread: int
    acknowledged: int
    unsent: int


class TcpView:
    """A look at one connection."""

    def __init__(self, descriptor: int) -> None:
        """Duplicate `descriptor`.

        Raises:
            OSError: it is no connected socket, or it has been closed.
        """
        duplicate = os.dup(descriptor)
        try:
            self._socket = socket.socket(fileno=duplicate)
        except OSError:  # another thread of this process has a file there by now
            os.close(duplicate)
            raise
        try:
            if self._socket.family not in (socket.AF_INET, socket.AF_INET6):
                raise OSError("another thread of this process has a socket of its own there by now")
            self.peer = str(self._socket.getpeername()[0])
        except OSError:
            self._socket.close()
            raise

    def measure(self) -> Measured | None:
        """Return how much came in, or None where that cannot be known."""
        info = self._info()
        if info is None:
            return None
        import termios

        # The order matters: what arrives between the two calls counts as unread, never as held.
        acknowledged, received = struct.unpack_from("=QQ", info, _ACKNOWLEDGED_AT)
        return Measured(received, self._waiting(termios.FIONREAD), acknowledged, self._waiting(termios.TIOCOUTQ))

    def was_ended_by_us(self) -> bool:
        """Tell, after libzmq closed its descriptor, whether libzmq itself ended the connection.

        It does so only if what came breaks ZMTP or CURVE, or is over MAXMSGSIZE.
        """
        info = self._info()
        return (
            info is not None
            and info[_STATE_AT] == _ESTABLISHED
            and struct.unpack_from("=I", info, _LAST_DATA_AT)[0] < _SILENT_MS
        )

    def shut_down(self) -> None:
        """End the connection; libzmq notices and cleans up."""
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the second descriptor back."""
        self._socket.close()

    def _info(self) -> bytes | None:
        if not _LINUX:
            return None
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        except OSError:
            return None
        return info if len(info) == _INFO_BYTES else None

    def _waiting(self, way: int) -> int:
        """Return how many bytes wait in the kernel, one way or the other."""
        import fcntl

        return int(struct.unpack("=i", fcntl.ioctl(self._socket.fileno(), way, b"\0\0\0\0"))[0])


class TcpWatch:
    """Every TCP connection that we accepted or dialled; what is refused goes to `events`.

    libzmq names connections by file descriptor, and descriptors are used again. We name them by numbers that are not.
    libzmq's events of inbound connections come in order, so each means the newest connection with its descriptor
    (`inbound`). The number of a dialled connection is kept in `outbound`.
    """

    def __init__(self, limits: Limits, events: deque[NetworkEvent]) -> None:
        self._connections = Connections(limits)
        self.answered: Callable[[Link], None] = self._connections.answered  # told of each frame that went out
        self._views: dict[int, TcpView] = {}  # of those not yet gone, by number
        self._inbound: dict[int, int] = {}  # by descriptor
        self._count = count()
        self._events = events

    def __len__(self) -> int:
        return len(self._views)

    def accepted(self, descriptor: int, has_ended: Callable[[int], bool], now: float) -> None:
        """Watch a connection that came in; `has_ended` tells whether a descriptor's newest one has ended by now."""
        self._inbound.pop(descriptor, None)
        if (number := self._look(descriptor, has_ended)) is not None:
            self._inbound[descriptor] = number
            self._carry_out(self._connections.accepted(number, self._prefix(number), now))

    def inbound(self, descriptor: int) -> int:
        """Return the number of the last inbound connection with this descriptor, -1 if it was gone at once."""
        return self._inbound.get(descriptor, -1)

    def connected(self, descriptor: int, has_ended: Callable[[int], bool], link: Link) -> int:
        """Watch a connection that we dialled, before its handshake; return its number, -1 if it is gone already."""
        number = self._look(descriptor, has_ended)
        if number is None:
            return -1
        self._connections.connected(number, link, self._prefix(number))
        return number

    def gone(self, number: int, failure: str | None, now: float) -> None:
        """Note that a connection ended; `failure` is what to count if its handshake failed, None if it did not fail."""
        view = self._views.pop(number, None)
        if view is None:
            if failure:  # it was gone before we looked
                self._events.append(RefusedEarly(failure))
            return
        connection = self._connections.gone(number)
        if not connection.cut:
            reason = failure
            if reason is None and view.was_ended_by_us():
                reason = "framing"
                if connection.link is not None and connection.link.dialled:  # forgotten now, so its network pays here
                    self._connections.charge_network(connection.prefix, PENALTIES[reason], now)
            if reason:
                self._events.append(RefusedEarly(reason, connection.link))
        view.close()

    def host(self, number: int) -> str:
        """Return the IP address of a connection's other end, "" if it is gone."""
        view = self._views.get(number)
        return view.peer if view is not None else ""

    def forget(self, number: int) -> None:
        """Stop watching a connection that we dialled."""
        self._connections.forget(number)
        if (view := self._views.pop(number, None)) is not None:
            view.close()

    def took(self, number: int, link: Link, parts: Iterable[int]) -> bool:
        """Count a whole message; return whether it is to be delivered."""
        is_first = self._connections.is_anonymous(number)
        wanted, cuts = self._connections.took(number, link, parts)
        if cuts:
            self._carry_out(cuts)
        if wanted and is_first:
            self._events.append(Accepted(link, self.host(number)))
        return wanted

    def carries(self, number: int, link: Link) -> bool:
        """Tell whether this connection is the link's newest, so that `review` will return the link when it ends."""
        return self._connections.carries(number, link)

    def charge(self, link: Link, points: float, now: float) -> None:
        """Charge the network of a link's holder for an offence."""
        self._connections.charge(link, points, now)

    def hang_up(self, link: Link) -> None:
        """End the link's connection."""
        self._carry_out(self._connections.hung_up(link))

    def measure(self) -> None:
        """Begin a review: measure every connection."""
        self._connections.begin()
        for number in list(self._connections.numbers()):
            measured = self._views[number].measure()
            if measured is not None:
                self._connections.measure(number, *measured)

    def drained(self, link: Link | None) -> None:
        """Note that the socket of a dialled link, or (None) of all inbound ones, was read until it was empty."""
        self._connections.drained(link)

    def review(self, now: float) -> list[Link]:
        """End a review: cut what breaks the rules; return the links whose newest connection has ended."""
        review = self._connections.review(now)
        self._carry_out(review.cuts)
        self._events.extend(Moving(link) for link in review.moving)
        self._events.extend(Closed(link) for link in review.closed)
        return review.ended

    def close(self) -> None:
        """Give every descriptor back."""
        for view in self._views.values():
            view.close()
        self._views.clear()

    def _prefix(self, number: int) -> str:
        host = self._views[number].peer
        return counts_as(host, own=host)

    def _look(self, descriptor: int, has_ended: Callable[[int], bool]) -> int | None:
        try:
            view = TcpView(descriptor)
        except OSError:  # gone before we looked
            return None
        if has_ended(descriptor):  # asked after the dup: this may be anybody's
            view.close()
            return None
        number = next(self._count)
        self._views[number] = view
        return number

    def _carry_out(self, cuts: list[ConnectionCut]) -> None:
        for cut in cuts:
            if cut.number in self._views:
                self._views[cut.number].shut_down()
            if cut.reason:
                self._events.append(RefusedEarly(cut.reason, cut.link))
