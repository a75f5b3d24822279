"""Frames: the two forms in which anything crosses the network.

Three things are sealed in an envelope: an item, which is relayed; a hello, the first frame of either end; and a goodbye
to a node of another version:

    frame  = public key (32) | signature (64) | header (72) | body
    header = version (2) | kind (2) | swarm id (16) | sequence (8) | time in ms (8) | body's size (4) | digest (32)

Integers are big-endian. The signature is Ed25519 over a domain separator and the header. The header holds a digest of
the body, which also names an item (`item_id`): so sender and receiver hash a body once each.

    digest = SHA-256(SHA-256(chunk 0) | SHA-256(chunk 1) | ...), chunks of `CHUNK_BYTES`, the last one shorter

All else is said to one peer only and carries no signature. CURVE has proven the sender's key, which the record in its
hello binds to its node id, and lets nobody change, repeat or reorder frames:

    frame  = "gossamer" (8) | kind (2) | body

A public key begins like that with a chance of one in 2**64. An item of several chunks never travels as one frame. Its
chunks travel by themselves, each checked by the list of their hashes (see `protocol.gossip.chunks`).

`version` is major x 256 + minor. A newer minor version may append fields to the arrays in bodies, and add kinds, which
older nodes skip. Another major version is refused (see `protocol.wire.version`).

The receiver of an envelope checks, in this order: size, version, signature, digest. It parses nothing of the body
before, and relays the very bytes that came.
"""

import hashlib
import struct
from enum import IntEnum
from typing import NewType

from protocol.errors import EnvelopeError
from protocol.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, Verify, verify
from protocol.value import value
from protocol.wire.version import MAJOR, VERSION, said, spoken_version

ItemId = NewType("ItemId", bytes)

SWARM_BYTES = 16
HASH_BYTES = 32
HEADER_BYTES = KEY_BYTES + SIGNATURE_BYTES  # key and signature, before the signed part of envelopes, records, manifests
_HEADER = struct.Struct(">HH16sQQI32s")
HEAD_BYTES = HEADER_BYTES + _HEADER.size  # key, signature and header, before an envelope's body
PLACE_BYTES = HASH_BYTES + 2  # before a chunk's data: which chunk it is
CONTROL = b"gossamer"
CONTROL_BYTES = len(CONTROL) + 2  # before the body of what is not sealed
# At 1 MB/s a chunk holds a link up for an eighth of a second. Its hash is a 4096th of its size.
CHUNK_BYTES = 128 << 10
MAX_BODY_BYTES = 192 << 10  # room for the largest message, 64 records of 2,688 bytes
MAX_ITEM_BYTES = 64 << 20  # what a swarm may allow: the hashes of its chunks fill 16 KiB
MAX_FRAME_BYTES = HEAD_BYTES + MAX_BODY_BYTES
_DOMAIN = b"gossamer/envelope/3\x00"


class Kind(IntEnum):
    """The type of a body. A number that is not listed is ignored, so that newer nodes may say more."""

    HELLO = 1
    PEERS = 2
    PING = 3
    PONG = 4
    HAVE = 5
    WANT = 6
    ITEM = 7
    DONT_HAVE = 8
    BUSY = 9
    CANCEL = 10
    GOODBYE = 11
    DIGEST = 12
    INTEREST = 13
    ASK_MANIFEST = 14
    MANIFEST = 15
    ASK_REVOCATIONS = 16
    REVOCATIONS = 17
    OUTLINE = 18
    CHUNK = 19
    ACK = 20
    DIAL_BACK = 21
    DIALLED_BACK = 22


CONTENT = frozenset({Kind.ITEM, Kind.CHUNK})  # kinds whose bytes are a node's content


@value
class Header:
    """The signed part of an envelope and its signer; the signature was found good.

    `kind` may be a number that this version does not know. `time_ms` is the signer's clock, in milliseconds of Unix
    time; `size` the body's bytes.
    """

    public_key: bytes
    swarm: bytes
    kind: int
    sequence: int
    time_ms: int
    size: int
    digest: bytes

    @property
    def item_id(self) -> ItemId:
        """The id of an item with this header."""
        return item_id(self.public_key, self.digest)


@value
class Envelope(Header):
    """A whole envelope: its header, and the frame that it came as."""

    frame: bytes

    @property
    def body(self) -> bytes:
        """A copy of the body. To pass the frame on needs none."""
        return self.frame[HEAD_BYTES:]


def seal(
    identity: Identity,
    swarm: bytes,
    kind: int,
    sequence: int,
    time_ms: int,
    body: bytes,
    hashes: bytes | None = None,
) -> bytes:
    """Return the signed frame; equal arguments give equal bytes (Ed25519 is deterministic).

    `hashes` are the body's `chunk_hashes`, where they are known already.
    """
    root = digest_of_hashes(chunk_hashes(body) if hashes is None else hashes)
    header = _HEADER.pack(VERSION, int(kind), swarm, sequence, time_ms, len(body), root)
    return b"".join((identity.public_key, identity.sign(_DOMAIN + header), header, body))


def open_frame(frame: bytes, check: Verify = verify) -> Envelope:
    """Verify and decode `frame`; `check` verifies signatures.

    Raises:
        EnvelopeError: reason "oversized", "malformed", "forged" (the signature is not the key's, or the body is
            another than the signed one) or "other_version".
    """
    if len(frame) > MAX_FRAME_BYTES:
        raise EnvelopeError("oversized", f"{len(frame)} bytes")
    return _open(frame, check)


