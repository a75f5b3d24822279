"""Carries out what `Connections` decides: measures the TCP connections below ZeroMQ's sockets, and ends them."""

from collections import deque
from collections.abc import Iterable
from itertools import count

from protocol.config import Limits
from protocol.limits.connections import Connections, Cut
from protocol.limits.rate_limits import prefix_of
from protocol.transport import Closed, Link, NetworkEvent, Refused
from protocol.transport.tcp import TcpView


class TcpWatch:
    """Every TCP connection that we accepted or dialled; what is refused goes to `events`.

    libzmq names them by file descriptor, and descriptors are given again. We know them by a number
    that is not. What libzmq says of inbound connections comes in order, so for these the last one with
    a descriptor is meant (`inbound`); of a dialled one it says so elsewhere, so its number is kept there.
    """

    def __init__(self, limits: Limits, events: deque[NetworkEvent]) -> None:
        self._connections = Connections(limits)
        self._views: dict[int, TcpView] = {}  # of those not yet gone, by number
        self._inbound: dict[int, int] = {}  # by descriptor
        self._count = count()
        self._events = events

    def __len__(self) -> int:
        return len(self._views)

    def accepted(self, descriptor: int, now: float) -> None:
        """A connection came in."""
        self._inbound.pop(descriptor, None)
        if (number := self._look(descriptor)) is not None:
            self._inbound[descriptor] = number
            self._carry_out(self._connections.accepted(number, prefix_of(self._views[number].peer), now))

    def inbound(self, descriptor: int) -> int:
        """Return the number of the last inbound connection with this descriptor, -1 if it was gone at once."""
        return self._inbound.get(descriptor, -1)

    def connected(self, descriptor: int, link: Link) -> int:
        """A connection that we dialled is there, before its handshake; return its number, -1 if it is gone already."""
        number = self._look(descriptor)
        if number is None:
            return -1
        self._connections.connected(number, link)
        return number

    def gone(self, number: int, failure: str | None) -> None:
        """A connection ended; `failure` is what to count if its handshake failed, None if it did not."""
        view = self._views.pop(number, None)
        if view is None:
            if failure:  # it was gone before we looked
                self._events.append(Refused(failure))
            return
        connection = self._connections.gone(number)
        if not connection.cut:
            reason = failure
            if reason is None and view.was_ended_by_us():
                reason = "framing"
            if reason:
                self._events.append(Refused(reason, connection.link))
        view.close()

    def forget(self, number: int) -> None:
        """A connection that we dialled is none of ours any more."""
        self._connections.forget(number)
        if (view := self._views.pop(number, None)) is not None:
            view.close()

    def took(self, number: int, link: Link, parts: Iterable[int]) -> bool:
        """Account for a whole message; return whether it is wanted."""
        wanted, cuts = self._connections.took(number, link, parts)
        self._carry_out(cuts)
        return wanted

    def answered(self, link: Link) -> None:
        """A frame was sent over the link."""
        self._connections.answered(link)

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

    def review(self, now: float) -> None:
        """End a review: cut what breaks the rules."""
        review = self._connections.review(now)
        self._carry_out(review.cuts)
        self._events.extend(Closed(link) for link in review.closed)

    def close(self) -> None:
        """Give every descriptor back."""
        for view in self._views.values():
            view.close()
        self._views.clear()

    def _look(self, descriptor: int) -> int | None:
        try:
            view = TcpView(descriptor)
        except OSError:  # gone before we looked
            return None
        number = next(self._count)
        self._views[number] = view
        return number

    def _carry_out(self, cuts: list[Cut]) -> None:
        for cut in cuts:
            if cut.number in self._views:
                self._views[cut.number].shut_down()
            if cut.reason:
                self._events.append(Refused(cut.reason, cut.link))
