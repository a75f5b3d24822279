"""Membership of a swarm with an allowlist: grants that an owner signed, and their check.

The owners are the founder and those to whom the swarm was handed over (see `revocations`). A grant is part of its
holder's record, so every node can check it without asking anybody.

    pass    MessagePack [1, [expiry in ms, signature]]
            the owner's signature over: domain | swarm (16) | node id (20) | expiry (8)
    ticket  MessagePack [2, [invite key (32), uses, expiry in ms, signature, signature by the invite key]]
            the owner's signature, the certificate: domain | swarm | invite key | uses (4) | expiry (8)
            the invite key's signature: domain | swarm | holder's public key (32)

A pass is for one node. An invite for several nodes holds the invite key's private half and its certificate. A node that
has the invite writes a ticket for its own public key. Neither is of use under another key. The membership ends when the
pass or ticket expires.

An invite for N nodes admits the first N that show a ticket of it. Each node counts for itself, from its start: those
that it hears of, among them those of its peers file. So N uses admit at most N nodes at any one node between two
restarts; in the swarm as a whole they could admit more.
"""

from dataclasses import dataclass
from typing import Any

from protocol.config import Gate, Instant
from protocol.credentials.manifest import JoinPolicy, SwarmManifest
from protocol.credentials.records import MAX_GRANT_BYTES, PeerRecord
from protocol.credentials.revocations import RevocationList, open_revocations
from protocol.errors import GrantError
from protocol.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, NodeId, Verify, id_bytes, node_id, verify
from protocol.lru import Recent
from protocol.wire.encoding import is_bytes, is_uint, pack, unpack
from protocol.wire.envelope import SWARM_BYTES

# Why a `Gatekeeper` refuses a node. `too_many_uses`: more uses are in force than it can remember.
REFUSALS = frozenset({"not_admitted", "invite_used", "invite_expired", "too_many_uses", "revoked", "invite_revoked"})
MAX_USES = 4096
MAX_CHECKED = 4096  # grants whose signatures were found good, about 300 bytes each
MAX_HOLDERS = 1 << 16  # of all invites that are remembered: those of sixteen of the largest
MAX_FIELDS = 16  # five today; a newer minor version may append some
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
    """An owner's word that the holder of `key`'s private half may admit `uses` nodes."""

    key: bytes
    uses: int
    expiry_ms: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class Ticket:
    """One use of an invite: it admits the node that `signature`, by the invite's key, names."""

    certificate: Certificate
    signature: bytes

    def encode(self) -> bytes:
        """Return the grant's bytes."""
        invite = self.certificate
        certified = [invite.key, invite.uses, invite.expiry_ms, invite.signature]
        return pack([_TICKET, [*certified, self.signature]])


def make_pass(founder: Identity, swarm: bytes, node: NodeId, expiry_ms: int) -> Pass:
    """Sign a pass for `node`. `founder` is an owner of the swarm: no other signature counts."""
    return Pass(expiry_ms, founder.sign(_pass_text(swarm, node, expiry_ms)))


def make_certificate(founder: Identity, swarm: bytes, key: bytes, uses: int, expiry_ms: int) -> Certificate:
    """Certify an invite's public key.

    Raises:
        GrantError: `uses` is not between 1 and `MAX_USES`.
    """
    if not 1 <= uses <= MAX_USES:
        raise GrantError("malformed", f"an invite has 1 to {MAX_USES} uses, not {uses}")
    return Certificate(key, uses, expiry_ms, founder.sign(_certificate_text(swarm, key, uses, expiry_ms)))


def make_ticket(certificate: Certificate, invite: Identity, swarm: bytes, holder: bytes) -> Ticket:
    """Use the invite whose key pair is `invite` for the node with the public key `holder`."""
    return Ticket(certificate, invite.sign(_ticket_text(swarm, holder)))


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
    if kind == _TICKET and len(fields) >= 5:
        *certified, signature = fields[:5]
        if is_bytes(signature, SIGNATURE_BYTES):
            return Ticket(read_certificate(*certified), signature)
    raise GrantError("malformed", "grant")


def grant_expiry(data: bytes) -> float | None:
    """Return when a grant ends, in Unix seconds; None if `data` is no grant."""
    try:
        grant = open_grant(data)
    except GrantError:
        return None
    return (grant.expiry_ms if isinstance(grant, Pass) else grant.certificate.expiry_ms) / 1000


def unpack_kind(data: bytes) -> tuple[object, list[Any]]:
    """Return the kind and the fields of a grant, or of an invite's last part; raise `GrantError` ("malformed")."""
    kind, fields = unpack(data, 2, error=GrantError, max_bytes=SIGNATURE_BYTES, max_array=MAX_FIELDS)
    if not is_uint(kind) or not isinstance(fields, list):  # True is equal to 1
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


