"""How two members begin a connection: a signed Diffie-Hellman exchange (SIGMA-R), bytes in, bytes out.

The rules, after SIGMA-R (Krawczyk 2003, section 5.2), with what the group knows mixed into the keys:

    initiator                                responder
    HELLO  ------------------------------->
           <-------------------------------  HELLO
    PROOF  ------------------------------->
           <-------------------------------  PROOF

- HELLO (40 bytes, all of one length) says: version, the records' protection, whether the kernel vouches
  for this end's socket, what the connection is for, and a fresh X25519 key. Nothing in it
  tells which group it is, or who speaks.
- Keys come from X25519's secret and the group's key by HKDF-SHA256 (RFC 5869), with the SHA-256 of both
  HELLOs as salt: one for each direction's proof, one for each direction's records. The group's key is
  made from its name and its secret, if it has one (`group_key`), and never leaves the process.
- PROOF (120 bytes) is the sender's Ed25519 key, its session, which tells a process that started again
  under the same key from the one that was, and its signature over (role, transcript, key, session), all
  sealed under its direction's key, even where records will not be encrypted. So it shows that the key's
  holder is there, that it knows the group, and that it knows this connection's secret.
- The role is signed, so nobody's own proof can be sent back to it. The transcript holds both fresh keys,
  and the responder's also the initiator's PROOF, so a recorded handshake proves nothing to anybody later.
- Each end asks `may_join` about who the other has proven to be: the responder before it proves anything
  itself. Both ends must want the same protection. The payload of data streams is neither encrypted nor has
  it a tag where both want it unauthenticated, or where the kernel vouches at both ends: on a Unix socket
  between processes of one user. It does not leave the machine, and whoever could read or change it there
  could as well read or change the processes' memory. What is refused
  ends in `HandshakeError`; its `reason` is counted, and no byte of an unproven peer is read beyond these lengths.

Others learn little: one who listens, nothing but that two processes speak this. One who dials a member learns neither
who it is nor whether a guess at the group's name and secret was right, except by being let in: one guess a connection.
One whom a member dials has the member's PROOF to test guesses against, as many as it can compute, and a right one shows
it who dialled. So a secret is drawn at random, 16 bytes or more, not chosen to be remembered; a password would need a
PAKE, which this is not.
"""

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from collectives.mesh.sealing import KEY_BYTES, TAG_BYTES, Opener, Sealer
from collectives.types import Protection
from protocol.errors import PeerError
from protocol.identity import KEY_BYTES as IDENTITY_BYTES
from protocol.identity import SIGNATURE_BYTES, Identity, NodeId, node_id

VERSION = 5
SESSION_BYTES = 8
_MAGIC = b"GSMC"
_HELLO = struct.Struct("!4sBBBB32s")
_PROOF = struct.Struct(f"!{IDENTITY_BYTES}s{SESSION_BYTES}s{SIGNATURE_BYTES}s")
HELLO_BYTES = _HELLO.size
PROOF_BYTES = _PROOF.size + TAG_BYTES
_VOUCHED = 2  # a flag of a HELLO, beside that of the protection
_FLAGS = {Protection.AUTHENTICATED: 0, Protection.ENCRYPTED: 1, Protection.UNAUTHENTICATED: 4}
_PROOF_NONCE = bytes(12)  # each of the two keys seals one message
_INFO = b"gossamer/collectives/2"
_INITIATOR = b"gossamer/collectives/2/initiator"
_RESPONDER = b"gossamer/collectives/2/responder"


class HandshakeError(PeerError):
    """The peer is of another group, another version, not who it says, or one that may not join."""


class Purpose(IntEnum):
    """The purpose of a connection."""

    CONTROL = 1
    DATA = 2


def group_key(group: str, secret: bytes | None = None) -> bytes:
    """Return the 32 bytes that follow from the group's name, and from its secret if it has one."""
    name = group.encode()
    known = [b"gossamer/collectives/group/2", name, *([secret] if secret is not None else [])]
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in known)).digest()


def group_id(key: bytes) -> bytes:
    """Return the 32 bytes that name the group with this key among those who are in it."""
    return hashlib.sha256(b"gossamer/collectives/group/2/id" + key).digest()


def anybody(_: NodeId) -> bool:
    """Admits everybody: the rule of a group with a secret, and of one machine."""
    return True


@dataclass(frozen=True, slots=True)
class Party:
    """What this process brings to every handshake; `session` is 8 bytes of this process alone.

    `may_join` tells whether the holder of a key may be in the group. It is asked once in each handshake,
    about an id that is proven, and must be quick.
    """

    identity: Identity
    group_key: bytes
    session: bytes
    protection: Protection
    may_join: Callable[[NodeId], bool] = anybody


@dataclass(frozen=True, slots=True)
class ProvenPeer:
    """The proven member at the other end, and how to speak to it. `leftover` came after the handshake's bytes.

    `bare`: a data stream's payload travels without a tag.
    """

    member: NodeId
    session: bytes
    purpose: Purpose
    stream: int
    sealer: Sealer
    opener: Opener
    leftover: bytes
    bare: bool = False


