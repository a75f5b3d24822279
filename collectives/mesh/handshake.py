"""How two members begin a connection: a signed Diffie-Hellman exchange, bytes in, bytes out.

The rules, after SIGMA (Krawczyk 2003), with identities in the open:

    initiator                                responder
    HELLO  ------------------------------->
           <-------------------------------  HELLO, PROOF
    PROOF  ------------------------------->

- HELLO (112 bytes, all of one length) says: version, whether to encrypt, what the connection is for,
  the SHA-256 of the group's name, the Ed25519 key, a fresh X25519 key, and the sender's session,
  which tells a process that started again under the same key from the one that was.
- The transcript is SHA-256 over both HELLOs. Keys come from X25519's secret by HKDF-SHA256 (RFC 5869)
  with the transcript as salt: one for each direction's proof, one for each direction's records.
- PROOF (80 bytes) is the signature over (role, transcript), sealed under its direction's key even where
  records will not be. So it shows both that the key's holder is there, and that it knows the secret.
- The role is signed, so nobody's own proof can be sent back to it. The transcript holds both fresh
  keys, so a recorded handshake proves nothing to anybody later.
- Both ends must want the same of encryption. What is refused ends in `HandshakeError`; its `reason` is
  counted, and no byte of an unproven peer is read beyond these lengths.

The record layer after it is AES-256-GCM with a counter for a nonce (NIST SP 800-38D), or nothing at all.
Each direction of each connection has a key of its own, used for this connection only, so counters
never repeat under a key, and a record that is changed, repeated, dropped or moved fails to open.
Buffers are worked on in place of copies: a record is sealed from, and opened to, where it belongs.
"""

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from protocol.errors import PeerError
from protocol.identity import SIGNATURE_BYTES, Identity, NodeId, node_id

TAG_BYTES = 16
KEY_BYTES = 32


class SealError(PeerError):
    """A record that does not open: changed on the way, or not the one whose turn it is."""


class Sealer:
    """One direction's writing end; `overhead` bytes are added to each record."""

    def __init__(self, key: bytes | None) -> None:
        """With `key` None records are sent as they are."""
        self._aead = None if key is None else AESGCM(key)
        self._counter = 0
        self.overhead = 0 if key is None else TAG_BYTES

    def seal(self, plain: bytes | memoryview) -> bytes | memoryview:
        """Return the record of `plain`: `plain` itself where nothing is encrypted."""
        if self._aead is None:
            return plain
        return self._aead.encrypt(self._nonce(), plain, None)

    def seal_into(self, plain: memoryview, record: memoryview) -> None:
        """Write the record of `plain` to `record`, which is `overhead` bytes longer; only of an encrypting end."""
        assert self._aead is not None
        self._aead.encrypt_into(self._nonce(), plain, None, record)

    def _nonce(self) -> bytes:
        nonce = self._counter.to_bytes(12, "big")
        self._counter += 1  # 2^96 records: never again under this key
        return nonce


class Opener:
    """One direction's reading end."""

    def __init__(self, key: bytes | None) -> None:
        self._aead = None if key is None else AESGCM(key)
        self._counter = 0
        self.overhead = 0 if key is None else TAG_BYTES

    def open(self, record: bytes | memoryview) -> bytes:
        """Return what was sealed. Raises `SealError`."""
        if self._aead is None:
            return bytes(record)
        try:
            return self._aead.decrypt(self._nonce(), record, None)
        except (InvalidTag, ValueError):  # ValueError: shorter than a tag
            raise SealError("bad_record") from None

    def open_into(self, record: memoryview, plain: memoryview) -> None:
        """Write what was sealed to `plain`, `overhead` bytes shorter. Raises `SealError`."""
        assert self._aead is not None
        try:
            self._aead.decrypt_into(self._nonce(), record, None, plain)
        except (InvalidTag, ValueError):
            raise SealError("bad_record") from None

    def _nonce(self) -> bytes:
        nonce = self._counter.to_bytes(12, "big")
        self._counter += 1
        return nonce


VERSION = 1
_MAGIC = b"GSMC"
_LAYOUT = struct.Struct("!4sBBBB32s32s32s8s")
HELLO_BYTES = _LAYOUT.size
PROOF_BYTES = SIGNATURE_BYTES + TAG_BYTES
SESSION_BYTES = 8
_PROOF_NONCE = bytes(12)  # each of the two keys seals one message
_INFO = b"gossamer/collectives/1"
_INITIATOR = b"gossamer/collectives/1/initiator"
_RESPONDER = b"gossamer/collectives/1/responder"


class HandshakeError(PeerError):
    """The peer is of another group, another version, or not who it says."""


class Purpose(IntEnum):
    """What a connection is for."""

    CONTROL = 1
    DATA = 2


def group_hash(group: str) -> bytes:
    """Return the 32 bytes that stand for a group's name."""
    return hashlib.sha256(b"gossamer/collectives/group/1\0" + group.encode()).digest()


