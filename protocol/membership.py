"""Who is here. A pure state machine: `handle(event, now) -> actions`.

A node keeps one link to each peer it knows, up to `max_peers`: a mesh of tens.

Links, by the CURVE key that the other end proved
    DIALLED   we dialled and wait for the transport     -- Opened -->      GREETED, we send our hello
    GREETED   we sent a hello and wait for theirs       -- their hello --> LIVE
    (none)    somebody dialled us                       -- their hello --> LIVE, we answer with ours
    LIVE      the peer's signed record is bound to the link's key
  An unanswered hello is repeated every `HELLO_RETRY_S`. A dialled link that closes, or is not
  LIVE within `DIAL_TIMEOUT_S`, is one failure of its contact, which is tried again after a
  growing pause.

Rules
 1. A hello counts only if its record is signed by the hello's signer and names the very key
    that the link proved. Anything else is the sender's offence and gets no answer.
 2. Who answers: a hello is answered if and only if it came over a link that the peer dialled.
 3. One link a pair. When both dialled, the one dialled by the smaller node id is used for
    sending. The other stays open `SPARE_GRACE_S` for what is still on the way in it; then
    whoever dialled it hangs up. If the used link closes meanwhile, the spare takes over.
 4. Two ends that hear of each other would both dial, so the larger id waits `DIAL_YIELD_S`.
 5. A hello with another incarnation is a restarted peer: it goes down and comes up again
    with its new record and link.
 6. Anything heard keeps a peer alive. After `PING_INTERVAL_S` of silence it is pinged, after
    `PEER_TIMEOUT_S` it is dropped and dialled anew. If we were not run ourselves for a while,
    nobody is blamed for that time.
 7. Peers tell each other records: on going live, and now and then to a random peer. Live peers
    that nobody can dial are told of every newcomer, as the newcomer cannot dial them. A record
    of ourselves that is newer than our own (our clock was set back) makes us raise our
    incarnation above it.
"""

import random
from dataclasses import dataclass

from protocol.book import Book, Contact
from protocol.clock import Instant
from protocol.envelope import Kind
from protocol.errors import RecordError
from protocol.events import (
    Dial,
    Expel,
    HangUp,
    MembershipAction,
    MembershipEvent,
    Message,
    PeerDown,
    PeerUp,
    Tell,
    Tick,
)
from protocol.identity import KEY_BYTES, NodeId, node_id
from protocol.messages import MAX_RECORDS, Hello, Peers, Ping
from protocol.recent import Recent
from protocol.records import RECORD_LIFE_S, REFUTATION_BITS, PeerRecord, make_record
from protocol.setup import Setup
from protocol.transport import Closed, Link, Opened

DIAL_TIMEOUT_S = 10.0  # a TCP and a CURVE handshake and a hello, on a machine busy with loading models
HELLO_RETRY_S = 2.0
DIAL_YIELD_S = 1.0
MAX_DIALS = 8  # attempts in progress at a time
SPARE_GRACE_S = 2.0
PING_INTERVAL_S = 5.0
# Six pings unanswered. A node that loads a model can hold its interpreter for seconds on end;
# dropping it costs a new handshake, keeping a dead one costs next to nothing.
PEER_TIMEOUT_S = 6 * PING_INTERVAL_S
EXCHANGE_INTERVAL_S = 30.0
TICK_S = 0.5
MAX_PROVEN = 1024


@dataclass(slots=True)
class _Attempt:
    contact: Contact
    deadline: float
    greeted: float | None = None


@dataclass(slots=True)
class _Peer:
    record: PeerRecord
    link: Link
    heard: float
    pinged: float
    spare: Link | None = None
    spare_until: float = 0.0


