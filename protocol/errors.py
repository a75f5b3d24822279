"""The errors of the protocol, as types.

Errors that a person can act on carry one clear line. Errors about a peer's bytes
carry a `reason`, the short name under which they are counted.
"""

from collections.abc import Mapping
from types import MappingProxyType


class ProtocolError(Exception):
    """Base of every error that this package raises on purpose."""


class IdentityError(ProtocolError):
    """A key file that cannot be used; the message says what to do."""


class BadAddress(ProtocolError):  # noqa: N818  # reads as what it is: a bad address
    """An address or endpoint that cannot be parsed, bound or dialled."""


class PortInUse(ProtocolError):  # noqa: N818
    """Another process listens on the endpoint that was asked for."""


class NetworkFailed(ProtocolError):  # noqa: N818
    """The network thread ended by an error: this host can do nothing more."""


class PeerError(ProtocolError):
    """Bytes from a peer that break the protocol; `reason` is the name they are counted under."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class EnvelopeError(PeerError):
    """A frame that is no valid envelope: oversized, malformed or forged."""


class RecordError(PeerError):
    """A peer record that is malformed, forged, expired or someone else's."""


class MessageError(PeerError):
    """An authentic envelope whose body is not what its kind says."""


class UnpackError(MessageError):
    """Content that claims to unpack to `size` bytes, and does not."""

    def __init__(self, detail: str, size: int) -> None:
        super().__init__("malformed", detail)
        self.size = size


class ManifestError(PeerError):
    """Bytes that are no valid manifest of a swarm."""


class RevocationError(PeerError):
    """Bytes that are no valid revocation list of a swarm."""


class GrantError(PeerError):
    """Bytes that let nobody into a swarm."""


class OutboxFull(ProtocolError):  # noqa: N818
    """The network thread did not take what was published before, in time: publish it again later."""


class InviteError(ProtocolError):
    """An invite that cannot be read; the message says which part is wrong."""


class JoinError(ProtocolError):
    """A swarm that an invite does not open; the message says why.

    `reason` is what most of those that refused said, or ""; `refusals` is what each said, by its endpoint.
    """

    def __init__(self, message: str, reason: str = "", refusals: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(message)
        self.reason = reason
        self.refusals = refusals
