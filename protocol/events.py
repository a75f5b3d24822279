"""What membership is told and what it asks for; links' `Opened` and `Closed` come from the transport."""

from dataclasses import dataclass

from protocol.credentials.records import Address, Endpoint, Service
from protocol.identity import NodeId
from protocol.transport import Closed, Link, Opened
from protocol.wire.envelope import Kind


@dataclass(frozen=True, slots=True)
class Message:
    """An authentic control message that came over `link`, signed by `sender`."""

    link: Link
    sender: NodeId
    kind: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Expel:
    """The node is no longer welcome: drop it and do not dial it for a while."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Moved:
    """Where we and what else we run can be dialled is different now."""

    endpoints: tuple[Endpoint, ...]
    services: tuple[Service, ...] = ()


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Dial:
    """Open a link."""

    address: Address


@dataclass(frozen=True, slots=True)
class HangUp:
    """Close a link."""

    link: Link


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a control message over a link."""

    link: Link
    kind: Kind
    body: bytes


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A peer can be talked to; again if it is a new connection or a restart, and it may have missed things."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class PeerDown:
    """A peer is gone for now."""

    node: NodeId


MembershipEvent = Opened | Closed | Message | Expel | Moved | Tick
MembershipAction = Dial | HangUp | Tell | PeerUp | PeerDown
