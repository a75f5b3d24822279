"""One data stream: a proven connection, a thread that reads it and one that writes it.

The socket blocks: the kernel's buffers are the pipeline, and both directions move at once. Payloads
are received straight into the buffer that they are expected in, and sent straight from theirs. Sealed ones are checked
record by record before they are there. A buffer that is revoked meanwhile stays as it is.

Pieces for one member wait in one queue (`SendQueue`), and all of its streams take from it, the free one first.

Between processes of one user on one machine a stream also hands over descriptors (SCM_RIGHTS): see `shared_memory`.
"""

import os
import select
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from collectives.logs import Log
from collectives.mesh.addresses import is_vouched
from collectives.mesh.framing import (
    HEADER_BYTES,
    KEY_BYTES,
    MAX_HELD_BYTES,
    MAX_HELD_PIECES,
    RECORD_BYTES,
    Piece,
    PieceKind,
    WireError,
    header,
    read_header,
)
from collectives.mesh.handshake import ProvenPeer
from collectives.mesh.sealing import TAG_BYTES
from collectives.mesh.socket_port import Landing
from protocol.errors import PeerError
from protocol.identity import NodeId

log = Log()

MAX_GRANTED = 1 << 16  # operations that the other end has started and that are not over here: far more than there are


class Sender(Protocol):
    """The owner of a piece."""

    @property
    def key(self) -> bytes:
        """Its operation's name on the wire."""

    @property
    def wanted(self) -> bool:
        """Tell whether its pieces still have a use."""

    def left(self) -> None:
        """One of its pieces has left, or never will."""


@dataclass(frozen=True, slots=True)
class Portless:
    """The sender of a piece that belongs to no open port."""

    key: bytes = bytes(KEY_BYTES)
    wanted: bool = True

    def left(self) -> None:
        """Nobody waits for it."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One piece on its way out."""

    sender: Sender
    kind: PieceKind
    piece: Piece
    payload: memoryview
    descriptor: int | None = None  # goes with the payload, of a stream that `hands_over`; others drop the piece


