"""What the mesh tells its driver."""

from dataclasses import dataclass

from protocol.identity import NodeId


@dataclass(frozen=True, slots=True)
class Linked:
    """There is a way to `member`, which says that it listens at `address`."""

    member: NodeId
    address: str


@dataclass(frozen=True, slots=True)
class Unlinked:
    """The last connection to `member` broke, or its process is another now."""

    member: NodeId


@dataclass(frozen=True, slots=True)
class Arrived:
    """A frame from `member`."""

    member: NodeId
    body: bytes


MeshEvent = Linked | Unlinked | Arrived
