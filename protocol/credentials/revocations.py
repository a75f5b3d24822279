"""A swarm's revocation list (like a CRL, RFC 5280): what its owner took back, and to whom the swarm was handed over.

    list     = public key (32) | signature (64) | payload
    payload  = MessagePack [1, swarm id (16), sequence, [handover, ...], ids (20 each, joined)]
    handover = [next owner's public key (32), signature (64) of the owner before it]
               over: domain | swarm (16) | place in the chain (4) | next owner's public key

An id is 20 bytes, made as a node id is: of a node's key, of an invite's key, or of a pass's signature. A listed node is
not admitted; a listed pass, and the tickets of a listed invite, do not count; nor does anything that a listed owner's
key signed.

A manifest never changes, so the owners after the founder are named here. The chain of handovers begins with the
founder's. Each handover is signed by the owner before it, and the list by the last owner. So anybody who has the
manifest can verify it. The lists of one owner are numbered from 1. Number 0 hands the swarm over, and is signed by the
owner who does that.

Of two lists the one with the longer chain counts, then the one with the larger sequence, but only if its chain goes on
from the other's. So for nodes that have heard of a handover, the earlier owner can sign neither a list nor another
handover. For nodes that have not, the holder of the founder's key is still the owner.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from protocol.credentials.manifest import SwarmManifest
from protocol.errors import RevocationError
from protocol.identity import (
    KEY_BYTES,
    NODE_ID_BYTES,
    SIGNATURE_BYTES,
    Identity,
    NodeId,
    Verify,
    id_bytes,
    id_of_bytes,
    verify,
)
from protocol.wire.encoding import is_bytes, is_uint, pack, unpack
from protocol.wire.envelope import HEADER_BYTES
from protocol.wire.messages import MAX_REVOCATIONS_BYTES

FORMAT = 1
MAX_REVOKED = 1024  # 20 KiB
MAX_HANDOVERS = 4
SEQUENCE_BITS = 48  # of a revision; the chain's length is above them
_DOMAIN = b"gossamer/revocations/1\x00"
_HANDOVER_DOMAIN = b"gossamer/handover/1\x00"


@dataclass(frozen=True, slots=True)
class Handover:
    """The signed word of the owner before, that `owner` (a public key) owns the swarm from now on."""

    owner: bytes
    signature: bytes


@dataclass(frozen=True)
class RevocationList:
    """A verified list; `ids` are the revoked ones, joined, and `encoded` holds the exact bytes to pass on."""

    sequence: int
    handovers: tuple[Handover, ...]
    ids: bytes
    encoded: bytes

    @cached_property
    def revoked(self) -> frozenset[NodeId]:
        """The revoked ids. They take 5 ms, ten times as long as all else, so not for a list that is no news."""
        starts = range(0, len(self.ids), NODE_ID_BYTES)
        return frozenset(id_of_bytes(self.ids[start : start + NODE_ID_BYTES]) for start in starts)

    @property
    def revision(self) -> int:
        """A number that grows with every list and every handover; 0 is before the first."""
        return len(self.handovers) << SEQUENCE_BITS | self.sequence

    def replaces(self, other: "RevocationList | None") -> bool:
        """Tell whether this list is newer than `other`, and its chain goes on from there."""
        if other is None:
            return True
        owners, before = [[handover.owner for handover in each.handovers] for each in (self, other)]
        return self.revision > other.revision and owners[: len(before)] == before


def make_revocations(
    owner: Identity,
    manifest: SwarmManifest,
    revoked: Iterable[NodeId],
    sequence: int,
    handovers: tuple[Handover, ...] = (),
) -> RevocationList:
    """Sign a list as the last owner of the chain `handovers`; list number 0 as the owner before the last.

    Raises:
        RevocationError: there are too many ids, or `owner` may not sign this list.
    """
    ids = b"".join(sorted({id_bytes(node) for node in revoked}))
    chain = [[handover.owner, handover.signature] for handover in handovers]
    payload = pack([FORMAT, manifest.swarm, sequence, chain, ids])
    return open_revocations(owner.public_key + owner.sign(_DOMAIN + payload) + payload, manifest)


def make_handover(owner: Identity, manifest: SwarmManifest, place: int, successor: bytes) -> Handover:
    """Sign the swarm over to the holder of the public key `successor`; `place` counts the handovers before it."""
    return Handover(successor, owner.sign(_handover_text(manifest.swarm, place, successor)))


def open_revocations(data: bytes, manifest: SwarmManifest, check: Verify = verify) -> RevocationList:
    """Verify and decode a list for the swarm of `manifest`; `check` verifies signatures.

    Raises:
        RevocationError: reason "oversized", "malformed", "forged" or "wrong_swarm".
    """
    if len(data) > MAX_REVOCATIONS_BYTES:
        raise RevocationError("oversized", f"{len(data)} bytes")
    if len(data) <= HEADER_BYTES:
        raise RevocationError("malformed", f"{len(data)} bytes")
    public_key, signature, payload = data[:KEY_BYTES], data[KEY_BYTES:HEADER_BYTES], data[HEADER_BYTES:]
    if not check(public_key, signature, _DOMAIN + payload):
        raise RevocationError("forged", "list")
    fields = unpack(payload, 5, error=RevocationError, max_bytes=MAX_REVOKED * NODE_ID_BYTES, max_array=MAX_HANDOVERS)
    form, swarm, sequence, chain, ids = fields
    if form != FORMAT or not is_uint(sequence, (1 << SEQUENCE_BITS) - 1) or not isinstance(chain, list):
        raise RevocationError("malformed", "fields")
    if not isinstance(ids, bytes) or len(ids) % NODE_ID_BYTES or len(chain) > MAX_HANDOVERS:
        raise RevocationError("malformed", "ids")
    if swarm != manifest.swarm:
        raise RevocationError("wrong_swarm", "list")
    handovers = tuple(map(_handover, chain))
    owners = [manifest.founder_key]
    for place, handover in enumerate(handovers):
        if not check(owners[-1], handover.signature, _handover_text(manifest.swarm, place, handover.owner)):
            raise RevocationError("forged", "handover")
        owners.append(handover.owner)
    if public_key != (owners[-2] if handovers and sequence == 0 else owners[-1]):
        raise RevocationError("forged", "signed by another than the swarm's owner")
    return RevocationList(sequence, handovers, ids, data)


def _handover(fields: object) -> Handover:
    if not isinstance(fields, list) or len(fields) < 2:
        raise RevocationError("malformed", "handover")
    owner, signature = fields[:2]
    if not (is_bytes(owner, KEY_BYTES) and is_bytes(signature, SIGNATURE_BYTES)):
        raise RevocationError("malformed", "handover")
    return Handover(owner, signature)


def _handover_text(swarm: bytes, place: int, successor: bytes) -> bytes:
    return _HANDOVER_DOMAIN + swarm + place.to_bytes(4, "big") + successor
