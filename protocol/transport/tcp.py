"""A second descriptor of a TCP connection that libzmq owns: to measure it and to end it.

All that is done below libzmq's interface is done here.

Why: libzmq says neither how many bytes of a connection it holds nor from which address one came, and it
cannot be told to end one connection of a ROUTER. Without that, a message that never ends, or 512 strangers of
one network, take what memory and what connections there are. `protocol.limits.connections` has the rules.

What is done: of each connection that libzmq names, by its file descriptor, we hold a duplicate. The kernel tells
by it the other end's address and how much came, and `shutdown` ends the connection, which libzmq
takes for the peer's doing. Duplicated, the descriptor stays ours after libzmq closed its own, which tells who ended a
connection, and no later connection that gets the same number is mistaken for it.

Why the duplicate is of the connection that is meant, and of no other socket of this process:
libzmq (4.3.5, one I/O thread) reports that a connection begins before it can end, and that it ended
before it closes the descriptor. Had the number been given to somebody else by the time of our `dup`, the end would have
been reported by then: so we ask for it after the `dup`, and keep no duplicate of what has ended (`_look`).

Where the system gives no such information (TCP_INFO is read in Linux's layout only) connections are
counted and cut, but not measured. All of this would be unnecessary, were there an option of libzmq that bounds
the bytes of an unfinished message over all its parts, and a way to end one peer of a ROUTER.
"""

import os
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

from protocol.config import Limits
from protocol.events import Accepted, Closed, Link, NetworkEvent, NetworkRefused, RefusedEarly
from protocol.limits.connections import ConnectionCut, Connections
from protocol.limits.networks import prefix_of
from protocol.limits.peer_scores import PENALTIES

# struct tcp_info of Linux, stable since 4.2: the state, milliseconds since data came, bytes received.
_STATE_AT, _LAST_DATA_AT, _RECEIVED_AT = 0, 52, 128
_INFO_BYTES = 136
_ESTABLISHED = 1
# The kernel ends a connection that leads nowhere after 15 s, and its state says so; a broken one at once.
_SILENT_MS = 5_000
_LINUX = sys.platform == "linux"


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes `received` by the kernel since the connection began, of which `unread` wait in its buffer."""

    received: int
    unread: int


class TcpView:
    """A look at one connection."""

    def __init__(self, descriptor: int) -> None:
        """Duplicate `descriptor`.

        Raises:
            OSError: it is no connected socket, or not any more.
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
        # The order matters: what arrives between the two calls counts as unread, never as held.
        return Measured(struct.unpack_from("=Q", info, _RECEIVED_AT)[0], self._unread())

    def was_ended_by_us(self) -> bool:
        """Tell, after libzmq closed its descriptor, whether it was libzmq that ended a lively connection.

        It does so for one reason: what came breaks ZMTP or CURVE, or is over MAXMSGSIZE.
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

    def _unread(self) -> int:
        import fcntl
        import termios

        answer = fcntl.ioctl(self._socket.fileno(), termios.FIONREAD, b"\0\0\0\0")
        return int(struct.unpack("=i", answer)[0])


class TcpWatch:
    """Every TCP connection that we accepted or dialled; what is refused goes to `events`.

    libzmq names them by file descriptor, and descriptors are given again. We know them by a number that is not.
    libzmq's events of inbound connections come in order, so they mean the last one with a descriptor (`inbound`). Those
    of a dialled one come elsewhere, so its number is kept there.
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
        """A connection came in; `has_ended` tells whether that of this descriptor has ended by the time of the call."""
        self._inbound.pop(descriptor, None)
        if (number := self._look(descriptor, has_ended)) is not None:
            self._inbound[descriptor] = number
            self._carry_out(self._connections.accepted(number, prefix_of(self._views[number].peer), now))

    def inbound(self, descriptor: int) -> int:
        """Return the number of the last inbound connection with this descriptor, -1 if it was gone at once."""
        return self._inbound.get(descriptor, -1)

    def connected(self, descriptor: int, has_ended: Callable[[int], bool], link: Link) -> int:
        """A connection that we dialled is there, before its handshake; return its number, -1 if it is gone already."""
        number = self._look(descriptor, has_ended)
        if number is None:
            return -1
        self._connections.connected(number, link, prefix_of(self._views[number].peer))
        return number

    def gone(self, number: int, failure: str | None, now: float) -> None:
        """A connection ended; `failure` is what to count if its handshake failed, None if it did not."""
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
                if connection.link is not None and connection.link.dialled:  # of which nothing is known once it ended
                    self._told(self._connections.charge_network(connection.prefix, PENALTIES[reason], now))
            if reason:
                self._events.append(RefusedEarly(reason, connection.link))
        view.close()

    def host(self, number: int) -> str:
        """Return the IP address of a connection's other end, "" if it is gone."""
        view = self._views.get(number)
        return view.peer if view is not None else ""

    def forget(self, number: int) -> None:
        """A connection that we dialled is none of ours any more."""
        self._connections.forget(number)
        if (view := self._views.pop(number, None)) is not None:
            view.close()

    def took(self, number: int, link: Link, parts: Iterable[int]) -> bool:
        """Account for a whole message; return whether it is wanted."""
        is_first = self._connections.is_anonymous(number)
        wanted, cuts = self._connections.took(number, link, parts)
        if cuts:
            self._carry_out(cuts)
        if wanted and is_first:
            self._events.append(Accepted(link, self.host(number)))
        return wanted

    def carries(self, number: int, link: Link) -> bool:
        """Tell whether this connection is the link's newest, of whose end `review` will tell."""
        return self._connections.carries(number, link)

    def charge(self, link: Link, points: float, now: float) -> None:
        """The holder of the link broke the rules."""
        self._told(self._connections.charge(link, points, now))

    def hang_up(self, link: Link) -> None:
        """End the link's connection."""
        self._carry_out(self._connections.hung_up(link))

    def measure(self) -> None:
        """Begin a review: measure every connection."""
        self._connections.begin()
        for number in list(self._connections.numbers()):
            measured = self._views[number].measure()
            if measured is not None:
                self._connections.measure(number, measured.received, measured.unread)

    def drained(self, link: Link | None) -> None:
        """The socket of a dialled link, or of all inbound ones, was read until it was empty."""
        self._connections.drained(link)

    def review(self, now: float) -> list[Link]:
        """End a review: cut what breaks the rules; return the links whose newest connection is no more."""
        review = self._connections.review(now)
        self._carry_out(review.cuts)
        self._events.extend(Closed(link) for link in review.closed)
        return review.ended

    def close(self) -> None:
        """Give every descriptor back."""
        for view in self._views.values():
            view.close()
        self._views.clear()

    def _told(self, refused: str) -> None:
        if refused:
            self._events.append(NetworkRefused(refused))

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
