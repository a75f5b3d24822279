"""The envelope: the one form in which anything crosses the network.

    frame = public key (32) | signature (64) | payload
    payload = MessagePack [version, swarm id (16), kind, sequence, time in ms, body]

`version` is major x 256 + minor. A newer minor version may append fields to any array and
add kinds, which older nodes skip; another major version is not understood.

The signature is Ed25519 over a domain separator and the payload's exact bytes. A receiver
checks in this order: size, signature, layout. Nothing is parsed before its signature holds,
and an envelope is relayed as the very bytes that came.
"""

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from typing import NewType

from protocol.errors import EnvelopeError
from protocol.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, Verify, verify
from protocol.wire.encoding import is_bytes, is_uint, pack, unpack

ItemId = NewType("ItemId", bytes)

MAJOR, MINOR = 1, 0
VERSION = MAJOR << 8 | MINOR
SWARM_BYTES = 16
HEADER_BYTES = KEY_BYTES + SIGNATURE_BYTES
MAX_BODY_BYTES = (1 << 20) + 64  # an item of 1 MiB and its topic
# Version, swarm id, kind, sequence, time and the body's own header take at most 50 bytes, newer fields the rest.
MAX_FRAME_BYTES = HEADER_BYTES + 128 + MAX_BODY_BYTES
_MIN_PAYLOAD_BYTES = 24  # an array header, the swarm id, five one-byte fields and more
_DOMAIN = b"gossamer/envelope/1\x00"


class Kind(IntEnum):
    """What a body is. A number that is not listed is ignored, so that newer nodes may say more."""

    HELLO = 1
    PEERS = 2
    PING = 3
    PONG = 4
    ANNOUNCE = 5
    PULL = 6
    ITEM = 7
    PROBE = 8
    PROBED = 9
    NEWS = 10
    GOODBYE = 11
    DIGEST = 12
    INTEREST = 13
    ASK_MANIFEST = 14
    MANIFEST = 15
    ASK_REVOCATIONS = 16
    REVOCATIONS = 17


@dataclass(frozen=True, slots=True)
class Envelope:
    """An envelope whose signature was found good (or that is about to be signed).

    `kind` may be a number that this version does not know. `time_ms` is the signer's
    clock, in milliseconds of Unix time.
    """

    public_key: bytes
    swarm: bytes
    kind: int
    sequence: int
    time_ms: int
    body: bytes


def seal(identity: Identity, swarm: bytes, kind: int, sequence: int, time_ms: int, body: bytes) -> bytes:
    """Return the signed frame; equal arguments give equal bytes (Ed25519 is deterministic)."""
    payload = pack([VERSION, swarm, int(kind), sequence, time_ms, body])
    return identity.public_key + identity.sign(_DOMAIN + payload) + payload


def open_frame(frame: bytes, check: Verify = verify) -> Envelope:
    """Verify and decode `frame`; `check` verifies signatures.

    Raises:
        EnvelopeError: reason "oversized", "malformed", "forged" (the signature is not the key's) or "other_version".
    """
    if len(frame) > MAX_FRAME_BYTES:
        raise EnvelopeError("oversized", f"{len(frame)} bytes")
    if len(frame) < HEADER_BYTES + _MIN_PAYLOAD_BYTES:
        raise EnvelopeError("malformed", f"{len(frame)} bytes")
    public_key, signature, payload = frame[:KEY_BYTES], frame[KEY_BYTES:HEADER_BYTES], frame[HEADER_BYTES:]
    if not check(public_key, signature, _DOMAIN + payload):
        raise EnvelopeError("forged", "signature")
    version, swarm, kind, sequence, time_ms, body = unpack(payload, 6, error=EnvelopeError, max_bytes=MAX_BODY_BYTES)
    if not is_uint(version, 0xFFFF) or not is_bytes(swarm, SWARM_BYTES) or not isinstance(body, bytes):
        raise EnvelopeError("malformed", "layout")
    if version >> 8 != MAJOR:
        raise EnvelopeError("other_version", f"{version >> 8}.{version & 0xFF}")
    if not (is_uint(kind, 0xFFFF) and is_uint(sequence) and is_uint(time_ms)):
        raise EnvelopeError("malformed", "integers")
    return Envelope(public_key, swarm, kind, sequence, time_ms, body)


def item_id(public_key: bytes, body: bytes) -> ItemId:
    """Return the id of an item: SHA-256 over its signer's key and its body.

    Time and sequence are left out: a node that restarts and publishes a body again
    gives it the same id.
    """
    digest = hashlib.sha256(public_key)
    digest.update(body)
    return ItemId(digest.digest())
