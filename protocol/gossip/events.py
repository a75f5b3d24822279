"""What gossip is told and what it asks for; peers come and go by membership's `PeerUp` and `PeerDown`."""

from dataclasses import dataclass

from protocol.events import PeerDown, PeerUp, Tick
from protocol.gossip.subscriptions import hint
from protocol.identity import NodeId
from protocol.wire.envelope import ItemId
from protocol.wire.messages import Entry, Interest


@dataclass(frozen=True, slots=True)
class Item:
    """A verified item: who signed it, the unix time they gave, its topic, and its frame."""

    id: ItemId
    signer: NodeId
    time: float
    topic: bytes
    frame: bytes

    @property
    def entry(self) -> Entry:
        """What is announced of the item."""
        return Entry(self.id, len(self.frame), self.topic, hint(self.signer))


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
    """A peer says what it holds."""

    node: NodeId
    items: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Interested:
    """A peer says what it wants to be offered."""

    node: NodeId
    interest: Interest


@dataclass(frozen=True, slots=True)
class Subscribe:
    """The node wants items of these topics (8 bytes each; None: all), `demand` of them a second at most."""

    topics: frozenset[bytes] | None
    demand: float


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
    items: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class SendInterest:
    """Tell a peer what we want to be offered."""

    node: NodeId
    interest: Interest


@dataclass(frozen=True, slots=True)
class SendPull:
    """Ask a peer for items."""

    node: NodeId
    ids: tuple[ItemId, ...]


@dataclass(frozen=True, slots=True)
class Blame:
    """A peer did what has a price (see `limits.PENALTIES`), or only a name to be counted by."""

    node: NodeId
    reason: str


GossipEvent = PeerUp | PeerDown | Publish | Got | Announced | Interested | Pulled | Subscribe | NotSent | Discard | Tick
GossipAction = Deliver | SendItem | SendAnnounce | SendInterest | SendPull | Blame
