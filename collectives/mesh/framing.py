"""The format of a data stream: pieces of payloads, each behind a header of one length.

    header = operation (16) | kind (1) | slot (4) | offset (8) | total (8) | length (4), big endian

The header is one record (see `sealing`), and the piece follows in records of `RECORD_BYTES`.
The operation is named with its view's mark, so that two views of one epoch, on the two sides of a
split group, never take each other's bytes.
"""

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum

from collectives.agreement.views import OpId
from collectives.mesh.port import MAX_REQUEST_BYTES
from protocol.errors import PeerError

_LAYOUT = struct.Struct("!16sBIQQI")
HEADER_BYTES = _LAYOUT.size
KEY_BYTES = 16
# A piece is what one stream sends before it turns to another payload. Large enough that the cost of a
# header and of two threads' turns (about 50 us) is small beside it, small enough to spread over streams.
PIECE_BYTES = 4 << 20
SPREAD_BYTES = 256 << 10  # of several streams: a window of theirs, so that all are done at about the same time
RECORD_BYTES = 256 << 10  # sealed, or its tag made, while it is in the processor's cache
MAX_PAYLOAD_BYTES = 1 << 40
# What comes of one member before it is expected is held. This is its room, and the sender counts what it has used.
MAX_HELD_BYTES = 64 << 20
MAX_HELD_PIECES = 1024  # each may be of an operation of its own: 1 KB


class WireError(PeerError):
    """A member's stream that does not keep to this format."""


class PieceKind(IntEnum):
    """The kind of a piece."""

    DATA = 1
    REQUEST = 2  # `slot` is where the answer goes
    REFUSAL = 3  # the answer: no; or, of an operation without an agreement, that it is off, and why
    MEMORY = 4  # the name of the sender's arena, and beside it the arena's descriptor: see `shared_memory`
    FIN = 5  # the sender sends nothing more; `total` is how many pieces of DATA it has sent, on all streams
    HELD = 6  # the sender holds pieces back until it has room, or hears which operations have started
    GRANT = 7  # this operation has started or ended, so its pieces may come now; with a key of zeros: all may, for good
    CREDIT = 8  # there is room for `slot` more pieces and `total` more bytes
    TAKEN = 9  # all that FINs announced is here


WITHOUT_TEXT = (PieceKind.FIN, PieceKind.TAKEN, PieceKind.HELD, PieceKind.GRANT, PieceKind.CREDIT)


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` bytes of the payload in `slot`, at `offset` of its `total`."""

    slot: int
    offset: int
    total: int
    length: int


def operation_key(op: OpId) -> bytes:
    """Return the 16 bytes that stand for one operation of one view on its streams."""
    name = struct.pack("!8sQQQ", op.mark, op.epoch, op.tag, op.n)
    return hashlib.blake2b(name, digest_size=KEY_BYTES, person=b"gossamer-op").digest()


def header(key: bytes, kind: PieceKind, piece: Piece) -> bytes:
    """Return a piece's header."""
    return _LAYOUT.pack(key, kind, piece.slot, piece.offset, piece.total, piece.length)


def read_header(data: bytes | memoryview) -> tuple[bytes, PieceKind, Piece]:
    """Return what a header says. Raises `WireError`."""
    key, kind, slot, offset, total, length = _LAYOUT.unpack(data)
    if kind not in list(PieceKind):
        raise WireError("kind")
    longest = {PieceKind.DATA: PIECE_BYTES, **dict.fromkeys(WITHOUT_TEXT, 0)}.get(kind, MAX_REQUEST_BYTES)
    if length > longest or total > MAX_PAYLOAD_BYTES or offset + length > total:
        raise WireError("piece")
    return key, PieceKind(kind), Piece(slot, offset, total, length)


def cut(slot: int, total: int, largest: int) -> list[Piece]:
    """Return the pieces of a payload, each of at most `largest` bytes; an empty payload is one empty piece."""
    return [Piece(slot, at, total, min(largest, total - at)) for at in range(0, total, largest)] or [
        Piece(slot, 0, 0, 0)
    ]
