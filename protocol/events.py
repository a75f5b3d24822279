"""Every event and every action of a node's cores, from the link up to the item.

A core is told events and answers with actions: `handle(event, now) -> actions`. It calls the methods of gossip, and
those of membership for what it found itself.

    transport --> NetworkEvent --> core --> MembershipEvent --> membership --> MembershipAction --+
    node -------> Offer, ... ----> core --> its methods ------> gossip ------> GossipAction ------+
    transport <-- CoreAction <------------------------- core makes frames of what they `Send` ----+
"""

from collections.abc import Iterable
from dataclasses import field
from enum import Enum
from typing import NamedTuple

from protocol.credentials.records import Address, Endpoint, Service
from protocol.identity import NodeId, node_id
from protocol.limits.networks import Scope
from protocol.value import value
from protocol.wire.envelope import CHUNK_BYTES, HEAD_BYTES, Header, ItemId, hash_in
from protocol.wire.messages import (
    TOPIC_BYTES,
    Body,
    Entry,
    ItemChunk,
    ItemOutline,
    hint,
)

# Events of transports, about links


class Link(NamedTuple):
    """A connection with the holder of the CURVE key `key` (32 bytes); `dialled` if we dialled it."""

    key: bytes
    dialled: bool


@value
class Opened:
    """A dialled link is up: encrypted, and the other end, at the IP address `host` ("": unknown), proved its key."""

    link: Link
    host: str = field(default="", compare=False)


@value
class Accepted:
    """The holder of the link's key dialled us, from the IP address `host`, and its first frame follows."""

    link: Link
    host: str


@value
class Moving:
    """Bytes came over a link, or bytes that wait for it in our kernel were acknowledged: the other end is not dead.

    On a slow line a frame may take minutes.
    """

    link: Link


@value
class Closed:
    """A link is gone; frames on the way are lost. The transport does not restore it."""

    link: Link


@value
class TurnedAway:
    """The other end of a link that we dialled refuses our key; `Closed` follows."""

    link: Link


@value
class Arrived:
    """A frame came over a link."""

    link: Link
    frame: bytes


@value
class RefusedEarly:
    """The transport refused something; it is counted by `reason`. `link` is None if its key is not known."""

    reason: str
    link: Link | None = None


@value
class Tick:
    """Time has passed."""


# Events of our own node: the program that runs these cores


class ItemVerdict(Enum):
    """The node's verdict on an item. Only a rejected one costs its signer."""

    ACCEPT = "accept"
    IGNORE = "ignore"
    REJECT = "reject"


@value
class Offer:
    """The node publishes an item's body: a topic (8 bytes) and content. `hashes` are those of its chunks, if known."""

    body: bytes
    hashes: bytes | None = None


@value
class Judgement:
    """The node's verdict on an item, with a reason to count it by."""

    id: ItemId
    verdict: ItemVerdict
    reason: str


@value
class Subscribe:
    """The node wants items of these topics (8 bytes each; None: all), `demand` of them a second at most.

    Small items of the topics in `beside` do not wait for their lot: they have an allowance of their own beside it.
    """

    topics: frozenset[bytes] | None
    demand: float
    beside: frozenset[bytes] = frozenset()


@value
class Moved:
    """The endpoints of this node, or of what else it runs, have changed."""

    endpoints: tuple[Endpoint, ...]
    services: tuple[Service, ...] = ()


@value
class PortMapped:
    """Our router says that it forwards our port from this outer IP address; "": it no longer does."""

    external: str


@value
class Neighbour:
    """Somebody in our own network says, without proof, that a node of our swarm is at one of these addresses."""

    addresses: tuple[Address, ...]


# Events of membership, and what is said of items


@value
class Revoked:
    """A person on this machine brings a revocation list, as bytes."""

    encoded: bytes


@value
class Message:
    """A message about peers that came over `link`. CURVE proved that `sender` said it; a hello is signed as well."""

    link: Link
    sender: NodeId
    kind: int
    body: bytes


@value
class PeerUp:
    """A peer is live. It comes again after a restart or on a new connection: then the peer may have missed things.

    `voice` is as whom it counts (see `protocol.limits.networks.counts_as`), "" for itself alone.
    """

    node: NodeId
    voice: str = field(default="", compare=False)


@value
class PeerDown:
    """A peer is gone for now."""

    node: NodeId


