"""The data plane of one member: the streams to every other one, and the attempts that they carry.

Every link has one outbox and all of its streams take pieces from it, so a slow stream takes fewer. A piece that comes
is looked up by its operation. One that is not known yet gets an `Inbox`, since it is about to start here too; ended
operations are remembered to drop their rest. Early pieces are bounded for each member, in bytes and in pieces, so
that one member costs no other its place. Each member keeps within its room by itself: a CREDIT tells it what is free
again, and one that holds pieces back (HELD) is told which operations have started (GRANT).

A member that has no more operations to carry out says so with a FIN on each of its streams, later ones too (`finish`).
A FIN says how many pieces the member has sent on all of them. When as many have arrived, whoever waits for another one
learns that none will come. If a stream has broken, fewer may arrive: then the member has finished once each stream that
is left has brought its FIN. The member is told (TAKEN), and may leave: others go on with what it has sent.
"""

import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Set
from dataclasses import dataclass, field

from collectives.agreement.views import OpId
from collectives.errors import Aborted
from collectives.logs import Log
from collectives.mesh.framing import (
    KEY_BYTES,
    MAX_HELD_PIECES,
    PIECE_BYTES,
    SPREAD_BYTES,
    Piece,
    PieceKind,
    cut,
    operation_key,
)
from collectives.mesh.handshake import ProvenPeer
from collectives.mesh.port import MAX_REQUEST_BYTES
from collectives.mesh.shared_memory import Arena, Lease, SharedMemory, is_possible
from collectives.mesh.socket_port import CALL_OFF, Inbox, Landing, ReceiveWindow, SocketPort, ended
from collectives.mesh.stream import Outgoing, Portless, SendQueue, Stream
from collectives.threads import add_thread, join_all
from protocol.identity import NodeId

log = Log()

MAX_UNKNOWN = (
    MAX_HELD_PIECES + 1024
)  # operations that a member started and we did not yet: 1 KB each; some have no data
MAX_ENDED = 4096  # operations whose late pieces are told from those of unknown ones
MAX_STREAMS = 256  # of one link, both ends' together
MAX_HAND_OVERS = 8  # of an arena to one member, which may refuse it
# How long a stream whose member's room is used up waits for an operation to start here: as long as torch's own backends
# wait for a rank that is late. One that is not in the group any more is not waited for.
PATIENCE_S = 1800.0
# How long `close` waits for the streams' threads.
_JOIN_S = 5.0
_OVER = "it ended before it started here"
_TOO_MUCH = "too much came for operations that had not started here: call it again, with fewer in flight"


@dataclass(slots=True)
class _MemberLane:
    """The streams between this process and one member, and what waits on them."""

    outbox: SendQueue = field(default_factory=SendQueue)
    streams: dict[Stream, bool] = field(default_factory=dict)  # -> did we dial it?
    window: ReceiveWindow = field(init=False)
    holds_back: bool = False  # the member waits to hear which operations have started here
    asked_for: set[bytes] = field(default_factory=set)  # operations that were granted before they start
    early: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # operations that have yet to start here
    hand_overs: int = 0  # of this member's arena, since the last stream was made
    arrived: int = 0  # pieces of data
    announced: int | None = None  # how many the member has sent, once it has finished
    has_lost: bool = False  # a stream has broken: not all of them may arrive
    is_finished: bool = False  # nothing of the member is on its way any more, for good
    has_taken: bool = False  # the member has all that it was sent, and nothing more is sent to it

    def __post_init__(self) -> None:
        self.window = ReceiveWindow(self.credit)

    def credit(self, pieces: int, count: int) -> None:
        """Tell the member of its room. If it still holds something back, it says so again."""
        self.holds_back = False
        self.asked_for.clear()
        self.outbox.put([_bare(PieceKind.CREDIT, Piece(pieces, 0, count, 0))], urgent=True)

    def grant(self, key: bytes) -> None:
        """Let an operation's pieces come if the member holds any back."""
        if self.holds_back:
            self.outbox.put([_bare(PieceKind.GRANT, key=key)], urgent=True)

    def finishes(self) -> bool:
        """Tell whether what has changed finishes it."""
        if self.is_finished or self.announced is None:
            return False
        rest_is_lost = self.has_lost and all(stream.has_brought_fin for stream in self.streams)
        self.is_finished = rest_is_lost or self.arrived >= self.announced
        if self.is_finished:
            self.say_taken()
        return self.is_finished

    def say_taken(self) -> None:
        """Tell the member that has finished that all is here: once more where a stream ends, which may have lost it."""
        self.outbox.put([_bare(PieceKind.TAKEN)], urgent=True)