def _open(frame: bytes, check: Verify) -> Envelope:
    _verify_head(frame[:HEAD_BYTES], check)
    _, kind, swarm, sequence, time_ms, size, root = _HEADER.unpack_from(frame, HEADER_BYTES)
    body = memoryview(frame)[HEAD_BYTES:]
    if size != len(body) or root != digest(body):
        raise EnvelopeError("forged", "body")
    return Envelope(frame[:KEY_BYTES], swarm, kind, sequence, time_ms, size, root, frame)


def open_item(data: bytes, check: Verify = verify) -> Envelope:
    """Verify and decode a whole item, of one chunk or of several: its head and all of its body.

    Raises:
        EnvelopeError: as `open_frame`; "oversized" beyond what any swarm allows.
    """
    if len(data) > HEAD_BYTES + MAX_ITEM_BYTES:
        raise EnvelopeError("oversized", f"{len(data)} bytes")
    return _open(data, check)


@value
class Control:
    """A message to one peer only, without a seal: its kind and its body."""

    kind: int
    body: bytes


def control_frame(kind: int, body: bytes) -> bytes:
    """Return the frame of a message to one peer."""
    return b"".join((CONTROL, int(kind).to_bytes(2), body))


def read_control(frame: bytes) -> Control | None:
    """Return the message in a frame, None if the frame is sealed or makes no sense.

    Raises:
        EnvelopeError: reason "oversized".
    """
    if not frame.startswith(CONTROL) or len(frame) < CONTROL_BYTES:
        return None
    if len(frame) > CONTROL_BYTES + MAX_BODY_BYTES:
        raise EnvelopeError("oversized", f"{len(frame)} bytes")
    return Control(int.from_bytes(frame[len(CONTROL) : CONTROL_BYTES]), frame[CONTROL_BYTES:])


def open_header(head: bytes, check: Verify = verify) -> Header:
    """Verify and decode the first `HEAD_BYTES` of a frame. Raises as `open_frame`."""
    _verify_head(head, check)
    return header_of(head)


def _verify_head(head: bytes, check: Verify) -> None:
    version = spoken_version(head)
    if version is not None and version >> 8 != MAJOR:
        raise EnvelopeError("other_version", f"it speaks {said(version)}, this node {said(VERSION)}")
    if len(head) != HEAD_BYTES:
        raise EnvelopeError("malformed", f"{len(head)} bytes")
    public_key, signature, header = head[:KEY_BYTES], head[KEY_BYTES:HEADER_BYTES], head[HEADER_BYTES:]
    if not check(public_key, signature, _DOMAIN + header):
        raise EnvelopeError("forged", "signature")


def header_of(frame: bytes) -> Header:
    """Return the header of a frame that is known to be good, or was made here."""
    _, kind, swarm, sequence, time_ms, size, root = _HEADER.unpack_from(frame, HEADER_BYTES)
    return Header(frame[:KEY_BYTES], swarm, kind, sequence, time_ms, size, root)


def kind_of(frame: bytes) -> int | None:
    """Return the kind that a frame of this major version claims, unchecked; None for any other frame."""
    if frame.startswith(CONTROL):
        return int.from_bytes(frame[len(CONTROL) : CONTROL_BYTES])
    if not HEAD_BYTES <= len(frame) <= MAX_FRAME_BYTES or frame[HEADER_BYTES] != MAJOR:
        return None
    return int.from_bytes(frame[HEADER_BYTES + 2 : HEADER_BYTES + 4], "big")


def claimed_id(frame: bytes) -> ItemId:
    """Return the id that an item's frame claims, unchecked: enough to recognise an item that we know."""
    return item_id(frame[:KEY_BYTES], frame[HEAD_BYTES - HASH_BYTES : HEAD_BYTES])


def content_id(frame: bytes) -> ItemId:
    """Return the id that a frame of an ITEM or a CHUNK claims, unchecked."""
    is_chunk = frame.startswith(CONTROL)
    return ItemId(frame[CONTROL_BYTES : CONTROL_BYTES + HASH_BYTES]) if is_chunk else claimed_id(frame)


def chunk_count(size: int) -> int:
    """Return how many chunks a body of `size` bytes has: at least one."""
    return max(1, -(-size // CHUNK_BYTES))


def chunk_hashes(body: bytes | memoryview) -> bytes:
    """Return the hashes of a body's chunks, joined."""
    if len(body) <= CHUNK_BYTES:
        return hashlib.sha256(body).digest()
    view = memoryview(body)
    return b"".join(
        hashlib.sha256(view[start : start + CHUNK_BYTES]).digest() for start in range(0, len(body), CHUNK_BYTES)
    )


def hash_in(hashes: bytes, index: int) -> bytes:
    """Return the hash of chunk `index` among joined hashes, empty beyond the end."""
    return hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]


def digest(body: bytes | memoryview) -> bytes:
    """Return the digest (32 bytes) of a body, which its header holds."""
    return digest_of_hashes(chunk_hashes(body))


def digest_of_hashes(hashes: bytes) -> bytes:
    """Return the digest of the body of which these are `chunk_hashes`."""
    return hashlib.sha256(hashes).digest()


def item_id(public_key: bytes, body_digest: bytes) -> ItemId:
    """Return the id of an item: SHA-256 over its signer's key and the digest of its body.

    Time and sequence are left out: a node that restarts and publishes a body again
    gives it the same id.
    """
    return ItemId(hashlib.sha256(public_key + body_digest).digest())
