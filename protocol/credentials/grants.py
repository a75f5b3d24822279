"""Who may be in a swarm with an allowlist: grants that the founder signed, and their check.

A grant is part of its holder's record, so every node can check it without asking anybody.

    pass    MessagePack [1, [expiry in ms, signature]]
            the founder's signature over: domain | swarm (16) | node id (20) | expiry (8)
    ticket  MessagePack [2, [invite key (32), uses, expiry in ms, signature, number, signature by the invite key]]
            the founder's signature, the certificate: domain | swarm | invite key | uses (4) | expiry (8)
            the invite key's signature: domain | swarm | number (4) | holder's public key (32)

A pass is for one node. An invite for several holds the invite key's private half and its
certificate; whoever has it writes a ticket with a number below `uses` for the own public key.
Neither is of use under another key. Both end at their expiry, and the membership with them.

A number belongs to the node that was seen with it first. No node sees everything first: when two
use one number in different parts of a swarm, each part keeps its own until the ticket expires.
So N uses admit at most N nodes at any one node, and could admit more in the swarm as a whole.
"""

from dataclasses import dataclass
from typing import Any

from protocol.config import Instant
from protocol.credentials.manifest import Policy, SwarmManifest
from protocol.credentials.records import MAX_GRANT_BYTES, PeerRecord
from protocol.errors import GrantError
from protocol.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, NodeId, Verify, id_bytes, node_id, verify
from protocol.lru import Recent
from protocol.wire.encoding import is_bytes, is_uint, pack, unpack
from protocol.wire.envelope import SWARM_BYTES

REFUSALS = frozenset({"not_admitted", "invite_used", "invite_expired"})  # what a `Gatekeeper` answers
MAX_USES = 4096
MAX_CHECKED = 4096  # grants whose signatures were found good, about 300 bytes each
MAX_NUMBERS = 1 << 16  # used numbers that are remembered: sixteen of the largest invites
MAX_FIELDS = 16  # six of today, and what a newer minor version may append
_PASS, _TICKET = 1, 2
_PASS_DOMAIN = b"gossamer/pass/1\x00"
_INVITE_DOMAIN = b"gossamer/invite/1\x00"
_TICKET_DOMAIN = b"gossamer/ticket/1\x00"


@dataclass(frozen=True, slots=True)
class Pass:
    """Admits one node."""

    expiry_ms: int
    signature: bytes

    def encode(self) -> bytes:
        """Return the grant's bytes."""
        return pack([_PASS, [self.expiry_ms, self.signature]])


@dataclass(frozen=True, slots=True)
class Certificate:
    """The founder's word that the holder of `key`'s private half may admit `uses` nodes."""

    key: bytes
    uses: int
    expiry_ms: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class Ticket:
    """One use of an invite: number `number` of it admits the node that `signature` names."""

    certificate: Certificate
    number: int
    signature: bytes

    def encode(self) -> bytes:
        """Return the grant's bytes."""
        invite = self.certificate
        certified = [invite.key, invite.uses, invite.expiry_ms, invite.signature]
        return pack([_TICKET, [*certified, self.number, self.signature]])


def make_pass(founder: Identity, swarm: bytes, node: NodeId, expiry_ms: int) -> Pass:
    """Sign a pass for `node`; only the founder's signature is of any use."""
    return Pass(expiry_ms, founder.sign(_pass_text(swarm, node, expiry_ms)))


def make_certificate(founder: Identity, swarm: bytes, key: bytes, uses: int, expiry_ms: int) -> Certificate:
    """Certify an invite's public key.

    Raises:
        GrantError: `uses` is not between 1 and `MAX_USES`.
    """
    if not 1 <= uses <= MAX_USES:
        raise GrantError("malformed", f"an invite has 1 to {MAX_USES} uses, not {uses}")
    return Certificate(key, uses, expiry_ms, founder.sign(_certificate_text(swarm, key, uses, expiry_ms)))


def make_ticket(certificate: Certificate, invite: Identity, swarm: bytes, number: int, holder: bytes) -> Ticket:
    """Use `number` of the invite whose key pair is `invite` for the node with the public key `holder`."""
    return Ticket(certificate, number, invite.sign(_ticket_text(swarm, number, holder)))


def open_grant(data: bytes) -> Pass | Ticket:
    """Decode a grant; its signatures are not yet checked.

    Raises:
        GrantError: reason "malformed".
    """
    if len(data) > MAX_GRANT_BYTES:
        raise GrantError("malformed", f"{len(data)} bytes")
    kind, fields = unpack_kind(data)
    if kind == _PASS and len(fields) >= 2:
        expiry_ms, signature = fields[:2]
        if is_uint(expiry_ms) and is_bytes(signature, SIGNATURE_BYTES):
            return Pass(expiry_ms, signature)
    if kind == _TICKET and len(fields) >= 6:
        key, uses, expiry_ms, certified, number, signature = fields[:6]
        certificate = read_certificate(key, uses, expiry_ms, certified)
        if is_uint(number, certificate.uses - 1) and is_bytes(signature, SIGNATURE_BYTES):
            return Ticket(certificate, number, signature)
    raise GrantError("malformed", "grant")


