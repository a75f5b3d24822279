"""Connections to every member: who is linked, who is to be dialled, and the streams beside each link.

Driven by one thread, through `poll`. A link is to one member's one process (its session), and is there
while any control connection with it is: both ends may dial, and one that can be dialled is enough. The
end that dialled a control connection dials the link's data streams too, as that direction works, or the
member's Unix socket where both are on one machine; each of these, once proven, is handed to `on_stream`
with its socket and belongs to the mesh no longer.

A link with one that is no member yet carries no data stream: streams that it dials wait for the view that it is in, as
its handshakes do for their proof (`limits`).

A wanted member is tried again with growing pauses, all addresses of its name in turn, until it is linked or `WANT_S`
have passed. The caller may then want it again.
"""

import selectors
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from collectives.logs import Log
from collectives.mesh.addresses import (
    MAX_ADDRESS_BYTES,
    Address,
    BadAddress,
    connecting,
    is_vouched,
    listen,
    listen_locally,
    local_name,
    numeric,
    prepare,
)
from collectives.mesh.connection import Channel, ChannelState, MemberLink
from collectives.mesh.forks import close_in_children
from collectives.mesh.handshake import Handshake, HandshakeError, Party, ProvenPeer, Purpose
from collectives.mesh.limits import (
    MAX_LINKS,
    MAX_UNPROVEN,
    MAX_UNPROVEN_OF_PREFIX,
    REFUSED_AT_ONCE,
    REFUSED_PAUSE_S,
    THIS_MACHINE,
    HandshakeRates,
)
from protocol.credentials.records import Endpoint
from protocol.errors import PeerError
from protocol.identity import NodeId
from protocol.limits.networks import counts_as
from protocol.transport.addresses import Resolver
from protocol.wire.encoding import pack, unpack

log = Log()


