"""What gossip is told and what it asks for; peers come and go by membership's `PeerUp` and `PeerDown`."""

from dataclasses import dataclass

from protocol.envelope import ItemId
from protocol.events import PeerDown, PeerUp, Tick
from protocol.identity import NodeId


@dataclass(frozen=True, slots=True)
class Item:
    """A verified item: who signed it, the unix time they gave, and its frame."""

    id: ItemId
    signer: NodeId
    time: float
    frame: bytes


@dataclass(frozen=True, slots=True)
class Publish:
    """We made an item."""

    item: Item


@dataclass(frozen=True, slots=True)
class Got:
    """A peer sent an item."""

    node: NodeId
    item: Item


@dataclass(frozen=True, slots=True)
class Announced:
    """A peer says what it holds: ids and frame sizes."""

    node: NodeId
    items: tuple[tuple[ItemId, int], ...]


@dataclass(frozen=True, slots=True)
class Pulled:
    """A peer asks for items."""

    node: NodeId
    ids: tuple[ItemId, ...]


@dataclass(frozen=True, slots=True)
class NotSent:
    """These items, or their announcement, could not be sent to the peer."""

    node: NodeId
    ids: tuple[ItemId, ...]


@dataclass(frozen=True, slots=True)
class Discard:
    """The node found the item worthless: do not pass it on any more."""

    id: ItemId


@dataclass(frozen=True, slots=True)
class Deliver:
    """A new item for the node."""

    item: Item


@dataclass(frozen=True, slots=True)
class SendItem:
    """Send an item's frame to a peer."""

    node: NodeId
    id: ItemId
    frame: bytes


@dataclass(frozen=True, slots=True)
class SendAnnounce:
    """Tell a peer what we hold."""

    node: NodeId
    items: tuple[tuple[ItemId, int], ...]


@dataclass(frozen=True, slots=True)
class SendPull:
    """Ask a peer for items."""

    node: NodeId
    ids: tuple[ItemId, ...]


GossipEvent = PeerUp | PeerDown | Publish | Got | Announced | Pulled | NotSent | Discard | Tick
GossipAction = Deliver | SendItem | SendAnnounce | SendPull
