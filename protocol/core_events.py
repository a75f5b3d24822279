"""What a node's core is told, by its network and by its owner, and what it asks for."""

from dataclasses import dataclass
from enum import Enum

from protocol.events import Dial, HangUp, Moved, Tick
from protocol.gossip.events import Subscribe
from protocol.identity import NodeId
from protocol.transport import Link, NetworkEvent
from protocol.wire.envelope import ItemId


class Verdict(Enum):
    """What the node makes of an item. Only a rejected one costs its signer."""

    ACCEPT = "accept"
    IGNORE = "ignore"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class Received:
    """An item for the node: its id, who signed it, its body and topic, and the unix time (s) its signer gave."""

    id: ItemId
    sender: NodeId
    body: bytes
    time: float
    topic: bytes


@dataclass(frozen=True, slots=True)
class Offer:
    """The node publishes a body under a topic (8 bytes)."""

    body: bytes
    topic: bytes


@dataclass(frozen=True, slots=True)
class Report:
    """The node's verdict on an item, with a reason to count it by."""

    id: ItemId
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Unsent:
    """A frame with (or about) these items could not be queued on the link."""

    link: Link
    ids: tuple[ItemId, ...]


@dataclass(frozen=True, slots=True)
class SendFrame:
    """Send a frame on a link; report `Unsent` with `ids` when it cannot be queued."""

    link: Link
    frame: bytes
    ids: tuple[ItemId, ...] = ()
    is_item: bool = False


CoreEvent = NetworkEvent | Moved | Offer | Subscribe | Report | Unsent | Tick
CoreAction = Dial | HangUp | SendFrame | Received
