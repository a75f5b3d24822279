"""What the host needs of a network: links to other keys, frames over them, and events.

A link is one direction of dialling between us and one CURVE key that was proven in the
handshake. Frames on a link arrive in order or the link closes.
"""

from dataclasses import dataclass
from typing import Protocol

from protocol.credentials.records import Address


@dataclass(frozen=True, slots=True)
class Link:
    """A connection with the holder of the CURVE key `key` (32 bytes); `dialled` by us or by them."""

    key: bytes
    dialled: bool


@dataclass(frozen=True, slots=True)
class Opened:
    """A dialled link is up: encrypted, and the other end proved its key."""

    link: Link


@dataclass(frozen=True, slots=True)
class Closed:
    """A link is gone; frames on the way are lost. The transport does not restore it."""

    link: Link


@dataclass(frozen=True, slots=True)
class Arrived:
    """A frame came over a link."""

    link: Link
    frame: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """Something came that never reached a link; counted by `reason`. `link` where its key is known."""

    reason: str
    link: Link | None = None


NetworkEvent = Opened | Closed | Arrived | Refused


class Transport(Protocol):
    """A network as seen from one node. All methods but `wake` belong to one thread."""

    def dial(self, address: Address) -> None:
        """Begin to open a link to `address`; `Opened` follows, or nothing. Dialling twice is dialling once."""
        ...

    def hang_up(self, link: Link) -> None:
        """Close a link, without waiting for what was sent. A link that is not there is no error."""
        ...

    def send(self, link: Link, frame: bytes) -> bool:
        """Queue a frame; False if the link is gone or its queue is full. Never blocks."""
        ...

    def poll(self, timeout: float) -> list[NetworkEvent]:
        """Wait up to `timeout` seconds for something to happen; return a bounded number of events."""
        ...

    def wake(self) -> None:
        """Make a `poll` in progress, or else the next one, return at once. Safe from any thread."""
        ...

    def close(self) -> None:
        """Close every link and socket."""
        ...