def is_genuine(grant: Pass | Ticket, holder: bytes, owner: bytes, swarm: bytes, check: Verify = verify) -> bool:
    """Tell whether the owner with the key `owner` admits the node with the key `holder`, directly or by an invite."""
    if isinstance(grant, Pass):
        return check(owner, grant.signature, _pass_text(swarm, node_id(holder), grant.expiry_ms))
    invite = grant.certificate
    certified = _certificate_text(swarm, invite.key, invite.uses, invite.expiry_ms)
    return check(owner, invite.signature, certified) and check(invite.key, grant.signature, _ticket_text(swarm, holder))


def revocable_id(grant: Pass | Ticket | Certificate) -> NodeId:
    """Return the id by which a revocation list takes back a pass, or an invite with all its tickets."""
    match grant:
        case Pass():
            return node_id(grant.signature)
        case Ticket():
            return node_id(grant.certificate.key)
        case Certificate():
            return node_id(grant.key)


class Gatekeeper(Gate):
    """Decides whose records are admitted to the swarm of `manifest`; no I/O, bounded state.

    `check` verifies signatures.
    """

    is_owned = True

    def __init__(self, manifest: SwarmManifest, *, check: Verify = verify) -> None:
        self._manifest = manifest
        self._check = check
        self._list: RevocationList | None = None
        self._genuine: Recent[tuple[bytes, bytes], tuple[Pass | Ticket, bytes]] = Recent(MAX_CHECKED)  # and who signed
        self._holders: dict[Certificate, set[NodeId]] = {}  # of tickets of each invite

    def admits(self, record: PeerRecord, now: Instant) -> str:
        """Return "" if the node of a verified record is admitted, else one of `REFUSALS`."""
        if self.is_revoked(record.node_id):
            return "revoked"
        if self._manifest.policy is JoinPolicy.OPEN or record.public_key in self.owners:
            return ""
        if record.node_id in self._manifest.allowed:
            return ""
        opened = self._open(record)
        if opened is None:
            return "not_admitted"
        grant, owner = opened
        if self.is_revoked(revocable_id(grant)) or self.is_revoked(node_id(owner)):
            return "invite_revoked"
        if isinstance(grant, Pass):
            return "" if now.unix * 1000 < grant.expiry_ms else "invite_expired"
        if now.unix * 1000 >= grant.certificate.expiry_ms:
            return "invite_expired"
        return self._use(grant.certificate, record.node_id, now)

    @property
    def owners(self) -> tuple[bytes, ...]:
        """The public keys that may sign grants: the founder's, then those of later owners, the newest last."""
        handovers = self._list.handovers if self._list else ()
        return (self._manifest.founder_key, *(handover.owner for handover in handovers))

    def obey(self, encoded: bytes) -> bool:
        """Take in a revocation list; False if it is not newer than the one that is obeyed.

        Raises:
            RevocationError: as `open_revocations`.
        """
        if encoded == self.revocations:
            return False
        opened = open_revocations(encoded, self._manifest, self._check)
        if not opened.replaces(self._list):
            return False
        self._list, self.revision, self.revocations = opened, opened.revision, opened.encoded
        return True

    def is_revoked(self, node: NodeId) -> bool:
        """Tell whether the list revokes this id, so that what its key signs does not count."""
        return self._list is not None and node in self._list.revoked

    def _use(self, invite: Certificate, holder: NodeId, now: Instant) -> str:
        holders = self._holders.get(invite, set())
        if holder in holders:
            return ""
        if len(holders) >= invite.uses:
            return "invite_used"
        if sum(map(len, self._holders.values())) >= MAX_HOLDERS:
            limit = now.unix * 1000  # only now: a clock that was ahead for a while makes no used invite good again
            self._holders = {known: of for known, of in self._holders.items() if known.expiry_ms > limit}
        if sum(map(len, self._holders.values())) >= MAX_HOLDERS:
            return "too_many_uses"
        self._holders.setdefault(invite, set()).add(holder)
        return ""

    def _open(self, record: PeerRecord) -> tuple[Pass | Ticket, bytes] | None:
        """Return the record's grant and the public key of the owner who signed it."""
        key = (record.public_key, record.grant)
        known = self._genuine.get(key)
        if known is not None:
            return known
        try:
            grant = open_grant(record.grant)
        except GrantError:
            return None
        for owner in reversed(self.owners):
            if is_genuine(grant, record.public_key, owner, self._manifest.swarm, self._check):
                self._genuine.set(key, (grant, owner))
                return grant, owner
        return None


def _pass_text(swarm: bytes, node: NodeId, expiry_ms: int) -> bytes:
    return _PASS_DOMAIN + _swarm(swarm) + id_bytes(node) + expiry_ms.to_bytes(8, "big")


def _certificate_text(swarm: bytes, key: bytes, uses: int, expiry_ms: int) -> bytes:
    return _INVITE_DOMAIN + _swarm(swarm) + key + uses.to_bytes(4, "big") + expiry_ms.to_bytes(8, "big")


def _ticket_text(swarm: bytes, holder: bytes) -> bytes:
    return _TICKET_DOMAIN + _swarm(swarm) + holder


def _swarm(swarm: bytes) -> bytes:
    assert len(swarm) == SWARM_BYTES  # fields of fixed sizes: no two meanings for one text
    return swarm
