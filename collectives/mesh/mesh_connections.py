"""What a mesh knows of each connection, and of each member that it is linked with."""

from dataclasses import dataclass, field
from typing import Any

from collectives.mesh.addresses import Address
from collectives.mesh.connection import Channel
from protocol.identity import NodeId


@dataclass(slots=True, eq=False)
class Connection:
    """One that is being made, or a control connection."""

    channel: Channel
    proven_by: float
    wanted: Address | None = None  # what was dialled; None of inbound ones
    others: list[Any] = field(default_factory=list)  # further addresses of the same name
    where: Any = None  # the (family, socket address) dialled
    stream_of: NodeId | None = None  # of an own data connection
    stream: int = 0
    introduced: bool = False

    @property
    def inbound(self) -> bool:
        """Tell whether somebody dialled us."""
        return self.wanted is None and self.stream_of is None


@dataclass(slots=True)
class Link:
    """The ways to one member's process."""

    session: bytes
    address: str
    channels: list[Connection]
    dialled: Any = None
    is_local: bool = True  # until no Unix socket of its was found
    dialling: set[int] = field(default_factory=set)  # streams whose handshakes are under way
