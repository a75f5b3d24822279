"""The record layer: AES-256-GCM with a counter for a nonce (NIST SP 800-38D), or nothing at all.

Each direction of each connection has a key of its own, used for this connection only, so counters
never repeat under a key, and a record that is changed, repeated, dropped or moved fails to open.
Buffers are worked on in place of copies: a record is sealed from, and opened to, where it belongs.
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from protocol.errors import PeerError

TAG_BYTES = 16
KEY_BYTES = 32


class RecordError(PeerError):
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
        """Return what was sealed. Raises `RecordError`."""
        if self._aead is None:
            return bytes(record)
        try:
            return self._aead.decrypt(self._nonce(), record, None)
        except (InvalidTag, ValueError):  # ValueError: shorter than a tag
            raise RecordError("bad_record") from None

    def open_into(self, record: memoryview, plain: memoryview) -> None:
        """Write what was sealed to `plain`, `overhead` bytes shorter. Raises `RecordError`."""
        assert self._aead is not None
        try:
            self._aead.decrypt_into(self._nonce(), record, None, plain)
        except (InvalidTag, ValueError):
            raise RecordError("bad_record") from None

    def _nonce(self) -> bytes:
        nonce = self._counter.to_bytes(12, "big")
        self._counter += 1
        return nonce