def unpack_kind(data: bytes) -> tuple[object, list[Any]]:
    """Return the kind and the fields of a grant, or of an invite's last part; raise `GrantError` ("malformed")."""
    kind, fields = unpack(data, 2, error=GrantError, max_bytes=SIGNATURE_BYTES, max_array=MAX_FIELDS)
    if not isinstance(fields, list):
        raise GrantError("malformed", "layout")
    return kind, fields


def read_certificate(key: object, uses: object, expiry_ms: object, signature: object) -> Certificate:
    """Check the form of a certificate's fields; raise `GrantError` ("malformed") if one is not right."""
    if not (isinstance(key, bytes) and isinstance(signature, bytes) and isinstance(uses, int)):
        raise GrantError("malformed", "certificate")
    if not (isinstance(expiry_ms, int) and is_uint(expiry_ms) and is_uint(uses, MAX_USES) and uses > 0):
        raise GrantError("malformed", "certificate")
    if len(key) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        raise GrantError("malformed", "certificate")
    return Certificate(key, uses, expiry_ms, signature)


def is_genuine(grant: Pass | Ticket, holder: bytes, manifest: SwarmManifest, check: Verify = verify) -> bool:
    """Tell whether the founder, directly or through an invite, admits the node with the public key `holder`."""
    founder, swarm = manifest.founder_key, manifest.swarm
    if isinstance(grant, Pass):
        return check(founder, grant.signature, _pass_text(swarm, node_id(holder), grant.expiry_ms))
    invite = grant.certificate
    certified = _certificate_text(swarm, invite.key, invite.uses, invite.expiry_ms)
    return check(founder, invite.signature, certified) and check(
        invite.key, grant.signature, _ticket_text(swarm, grant.number, holder)
    )


class Gatekeeper:
    """Decides whose records are admitted to the swarm of `manifest`; no I/O, bounded state.

    `check` verifies signatures.
    """

    def __init__(self, manifest: SwarmManifest, check: Verify = verify) -> None:
        self._manifest = manifest
        self._check = check
        self._genuine: Recent[tuple[bytes, bytes], Pass | Ticket] = Recent(MAX_CHECKED)
        self._holders: Recent[tuple[bytes, int], NodeId] = Recent(MAX_NUMBERS)

    def admits(self, record: PeerRecord, now: Instant) -> str:
        """Return "" or which of `REFUSALS` keeps the node of the verified `record` out."""
        if self._manifest.policy is Policy.OPEN or record.public_key == self._manifest.founder_key:
            return ""
        if record.node_id in self._manifest.allowed:
            return ""
        grant = self._open(record)
        if grant is None:
            return "not_admitted"
        if isinstance(grant, Pass):
            return "" if now.unix * 1000 < grant.expiry_ms else "invite_expired"
        if now.unix * 1000 >= grant.certificate.expiry_ms:
            return "invite_expired"
        use = (grant.certificate.key, grant.number)
        holder = self._holders.get(use) or record.node_id
        if holder != record.node_id:
            return "invite_used"
        self._holders.set(use, holder)
        return ""

    def _open(self, record: PeerRecord) -> Pass | Ticket | None:
        key = (record.public_key, record.grant)
        known = self._genuine.get(key)
        if known is not None:
            return known
        try:
            grant = open_grant(record.grant)
        except GrantError:
            return None
        if not is_genuine(grant, record.public_key, self._manifest, self._check):
            return None
        self._genuine.set(key, grant)
        return grant


def _pass_text(swarm: bytes, node: NodeId, expiry_ms: int) -> bytes:
    return _PASS_DOMAIN + _swarm(swarm) + id_bytes(node) + expiry_ms.to_bytes(8, "big")


def _certificate_text(swarm: bytes, key: bytes, uses: int, expiry_ms: int) -> bytes:
    return _INVITE_DOMAIN + _swarm(swarm) + key + uses.to_bytes(4, "big") + expiry_ms.to_bytes(8, "big")


def _ticket_text(swarm: bytes, number: int, holder: bytes) -> bytes:
    return _TICKET_DOMAIN + _swarm(swarm) + number.to_bytes(4, "big") + holder


def _swarm(swarm: bytes) -> bytes:
    assert len(swarm) == SWARM_BYTES  # fields of fixed sizes: no two meanings for one text
    return swarm