class Membership:
    """See the module's comment. `book` may be filled before the first event with what was saved."""

    def __init__(
        self,
        setup: Setup,
        book: Book,
        rng: random.Random,
        now: Instant,
    ) -> None:
        self._setup = setup
        self._identity = setup.identity
        self._swarm = setup.swarm
        self._limits = setup.limits
        self._rng = rng
        self.book = book
        self._endpoints = setup.endpoints
        self._renew(now, int(now.unix * 1000) << REFUTATION_BITS)
        self._attempts: dict[Link, _Attempt] = {}
        self._peers: dict[NodeId, _Peer] = {}
        self._proven: Recent[bytes, NodeId] = Recent(MAX_PROVEN)
        self._ticked = now.steady
        self._next_exchange = now.steady + EXCHANGE_INTERVAL_S

    @property
    def peers(self) -> list[NodeId]:
        """The live peers, in the order they came."""
        return list(self._peers)

    def link_of(self, node: NodeId) -> Link | None:
        """Return the link to send to a live peer on."""
        peer = self._peers.get(node)
        return peer.link if peer else None

    def live_node(self, link: Link) -> NodeId | None:
        """Return the live peer that holds the link's key: what it sends on either link of the pair is good."""
        node = self._proven.get(link.key)
        return node if node in self._peers else None

    def proven_node(self, link: Link) -> NodeId | None:
        """Return who once bound the link's key to its id by a signed record, live or not."""
        return self._proven.get(link.key)

    def heard(self, node: NodeId, now: Instant) -> None:
        """Note that a live peer said something."""
        self._peers[node].heard = now.steady

    def handle(self, event: MembershipEvent, now: Instant) -> list[MembershipAction]:
        """Advance by one event.

        Raises:
            RecordError: a hello is not what rule 1 asks for; nothing has changed.
            MessageError: a body is malformed; nothing has changed.
        """
        match event:
            case Opened(link):
                return self._opened(link, now)
            case Closed(link):
                return self._closed(link, now)
            case Message(link, sender, Kind.HELLO, body):
                return self._hello(link, sender, Hello.decode(body), now)
            case Message(_, _, Kind.PEERS, body):
                return self._learn(Peers.decode(body), now)
            case Message(link, _, Kind.PING, body):
                return [Tell(link, Kind.PONG, Ping.decode(body).encode())]
            case Message(_, _, Kind.PONG, body):
                Ping.decode(body)  # that it came is all it says
                return []
            case Expel(node):
                return self._expel(node, now)
            case Tick():
                return self._tick(now)
        return []

    def _opened(self, link: Link, now: Instant) -> list[MembershipAction]:
        attempt = self._attempts.get(link)
        if attempt is None:
            return [HangUp(link)]
        attempt.greeted = now.steady
        return [Tell(link, Kind.HELLO, self._own_hello())]

    def _own_hello(self) -> bytes:
        return Hello(self.record.encoded).encode()

    def _closed(self, link: Link, now: Instant) -> list[MembershipAction]:
        attempt = self._attempts.pop(link, None)
        if attempt is not None:
            attempt.contact.failed(now, self._rng)
        node = self.live_node(link)
        if node is None:
            return []
        peer = self._peers[node]
        if peer.spare == link:
            peer.spare = None
        elif peer.link == link and peer.spare is not None:
            peer.link, peer.spare = peer.spare, None
            return [PeerUp(node)]
        elif peer.link == link:
            return self._lose(node, now)
        return []

    def _lose(self, node: NodeId, now: Instant) -> list[MembershipAction]:
        peer = self._peers.pop(node)
        contact = self.book.contact(node)
        if contact is not None:
            contact.failed(now, self._rng)
        links = [peer.link] if peer.spare is None else [peer.link, peer.spare]
        return [*(HangUp(link) for link in links), PeerDown(node)]

    def _hello(self, link: Link, sender: NodeId, hello: Hello, now: Instant) -> list[MembershipAction]:
        record = self._read(hello.record, now)
        if record.node_id != sender or record.curve_key != link.key:
            raise RecordError("impostor", "the record is another node's or names another key")
        attempt = self._attempts.get(link)
        known = self._peers.get(sender)
        if link.dialled and attempt is None and (known is None or link not in {known.link, known.spare}):
            return [HangUp(link)]  # an answer that came after its deadline
        if sender == self._identity.node_id or (known is None and len(self._peers) >= self._limits.max_peers):
            return [HangUp(link), *self._closed(link, now)]
        self._attempts.pop(link, None)
        self._proven.set(link.key, sender)
        self.book.add(record)
        actions: list[MembershipAction] = []
        if not link.dialled:
            actions.append(Tell(link, Kind.HELLO, self._own_hello()))
        actions += self._admit(sender, record, link, now)
        for contact in (attempt.contact if attempt else None, self.book.contact(sender)):
            if contact is not None:
                contact.met()
        return actions

    def _admit(self, node: NodeId, record: PeerRecord, link: Link, now: Instant) -> list[MembershipAction]:
        actions: list[MembershipAction] = []
        known = self._peers.get(node)
        if known is not None and known.record.incarnation != record.incarnation:
            actions += [action for action in self._lose(node, now) if action != HangUp(link)]
            known = None
        if known is not None and known.link != link:
            return actions + self._pair_up(node, known, link, now)
        spare = known.spare if known else None
        until = known.spare_until if known else 0.0
        self._peers[node] = _Peer(record, link, now.steady, now.steady, spare, until)
        actions += [PeerUp(node), Tell(link, Kind.PEERS, self._sample(now, node))]
        return actions + (self._introduce(node, record) if known is None else [])

    def _introduce(self, node: NodeId, record: PeerRecord) -> list[MembershipAction]:
        """Tell of a newcomer those whom it cannot dial: they have to dial it."""
        if not record.endpoints:
            return []
        body = Peers((record.encoded,)).encode()
        return [
            Tell(peer.link, Kind.PEERS, body)
            for other, peer in self._peers.items()
            if other != node and not peer.record.endpoints
        ]

    def _pair_up(self, node: NodeId, peer: _Peer, link: Link, now: Instant) -> list[MembershipAction]:
        ours = self._identity.node_id < node
        if link.dialled == ours:
            peer.link, peer.spare = link, peer.link
        else:
            peer.spare = link
        peer.spare_until = now.steady + SPARE_GRACE_S
        peer.heard = now.steady
        return []

    def _learn(self, peers: Peers, now: Instant) -> list[MembershipAction]:
        for encoded in peers.records:
            author = node_id(encoded[:KEY_BYTES])
            known = self.record if author == self._identity.node_id else self.book.get(author)
            if known is not None and known.encoded == encoded:
                continue  # nothing new, and a signature that need not be checked again
            record = self._read(encoded, now)
            if record.node_id == self._identity.node_id:
                if record.replaces(self.record):
                    self._renew(now, max(self.record.incarnation, record.incarnation + 1))
                continue
            first = self._identity.node_id < record.node_id
            self.book.add(record, not_before=now.steady + (0.0 if first else DIAL_YIELD_S))
        return self._dial(now)

    def _renew(self, now: Instant, incarnation: int) -> None:
        setup = self._setup
        expiry_ms = int((now.unix + RECORD_LIFE_S) * 1000)
        self.record = make_record(
            setup.identity, setup.swarm, self._endpoints, incarnation, setup.agent, expiry_ms, setup.grant
        )

    def _read(self, encoded: bytes, now: Instant) -> PeerRecord:
        record = self._setup.reader.open(encoded, self._swarm, now.unix, self._identity.verify)
        reason = self._setup.admits(record, now)
        if reason:
            raise RecordError(reason, "record")
        return record

    def _sample(self, now: Instant, reader: NodeId) -> bytes:
        """Return the body of a peer exchange: our own record, the live peers', and others that may be good."""
        live: list[PeerRecord] = []
        others: list[PeerRecord] = []
        for record in self.book.good_records(now):
            if record.node_id != reader:
                (live if record.node_id in self._peers else others).append(record)
        self._rng.shuffle(live)
        self._rng.shuffle(others)
        chosen = [self.record, *live, *others][:MAX_RECORDS]
        return Peers(tuple(record.encoded for record in chosen)).encode()

    def _expel(self, node: NodeId, now: Instant) -> list[MembershipAction]:
        return self._lose(node, now) if node in self._peers else []

    def _tick(self, now: Instant) -> list[MembershipAction]:
        asleep = now.steady - self._ticked - 2 * TICK_S
        self._ticked = now.steady
        if asleep > 0:
            for peer in self._peers.values():
                peer.heard = min(now.steady, peer.heard + asleep)
            for attempt in self._attempts.values():
                attempt.deadline += asleep
        if self.record.expiry_ms / 1000 - now.unix < RECORD_LIFE_S / 2:
            self._renew(now, self.record.incarnation)
        self.book.expire(now)
        return [*self._check_attempts(now), *self._check_peers(now), *self._exchange(now), *self._dial(now)]

    def _check_attempts(self, now: Instant) -> list[MembershipAction]:
        actions: list[MembershipAction] = []
        for link, attempt in list(self._attempts.items()):
            if attempt.deadline <= now.steady:
                self._attempts.pop(link).contact.failed(now, self._rng)
                actions.append(HangUp(link))
            elif attempt.greeted is not None and attempt.greeted + HELLO_RETRY_S <= now.steady:
                actions += self._opened(link, now)
        return actions

    def _check_peers(self, now: Instant) -> list[MembershipAction]:
        actions: list[MembershipAction] = []
        for node, peer in list(self._peers.items()):
            silent = now.steady - peer.heard
            if peer.spare is not None and peer.spare_until <= now.steady:
                actions.append(HangUp(peer.spare))
                peer.spare = None
            if silent >= PEER_TIMEOUT_S:
                actions += self._lose(node, now)
            elif silent >= PING_INTERVAL_S and now.steady - peer.pinged >= PING_INTERVAL_S:
                peer.pinged = now.steady
                actions.append(Tell(peer.link, Kind.PING, Ping(self._rng.getrandbits(32)).encode()))
        return actions

    def _exchange(self, now: Instant) -> list[MembershipAction]:
        if not self._peers or now.steady < self._next_exchange:
            return []
        self._next_exchange = now.steady + EXCHANGE_INTERVAL_S * self._rng.uniform(0.75, 1.25)
        node = self._rng.choice(list(self._peers))
        return [Tell(self._peers[node].link, Kind.PEERS, self._sample(now, node))]

    def _dial(self, now: Instant) -> list[MembershipAction]:
        actions: list[MembershipAction] = []
        busy = {peer.record.curve_key for peer in self._peers.values()} | {link.key for link in self._attempts}
        busy.add(self._identity.curve_key)
        for contact in self.book.contacts_due(now):
            if len(self._attempts) >= MAX_DIALS or len(self._peers) + len(self._attempts) >= self._limits.max_peers:
                break
            if contact.key in busy:
                continue
            busy.add(contact.key)
            self._attempts[Link(contact.key, dialled=True)] = _Attempt(contact, now.steady + DIAL_TIMEOUT_S)
            actions.append(Dial(contact.address))
        return actions