@dataclass(frozen=True, slots=True)
class _Handing:
    """The sender of the piece with an arena's descriptor, which stays open until the piece has left."""

    arena: Arena
    key: bytes = bytes(KEY_BYTES)
    wanted: bool = True

    def left(self) -> None:
        """Nobody waits for it."""


def _bare(kind: PieceKind, piece: Piece = Piece(0, 0, 0, 0), key: bytes = bytes(KEY_BYTES)) -> Outgoing:  # noqa: B008
    return Outgoing(Portless(key), kind, piece, memoryview(b""))


class DataPlane:
    """Thread-safe."""

    def __init__(self, own: NodeId) -> None:
        self._own = own
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # notified when a member finishes, or is lost
        self._lanes: dict[NodeId, _MemberLane] = {}
        self._threads: list[threading.Thread] = []  # of streams, also of those that are in no lane any more
        self._ports: dict[bytes, tuple[Inbox, frozenset[NodeId]]] = {}
        self._unknown: dict[bytes, Inbox] = {}
        self._loose: set[bytes] = set()  # keys of the ports of operations without an agreement
        self._ended: OrderedDict[bytes, str] = OrderedDict()  # and why
        self._closed = False
        self._has_finished = False
        self._outlives_views = False
        self._lost: set[NodeId] = set()  # if it does: members with which something may have been lost
        self._gone: set[NodeId] = set()  # members that finished before they were dropped
        self._memory = SharedMemory(own)

    # --- memory of one machine -----------------------------------------------------------------

    def lease_memory(self, members: Set[NodeId]) -> Lease | None:
        """Return the shared memory of an operation of these members, or None if they cannot share any. End it."""
        return self._memory.lease(members) if self._are_here(members) else None

    def hand_over_memory(self, members: Set[NodeId]) -> None:
        """Let these, who all could share memory, have this member's arena."""
        arena = self._memory.own_arena() if self._are_here(members) else None
        if arena is None:
            return
        text = memoryview(arena.serial)
        piece = Piece(0, 0, len(text), len(text))
        with self._lock:
            lanes = [self._lanes[member] for member in members if member in self._lanes]
            lanes = [lane for lane in lanes if lane.hand_overs < MAX_HAND_OVERS]
            for lane in lanes:
                lane.hand_overs += 1
        for lane in lanes:
            lane.outbox.put([Outgoing(_Handing(arena), PieceKind.MEMORY, piece, text, arena.descriptor)])

    def _are_here(self, members: Set[NodeId]) -> bool:
        """Tell whether these are processes of this user on this machine, with streams that say so."""
        with self._lock:
            return is_possible() and all(
                member == self._own
                or (member in self._lanes and any(stream.hands_over for stream in self._lanes[member].streams))
                for member in members
            )

    def handed(self, source: NodeId, serial: bytes, descriptor: int) -> None:
        """See `stream.Arrivals`."""
        if self._memory.holds(source, serial):
            return
        try:
            arena = Arena.of(descriptor, serial)
        except (OSError, ValueError) as error:  # ValueError: mmap's, of a size that is none
            log.warning("shared memory refused", member=source, reason=str(error))
            return
        with self._lock:
            if source in self._lanes:
                self._memory.hold(source, arena)

    # --- attempts ------------------------------------------------------------------------------

    def open(
        self,
        op: OpId,
        members: Set[NodeId],
        deadline: float,
        told: Callable[[NodeId, str], None] | None = None,
        salt: int | None = None,
    ) -> SocketPort:
        """Return the port of an operation that starts; `deadline` is on the monotonic clock. Close it afterwards.

        If members carry the operation out without an agreement, `told` is called if another one calls it off, and the
        view's end ends the port. Its slots are `salt << SALT_SHIFT` and above; a payload in another one is of a member
        that has called something else.
        """
        key = operation_key(op)
        with self._lock:
            inbox = self._no_longer_early(key) or Inbox()
            self._ports[key] = inbox, frozenset(members)
            dropped = self._ended.get(key)
            if told is not None:
                self._loose.add(key)
            lanes = {member: self._lanes[member] for member in members if member in self._lanes}
            finished = [member for member in members if self._has_ended(member)]
            for lane in lanes.values():
                lane.grant(key)
        inbox.start(deadline, told, salt)
        for member in finished:
            inbox.finished(member)
        if dropped is not None:
            inbox.end(Aborted(dropped))
        return SocketPort(self._own, key, inbox, deadline, self._post, salt)

    def has_early(self, op: OpId, source: NodeId) -> bool:
        """Tell whether something came of a member for an operation that has not started here; let it come if not."""
        key = operation_key(op)
        with self._lock:
            lane = self._lanes.get(source)
            if lane is not None and key not in self._unknown and key not in lane.asked_for:
                lane.grant(key)
                lane.asked_for.update([key] if lane.holds_back else [])
            return key in self._unknown

    def held_back(self, source: NodeId) -> None:
        """See `stream.Arrivals`."""
        with self._lock:
            lane = self._lanes.get(source)
            if lane is None or (lane.holds_back and lane.outbox.has_urgent):  # the answer to it has yet to leave
                return
            lane.holds_back = True
            if self._has_finished:
                lane.grant(bytes(KEY_BYTES))
            for key, (_, members) in self._ports.items():
                if source in members:
                    lane.grant(key)

    def has_ways_to(self, members: Set[NodeId]) -> bool:
        """Tell whether all of these are in the view, with no connection lost since, or were and have finished."""
        with self._lock:
            return members - {self._own} <= self._lanes.keys() | self._gone

    def outlive_views(self) -> None:
        """Let operations go on whoever leaves the view, if they need nothing more of it: no member comes twice."""
        with self._lock:
            self._outlives_views = True

    def lost(self, members: Set[NodeId]) -> Set[NodeId]:
        """Return those of a plane that outlives views that it has lost: they are gone without a FIN, or a stream is."""
        with self._lock:
            return members & self._lost

    def call_off(self, port: SocketPort, members: Set[NodeId], reason: str) -> None:
        """Tell the others that an operation without an agreement is off, and why (at most `MAX_REQUEST_BYTES`)."""
        text = memoryview(reason.encode()[:MAX_REQUEST_BYTES])
        piece = Piece(CALL_OFF, 0, len(text), len(text))
        for member in members - {self._own}:
            with self._lock:
                lane = self._lanes.get(member)
            if lane is not None:
                lane.outbox.put([Outgoing(Portless(port.key), PieceKind.REFUSAL, piece, text)])

    def close_port(self, port: SocketPort, reason: str = "the operation is over", *, late: bool = False) -> None:
        """Forget an attempt: what still comes for it is dropped.

        `late`: it was called off because time was up. Then a stream on which nothing has come since it began may have
        lost its path without a word (a NAT that forgot it): it is closed, and whoever dialled it dials again.
        """
        port.when_sent(None)
        with self._lock:
            _, members = self._ports.pop(port.key, (None, frozenset[NodeId]()))
            self._loose.discard(port.key)
            self._remember(port.key)
            for member in members & self._lanes.keys():
                self._lanes[member].outbox.forget(port.key)
            late = late and port.uses_streams
            lanes = [self._lanes[member] for member in members if member in self._lanes] if late else []
            silent = [stream for lane in lanes for stream in lane.streams if stream.moved < port.opened]
        for stream in silent:
            stream.close()
        port.cancel(reason)

    def forget(self, op: OpId) -> None:
        """Drop what came, and what will come, for an operation that ended before it started here."""
        key = operation_key(op)
        with self._lock:
            self._remember(key)
            inbox = self._no_longer_early(key)
            for lane in self._lanes.values():
                lane.grant(key)
        if inbox is not None:
            inbox.end(Aborted(_OVER))

    def begin_view(self, reason: str = "the group changed") -> None:
        """Drop what came for operations that did not start here: they were of a view before this one.

        Operations without an agreement end with their view, unless the plane outlives it.
        """
        with self._lock:
            if self._outlives_views:
                return
            loose = [self._ports[key][0] for key in self._loose]
            keys = list(self._unknown)
            late = [self._no_longer_early(key) for key in keys]
            for key in keys:
                self._remember(key)
        for inbox in filter(None, late):
            inbox.end(Aborted("the group changed before it started here"))
        for inbox in loose:
            inbox.end(Aborted(reason))

    def _no_longer_early(self, key: bytes) -> Inbox | None:
        for lane in self._lanes.values():
            lane.early.pop(key, None)
        return self._unknown.pop(key, None)

    def _remember(self, key: bytes, reason: str = _OVER) -> None:
        self._ended[key] = reason
        while len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)

    def _post(self, to: NodeId, port: SocketPort, kind: PieceKind, slot: int, payload: memoryview) -> None:
        with self._lock:
            lane = self._lanes.get(to)
            largest = PIECE_BYTES if lane is None or len(lane.streams) <= 1 else SPREAD_BYTES
            gone = to in self._gone
        if lane is None:
            port.inbox.lost(to, ended(to) if gone else f"there is no connection with member {to}: call it again")
            return
        pieces = cut(slot, payload.nbytes, largest)
        port.queued(len(pieces))
        lane.outbox.put(
            [Outgoing(port, kind, piece, payload[piece.offset : piece.offset + piece.length]) for piece in pieces]
        )

    # --- what streams bring --------------------------------------------------------------------

    def place(self, source: NodeId, key: bytes, piece: Piece) -> Landing | None:
        """See `stream.Arrivals`."""
        inbox = self._inbox(source, key)
        with self._lock:
            lane = self._lanes.get(source)
        where = None
        if lane is not None and inbox is None:
            lane.window.passed(piece.length)
        elif lane is not None and inbox is not None:
            where = inbox.place(source, piece, PATIENCE_S, lane.window)
        if where is None:
            self._count(source, pieces=1)
        return where

    def arrived(self, source: NodeId, key: bytes, piece: Piece, where: Landing) -> None:
        """See `stream.Arrivals`."""
        inbox = self._inbox(source, key)
        if inbox is not None:
            inbox.arrived(source, piece, where)
        self._count(source, pieces=1)

    def told(self, source: NodeId, key: bytes, kind: PieceKind, slot: int, text: bytes) -> None:
        """See `stream.Arrivals`."""
        inbox = self._inbox(source, key)
        if inbox is None:
            return
        if kind is PieceKind.REQUEST:
            inbox.asked(source, slot, text)
        else:
            inbox.refused(source, slot, text)

    def _inbox(self, source: NodeId, key: bytes) -> Inbox | None:
        with self._lock:
            known = self._ports.get(key)
            if known is not None:
                inbox, members = known
                return inbox if source in members else None
            lane = self._lanes.get(source)
            if key in self._ended or self._closed or self._has_finished or lane is None:
                return None
            lane.early[key] = None
            if len(lane.early) > MAX_UNKNOWN:
                oldest, _ = lane.early.popitem(last=False)
                dropped = self._no_longer_early(oldest)
                if dropped is not None:
                    dropped.end(Aborted(_TOO_MUCH))
                self._remember(oldest, _TOO_MUCH)
            return self._unknown.setdefault(key, Inbox())

    # --- the end -------------------------------------------------------------------------------

    def finish(self) -> None:
        """Tell all members that this one sends nothing more. What it has sent comes to them before that.

        It starts nothing more either, so what comes for other operations is dropped, and nobody holds it back.
        """
        with self._lock:
            self._has_finished = True
            early = [self._no_longer_early(key) for key in list(self._unknown)]
            lanes = list(self._lanes.values())
        for inbox in filter(None, early):
            inbox.end(Aborted(_OVER))
        for lane in lanes:
            lane.grant(bytes(KEY_BYTES))
            lane.outbox.finish(_bare(PieceKind.FIN))

    def wait_taken(self, until: float) -> Set[NodeId]:
        """Wait until every other member has all that was sent to it, or is lost; return those that have not."""
        with self._changed:
            self._changed.wait_for(lambda: not self._untaken(), max(0.0, until - time.monotonic()))
            return self._untaken()

    def _untaken(self) -> Set[NodeId]:
        return {member for member, lane in self._lanes.items() if not lane.has_taken}

    def taken(self, source: NodeId) -> None:
        """See `stream.Arrivals`."""
        with self._changed:
            if source in self._lanes:
                self._lanes[source].has_taken = self._has_finished
                self._changed.notify_all()

    def has_finished(self, member: NodeId) -> bool:
        """Tell whether nothing of a member is on its way any more."""
        with self._lock:
            return self._has_ended(member)

    def _has_ended(self, member: NodeId) -> bool:
        return member in self._gone or (member in self._lanes and self._lanes[member].is_finished)

    def finished(self, source: NodeId, pieces: int) -> None:
        """See `stream.Arrivals`."""
        self._count(source, announced=pieces)

    def _count(self, source: NodeId, *, pieces: int = 0, announced: int | None = None) -> None:
        with self._changed:
            lane = self._lanes.get(source)
            if lane is None:
                return
            lane.arrived += pieces
            if announced is not None:
                lane.announced = max(announced, lane.announced or 0)  # one stream may overtake another
            if not lane.finishes():
                return
            self._changed.notify_all()
            waiting = self._concerned(source)
        for inbox in waiting:
            inbox.finished(source)

    # --- streams -------------------------------------------------------------------------------

    def link(self, member: NodeId) -> None:
        """Let what is sent to a member of the view wait for a stream, and come from one."""
        with self._lock:
            if not self._closed and member not in self._lanes:
                lane = self._lanes[member] = _MemberLane()
                if self._has_finished:
                    lane.outbox.finish(_bare(PieceKind.FIN))

    def add_stream(self, peer: ProvenPeer, sock: socket.socket, dialled: bool) -> None:
        """Take over a proven data connection with a linked member."""
        with self._lock:
            lane = self._lanes.get(peer.member)
            if lane is None or len(lane.streams) >= MAX_STREAMS:
                sock.close()
                return
            stream = Stream(peer, sock, lane.outbox, self, self._on_end)
            lane.streams[stream] = dialled
            lane.hand_overs = 0
            stream.start()
            self._threads = add_thread(self._threads, *stream.threads)

    def open_streams(self, member: NodeId) -> Set[int]:
        """Return the numbers of the streams to `member` that we dialled and that are alive."""
        with self._lock:
            lane = self._lanes.get(member)
            return {stream.number for stream, dialled in lane.streams.items() if dialled} if lane else set()

    def moved(self, member: NodeId) -> float | None:
        """Return when bytes last came from a member, on the monotonic clock; None: never on the streams there are."""
        with self._lock:
            lane = self._lanes.get(member)
            signs = [stream.moved for stream in lane.streams] if lane else []
        return max((at for at in (*signs, self._memory.moved(member)) if at), default=None)

    def drop(self, member: NodeId, reason: str) -> None:
        """Close all streams to a member, until it is linked again; attempts that wait for it are told.

        What it sent early is let go, with the operations that it is for: else one that comes back again and again
        would have more held each time. But what one has sent that finished is taken later.
        """
        with self._changed:
            lane = self._lanes.pop(member, None)
            self._changed.notify_all()
            is_gone = lane is not None and lane.is_finished and self._outlives_views
            if lane is not None and self._outlives_views:
                (self._gone if is_gone else self._lost).add(member)
            keys = list(lane.early) if lane is not None and not is_gone else []
            self._memory.let_go(member)
            if lane is not None:
                self._memory.give_up()
                for other in self._lanes.values():
                    other.hand_overs = 0
            early = [self._no_longer_early(key) for key in keys]
            for key in keys:
                self._remember(key, reason)
            waiting = self._concerned(member) if not is_gone else []
        for inbox in filter(None, early):
            inbox.end(Aborted(reason))
        for inbox in waiting:
            inbox.lost(member, reason)
        if lane is not None:
            lane.outbox.close()
            for stream in list(lane.streams):
                stream.close()

    def close(self) -> None:
        """End every attempt and every stream, and wait a moment for their threads."""
        with self._lock:
            self._closed = True
            members = list(self._lanes)
            inboxes = [inbox for inbox, _ in self._ports.values()] + list(self._unknown.values())
            self._unknown.clear()
        for inbox in inboxes:
            inbox.end(Aborted("this member leaves the group"))
        for member in members:
            self.drop(member, "this member leaves the group")
        join_all(self._threads, _JOIN_S)

    def _on_end(self, stream: Stream, reason: str) -> None:
        """A stream's thread says that it is over: what was on it is lost."""
        text = f"the connection with member {stream.member} broke ({reason}): call it again"
        with self._changed:
            lane = self._lanes.get(stream.member)
            if lane is None or lane.streams.pop(stream, None) is None:
                return
            if lane.is_finished:
                lane.say_taken()
                return
            lane.has_lost = True
            if self._outlives_views and (lane.arrived or lane.outbox.has_sent):
                self._lost.add(stream.member)
            lane.outbox.renew()
            if lane.finishes():
                self._changed.notify_all()
            waiting = self._concerned(stream.member)
        for inbox in waiting:
            inbox.lost(stream.member, text)

    def _concerned(self, member: NodeId) -> list[Inbox]:
        known = [inbox for inbox, members in self._ports.values() if member in members]
        return known + list(self._unknown.values())