class SendQueue:
    """First in, first out, but for what the other end has no room for yet; readers can be told to ask again.

    The other end holds what comes for an operation that it has not started, and has room for so much. Whoever takes a
    piece of data uses some of that room, and `credit` gives it back. Without room data waits, each operation by itself:
    one that the other end has started (`grant`) goes on, whatever waits before it. So neither many small operations nor
    a large one keep another one from its end.

    A queue that is finished gives each reader a FIN once it is empty: so every stream brings one, a later one too.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._items: deque[Outgoing] = deque()
        self._urgent: deque[Outgoing] = deque()  # what the other end waits for: not behind any data
        self._held: OrderedDict[bytes, deque[Outgoing]] = OrderedDict()  # by operation: data that has no room
        self._granted: OrderedDict[bytes, None] = OrderedDict()
        self._all_granted = False
        self._has_told = False  # that something is held, since the last credit
        self._pieces, self._bytes = MAX_HELD_PIECES, MAX_HELD_BYTES  # of room; below 0 if granted ones used more
        self._closed = False
        self._taken = 0  # pieces of data
        self._fin: Outgoing | None = None

    def put(self, items: list[Outgoing], *, urgent: bool = False) -> None:
        """Append pieces, before all data if they are `urgent`; after `close` they are let go at once."""
        with self._changed:
            if not self._closed:
                (self._urgent if urgent else self._items).extend(items)
                self._changed.notify(len(items))
                return
        for item in items:
            item.sender.left()

    def finish(self, fin: Outgoing) -> None:
        """Let every reader take `fin` after all that was put."""
        with self._changed:
            self._fin = fin
            self._changed.notify_all()

    def credit(self, pieces: int, count: int) -> None:
        """The other end has room for so many more pieces and bytes."""
        with self._changed:
            self._pieces = min(MAX_HELD_PIECES, self._pieces + pieces)
            self._bytes = min(MAX_HELD_BYTES, self._bytes + count)
            self._has_told = False
            self._changed.notify_all()

    def grant(self, key: bytes) -> None:
        """Let the pieces of an operation go without room; with a key of zeros those of all, for good."""
        with self._changed:
            self._all_granted = self._all_granted or not any(key)
            self._granted[key] = None
            if len(self._granted) > MAX_GRANTED:
                self._granted.popitem(last=False)
            for each in list(self._held) if self._all_granted else [key]:
                self._items.extend(self._held.pop(each, ()))
            self._changed.notify_all()

    def forget(self, key: bytes) -> None:
        """Let go what is held of an operation that is over here."""
        with self._changed:
            self._granted.pop(key, None)
            dropped = self._held.pop(key, ())
        for item in dropped:
            item.sender.left()

    def take(self, ended: Callable[[], bool], *, has_fin: bool = False) -> Outgoing | None:
        """Wait for the next piece that is still wanted; None when `ended` says so, at the latest after `wake`.

        A FIN has the number of pieces of data that all readers have taken. A reader that `has_fin` gets no other one.
        """
        while True:
            with self._changed:
                item = None
                while not self._closed and not ended():
                    item = self._next()
                    if item is not None:
                        break
                    if self._fin is not None and not has_fin and not self._held:
                        return replace(self._fin, piece=Piece(0, 0, self._taken, 0))
                    self._changed.wait()
                if item is None:
                    self._changed.notify()  # another reader has to take what this one was woken for
                    return None
                wanted = item.sender.wanted
                if wanted and item.kind is PieceKind.DATA:
                    self._taken += 1
                    self._pieces -= 1
                    self._bytes -= item.piece.length
            if wanted:
                return item
            item.sender.left()

    def _next(self) -> Outgoing | None:
        """Take the next piece that may go now."""
        if self._urgent:
            return self._urgent.popleft()
        for key, waiting in self._held.items():
            if not self._has_room(waiting[0]):
                break
            item = waiting.popleft()
            if not waiting:
                del self._held[key]
            return item
        while self._items:
            item = self._items.popleft()
            key = item.sender.key
            if item.kind is not PieceKind.DATA or self._all_granted or key in self._granted or self._has_room(item):
                return item
            self._held.setdefault(key, deque()).append(item)
        if self._held and not self._has_told:
            self._has_told = True
            return Outgoing(Portless(), PieceKind.HELD, Piece(0, 0, 0, 0), memoryview(b""))
        return None

    def _has_room(self, item: Outgoing) -> bool:
        return self._pieces > 0 and self._bytes >= item.piece.length

    @property
    def has_urgent(self) -> bool:
        """Whether anything urgent has yet to be taken."""
        return bool(self._urgent)

    @property
    def has_sent(self) -> bool:
        """Whether any data was taken."""
        return self._taken > 0

    def renew(self) -> None:
        """All room is free again, as far as is known: a stream broke, and what was on it needs none."""
        self.credit(MAX_HELD_PIECES, MAX_HELD_BYTES)

    def wake(self) -> None:
        """Let every reader ask again."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Let everything go: nobody will carry it."""
        with self._changed:
            self._closed = True
            dropped = [*self._urgent, *self._items, *(item for waiting in self._held.values() for item in waiting)]
            for kept in (self._urgent, self._items, self._held):
                kept.clear()
            self._changed.notify_all()
        for item in dropped:
            item.sender.left()


class Arrivals(Protocol):
    """Says where a stream's pieces go."""

    def place(self, source: NodeId, key: bytes, piece: Piece) -> Landing | None:
        """Return where to receive a piece, None to drop it."""

    def arrived(self, source: NodeId, key: bytes, piece: Piece, where: Landing) -> None:
        """A piece is where `place` said."""

    def told(self, source: NodeId, key: bytes, kind: PieceKind, slot: int, text: bytes) -> None:
        """A request (`text` is the question) or a refusal came."""

    def handed(self, source: NodeId, serial: bytes, descriptor: int) -> None:
        """A member's arena came. The descriptor is closed afterwards."""

    def held_back(self, source: NodeId) -> None:
        """HELD came: the member has no room for what it wants to send."""

    def finished(self, source: NodeId, pieces: int) -> None:
        """A FIN came: the member has sent so many pieces of data, and sends nothing more."""

    def taken(self, source: NodeId) -> None:
        """The member has all that it was sent before a FIN."""