@value
class Item:
    """A verified item: its signer, the unix time (s) that the signer gave, its topic, frame, and chunks' hashes.

    An item of a single chunk needs no hashes.
    """

    id: ItemId
    signer: NodeId
    time: float
    topic: bytes
    frame: bytes
    hashes: bytes = b""

    @property
    def outline(self) -> ItemOutline:
        """The answer to a pull of a large item."""
        return ItemOutline(self.frame[:HEAD_BYTES], self.hashes)

    def chunk(self, index: int) -> ItemChunk:
        """Return a chunk, empty beyond the end."""
        start = HEAD_BYTES + index * CHUNK_BYTES
        return ItemChunk(self.id, index, self.frame[start : start + CHUNK_BYTES], hash_in(self.hashes, index))

    @property
    def content(self) -> memoryview:
        """The application's bytes, after the topic: a view of the frame."""
        return memoryview(self.frame)[HEAD_BYTES + TOPIC_BYTES :]

    @property
    def entry(self) -> Entry:
        """What is announced of the item."""
        return Entry(self.id, len(self.frame), self.topic, hint(self.signer))


@value
class Outline:
    """A large item without its body: its verified header, the frame's head as bytes, and its chunks' hashes, joined."""

    header: Header
    head: bytes
    hashes: bytes

    @property
    def id(self) -> ItemId:
        """The item's id."""
        return self.header.item_id

    @property
    def signer(self) -> NodeId:
        """The signer of the header."""
        return node_id(self.header.public_key)

    def proves(self, chunk: ItemChunk) -> bool:
        """Tell whether the data of a chunk is the item's."""
        return chunk.hash == hash_in(self.hashes, chunk.index)

    def size_of(self, index: int) -> int:
        """Return how many bytes chunk `index` has by the size that the signer states."""
        return min(CHUNK_BYTES, self.header.size - index * CHUNK_BYTES)

    def chunk(self, index: int, data: bytes) -> ItemChunk:
        """Return a chunk of which the data is known to be good."""
        return ItemChunk(self.id, index, data, hash_in(self.hashes, index))

    def fill(self, chunks: Iterable[bytes]) -> Item:
        """Return the item, once all its chunks are there."""
        frame = b"".join((self.head, *chunks))
        topic = frame[HEAD_BYTES : HEAD_BYTES + TOPIC_BYTES]
        return Item(self.id, self.signer, self.header.time_ms / 1000, topic, frame, self.hashes)


@value
class Bring:
    """The node has room now for an item that came when it had none. `Deliver` follows if the item is still held."""

    id: ItemId


# Actions that the cores ask for


@value
class Dial:
    """Open a link. A host name is dialled only at addresses that are at least of that scope."""

    address: Address
    scope: Scope = Scope.LOOPBACK


@value
class HangUp:
    """Close a link."""

    link: Link


@value
class Send:
    """Send a message over a link or to a live peer."""

    to: Link | NodeId
    message: Body


@value
class Serve:
    """Something waits for a peer's line, which is to ask `Gossip.serve` for it."""

    to: NodeId


@value
class SendFrame:
    """Send a frame on a link."""

    link: Link
    frame: bytes


@value
class FillLink:
    """Let a link ask for what waits for it (`Core.make_frame`) whenever it is free, until nothing waits."""

    link: Link


@value
class Deliver:
    """An item for the node: a new one, or one that it asked for `again` (`Bring`)."""

    item: Item
    again: bool = False


@value
class ChargePrefix:
    """The holder of a link committed an offence: the network at its other end pays so many points, too."""

    link: Link
    points: float


@value
class Blame:
    """A peer did what is counted as `reason`; it pays if that has a price (see `peer_scores.PENALTIES`)."""

    node: NodeId
    reason: str


OfLink = Opened | Accepted | TurnedAway | Moving | Closed
NetworkEvent = OfLink | Arrived | RefusedEarly
News = Moved | PortMapped | Neighbour  # of where we are
MembershipEvent = Opened | Accepted | TurnedAway | Moving | Closed | Message | News | Revoked | Tick
MembershipAction = Dial | HangUp | Send | PeerUp | PeerDown
GossipAction = Deliver | Send | Serve | Blame
CoreEvent = NetworkEvent | Bring | News | Revoked | Offer | Subscribe | Judgement | Tick
CoreAction = Dial | HangUp | SendFrame | FillLink | Deliver | ChargePrefix
