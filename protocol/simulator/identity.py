"""Keys without cryptography, so that ten thousand nodes fit a processor."""

import hashlib

from protocol.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, Verify, node_id


def _verify(public_key: bytes, signature: bytes, message: bytes) -> bool:
    return signature == _sign(public_key, message)


def _sign(public_key: bytes, message: bytes) -> bytes:
    return hashlib.blake2b(message, digest_size=SIGNATURE_BYTES, key=public_key).digest()


class SimulatedIdentity(Identity):
    """Signs with a hash that is keyed by the *public* key: whoever knows a node can forge its signature.

    Simulated attackers do not, but for those that try with a wrong signature. Everything
    else about an identity, its sizes included, is as for a real one.
    """

    verify: Verify = staticmethod(_verify)

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self.public_key = hashlib.blake2b(seed, digest_size=KEY_BYTES, person=b"public").digest()
        self.node_id = node_id(self.public_key)
        self.curve_secret = hashlib.blake2b(seed, digest_size=KEY_BYTES, person=b"curve secret").digest()
        self.curve_key = hashlib.blake2b(self.curve_secret, digest_size=KEY_BYTES, person=b"curve").digest()

    def sign(self, message: bytes) -> bytes:
        """Return 64 bytes that `verify` accepts."""
        return _sign(self.public_key, message)
