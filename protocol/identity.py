"""A node's identity: one Ed25519 key (RFC 8032), and what follows from it.

    seed (32 bytes) -> Ed25519 key pair -> node id: base32 of SHA-256(public key)[:20]
                    -> HKDF-SHA256 (RFC 5869) -> X25519 key pair for CURVE

The CURVE key is derived, so one file holds all that a node must keep. Others cannot check that the two public keys
belong together; a signed `PeerRecord` states it.
"""

import base64
import hashlib
import os
import shlex
import stat
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NewType

import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from nacl.bindings import crypto_sign_open
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey

from protocol.errors import IdentityError
from protocol.storage import write_atomically

NodeId = NewType("NodeId", str)
Verify = Callable[[bytes, bytes, bytes], bool]  # (public key, signature, message) -> is it good?

KEY_BYTES = 32
SIGNATURE_BYTES = 64
NODE_ID_BYTES = 20  # 160 bits: no second key for an id in 2^160 tries; 32 characters to read
MAX_KEY_FILE_BYTES = 4096
_CURVE_INFO = b"gossamer/curve/1"

log = structlog.get_logger()


def id_bytes(node: NodeId) -> bytes:
    """Return the 20 bytes of a node id."""
    return base64.b32decode(node.upper())


def id_of_bytes(data: bytes) -> NodeId:
    """Return the node id of these 20 bytes."""
    return NodeId(base64.b32encode(data).decode().lower())


@lru_cache(maxsize=1 << 14)  # asked for every frame and record; a simulated swarm has ten thousand keys
def node_id(public_key: bytes) -> NodeId:
    """Return the id of the node that holds the Ed25519 `public_key` (32 bytes)."""
    return id_of_bytes(hashlib.sha256(public_key).digest()[:NODE_ID_BYTES])


def verify(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Tell whether `signature` (64 bytes) over `message` was made by the key's holder.

    libsodium takes three fifths of OpenSSL's time. It also refuses keys of small order, with which anybody can sign.
    """
    if len(public_key) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:  # the library checks neither
        return False
    try:
        crypto_sign_open(signature + message, public_key)
    except BadSignatureError:
        return False
    return True


class Identity:
    """A node's private key: it signs, and it derives the keys of the encrypted transport.

    `verify` checks others' signatures. A simulated identity replaces `sign` and `verify` by cheaper ones.
    """

    verify: Verify = staticmethod(verify)

    def __init__(self, seed: bytes) -> None:
        if len(seed) != KEY_BYTES:
            raise IdentityError(f"an identity seed has {KEY_BYTES} bytes, got {len(seed)}")
        self._key = SigningKey(seed)
        self.public_key: bytes = self._key.verify_key.encode()
        self.node_id: NodeId = node_id(self.public_key)
        secret = HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=_CURVE_INFO).derive(seed)
        self.curve_secret: bytes = secret
        self.curve_key: bytes = X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"Identity({self.node_id})"  # never the seed

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte Ed25519 signature over `message`."""
        return self._key.sign(message).signature

    @classmethod
    def generate(cls) -> "Identity":
        """Make a new identity from the system's random source."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    def export(self) -> str:
        """Return the private key as PEM text (PKCS #8, not encrypted). Anybody who has it can act as this node."""
        key = Ed25519PrivateKey.from_private_bytes(self._key.encode())
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()

    @classmethod
    def import_(cls, text: str) -> "Identity":
        """Read what `export` wrote.

        Raises:
            IdentityError: the text is no unencrypted Ed25519 private key in PEM.
        """
        try:
            key = load_pem_private_key(text.encode(), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: the PEM is encrypted
            raise IdentityError("not an Ed25519 private key in unencrypted PEM: export it again") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise IdentityError("the private key is not of type Ed25519: export the key of a gossamer node")
        return cls(key.private_bytes_raw())

    def save(self, path: Path) -> None:
        """Write the key to `path`, atomically and readable by its owner only.

        Raises:
            IdentityError: the file cannot be written.
        """
        try:
            write_atomically(path, self.export().encode(), mode=0o600)
        except OSError as error:
            raise IdentityError(f"cannot write the key file {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> "Identity":
        """Read the key file at `path`.

        One that only the owner's group can read becomes its owner's alone again: a Kubernetes volume with an `fsGroup`
        gives every file to that group, each time it is mounted.

        Raises:
            IdentityError: no such file, others may read it, or it holds no key.
        """
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                mode = stat.S_IMODE(found.st_mode)
                if mode & 0o070 and not mode & 0o007 and found.st_uid == os.geteuid():
                    os.fchmod(file.fileno(), mode := 0o600)
                    log.warning("the key file was open to its group, and is its owner's alone again", path=str(path))
                data = file.read(MAX_KEY_FILE_BYTES + 1)
        except FileNotFoundError:
            raise IdentityError(f"no key file {path}: check the path, or let the node make one") from None
        except OSError as error:
            raise IdentityError(f"cannot read the key file {path}: {error.strerror}") from None
        if mode & 0o077:
            run = f"chmod 600 {shlex.quote(str(path))}"
            raise IdentityError(f"others can read the key file {path} (mode {mode:03o}): run `{run}`")
        if len(data) > MAX_KEY_FILE_BYTES:
            raise IdentityError(f"{path} is too large to be a key file: check the path")
        try:
            return cls.import_(data.decode("ascii"))
        except (UnicodeDecodeError, IdentityError):
            raise IdentityError(
                f"{path} holds no Ed25519 private key: restore it, or delete it to get a new one"
            ) from None

    @classmethod
    def load_or_generate(cls, path: Path) -> "Identity":
        """Read the key file at `path`; when there is none, make a key and save it there.

        Raises:
            IdentityError: as `load` and `save`.
        """
        if path.exists():
            return cls.load(path)
        identity = cls.generate()
        identity.save(path)
        return identity