@dataclass(frozen=True, slots=True)
class Party:
    """What this process brings to every handshake; `group` has 32 bytes, `session` 8 of this process alone."""

    identity: Identity
    group: bytes
    session: bytes
    encrypt: bool


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, proven, and how to speak to it. `leftover` came after the handshake's bytes."""

    member: NodeId
    session: bytes
    purpose: Purpose
    stream: int
    sealer: Sealer
    opener: Opener
    leftover: bytes


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
    ) -> None:
        """`purpose` and `stream` are the initiator's to say; `expected` is who must answer, if that is known."""
        self._party = party
        self._initiator = initiator
        self._purpose = purpose
        self._stream = stream
        self._expected = expected
        self._key = X25519PrivateKey.generate()
        self._buffer = bytearray()
        self._hello = b"" if not initiator else self._make_hello(purpose, stream)
        self._keys: _Keys | None = None
        self._their_key = b""
        self._their_session = b""
        self.peer: Peer | None = None

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

    def _make_hello(self, purpose: Purpose, stream: int) -> bytes:
        party = self._party
        return _LAYOUT.pack(
            _MAGIC,
            VERSION,
            party.encrypt,
            purpose,
            stream,
            party.group,
            party.identity.public_key,
            self._key.public_key().public_bytes_raw(),
            party.session,
        )

    def _read_hello(self, theirs: bytes) -> bytes:
        magic, version, encrypt, purpose, stream, group, public_key, ephemeral, session = _LAYOUT.unpack(theirs)
        self._refuse_unless(magic == _MAGIC, "not_ours")
        self._refuse_unless(version == VERSION, "version")
        self._refuse_unless(group == self._party.group, "group")
        self._refuse_unless(encrypt == self._party.encrypt, "encryption")
        self._refuse_unless(public_key != self._party.identity.public_key, "self")
        self._refuse_unless(self._expected in (None, node_id(public_key)), "other_id")
        self._refuse_unless(purpose in (Purpose.CONTROL, Purpose.DATA), "purpose")
        if self._initiator:
            self._refuse_unless((purpose, stream) == (self._purpose, self._stream), "purpose")
        else:
            self._purpose, self._stream = Purpose(purpose), stream
            self._hello = self._make_hello(self._purpose, stream)
        self._their_key, self._their_session = public_key, session
        hellos = (self._hello, theirs) if self._initiator else (theirs, self._hello)
        self._keys = _derive(self._key, ephemeral, hashlib.sha256(b"".join(hellos)).digest())
        return b"" if self._initiator else self._hello + self._prove()

    def _prove(self) -> bytes:
        assert self._keys is not None
        role, key = (_INITIATOR, self._keys.initiator_proof)
        if not self._initiator:
            role, key = (_RESPONDER, self._keys.responder_proof)
        signature = self._party.identity.sign(role + self._keys.transcript)
        return AESGCM(key).encrypt(_PROOF_NONCE, signature, None)

    def _read_proof(self, proof: bytes) -> bytes:
        keys = self._keys
        assert keys is not None
        role, key = (_RESPONDER, keys.responder_proof) if self._initiator else (_INITIATOR, keys.initiator_proof)
        try:
            signature = AESGCM(key).decrypt(_PROOF_NONCE, proof, None)
        except InvalidTag:
            raise HandshakeError("proof") from None
        self._refuse_unless(
            self._party.identity.verify(self._their_key, signature, role + keys.transcript), "signature"
        )
        answer = self._prove() if self._initiator else b""
        outgoing, incoming = keys.initiator_records, keys.responder_records
        if not self._initiator:
            outgoing, incoming = incoming, outgoing
        encrypt = self._party.encrypt
        self.peer = Peer(
            node_id(self._their_key),
            self._their_session,
            self._purpose,
            self._stream,
            Sealer(outgoing if encrypt else None),
            Opener(incoming if encrypt else None),
            bytes(self._buffer),
        )
        return answer

    @staticmethod
    def _refuse_unless(good: bool, reason: str) -> None:
        if not good:
            raise HandshakeError(reason)


@dataclass(frozen=True, slots=True)
class _Keys:
    transcript: bytes
    initiator_proof: bytes
    responder_proof: bytes
    initiator_records: bytes
    responder_records: bytes


def _derive(own: X25519PrivateKey, theirs: bytes, transcript: bytes) -> _Keys:
    try:
        secret = own.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError:  # a point of small order: the secret would be everybody's
        raise HandshakeError("ephemeral") from None
    stream = HKDF(hashes.SHA256(), 4 * KEY_BYTES, salt=transcript, info=_INFO).derive(secret)
    return _Keys(transcript, *(stream[i : i + KEY_BYTES] for i in range(0, 4 * KEY_BYTES, KEY_BYTES)))
