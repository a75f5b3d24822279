"""One attempt's payloads: where those that come in belong, and the `Port` that an algorithm holds.

An `Inbox` may be older than its port: other members start an operation a moment earlier, and what
they send then is held until this member starts it too. What is held of one member is bounded, over all
operations. The member knows the bound, and holds back what has no room (see `stream.SendQueue`). Where it sends more,
the readers of its streams wait, which in the end makes it wait, and no other member.

Each inbox has a lock, held for bookkeeping only. Payload bytes are received without it, straight into the
ticket's buffer.
"""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from queue import SimpleQueue

from collectives.errors import Aborted, DeadlineExceeded
from collectives.mesh.framing import MAX_HELD_BYTES, MAX_HELD_PIECES, Piece, PieceKind
from collectives.mesh.port import MAX_REQUEST_BYTES, MAX_SLOT, Handler, PendingReceive, SourceLost
from protocol.identity import NodeId

LOOK_S = 0.05  # between checks whether another operation gave back room that it held of this member
MAX_REQUESTS = 1024  # that wait for an answer
MAX_UNSENT_ANSWERS = 1024  # pieces that have yet to leave; those who ask have four requests under way each

CALL_OFF = 0  # the slot of a refusal that means all of an operation without an agreement

SALT_SHIFT = 16  # what is above in a slot is the hash of an operation's arguments, where it has no agreement
MAX_SALT = MAX_SLOT >> SALT_SHIFT

_Name = tuple[NodeId, int]


def ended(member: NodeId) -> str:
    """Return why nothing can be had of a member that has finished."""
    return f"member {member} has ended, and takes part in no further operation"


class SocketReceive:
    """A payload that is to come to `into`; done at 0 bytes `missing`."""

    __slots__ = ("error", "into", "missing", "source")

    def __init__(self, source: NodeId, into: memoryview) -> None:
        self.source = source
        self.into = into
        self.missing = into.nbytes
        self.error: Aborted | None = None

    def done(self) -> bool:
        """Tell whether a wait for it would end at once."""
        return self.missing <= 0 or self.error is not None


class Landing:
    """Where a piece is received to. Whoever writes to `part` of it holds `lock` meanwhile."""

    __slots__ = ("_into", "length", "lock")

    def __init__(self, into: memoryview) -> None:
        self.length = len(into)
        self.lock = threading.Lock()
        self._into: memoryview | None = into

    def part(self, first: int, end: int) -> memoryview:
        """Return the memory of some of its bytes; after `revoke`, memory that nobody reads."""
        return memoryview(bytearray(end - first)) if self._into is None else self._into[first:end]

    @property
    def owner(self) -> object:
        """Whose memory it is; None after `revoke`."""
        return None if self._into is None else self._into.obj

    def revoke(self) -> None:
        """See to it that nobody writes there any more."""
        with self.lock:
            self._into = None


class ReceiveWindow:
    """The room for what is held of one member, which learns what it has left. Thread-safe.

    An inbox's lock is taken first where both are. Whatever the member sends uses its room until it is expected, or
    dropped. `tell` is called with what is free again, pieces and bytes, once that is a quarter of all.
    """

    def __init__(self, tell: Callable[[int, int], None] = lambda pieces, count: None) -> None:
        self._lock = threading.Lock()
        self._tell = tell
        self._bytes = MAX_HELD_BYTES
        self._pieces = MAX_HELD_PIECES
        self._owed_pieces = self._owed_bytes = 0

    def take(self, count: int) -> bool:
        """Take room for a piece of `count` bytes; False: there is not so much left, and nothing was taken."""
        with self._lock:
            if count > self._bytes or not self._pieces:
                return False
            self._bytes -= count
            self._pieces -= 1
            return True

    def give_back(self, count: int) -> None:
        """A piece of `count` bytes is held no more."""
        with self._lock:
            self._bytes += count
            self._pieces += 1
        self.passed(count)

    def passed(self, count: int) -> None:
        """A piece of `count` bytes needs no room any more, or never needed any here."""
        with self._lock:
            self._owed_pieces += 1
            self._owed_bytes += count
            pieces, owed = self._owed_pieces, self._owed_bytes
            if 4 * pieces < MAX_HELD_PIECES and 4 * owed < MAX_HELD_BYTES:
                return
            self._owed_pieces = self._owed_bytes = 0
        self._tell(pieces, owed)