class Stream:
    """Runs until either end closes, then calls `on_end` once, from one of its threads."""

    def __init__(
        self,
        peer: ProvenPeer,
        sock: socket.socket,
        outbox: SendQueue,
        arrivals: Arrivals,
        on_end: Callable[["Stream", str], None],
    ) -> None:
        """Take over the socket of a connection whose handshake is over; `outbox` may have other readers too."""
        self.member = peer.member
        self.number = peer.stream
        self.hands_over = peer.bare and is_vouched(sock)  # descriptors, as one process of this user to another
        self._peer = peer
        self._socket = sock
        self._outbox = outbox
        self._arrivals = arrivals
        self._on_end = on_end
        self.moved = 0.0  # when bytes last came, on the monotonic clock
        self.has_brought_fin = False  # so that no data follows on this stream
        self._early = memoryview(peer.leftover)
        self._lock = threading.Lock()
        self._running = 2
        sock.setblocking(True)
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self.threads = [
            threading.Thread(target=self._run, args=(work,), name=f"gossamer-{name}", daemon=True)
            for name, work in (("reader", self._read), ("writer", self._write))
        ]

    def start(self) -> None:
        """Start both threads."""
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """End the connection; both threads notice. From any thread."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _run(self, work: Callable[[], None]) -> None:
        reason = "closed"
        try:
            work()
        except PeerError as error:
            reason = error.reason
        except OSError as error:
            reason = error.strerror or "broken"
        except Exception:  # no memory, or a defect: half a stream would keep the other end waiting
            log.exception("a data stream failed", member=self.member)
            reason = "internal_error"
        self.close()
        with self._lock:
            self._running -= 1
            first = self._running == 1
        if first:
            self._outbox.wake()
            self._on_end(self, reason)
        else:
            self._socket.close()  # only now that no thread uses its number, which may be given again

    def _has_ended(self) -> bool:
        return self._running < 2

    # --- reading -------------------------------------------------------------------------------

    def _read(self) -> None:
        opener = self._peer.opener
        head = memoryview(bytearray(HEADER_BYTES + TAG_BYTES))
        record = memoryview(bytearray(RECORD_BYTES + TAG_BYTES))
        while self._fill(head):
            key, kind, piece = read_header(opener.open(head))
            if kind is PieceKind.MEMORY:
                self._take_descriptors(piece.length)
                continue
            if kind is PieceKind.FIN:
                self.has_brought_fin = True
                self._arrivals.finished(self.member, piece.total)
                continue
            if kind is PieceKind.TAKEN:
                self._arrivals.taken(self.member)
                continue
            if kind is PieceKind.HELD:
                self._arrivals.held_back(self.member)
                continue
            if kind is PieceKind.GRANT:
                self._outbox.grant(key)
                continue
            if kind is PieceKind.CREDIT:
                self._outbox.credit(piece.slot, piece.total)
                continue
            if kind is not PieceKind.DATA:
                text = bytearray(piece.length)
                self._receive(Landing(memoryview(text)), record)
                self._arrivals.told(self.member, key, kind, piece.slot, bytes(text))
                continue
            where = self._arrivals.place(self.member, key, piece)
            if where is not None:
                self._receive(where, record)
                self._arrivals.arrived(self.member, key, piece, where)
            else:
                self._receive(Landing(memoryview(bytearray(piece.length))), record)

    def _receive(self, where: Landing, record: memoryview) -> None:
        """Receive a piece; `record` has room for one record. What comes after `where` is revoked is dropped."""
        opener = self._peer.opener
        if self._peer.bare:
            self._receive_bare(where)
            return
        for at in range(0, where.length, RECORD_BYTES):
            count = min(RECORD_BYTES, where.length - at)
            sealed = record[: count + TAG_BYTES]
            self._must_fill(sealed)
            if not opener.encrypts:
                opener.check(sealed[:count], sealed[count:])
            with where.lock:
                plain = where.part(at, at + count)
                if opener.encrypts:
                    opener.open_into(sealed, plain)
                else:
                    plain[:] = sealed[:count]

    def _receive_bare(self, where: Landing) -> None:
        """Receive what is not in records: as much at once as has come, for none must come after `where` is revoked."""
        at = min(len(self._early), where.length)
        with where.lock:
            where.part(0, at)[:] = self._early[:at]
        self._early = self._early[at:]
        while at < where.length:
            try:
                with where.lock:
                    count = self._socket.recv_into(where.part(at, where.length), 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._readable.poll()
                continue
            if count == 0:
                raise ConnectionResetError("closed")
            self.moved = time.monotonic()
            at += count

    def _take_descriptors(self, length: int) -> None:
        if not self.hands_over:
            raise WireError("memory")
        if self._early:  # who read the handshake has lost the descriptor: the member hands it over again
            self._must_fill(memoryview(bytearray(length)))
            return
        text, descriptors, _, _ = socket.recv_fds(self._socket, length, 1, socket.MSG_CMSG_CLOEXEC)
        try:
            if len(text) < length:
                raise WireError("memory")
            for descriptor in descriptors:
                self._arrivals.handed(self.member, text, descriptor)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _must_fill(self, buffer: memoryview) -> None:
        if buffer and not self._fill(buffer):
            raise ConnectionResetError("closed")

    def _fill(self, buffer: memoryview) -> bool:
        """Receive until `buffer` is full; False: the stream ended."""
        if self._early:
            count = min(len(self._early), len(buffer))
            buffer[:count] = self._early[:count]
            self._early = self._early[count:]
            buffer = buffer[count:]
        while buffer:
            count = self._socket.recv_into(buffer, 0, socket.MSG_WAITALL)
            if count == 0:
                return False
            self.moved = time.monotonic()
            buffer = buffer[count:]
        return True

    # --- writing -------------------------------------------------------------------------------

    def _write(self) -> None:
        record = memoryview(bytearray(RECORD_BYTES + TAG_BYTES))
        has_fin = False
        while (outgoing := self._outbox.take(self._has_ended, has_fin=has_fin)) is not None:
            has_fin = has_fin or outgoing.kind is PieceKind.FIN
            try:
                self._put(outgoing, record)
            finally:
                outgoing.sender.left()

    def _put(self, outgoing: Outgoing, record: memoryview) -> None:
        sealer = self._peer.sealer
        if outgoing.descriptor is not None and not self.hands_over:
            return
        parts: list[bytes | memoryview] = [sealer.seal(header(outgoing.sender.key, outgoing.kind, outgoing.piece))]
        payload = outgoing.payload
        if outgoing.descriptor is not None:
            self._put_all(parts)
            socket.send_fds(self._socket, [payload], [outgoing.descriptor])
            return
        if self._peer.bare:
            self._put_all([*parts, payload])
            return
        for at in range(0, len(payload), RECORD_BYTES):
            plain = payload[at : at + RECORD_BYTES]
            if sealer.encrypts:
                sealed = record[: len(plain) + TAG_BYTES]
                sealer.seal_into(plain, sealed)
                self._put_all([*parts, sealed])
            else:
                self._put_all([*parts, plain, sealer.tag(plain)])
            parts = []
        if parts:
            self._put_all(parts)

    def _put_all(self, parts: list[bytes | memoryview]) -> None:
        """Send all, in one system call where the kernel takes them."""
        sent = self._socket.sendmsg(parts)
        for part in parts:
            if sent < len(part):
                self._socket.sendall(part[sent:])
            sent = max(0, sent - len(part))