@dataclass(frozen=True, slots=True)
class LinkMade:
    """There is a way to `member`, which says that it listens at `address`."""

    member: NodeId
    address: str


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The last connection to `member` broke, or its process is another now."""

    member: NodeId


@dataclass(frozen=True, slots=True)
class FrameReceived:
    """A frame from `member`."""

    member: NodeId
    body: bytes


MeshEvent = LinkMade | LinkLost | FrameReceived


PAUSE_S, MAX_PAUSE_S = 0.1, 3.0  # between tries: doubled from the one up to the other


@dataclass(slots=True)
class Wanted:
    """An address that is tried until `until`."""

    next_try: float
    until: float
    tries: int = 0
    trying: bool = False

    def pause(self, now: float) -> None:
        """A try has failed."""
        self.trying = False
        self.tries += 1
        self.next_try = now + min(PAUSE_S * 2 ** min(self.tries, 10), MAX_PAUSE_S)


HANDSHAKE_S = 5.0  # a connection that is not proven by then is closed: several round trips on any link
MAX_CHANNELS = 4  # of one link: each end's own, and one that is about to break
WANT_S = 60.0
_YIELD_S = 0.3  # the greater id lets the smaller dial first: most pairs then have one connection, not two
_STREAM_PAUSE_S = 0.25  # between looks whether streams are missing
ASK_S = 1.0  # between two questions whether linked nodes may still be members


class MeshError(PeerError):
    """A proven peer broke the rules."""


class Mesh:
    """Everything that listens, dials and speaks for one member. Only `wake` may be called from other threads."""

    def __init__(
        self,
        party: Party,
        listening: Address,
        streams: int,
        on_stream: Callable[[ProvenPeer, socket.socket, bool], None],
        open_streams: Callable[[NodeId], Set[int]],
        *,
        unacknowledged_s: float = 0.0,
    ) -> None:
        """Listen. `open_streams` tells which of a member's streams that we dialled are alive.

        `unacknowledged_s`: see `prepare`.

        Raises:
            BadAddress: it is not possible to listen there.
        """
        self._party = replace(party, may_join=self._may_join)
        self._own = party.identity.node_id
        self._allows = party.may_join
        self._unacknowledged_s = unacknowledged_s
        self._ask_again = 0.0
        self._streams = streams
        self._on_stream = on_stream
        self._open_streams = open_streams
        listener, where = listen(listening)
        self.address = str(where)
        listeners = [sock for sock in (listener, listen_locally(party.session)) if sock is not None]
        self._listeners = [close_in_children(sock) for sock in listeners]
        self.refused: Counter[str] = Counter()
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        for sock in (self._wake_in, self._wake_out):
            sock.setblocking(False)
        for listener in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        self._connections: dict[Channel, ChannelState] = {}
        self._links: dict[NodeId, MemberLink] = {}
        self._wanted: dict[Address, Wanted] = {}
        self._resolver = Resolver(self.wake)
        self._events: deque[MeshEvent] = deque()
        self._look_at_streams = 0.0
        self._resting: dict[Any, float] = {}  # listeners that accept nothing until then
        self._rates = HandshakeRates(time.monotonic())
        self._members: Set[NodeId] = frozenset()

    @property
    def linked(self) -> Set[NodeId]:
        """The members that there is a way to."""
        return self._links.keys()

    def want(self, address: Address) -> None:
        """See to it that the node at `address` is linked."""
        now = time.monotonic()
        if self._reached(address):
            return
        known = self._wanted.get(address)
        if known is not None:
            known.until = now + WANT_S
            return
        first = now + (_YIELD_S if address.member is not None and self._own > address.member else 0.0)
        self._wanted[address] = Wanted(first, now + WANT_S)

    def _reached(self, address: Address) -> bool:
        if address.member is not None:
            return address.member in self._links or address.member == self._own
        return str(address) == self.address or any(
            link.address == str(address) or any(address == channel.wanted for channel in link.channels)
            for link in self._links.values()
        )

    def _may_join(self, member: NodeId) -> bool:
        """Ask the owner's predicate. A defect in it refuses one node, and does not end the thread of all."""
        try:
            return self._allows(member)
        except Exception:
            log.exception("may_join failed", member=member)
            return False

    def enter(self, members: Set[NodeId]) -> None:
        """Take the members of the view: they, and nobody else, have data streams."""
        self._members = members
        self._look_at_streams = 0.0
        for connection in list(self._connections.values()):
            peer = connection.channel.peer
            if connection.parked and peer is not None and peer.member in members:
                self._hand_over(connection, peer)

    def drop(self, member: NodeId, reason: str) -> None:
        """Hang up on a member; it may be dialled again."""
        link = self._links.get(member)
        for connection in list(link.channels) if link is not None else []:
            self._end(connection, reason)

    def send(self, member: NodeId, body: bytes) -> bool:
        """Send a frame to a linked member; False: it is not linked, or not any more."""
        link = self._links.get(member)
        while link is not None and link.channels:
            connection = link.channels[-1]
            try:
                connection.channel.send(body)
            except PeerError as error:
                self._end(connection, error.reason)
                continue
            self._watch(connection)
            return True
        return False

    def wake(self) -> None:
        """Make `poll` return soon. From any thread."""
        with suppress(OSError):  # full: it will wake; closed: nobody polls
            self._wake_out.send(b"\0")

    def poll(self, timeout: float) -> list[MeshEvent]:
        """Work on every connection, waiting up to `timeout` seconds for something to do; return what happened."""
        now = time.monotonic()
        if self._events:
            timeout = 0.0
        for key, mask in self._selector.select(max(0.0, min(timeout, self._next_timer(now) - now))):
            if key.fileobj in self._listeners:
                self._accept(key.fileobj)
            elif key.fileobj is self._wake_in:
                with suppress(BlockingIOError):
                    while self._wake_in.recv(4096):
                        pass
            elif key.data in self._connections:  # it may have been closed on account of another one
                self._work(self._connections[key.data], mask)
        self._keep_house(time.monotonic())
        events = list(self._events)
        self._events.clear()
        return events

    def close(self, linger: float = 0.5) -> None:
        """Hang up on everybody; what was said last is given `linger` seconds to be read.

        A socket closed over unread bytes resets the connection, which may destroy what we sent. So say
        that we are done, and read until the others are too.
        """
        for listener in self._listeners:
            if listener not in self._resting:
                self._selector.unregister(listener)
            listener.close()
        open_until = time.monotonic() + linger
        for connection in list(self._connections.values()):
            try:
                connection.channel.write()
                connection.channel.socket.shutdown(socket.SHUT_WR)
            except (PeerError, OSError):
                self._end(connection, "closed")
                continue
            connection.parked = False
            self._watch(connection, selectors.EVENT_READ)
        while self._connections and (left := open_until - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                if key.data in self._connections:
                    try:
                        key.data.read()
                    except PeerError:
                        self._end(self._connections[key.data], "closed")
        for connection in list(self._connections.values()):
            connection.channel.close()
        self._connections.clear()
        self._selector.close()
        for sock in (self._wake_in, self._wake_out):
            sock.close()

    # --- one connection ------------------------------------------------------------------------

    def _accept(self, listener: Any) -> None:
        refused = 0
        while refused < REFUSED_AT_ONCE:
            try:
                sock, where = listener.accept()
            except BlockingIOError:
                return
            except OSError:  # it is gone again, or we have no descriptor left for it: it would wake us on and on
                break
            prefix = counts_as(where[0], own=where[0]) if isinstance(where, tuple) else THIS_MACHINE
            if not self._rates.take(prefix, time.monotonic()):
                self.refused["too_many_handshakes"] += 1
                sock.close()
                refused += 1
                continue
            self._make_room(prefix)
            sock.setblocking(False)
            self._begin(sock, Handshake(self._party, initiator=False, vouched=is_vouched(sock)), prefix=prefix)
        self._selector.unregister(listener)
        self._resting[listener] = time.monotonic() + REFUSED_PAUSE_S

    def _make_room(self, prefix: str) -> None:
        """Let the oldest handshake go for a new one from `prefix`, if there are too many."""
        unproven = [c for c in self._connections.values() if c.inbound and not c.introduced]  # the oldest first
        counts = Counter(c.prefix for c in unproven)
        if counts[prefix] >= MAX_UNPROVEN_OF_PREFIX:
            self._end(next(c for c in unproven if c.prefix == prefix), "crowded_out")
        elif len(unproven) >= MAX_UNPROVEN:
            (most, _), *_ = counts.most_common(1)
            self._end(next(c for c in unproven if c.prefix == most), "crowded_out")

    def _begin(self, sock: socket.socket, handshake: Handshake, **facts: Any) -> None:
        prepare(close_in_children(sock), self._unacknowledged_s)
        connection = ChannelState(Channel(sock, handshake), time.monotonic() + HANDSHAKE_S, **facts)
        self._connections[connection.channel] = connection
        self._selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, connection.channel)

    def _watch(self, connection: ChannelState, mask: int | None = None) -> None:
        """Wait for what the connection can do next: one that is parked may have nothing to wait for."""
        channel = connection.channel
        if mask is None:
            mask = 0 if connection.parked else selectors.EVENT_READ
            mask |= selectors.EVENT_WRITE if channel.wants_to_write else 0
        watched = self._selector.get_map().get(channel.socket)
        if not mask:
            if watched is not None:
                self._selector.unregister(channel.socket)
        elif watched is None:
            self._selector.register(channel.socket, mask, channel)
        elif watched.events != mask:
            self._selector.modify(channel.socket, mask, channel)

    def _work(self, connection: ChannelState, mask: int) -> None:
        channel = connection.channel
        try:
            if mask & selectors.EVENT_WRITE:
                channel.write()
            if mask & selectors.EVENT_READ:
                proven = channel.peer is not None
                frames = channel.read()
                if channel.peer is not None and not proven:
                    self._prove(connection, channel.peer)
                for frame in frames:
                    self._take(connection, frame)
        except PeerError as error:
            self._end(connection, error.reason)
            return
        if channel in self._connections:
            self._watch(connection)

    def _prove(self, connection: ChannelState, peer: ProvenPeer) -> None:
        """The handshake is over: a control connection introduces itself, a data connection leaves us."""
        if peer.purpose is Purpose.CONTROL:
            connection.channel.send(pack([self.address]))
            return
        link = self._links.get(peer.member)
        if link is None or link.session != peer.session:
            raise MeshError("stream_without_link")
        while connection.channel.wants_to_write:  # the proof's 120 bytes, into an empty socket
            connection.channel.write()
        if peer.member in self._members:
            self._hand_over(connection, peer)
        else:  # it may have entered a view that this node is about to enter
            connection.parked = True

    def _hand_over(self, connection: ChannelState, peer: ProvenPeer) -> None:
        """Let a proven data connection go to the streams."""
        self._forget(connection)
        self._on_stream(peer, connection.channel.socket, connection.stream_of is not None)
        link = self._links.get(peer.member)
        if link is not None:
            link.dialling.discard(connection.stream)

    def _take(self, connection: ChannelState, frame: bytes) -> None:
        peer = connection.channel.peer
        assert peer is not None
        if connection.introduced:
            self._events.append(FrameReceived(peer.member, frame))
            return
        (text,) = unpack(frame, 1, error=MeshError, max_text=MAX_ADDRESS_BYTES)
        try:
            address = Address.parse(text) if isinstance(text, str) else None
        except BadAddress:
            address = None
        if address is None:
            raise MeshError("introduction")
        self._link(connection, peer, str(Address(address.host, address.port)))
        connection.introduced = True  # only now: one that there is no link for is tried again

    def _link(self, connection: ChannelState, peer: ProvenPeer, address: str) -> None:
        link = self._links.get(peer.member)
        if link is not None and link.session != peer.session:
            for old in list(link.channels):
                self._end(old, "new_session")
            link = None
        if link is None:
            if connection.inbound and peer.member not in self._members and len(self._links) >= MAX_LINKS:
                raise MeshError("too_many_links")
            link = self._links[peer.member] = MemberLink(peer.session, address, [])
            self._events.append(LinkMade(peer.member, address))
        if len(link.channels) >= MAX_CHANNELS:
            raise MeshError("too_many_connections")
        link.channels.append(connection)
        if connection.where is not None:
            link.dialled = connection.where
            self._look_at_streams = 0.0
        for wanted in [a for a in self._wanted if a.member == peer.member or a == connection.wanted]:
            del self._wanted[wanted]

    def _forget(self, connection: ChannelState) -> None:
        del self._connections[connection.channel]
        if connection.channel.socket in self._selector.get_map():
            self._selector.unregister(connection.channel.socket)

    def _end(self, connection: ChannelState, reason: str) -> None:
        """Hang up, and see what follows from it."""
        if connection.channel not in self._connections:
            return
        self._forget(connection)
        connection.channel.close()
        self.refused[reason] += 1
        if connection.stream_of is not None:
            link = self._links.get(connection.stream_of)
            if link is not None:
                link.dialling.discard(connection.stream)
                link.is_local = False  # if this was the Unix socket, it does not work
        elif connection.introduced and connection.channel.peer is not None:
            member = connection.channel.peer.member
            link = self._links.get(member)
            if link is not None and connection in link.channels:
                link.channels.remove(connection)
                if not link.channels:
                    del self._links[member]
                    self._events.append(LinkLost(member))
        elif connection.wanted is not None:
            self._try_later(connection)

    # --- dialling ------------------------------------------------------------------------------

    def _try_later(self, connection: ChannelState) -> None:
        assert connection.wanted is not None
        if connection.others:
            self._dial(connection.wanted, connection.others)
        elif (wanted := self._wanted.get(connection.wanted)) is not None:
            wanted.pause(time.monotonic())

    def _dial(self, wanted: Address, found: list[Any]) -> None:
        """Dial the first of a name's addresses that a socket can be made for, keeping the others."""
        while found:
            family, where = found[0]
            found = found[1:]
            sock = connecting(family, where)
            if sock is not None:
                handshake = Handshake(self._party, initiator=True, expected=wanted.member)
                self._begin(sock, handshake, wanted=wanted, others=found, where=(family, where))
                return
        if wanted in self._wanted:
            self._wanted[wanted].pause(time.monotonic())

    def _dial_streams(self, member: NodeId, link: MemberLink) -> None:
        for stream in range(self._streams):
            if stream in link.dialling or stream in self._open_streams(member):
                continue
            sock = connecting(socket.AF_UNIX, local_name(link.session)) if link.is_local else None
            link.is_local = sock is not None
            sock = sock or connecting(*link.dialled)
            if sock is None:
                return
            link.dialling.add(stream)
            handshake = Handshake(
                self._party,
                initiator=True,
                purpose=Purpose.DATA,
                stream=stream,
                expected=member,
                vouched=is_vouched(sock),
            )
            self._begin(sock, handshake, stream_of=member, stream=stream)

    def _turn_from_those_who_may_not(self, now: float) -> None:
        """Hang up on those whom the owner's predicate no longer admits."""
        if now < self._ask_again + ASK_S:
            return
        self._ask_again = now
        for member in [member for member in self._links if not self._may_join(member)]:
            self.drop(member, "may_not_join")

    def _go_on_after_pauses(self, now: float) -> None:
        for listener in [listener for listener, until in self._resting.items() if until <= now]:
            del self._resting[listener]
            self._selector.register(listener, selectors.EVENT_READ)

    # --- time ----------------------------------------------------------------------------------

    def _next_timer(self, now: float) -> float:
        times = [w.next_try for w in self._wanted.values() if not w.trying]
        times += [c.proven_by for c in self._connections.values() if not c.introduced]
        times += self._resting.values()
        if any(link.dialled for member, link in self._links.items() if member in self._members):
            times.append(self._look_at_streams + _STREAM_PAUSE_S)
        return min(times, default=now + 60.0)

    def _keep_house(self, now: float) -> None:
        self._turn_from_those_who_may_not(now)
        for connection in [c for c in self._connections.values() if not c.introduced and c.proven_by <= now]:
            self._end(connection, "slow_handshake")
        self._go_on_after_pauses(now)
        for wanted, endpoints in self._resolver.take():
            if isinstance(wanted, Address) and wanted in self._wanted:
                self._dial(wanted, [numeric(endpoint) for endpoint in endpoints])
        for address, state in list(self._wanted.items()):
            if state.trying or state.next_try > now:
                continue
            if state.until <= now or self._reached(address):
                del self._wanted[address]
                continue
            state.trying = True
            try:
                addresses = [numeric(Endpoint(address.host, address.port))]
            except (OSError, UnicodeError):  # a name, perhaps one that none can be: ask for its addresses elsewhere
                state.trying = self._resolver.ask(address, Endpoint(address.host, address.port))
                state.next_try = now + PAUSE_S
                continue
            self._dial(address, addresses)
        if now >= self._look_at_streams + _STREAM_PAUSE_S:
            self._look_at_streams = now
            for member, link in self._links.items():
                if link.dialled is not None and member in self._members:
                    self._dial_streams(member, link)


__all__ = ["FrameReceived", "HandshakeError", "LinkLost", "LinkMade", "Mesh", "MeshEvent"]