class Inbox:
    """The received and the expected payloads of one attempt."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.ended: Aborted | None = None
        self.deadline: float | None = None  # on the monotonic clock; None: it has not started here
        self.bytes_received = 0
        self.requests: SimpleQueue[tuple[NodeId, int, bytes] | None] = SimpleQueue()
        self._tickets: dict[_Name, SocketReceive] = {}
        self._held: defaultdict[_Name, list[tuple[Piece, bytearray]]] = defaultdict(list)
        self._paid: dict[int, tuple[bytearray, ReceiveWindow]] = {}  # buffers in a window, by their id
        self.lost_members: dict[NodeId, str] = {}
        self.finished_members: set[NodeId] = set()  # they have sent all, and taken all that they wanted
        self._told: Callable[[NodeId, str], None] | None = None  # of an operation without an agreement
        self._called_off: tuple[NodeId, str] | None = None
        self._salt: int | None = None
        self._landings: set[Landing] = set()  # parts of tickets that are being received to

    # --- the readers' side ---------------------------------------------------------------------

    def place(self, source: NodeId, piece: Piece, patience: float, window: ReceiveWindow) -> Landing | None:
        """Return where to receive a piece of a payload, or None: nobody will ever want it.

        Blocks when it is not expected yet and `window`, the member's, is used up: to the attempt's deadline, however
        long its owner takes to expect it, or `patience` seconds while it has not started here.
        """
        name = (source, piece.slot)
        began = time.monotonic()
        with self.changed:
            self._check_salt(source, piece.slot)
            while self.ended is None:
                ticket = self._tickets.get(name)
                if ticket is not None:
                    window.passed(piece.length)
                    into = self._within(ticket, piece)
                    if into is None:
                        return None
                    landing = Landing(into)
                    self._landings.add(landing)
                    return landing
                if window.take(piece.length):
                    buffer = bytearray(piece.length)
                    self._paid[id(buffer)] = buffer, window
                    return Landing(memoryview(buffer))
                left = (began + patience if self.deadline is None else self.deadline) - time.monotonic()
                if left > 0:
                    self.changed.wait(min(left, LOOK_S))
                elif self.deadline is None:
                    self._end(Aborted("payloads came for an operation that did not start here: call it again"))
                else:
                    break
        window.passed(piece.length)
        return None

    def _check_salt(self, source: NodeId, slot: int) -> None:
        if self._salt is not None and slot >> SALT_SHIFT != self._salt:
            self._end(Aborted(f"member {source} has called another operation, or with other arguments", source))

    def _within(self, ticket: SocketReceive, piece: Piece) -> memoryview | None:
        if piece.total == ticket.into.nbytes:
            return ticket.into[piece.offset : piece.offset + piece.length]
        problem = f"member {ticket.source} sent {piece.total} bytes where {ticket.into.nbytes} were expected"
        if piece.slot > MAX_SLOT:
            ticket.error = SourceLost(problem)
            self.changed.notify_all()
        else:
            self._end(Aborted(problem + ": every member must run the same version", ticket.source))
        return None

    def arrived(self, source: NodeId, piece: Piece, where: Landing) -> None:
        """Count a piece that was received to where `place` said."""
        name = (source, piece.slot)
        with self.changed:
            self.bytes_received += piece.length
            self._landings.discard(where)
            if self.ended is not None:
                return
            ticket = self._tickets.get(name)
            buffer = where.owner
            if isinstance(buffer, bytearray) and (ticket is None or ticket.into.obj is not buffer):
                if ticket is None:
                    self._held[name].append((piece, buffer))
                    return
                self._settle(ticket, piece, buffer)  # expected while it was on its way
            else:
                assert ticket is not None
                ticket.missing -= piece.length
            if ticket.done():
                self.changed.notify_all()

    def _settle(self, ticket: SocketReceive, piece: Piece, buffer: bytearray) -> None:
        self._give_back(buffer)
        into = self._within(ticket, piece)
        if into is not None:
            into[:] = buffer
            ticket.missing -= piece.length
        self.changed.notify_all()

    def _give_back(self, buffer: bytearray) -> None:
        _, window = self._paid.pop(id(buffer), (None, None))
        if window is not None:  # else the attempt has ended
            window.give_back(len(buffer))

    def refused(self, source: NodeId, slot: int, text: bytes = b"") -> None:
        """`source` does not answer the request that `slot` belongs to, or calls the operation off, with a reason."""
        if slot == CALL_OFF:
            with self.changed:
                told, self._called_off = self._told, (source, text.decode(errors="replace"))
            if told is not None:
                told(*self._called_off)
            return
        with self.changed:
            ticket = self._tickets.get((source, slot))
            if ticket is not None:
                ticket.error = SourceLost(f"member {source} does not have what it was asked for: ask another")
                self.changed.notify_all()

    def asked(self, source: NodeId, slot: int, question: bytes) -> None:
        """Note a request; it is answered when somebody serves."""
        if self.requests.qsize() < MAX_REQUESTS:
            self.requests.put((source, slot, question))

    def lost(self, member: NodeId, reason: str) -> None:
        """A connection to `member` broke: what it still owes will not come."""
        with self.changed:
            self.lost_members[member] = reason
            self._fail_tickets(member)

    def finished(self, member: NodeId) -> None:
        """Everything has come that `member` sends: what it still owes will not come."""
        with self.changed:
            self.finished_members.add(member)
            self._fail_tickets(member)

    def no_more_from(self, member: NodeId) -> str:
        """Return why nothing more comes from `member`; "" while something may."""
        if member in self.lost_members:
            return self.lost_members[member]
        if member in self.finished_members:
            return ended(member)
        return ""

    def _fail_tickets(self, member: NodeId) -> None:
        reason = self.no_more_from(member)
        for (source, slot), ticket in self._tickets.items():
            if source == member and not ticket.done():
                ticket.error = (SourceLost if slot > MAX_SLOT else Aborted)(reason)
        self.changed.notify_all()

    # --- the algorithm's side ------------------------------------------------------------------

    def start(
        self, deadline: float, told: Callable[[NodeId, str], None] | None = None, salt: int | None = None
    ) -> None:
        """It has started here: what comes is expected soon, or has no use after `deadline`. See `DataPlane.open`."""
        with self.changed:
            self.deadline = deadline
            self._told, self._salt = told, salt
            for source, slot in list(self._held):
                self._check_salt(source, slot)
            early = self._called_off
            self.changed.notify_all()
        if told is not None and early is not None:
            told(*early)

    def expect(self, source: NodeId, slot: int, into: memoryview) -> SocketReceive:
        """See `Port.expect`."""
        into = into.cast("B")
        ticket = SocketReceive(source, into)
        name = (source, slot)
        with self.changed:
            if name in self._tickets:
                raise ValueError(f"slot {slot} of {source} is expected already: number payloads differently")
            self._tickets[name] = ticket
            for piece, buffer in self._held.pop(name, ()):
                self._settle(ticket, piece, buffer)
            reason = self.no_more_from(source)
            if reason and not ticket.done():
                ticket.error = (SourceLost if slot > MAX_SLOT else Aborted)(reason)
            self.changed.notify_all()  # a reader may wait for it
        return ticket

    def wait(self, ticket: SocketReceive, deadline: float) -> None:
        """See `Port.wait`."""
        with self.changed:
            while not ticket.done():
                if self.ended is not None:
                    raise self.ended
                if not self.changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    raise DeadlineExceeded(
                        f"member {ticket.source} sent too little in time: allow more, or call it again"
                    )
        if ticket.missing > 0 and ticket.error is not None:
            raise ticket.error

    def end(self, error: Aborted) -> None:
        """Wake everything; the first reason stays."""
        with self.changed:
            self._end(error)
        self.requests.put(None)

    def _end(self, error: Aborted) -> None:
        if self.ended is None:
            self.ended = error
            self._held.clear()
            for buffer, _ in list(self._paid.values()):
                self._give_back(buffer)
            for landing in self._landings:
                landing.revoke()
            self._landings.clear()
        self.changed.notify_all()


class SocketPort:
    """A `Port` over the streams of a `DataPlane`."""

    def __init__(
        self,
        own: NodeId,
        key: bytes,
        inbox: Inbox,
        deadline: float,
        post: Callable[[NodeId, "SocketPort", PieceKind, int, memoryview], None],
        salt: int | None = None,
    ) -> None:
        """`post` queues a payload as pieces; `deadline` is on the monotonic clock; `salt`: see `DataPlane.open`."""
        self.own = own
        self.key = key
        self.inbox = inbox
        self.bytes_sent = 0
        self.opened = time.monotonic()
        self._first = (salt or 0) << SALT_SHIFT  # slot
        self._deadline = deadline
        self._post = post
        self._unsent = 0
        self._sent_to: set[NodeId] = set()
        self._left = threading.Condition()
        self._when_sent: Callable[[], None] | None = None
        self._is_sent = False
        self._answers = 0
        self.uses_streams = False
        self.receives = False
        self._servers: deque[threading.Thread] = deque()

    @property
    def bytes_received(self) -> int:
        """Payload bytes received so far."""
        return self.inbox.bytes_received

    def send(self, to: NodeId, slot: int, payload: memoryview) -> None:
        """See `Port.send`."""
        if not 0 <= slot <= MAX_SLOT:
            raise ValueError(f"slot {slot} is not in [0, {MAX_SLOT}]")
        self._sent_to.add(to)
        self.uses_streams = True
        self._check()
        self._queue(to, PieceKind.DATA, self._first + slot, payload)

    def expect(self, source: NodeId, slot: int, into: memoryview) -> SocketReceive:
        """See `Port.expect`."""
        self.uses_streams = self.receives = True
        return self.inbox.expect(source, self._first + slot, into)

    def wait(self, ticket: PendingReceive) -> None:
        """See `Port.wait`."""
        assert isinstance(ticket, SocketReceive)
        self.inbox.wait(ticket, self._deadline)

    def flush(self) -> None:
        """See `Port.flush`."""
        with self._left:
            while self._unsent > 0:
                self._check()
                if not self._left.wait(self._deadline - time.monotonic()) and time.monotonic() >= self._deadline:
                    raise DeadlineExceeded("not everything could be sent in time: allow more, or call it again")
            if self._is_sent:
                return
        self._check()

    def check(self, member: NodeId) -> None:
        """See `Port.check`."""
        if self.inbox.ended is not None:
            raise self.inbox.ended
        reason = self.inbox.no_more_from(member)
        if reason:
            raise Aborted(reason)
        if time.monotonic() >= self._deadline:
            raise DeadlineExceeded(f"member {member} wrote too little in time: allow more, or call it again")

    def serve(self, handler: Handler) -> None:
        """See `Port.serve`."""
        thread = threading.Thread(target=self._answer, args=(handler,), name="gossamer-serve", daemon=True)
        self._servers.append(thread)
        thread.start()

    def request(self, source: NodeId, question: bytes, into: memoryview) -> SocketReceive:
        """See `Port.request`."""
        if len(question) > MAX_REQUEST_BYTES:
            raise ValueError(f"a question has at most {MAX_REQUEST_BYTES} bytes, not {len(question)}")
        self.uses_streams = True
        self._check()
        with self._left:
            self._answers += 1
            slot = MAX_SLOT + self._answers
        ticket = self.inbox.expect(source, slot, into)
        self._queue(source, PieceKind.REQUEST, slot, memoryview(question))
        return ticket

    def cancel(self, reason: str) -> None:
        """See `Port.cancel`."""
        self.inbox.end(Aborted(reason))
        with self._left:
            self._left.notify_all()

    # --- the writers' side ---------------------------------------------------------------------

    @property
    def wanted(self) -> bool:
        """Tell whether what is queued still has a use."""
        return self.inbox.ended is None

    def left(self) -> None:
        """A piece has been handed to the kernel, or never will be."""
        with self._left:
            self._unsent -= 1
            if self._unsent <= 0 or self._unsent == MAX_UNSENT_ANSWERS - 1:
                self._left.notify_all()
            tell = self._sent()
        tell()

    def when_sent(self, tell: Callable[[], None] | None) -> None:
        """Let `tell` be called once all that was sent so far has left, if nothing fails before: here or on a writer.

        `flush` returns from then on, also when the port is closed. None: `tell` is not called any more.
        """
        with self._left:
            self._when_sent = tell
            tell = self._sent()
        tell()

    def _sent(self) -> Callable[[], None]:
        tell = self._when_sent
        if tell is None or self._unsent > 0 or not self.wanted or self.inbox.lost_members:
            return lambda: None
        self._when_sent, self._is_sent = None, True
        return tell

    def queued(self, pieces: int) -> None:
        """So many pieces are about to be queued."""
        with self._left:
            self._unsent += pieces

    def _queue(self, to: NodeId, kind: PieceKind, slot: int, payload: memoryview) -> None:
        payload = payload.cast("B")
        if kind is PieceKind.DATA:
            with self._left:
                self.bytes_sent += payload.nbytes
        self._post(to, self, kind, slot, payload)

    def _check(self) -> None:
        if self.inbox.ended is not None:
            raise self.inbox.ended
        for member, reason in list(self.inbox.lost_members.items()):
            if member in self._sent_to:  # what was in the kernel's buffers is lost
                raise Aborted(reason)

    def _answer(self, handler: Handler) -> None:
        while (asked := self.inbox.requests.get()) is not None:
            source, slot, question = asked
            with self._left:  # one that asks and never reads must not have its answers pile up here
                self._left.wait_for(lambda: self._unsent < MAX_UNSENT_ANSWERS or not self.wanted)
            if not self.wanted:
                break
            answer = handler(source, question)
            if answer is None:
                self._queue(source, PieceKind.REFUSAL, slot, memoryview(b""))
            else:
                self._queue(source, PieceKind.DATA, slot, memoryview(answer))
        self.inbox.requests.put(None)  # for the next of several servers
