"""One data stream: a proven connection, a thread that reads it and one that writes it.

The socket blocks: the kernel's buffers are the pipeline, and both directions move at once. Payloads
are received straight into the buffer that they are expected in, and sent straight from theirs.
"""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from collectives.mesh.framing import HEADER_BYTES, PIECE_BYTES, RECORD_BYTES, Kind, Piece, header, read_header
from collectives.mesh.handshake import Peer
from collectives.mesh.sendqueue import Outgoing, SendQueue
from protocol.errors import PeerError
from protocol.identity import NodeId


class Arrivals(Protocol):
    """Who says where a stream's pieces go."""

    def place(self, source: NodeId, key: bytes, piece: Piece) -> memoryview | None:
        """Return where to receive a piece, None to drop it."""

    def arrived(self, source: NodeId, key: bytes, piece: Piece, where: memoryview) -> None:
        """A piece is where `place` said."""

    def told(self, source: NodeId, key: bytes, kind: Kind, slot: int, text: bytes) -> None:
        """A request (`text` is the question) or a refusal came."""


@dataclass(slots=True)
class Traffic:
    """What a stream carried, and for how many seconds it was at it."""

    bytes_sent: int = 0
    seconds_sending: float = 0.0
    bytes_received: int = 0


class Stream:
    """Runs until either end closes, then calls `on_end` once, from one of its threads."""

    def __init__(
        self,
        peer: Peer,
        sock: socket.socket,
        outbox: SendQueue,
        arrivals: Arrivals,
        on_end: Callable[["Stream", str], None],
    ) -> None:
        """Take over the socket of a connection whose handshake is over; `outbox` may have other readers too."""
        self.member = peer.member
        self.number = peer.stream
        self.traffic = Traffic()
        self._peer = peer
        self._socket = sock
        self._outbox = outbox
        self._arrivals = arrivals
        self._on_end = on_end
        self._early = memoryview(peer.leftover)
        self._lock = threading.Lock()
        self._running = 2
        sock.setblocking(True)
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=f"gossamer-{name}", daemon=True)
            for name, work in (("reader", self._read), ("writer", self._write))
        ]

    def start(self) -> None:
        """Start both threads."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the connection; both threads notice. From any thread."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def join(self, timeout: float) -> None:
        """Wait for both threads to be gone."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout)

    def _run(self, work: Callable[[], None]) -> None:
        reason = "closed"
        try:
            work()
        except PeerError as error:
            reason = error.reason
        except OSError as error:
            reason = error.strerror or "broken"
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
        head = memoryview(bytearray(HEADER_BYTES + opener.overhead))
        spare = memoryview(bytearray(PIECE_BYTES + opener.overhead))
        while self._fill(head):
            key, kind, piece = read_header(opener.open(head) if opener.overhead else head)
            if kind is not Kind.DATA:
                self._receive(spare[: piece.length], spare_record=None)
                self._arrivals.told(self.member, key, kind, piece.slot, bytes(spare[: piece.length]))
                continue
            where = self._arrivals.place(self.member, key, piece)
            self._receive(spare[: piece.length] if where is None else where, spare)
            self.traffic.bytes_received += piece.length
            if where is not None:
                self._arrivals.arrived(self.member, key, piece, where)

    def _receive(self, into: memoryview, spare_record: memoryview | None) -> None:
        """Receive a piece to `into`. `spare_record` is a buffer for one sealed record."""
        opener = self._peer.opener
        if not opener.overhead:
            self._must_fill(into)
            return
        record = memoryview(bytearray(RECORD_BYTES + opener.overhead)) if spare_record is None else spare_record
        for at in range(0, len(into), RECORD_BYTES):
            plain = into[at : at + RECORD_BYTES]
            sealed = record[: len(plain) + opener.overhead]
            self._must_fill(sealed)
            opener.open_into(sealed, plain)

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
            buffer = buffer[count:]
        return True

    # --- writing -------------------------------------------------------------------------------

    def _write(self) -> None:
        sealer = self._peer.sealer
        record = memoryview(bytearray(RECORD_BYTES + sealer.overhead))
        while (outgoing := self._outbox.take(self._has_ended)) is not None:
            began = perf_counter()
            try:
                self._put(outgoing, record)
            finally:
                outgoing.sender.left()
            self.traffic.bytes_sent += outgoing.piece.length
            self.traffic.seconds_sending += perf_counter() - began

    def _put(self, outgoing: Outgoing, record: memoryview) -> None:
        sealer = self._peer.sealer
        head = header(outgoing.sender.key, outgoing.kind, outgoing.piece)
        if not sealer.overhead:
            self._put_both(head, outgoing.payload)
            return
        head = bytes(sealer.seal(head))
        payload = outgoing.payload
        for at in range(0, len(payload), RECORD_BYTES):
            plain = payload[at : at + RECORD_BYTES]
            sealed = record[: len(plain) + sealer.overhead]
            sealer.seal_into(plain, sealed)
            self._put_both(head, sealed)
            head = b""
        if head:
            self._socket.sendall(head)

    def _put_both(self, head: bytes, payload: memoryview) -> None:
        """Send both, in one system call where the kernel takes them."""
        sent = self._socket.sendmsg([head, payload])
        if sent < len(head):
            self._socket.sendall(head[sent:])
            sent = len(head)
        if sent - len(head) < len(payload):
            self._socket.sendall(payload[sent - len(head) :])
