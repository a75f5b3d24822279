"""Links: dialling, greeting, and one link a pair. Data and rules.

Links, by the CURVE key that the other end proved
    DIALLED   we dialled and wait for the transport     -- Opened -->      GREETED, we send our hello
    GREETED   we sent a hello and wait for theirs       -- their hello --> LIVE
    (none)    somebody dialled us                       -- their hello --> LIVE, we answer with ours
    LIVE      the peer's signed record is bound to the link's key
    PARTING   a goodbye was said, or there is a better link; closed `GRACE_S` later, so that what was said arrives

Rules
 1. One link a pair. If both dialled, the link that the smaller node id dialled stays, and the other one parts.
 2. There are at most `max_peers` links, attempts included, beside those of rule 4. A swarm is small while we know no
    more nodes to dial than that. In a small swarm a node dials all others, so that everybody gets each item from its
    signer. In a larger one the room is three quarters of `max_peers`. A node dials until three quarters of that room
    are taken, and leaves the rest to callers. Links beyond the room end one after the other (see `dialing`, rule 3).
    A home node, which nobody can dial, has eight links in any swarm, as the places for it are scarce.
 3. A third of the room is kept for links that we chose ourselves. Callers get only the rest, so nobody can surround a
    node by dialling it. At most `max_prefix_peers` links are of one public network. In our own segment of it, so many
    are of one address: the nodes of a school or a rack reach each other. Links of our own address have no bound. A link
    that we dialled is never given up for a caller.
 4. A node that can be dialled has `max_callers` more places for home nodes that call it. If all are taken, the network
    with the most places gives one to a network with at least two fewer. Otherwise a home node that had a peer when it
    called gives its place to one that had none. So each has one place before others have two.
 5. Distances (rendezvous hashing, Thaler and Ravishankar 1998): any two nodes are at a distance that anybody can
    compute and neither can choose. A node draws several nodes, and mostly dials the nearest. A near caller takes the
    place of a far one when there is no room. So honest nodes soon find places. A node that calls everybody is near to
    few: it gets about as many places as an honest one, however often it calls and with however many keys. But an
    attacker can rent networks that are near to its victim. So some places and some dials do not go by distance, and
    each pair's distance changes every `PERIOD_S`. A node that does not know its own network (a domain name, NAT) is
    turned away as often as one that dials at random.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from itertools import chain
from typing import NamedTuple

from protocol.config import Instant
from protocol.credentials.records import Address, Endpoint, PeerRecord
from protocol.events import Link
from protocol.identity import NodeId
from protocol.limits.limits import Limits
from protocol.limits.networks import Scope, counts_as, netgroup, read_address, scope_of, segment
from protocol.limits.quotas import Payer
from protocol.lru import Recent
from protocol.membership.address_book import Contact

DIAL_TIMEOUT_S = 10.0  # a TCP and a CURVE handshake and a hello, on a machine busy with loading models
HELLO_RETRY_S = 2.0
GRACE_S = 2.0
FEW_PEERS = 8  # the least room for links in any swarm: a sparser overlay falls apart
PERIOD_S = 3600.0  # more than most links live until they are rotated (see `Timing.rotate_interval`)


@dataclass(slots=True)
class DialAttempt:
    """A contact that is being dialled."""

    contact: Contact
    address: Address  # of its addresses the one that is dialled: a newer record may name others, or none
    deadline: float
    network: str  # the public network that it is said to be in, and once it answered, that of its address
    host: str = ""  # the IP address that answered
    greeted: float | None = None


class NetworkPlace(NamedTuple):
    """The public network that a node is in, "" if it is in none, and as whom it counts (see `counts_as`)."""

    network: str
    voice: str


@dataclass(slots=True)
class LivePeer:
    """A live peer."""

    record: PeerRecord
    link: Link
    place: NetworkPlace
    host: str = ""  # the IP address at the other end of its last hello's link, if it is known
    dialled_at: Endpoint | None = None  # where we dialled it, if we did
    met: float = 0.0  # when its last hello came
    needy: bool = False  # whether it lacked links when it called

    @property
    def is_home(self) -> bool:
        """Whether it called us and nobody can dial it. Rule 4."""
        return not self.link.dialled and not self.record.endpoints

    @property
    def is_caller(self) -> bool:
        """Whether it called us and takes one of the places of rule 3."""
        return not self.link.dialled and not self.is_home

    @property
    def scope(self) -> Scope:
        """The scope of its address. We tell it endpoints of that scope and farther, and take such from it."""
        return scope_of(self.host)


def distance(network: str, other: str, unix: float) -> int:
    """Return how far two nodes (see `counts_as`) are from each other at a time: below 2**64, and the same both ways."""
    pair = "|".join(sorted((network, other))).encode()
    phase = int.from_bytes(hashlib.blake2b(pair, digest_size=4).digest()) / 2**32
    return int.from_bytes(hashlib.blake2b(pair + b"|%d" % (unix / PERIOD_S + phase), digest_size=8).digest())


class Links:
    """See the module's comment."""

    def __init__(self, own: NodeId, limits: Limits) -> None:
        self._own = own
        self._limits = limits
        self.is_small = True  # whether we could dial no more nodes than there may be links
        self.is_home = False  # whether nobody can dial us
        self._own_segments: set[str] = set()  # of public networks (see `segment`): where we listen
        self._own_addresses: set[IPv4Address | IPv6Address | None] = set()  # where we listen
        self.attempts: dict[Link, DialAttempt] = {}
        self.peers: dict[NodeId, LivePeer] = {}  # in the order they came
        self._holders: dict[bytes, NodeId] = {}  # live peers by their CURVE keys
        self._proven: Recent[bytes, NodeId] = Recent(limits.max_remembered)  # holders of keys, live or not
        self._hosts: Recent[Link, str] = Recent(limits.max_remembered)  # at the other end, until the link ends
        self._parting: dict[Link, float] = {}

    # The other end

    def live_node(self, link: Link) -> NodeId | None:
        """Return the live peer that holds the link's key: what it sends on either link of the pair is good."""
        return self._holders.get(link.key)

    def link_of(self, node: NodeId) -> Link | None:
        peer = self.peers.get(node)
        return peer.link if peer is not None else None

    def proven_node(self, link: Link) -> NodeId | None:
        """Return who once bound the link's key to its id by a signed record, live or not."""
        return self._holders.get(link.key) or self._proven.get(link.key)

    def prove(self, link: Link, node: NodeId) -> None:
        """Remember who bound the link's key to its id by a signed record."""
        self._proven.set(link.key, node)

    def accepted(self, link: Link, host: str) -> None:
        self._hosts.set(link, host)

    def host_of(self, link: Link) -> str:
        """Return the IP address at the other end of a link whose hello came, "" if it is not known."""
        attempt, node = self.attempts.get(link), self.live_node(link)
        known = attempt.host if attempt is not None else self._hosts.get(link)
        return known or (self.peers[node].host if node is not None else "")

    def scope_of(self, link: Link) -> Scope:
        """Return the scope of the address at the other end of a link."""
        return scope_of(self.host_of(link))

    def place_of(self, link: Link, endpoints: tuple[Endpoint, ...] = ()) -> NetworkPlace:
        """Return the place of the node at the other end, whose record has these endpoints.

        It counts where it is seen, or else where we dialled it, or else where it says that it is.
        """
        attempt = self.attempts.get(link)
        told = attempt.address.endpoint.host if attempt is not None else next((e.host for e in endpoints), "")
        host = self.host_of(link) or told
        return NetworkPlace(self.network_of(host), counts_as(host, link.key.hex()))

    def payer(self, link: Link) -> Payer:
        """Return who pays for what comes over a link."""
        node = self.live_node(link)
        return Payer((self.peers[node].place if node is not None else self.place_of(link)).voice, node is not None)

    def listen_at(self, endpoints: Iterable[Endpoint]) -> None:
        """Note where we listen. Names tell no network."""
        self._own_segments = {segment(endpoint.host) for endpoint in endpoints} - {""}
        self._own_addresses = {read_address(endpoint.host) for endpoint in endpoints} - {None}

    def network_of(self, host: str) -> str:
        """Return the network whose links are bounded: the public one of `host`, or itself if it is in our segment.

        It is "" for our own address, as for a private one: who is there is on our machine or behind our router.
        """
        if segment(host) not in self._own_segments:
            return netgroup(host)
        address = read_address(host)
        return "" if address in self._own_addresses else str(address)

    # How many there may be

    @property
    def room(self) -> int:
        """How many links there may be. Links of our own choice that are lacking may exceed this. Rule 2."""
        most, few = self._limits.max_peers, min(self._limits.max_peers, FEW_PEERS)
        if self.is_home:
            return few
        return most if self.is_small else max(few, most * 3 // 4)

    @property
    def target(self) -> int:
        return self.room if self.is_small or self.is_home else max(1, self.room * 3 // 4)

    @property
    def _reserve(self) -> int:
        return max(1, self.room // 3)

    @property
    def wanted(self) -> int:
        """How many more contacts to dial now."""
        live, busy = self._overlay, len(self.attempts)
        missing = max(self.target - live, self._reserve - self._chosen) - busy
        return max(0, min(missing, self._limits.max_peers - live - busy, self._limits.max_dials - busy))

    @property
    def lacks_chosen(self) -> bool:
        """Whether fewer links than the reserve are of our own choice, so that we are needy where we call. Rule 3."""
        return self._chosen < self._reserve

    @property
    def _chosen(self) -> int:
        return sum(peer.link.dialled for peer in self.peers.values())

    @property
    def _overlay(self) -> int:
        """How many links count for rule 2."""
        return sum(not peer.is_home for peer in self.peers.values())

    @property
    def is_crowded(self) -> bool:
        return self._overlay > self.room

    @property
    def surplus_caller(self) -> NodeId | None:
        """The last caller, if callers have more than their places, as after a swarm has grown. Rule 3."""
        callers = [node for node, peer in self.peers.items() if peer.is_caller]
        return callers[-1] if len(callers) > self.room - self._reserve else None

    @property
    def is_full(self) -> bool:
        return self._overlay >= self._limits.max_peers

    def has_room(self, link: Link, record: PeerRecord, network: str) -> bool:
        """Tell whether a caller of that network (see `network_of`) can be taken in. Rules 2 to 4."""
        if not record.endpoints:
            return sum(peer.is_home for peer in self.peers.values()) < self._limits.max_callers
        came = sum(peer.is_caller for peer in self.peers.values())
        busy = sum(attempt.key != link.key for attempt in self.attempts)  # a caller that we dial has its place already
        return came < self.room - self._reserve and self._overlay + busy < self.room and not self.is_full_of(network)

    def is_full_of(self, network: str) -> bool:
        """Tell whether there are as many links as there may be with that network."""
        if not network:
            return False
        live = sum(peer.place.network == network and not peer.is_home for peer in self.peers.values())
        dialled = sum(attempt.network == network for attempt in self.attempts.values())
        return live + dialled >= self._limits.max_prefix_peers

    def displaced_home(self, voice: str, *, needy: bool) -> NodeId | None:
        """Return the home node that gives its place to one that counts as `voice`, if any does. Rule 4."""
        homes = {node: peer for node, peer in reversed(self.peers.items()) if peer.is_home}
        counts = Counter(peer.place.voice for peer in homes.values())
        most = max(counts.values(), default=0)
        if most >= counts[voice] + 2:
            return next(node for node, peer in homes.items() if counts[peer.place.voice] == most)
        return next((node for node, peer in homes.items() if not peer.needy), None) if needy else None

    def evictable(self, here: str, caller: str, now: Instant) -> NodeId | None:
        """Return the farthest of the younger half of the callers, if `caller` is nearer to us; we are at `here`.

        The older half is safe, or an attacker with many networks would replace every honest peer.
        """
        callers = [(node, peer) for node, peer in self.peers.items() if peer.is_caller]
        distances = {node: distance(here, peer.place.voice, now.unix) for node, peer in callers[len(callers) // 2 :]}
        farthest = max(distances, key=distances.__getitem__, default=None)
        return farthest if farthest and distance(here, caller, now.unix) < distances[farthest] else None

    def replaceable(self, rng: random.Random) -> NodeId:
        """Return a random peer of those that we dialled, or of all but home nodes."""
        return rng.choice(
            [node for node, peer in self.peers.items() if peer.link.dialled]
            or [node for node, peer in self.peers.items() if not peer.is_home]
        )

    @property
    def near(self) -> int:
        """How many links into our own network we dialled or are dialling. This `near` is no distance of rule 5."""
        linked = (peer.host for peer in self.peers.values() if peer.link.dialled)
        dialled = (attempt.address.endpoint.host for attempt in self.attempts.values())
        return sum(scope_of(host) is Scope.PRIVATE for host in chain(linked, dialled))

    # From the dial to the end

    def dial(self, contact: Contact, now: float) -> None:
        link, address = Link(contact.key, dialled=True), contact.address
        self._parting.pop(link, None)
        count = len(contact.addresses)  # which share the time of one, and have twice as long each turn: lines are slow
        patience = DIAL_TIMEOUT_S * min(1.0, 2.0 ** (contact.failures // count) / count)
        self.attempts[link] = DialAttempt(contact, address, now + patience, self.network_of(address.endpoint.host))

    def busy_keys(self) -> set[bytes]:
        """Return the CURVE keys of live peers and of those that are being dialled."""
        return {peer.record.curve_key for peer in self.peers.values()} | {link.key for link in self.attempts}

    def answered(self, attempt: DialAttempt, host: str) -> bool:
        """Note from which address a contact answered; False if its network has all its links already.

        The name that we dialled does not tell the network, and names cost less than addresses.
        """
        network = self.network_of(host)
        is_one_more = network != attempt.network and self.is_full_of(network)
        attempt.host, attempt.network = host, network
        return not is_one_more

    def expects(self, link: Link) -> bool:
        """Tell whether a hello over this link counts: somebody dialled us, or we have not given the link up."""
        return not link.dialled or link in self.attempts or self.is_of_peer(link)

    def is_of_peer(self, link: Link) -> bool:
        """Tell whether it is a live peer's link, or its second one that is still open. Rule 1."""
        node = self.live_node(link)
        return node is not None and (self.peers[node].link == link or link in self._parting)

    def settle(self, node: NodeId, record: PeerRecord, link: Link, now: float, *, needy: bool = False) -> Link | None:
        """Make the link live. If the pair has two links now, return the one that is to part. Rule 1."""
        host, place = self.host_of(link), self.place_of(link, record.endpoints)
        attempt = self.attempts.pop(link, None)
        dialled_at = attempt.address.endpoint if attempt is not None else None
        self._hosts.set(link, host)  # who parts goes on paying as its network does, and not as a new key
        self._parting.pop(link, None)
        self._holders[link.key] = node
        self.prove(link, node)
        known = self.peers.get(node)
        if known is None:
            self.peers[node] = LivePeer(record, link, place, host, dialled_at, met=now, needy=needy)
            return None
        known.record, known.place, known.host, known.met = record, place, host, now
        known.dialled_at = dialled_at or known.dialled_at
        if known.link == link:
            return None
        if link.dialled != (self._own < node):
            return link
        surplus, known.link = known.link, link
        return surplus

    def is_parting(self, link: Link) -> bool:
        """Tell whether the link is parting: what still comes is nobody's fault."""
        return link in self._parting

    def part(self, link: Link, now: float, after: float = GRACE_S) -> bool:
        """Close the link `after` so many seconds, counted from the first call, unless it becomes live meanwhile.

        False: too many links are parting, so close it now.
        """
        if len(self._parting) >= self._limits.max_parting:
            return False
        self._parting.setdefault(link, now + after)
        return True

    def due(self, now: float) -> list[Link]:
        """Return and forget the links to hang up now: those that parted long enough ago."""
        over = [link for link, until in self._parting.items() if until <= now]
        for link in over:
            del self._parting[link]
        return over

    def late(self, now: float) -> list[tuple[Link, DialAttempt]]:
        """Return and forget the attempts whose time is over."""
        over = [(link, attempt) for link, attempt in self.attempts.items() if attempt.deadline <= now]
        for link, _ in over:
            del self.attempts[link]
        return over

    def closed(self, link: Link) -> NodeId | None:
        """Forget a link that ended; return the live peer whose link it was."""
        self._parting.pop(link, None)
        self._hosts.pop(link)
        self.attempts.pop(link, None)
        node = self.live_node(link)
        return node if node is not None and self.peers[node].link == link else None

    def drop(self, node: NodeId) -> Link:
        """Forget a live peer; return its link."""
        peer = self.peers.pop(node)
        del self._holders[peer.link.key]
        return peer.link