class Handshake:
    """One connection's beginning. Send what `start` and `feed` return; `peer` is set when it is over."""

    def __init__(
        self,
        party: Party,
        *,
        initiator: bool,
        purpose: Purpose = Purpose.CONTROL,
        stream: int = 0,
        expected: NodeId | None = None,
        vouched: bool = False,
    ) -> None:
        """Prepare one end.

        `purpose` and `stream` are the initiator's to say; `expected` is who must answer, if that is known;
        `vouched` says that the kernel lets nobody but processes of this user at either end's socket.
        """
        self._party = party
        self._initiator = initiator
        self._purpose = purpose
        self._stream = stream
        self._expected = expected
        self._vouched = vouched
        self._bare = False
        self._ephemeral: X25519PrivateKey | None = None  # made when it is needed: a connection that is idle costs none
        self._hello = self._make_hello() if initiator else b""
        self._buffer = bytearray()
        self._keys: _Keys | None = None
        self._transcript = b""
        self.peer: ProvenPeer | None = None

    def start(self) -> bytes:
        """Return what to send before anything has come."""
        return self._hello

    def feed(self, data: bytes) -> bytes:
        """Take bytes that came, and return bytes to send.

        Raises:
            HandshakeError: end the connection, and send nothing more.
        """
        self._buffer += data
        answer = b""
        if self._keys is None:
            if len(self._buffer) < HELLO_BYTES:
                self._check_beginning()
                return b""
            answer = self._read_hello(self._take(HELLO_BYTES))
        if self.peer is None and len(self._buffer) >= PROOF_BYTES:
            answer += self._read_proof(self._take(PROOF_BYTES))
        return answer

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _check_beginning(self) -> None:
        """A stranger that speaks something else is told apart by its first bytes, not by the clock."""
        if not _MAGIC.startswith(self._buffer[: len(_MAGIC)]):
            raise HandshakeError("not_ours")

    def _make_hello(self) -> bytes:
        self._ephemeral = X25519PrivateKey.generate()
        public = self._ephemeral.public_key().public_bytes_raw()
        flags = _FLAGS[self._party.protection] | (_VOUCHED if self._vouched else 0)
        return _HELLO.pack(_MAGIC, VERSION, flags, self._purpose, self._stream, public)

    def _read_hello(self, theirs: bytes) -> bytes:
        magic, version, flags, purpose, stream, public = _HELLO.unpack(theirs)
        _refuse_unless(magic == _MAGIC, "not_ours")
        _refuse_unless(version == VERSION, "version")
        protection = self._party.protection
        _refuse_unless(flags & ~_VOUCHED == _FLAGS[protection], "protection")
        vouched = self._vouched and bool(flags & _VOUCHED)
        self._bare = vouched or protection is Protection.UNAUTHENTICATED
        _refuse_unless(purpose in (Purpose.CONTROL, Purpose.DATA), "purpose")
        if self._initiator:
            _refuse_unless((purpose, stream) == (self._purpose, self._stream), "purpose")
        else:
            self._purpose, self._stream = Purpose(purpose), stream
            self._hello = self._make_hello()
        assert self._ephemeral is not None
        hellos = (self._hello, theirs) if self._initiator else (theirs, self._hello)
        self._transcript = hashlib.sha256(b"".join(hellos)).digest()
        self._keys = _derive(self._ephemeral, public, self._party.group_key, self._transcript)
        return self._prove(self._keys) if self._initiator else self._hello

    def _prove(self, keys: "_Keys") -> bytes:
        """Return this end's PROOF, which the transcript holds from then on."""
        identity, session = self._party.identity, self._party.session
        role, key = (_INITIATOR, keys.initiator_proof) if self._initiator else (_RESPONDER, keys.responder_proof)
        signature = identity.sign(role + self._transcript + identity.public_key + session)
        proof = AESGCM(key).encrypt(_PROOF_NONCE, _PROOF.pack(identity.public_key, session, signature), None)
        self._transcript = hashlib.sha256(self._transcript + proof).digest()
        return proof

    def _read_proof(self, proof: bytes) -> bytes:
        """Check the other end's PROOF; return this end's, if it is still to be sent."""
        keys, party = self._keys, self._party
        assert keys is not None
        role, key = (_RESPONDER, keys.responder_proof) if self._initiator else (_INITIATOR, keys.initiator_proof)
        try:
            public_key, session, signature = _PROOF.unpack(AESGCM(key).decrypt(_PROOF_NONCE, proof, None))
        except InvalidTag:
            raise HandshakeError("group_or_secret") from None
        signed = role + self._transcript + public_key + session
        member = node_id(public_key)
        _refuse_unless(public_key != party.identity.public_key, "self")
        _refuse_unless(self._expected in (None, member), "other_id")
        _refuse_unless(party.identity.verify(public_key, signature, signed), "signature")
        _refuse_unless(party.may_join(member), "may_not_join")
        self._transcript = hashlib.sha256(self._transcript + proof).digest()
        answer = b"" if self._initiator else self._prove(keys)
        encrypts = party.protection is Protection.ENCRYPTED
        outgoing, incoming = keys.initiator_records, keys.responder_records
        if not self._initiator:
            outgoing, incoming = incoming, outgoing
        self.peer = ProvenPeer(
            member,
            session,
            self._purpose,
            self._stream,
            Sealer(outgoing, encrypts=encrypts),
            Opener(incoming, encrypts=encrypts),
            bytes(self._buffer),
            self._bare,
        )
        return answer


def _refuse_unless(good: bool, reason: str) -> None:
    if not good:
        raise HandshakeError(reason)


@dataclass(frozen=True, slots=True)
class _Keys:
    initiator_proof: bytes
    responder_proof: bytes
    initiator_records: bytes
    responder_records: bytes


def _derive(own: X25519PrivateKey, theirs: bytes, group: bytes, transcript: bytes) -> _Keys:
    try:
        secret = own.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError:  # a point of small order: the secret would be everybody's
        raise HandshakeError("ephemeral") from None
    stream = HKDF(hashes.SHA256(), 4 * KEY_BYTES, salt=transcript, info=_INFO).derive(secret + group)
    return _Keys(*(stream[i : i + KEY_BYTES] for i in range(0, 4 * KEY_BYTES, KEY_BYTES)))
