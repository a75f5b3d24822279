"""Membership: which peers are live. A pure state machine: `handle(event, now) -> actions`.

A node has few links, whatever the size of the swarm: HyParView's active view (Leitao 2007), with the address book as
the passive view. Each part states its rules: `links` the life of a link, `failure_detector` whether its other end still
answers, `directory` how records and the revocation list spread, `dialing` whom to dial, and `reachability` whether we
can be dialled.

Rules
 1. A hello counts only if its record is signed by the hello's signer, names the very key that the link proved, is in
    time, and is admitted to the swarm. Anything else gets no answer but a goodbye. A record that has expired, or that
    is dated ahead, costs nothing: a clock is off, and both operators are told.
 2. A hello is answered if and only if it came over a link that the peer dialled. An unanswered hello is repeated every
    `HELLO_RETRY_S`.
 3. A graylisted node (its score is too low) is refused at the hello by its node id, whatever its key, and not dialled.
 4. A caller without room gets records of a few others and a goodbye, and the manifest if it asks at once. A needy
    caller says that it lacks links of its own choice: then a peer that called us and is farther from us (see `links`)
    makes room for it. A caller that lies gains little: it has to be near. A home node is needy while it has no peer
    (see `links`, rule 4).
 5. A hello of a process that started at another time comes from a restarted peer: it goes down and comes up again. A
    peer that shows an older record of itself than we have is told the newer one. If a record of ourselves is newer than
    our own, our clock was set back or another process has our key: we raise our incarnation above it (see
    `RecordDirectory.outbid`).
 6. A peer whose hello names a newer revocation list than ours is asked for that list. If we would not admit the peer,
    we ask before we judge: the list may name a new owner, who signed its grant. The hello is judged when it comes again
    after the list. A new list is told to all peers, and each exchange asks one peer. Anybody may bring one, a stranger
    too: it counts by its signature. A node that the list revokes loses its link and its place in the book.
"""

import random
from collections.abc import Callable

from protocol.config import Instant, Setup
from protocol.credentials.records import MAX_RECORD_LIFE_S, PeerRecord
from protocol.errors import MessageError, RecordError
from protocol.events import (
    Accepted,
    Closed,
    HangUp,
    Link,
    MembershipAction,
    MembershipEvent,
    Message,
    Moved,
    Moving,
    Neighbour,
    Opened,
    PeerDown,
    PeerUp,
    PortMapped,
    Revoked,
    Send,
    Tick,
    TurnedAway,
)
from protocol.identity import NodeId
from protocol.limits.networks import Scope
from protocol.membership.address_book import Book, Contact
from protocol.membership.dialing import Dialing, Refuses
from protocol.membership.directory import RecordDirectory
from protocol.membership.failure_detector import Detector
from protocol.membership.links import DIAL_TIMEOUT_S, HELLO_RETRY_S, DialAttempt, Links
from protocol.membership.reachability import Reachability, can_dial_back
from protocol.refusals import CLOCK_AHEAD, CLOCK_BEHIND, GRAYLISTED, Refusals
from protocol.wire import version
from protocol.wire.envelope import Kind
from protocol.wire.messages import (
    AskManifest,
    AskRevocations,
    DialBack,
    DialledBack,
    Digest,
    Goodbye,
    Hello,
    Peers,
    Ping,
    Pong,
    Revocations,
)

# The least time between two hellos of a peer: half of the time after which it has to repeat one.
LEAST_HELLO_PAUSE_S = HELLO_RETRY_S / 2
TICK_S = 0.5
LIST_WAIT_S = 10.0  # for a list that we asked a caller for: as long as a stranger has for its hello
# What the other end of a link that we dialled may say before it is a live peer.
BEFORE_HELLO = frozenset({Kind.HELLO, Kind.PEERS, Kind.GOODBYE, Kind.ASK_REVOCATIONS, Kind.MANIFEST})
NO_ROOM = frozenset({"full", "evicted", "rotated"})  # goodbyes that are nobody's fault


class Membership:
    """See the module's comment. The attributes are for reading.

    `book` may be filled before the first event. `refuses` tells whether a node is graylisted just now.
    """

    def __init__(
        self, setup: Setup, book: Book, rng: random.Random, now: Instant, refuses: Refuses = lambda node, now: False
    ) -> None:
        self._setup = setup
        self._refuses = refuses
        self._own = setup.identity.node_id
        self._rng = rng
        self.links = Links(self._own, setup.limits)
        # Asked for each frame that comes or goes.
        self.live_node: Callable[[Link], NodeId | None] = self.links.live_node
        self.link_of: Callable[[NodeId], Link | None] = self.links.link_of
        self.detector = Detector(setup.timing, rng)
        self.reachability = Reachability(self.links, setup.limits, rng, now)
        self.reachability.give(setup.endpoints, now)
        self.book = book
        self.directory = RecordDirectory(setup, book, self.links, rng, now)
        self._dialing = Dialing(setup, book, self.directory, self.links, refuses, rng, now)
        self._next_review = now.steady
        self._full: Contact | None = None  # the last node that had no room for us, since we last had a peer
        self._full_since = now.steady  # when the first one had none
        self.deaths = 0  # peers dropped for silence
        self.refusals = Refusals(now)

    @property
    def record(self) -> PeerRecord:
        return self.directory.record

    @property
    def peers(self) -> list[NodeId]:
        """The live peers, in the order they came."""
        return list(self.links.peers)

    @property
    def may_find_peers(self) -> bool:
        """Whether there is anybody to dial."""
        return bool(self.book.seeds or self.book.dialable or self.links.attempts)

    @property
    def saved_records(self) -> list[PeerRecord]:
        """The records to keep on disk: those of the book that can be dialled, and expired ones of nodes to look for.

        The peers that we dialled come first, then those that dialled us: a person may be shown the first ones.
        """
        ranks = {node: not peer.link.dialled for node, peer in self.links.peers.items()}
        known = sorted(self.book.dialable_records(), key=lambda record: ranks.get(record.node_id, 2))
        return [*known, *self.book.lapsed_records()]

    def heard(self, node: NodeId, now: Instant) -> None:
        self.detector.heard(node, now.steady)

    def handle(self, event: MembershipEvent, now: Instant) -> list[MembershipAction]:  # noqa: C901, PLR0912  # an arm an event
        """Advance by one event.

        Raises:
            RecordError: a record is not what rule 1 asks for.
            MessageError: a body is malformed; nothing has changed.
        """
        match event:
            case Opened(link, host):
                return self._opened(link, now, host)
            case Accepted(link, host):
                self.links.accepted(link, host)
                return []
            case Moving(link):
                if (node := self.links.live_node(link)) is not None:
                    self.heard(node, now)
                return []
            case Closed(link):
                return self._closed(link, now)
            case Message():
                return self._message(event, now)
            case TurnedAway(link):
                if (attempt := self.links.attempts.get(link)) is not None:
                    self.refusals.by(str(attempt.address.endpoint), GRAYLISTED, now)
                return []
            case Moved(endpoints, services):
                self.reachability.give(endpoints, now)
                return self.directory.move(endpoints, self.reachability.told, services, now)
            case PortMapped(external):
                self.reachability.mapped(external, now)
                return []
            case Neighbour(addresses):
                self.book.meet(addresses)
                return [*self._dialing.fill(now)]
            case Revoked(encoded):
                return self._obey(encoded, None, now)
            case Tick():
                return self._tick(now)

    def expel(self, node: NodeId, now: Instant) -> list[MembershipAction]:
        """End the link of a peer that is graylisted, and do not dial it for a while."""
        return self._leave(node, GRAYLISTED, now) if node in self.links.peers else []

    def misfit(self, link: Link, theirs: int, now: Instant) -> list[MembershipAction]:
        """Part from a node that speaks another major version, `theirs`."""
        attempt = self.links.attempts.get(link)
        self.refusals.misfit(str(attempt.address.endpoint) if attempt else link.key.hex(), theirs, now)
        if link.dialled:
            self.refusals.latest = f"it speaks protocol {version.said(theirs)}"
        return self._refuse(link, version.goodbye_reason(), now)

    def _message(self, message: Message, now: Instant) -> list[MembershipAction]:  # an arm a message
        link, sender, body = message.link, message.sender, message.body
        is_peer = sender in self.links.peers
        match message.kind:
            case Kind.HELLO:
                return self._hello(message, now)
            case Kind.PEERS:
                return self._hear_of(link, sender, Peers.decode(body), now)
            case Kind.GOODBYE:
                return self._goodbye(link, Goodbye.decode(body), now)
            case Kind.ASK_REVOCATIONS:
                is_news = AskRevocations.decode(body).revision < self._setup.gate.revision
                return [Send(link, Revocations(self._setup.gate.revocations))] if is_news else []
            case Kind.REVOCATIONS:
                return self._obey(Revocations.decode(body).encoded, sender, now)
            case Kind.PING if is_peer:
                return [Send(link, Pong(Ping.decode(body).token))]
            case Kind.PONG if is_peer:
                self.detector.pong(sender, Ping.decode(body).token, now.steady)
            case Kind.DIAL_BACK if is_peer:
                return self.reachability.asked(sender, DialBack.decode(body), now)
            case Kind.DIALLED_BACK if is_peer:
                self.reachability.answered(sender, DialledBack.decode(body), now)
            case Kind.DIGEST if is_peer:
                return self.directory.answer(sender, Digest.decode(body), now)
        return []

    # Links

    def _opened(self, link: Link, now: Instant, host: str = "") -> list[MembershipAction]:
        if (answer := self.reachability.opened(link)) is not None:
            return answer
        attempt = self.links.attempts.get(link)
        if attempt is None:
            return [HangUp(link)]
        is_seed = any(seed.key == link.key for seed in self.book.seeds)
        if host and not self.links.answered(attempt, host) and not is_seed:
            return [HangUp(link), *self._closed(link, now)]
        if attempt.greeted is None:
            attempt.deadline = now.steady + DIAL_TIMEOUT_S
        attempt.greeted = now.steady
        return [Send(link, self._greeting(link))]

    def _greeting(self, link: Link) -> Hello:
        own = self.directory.record_for(self.links.scope_of(link))
        lacks_links = self.links.lacks_chosen if own.endpoints else not self.links.peers
        return Hello(own.encoded, link.dialled and lacks_links, self._setup.gate.revision)

    def _closed(self, link: Link, now: Instant) -> list[MembershipAction]:
        if (answer := self.reachability.closed(link)) is not None:
            return answer
        attempt, node = self.links.attempts.get(link), self.links.closed(link)
        if attempt is not None:
            self._unanswered(attempt, now)
        return self._lose(node, now) if node is not None else []

    def _unanswered(self, attempt: DialAttempt, now: Instant) -> None:
        """Note that a contact does not answer where we dialled it, unless its newest record names other addresses."""
        if attempt.address in attempt.contact.addresses:
            attempt.contact.failed(now, self._rng)

    def _hello(self, message: Message, now: Instant) -> list[MembershipAction]:
        """Judge a hello.

        Raises:
            MessageError: it is malformed.
            RecordError: it is forged, or its record is of no use.
        """
        link, sender, hello = message.link, message.sender, Hello.decode(message.body)
        setup, gate = self._setup, self._setup.gate
        record = setup.reader.read(hello.record, setup.swarm, setup.identity.verify)
        if record.node_id != sender or record.curve_key != link.key:
            raise RecordError("impostor", "the record is another node's or names another key")
        if self.links.live_node(link) not in (None, sender):
            raise RecordError("impostor", "the link's key is another live peer's")
        if sender == self._own or not self.links.expects(link):
            return [HangUp(link), *self._closed(link, now)]
        if self._refuses(sender, now):
            self.links.prove(link, sender)  # so that this key is refused in the handshake from now on
            self.refusals.of(sender, GRAYLISTED, now)
            dropped = self._drop(sender) if sender in self.links.peers else []
            return [*dropped, *self._refuse(link, GRAYLISTED, now)]
        is_off = clock_fault(record, now.unix)
        reason = is_off or gate.admits(record, now)
        if not reason:
            return self._take_in(link, record, hello, now)
        # We answer the caller by asking, so its connection would stay: it is closed `LIST_WAIT_S` after the first time.
        is_newer = hello.revision > gate.revision and not is_off
        if is_newer and (link.dialled or self.links.part(link, now.steady, LIST_WAIT_S)):
            return [Send(link, AskRevocations(gate.revision))]
        self.refusals.of(sender, reason, now)
        is_told = self.links.link_of(sender) == link
        left = self._leave(sender, reason, now) if sender in self.links.peers else []
        return left if is_told else [*left, *self._refuse(link, reason, now)]

    def _take_in(self, link: Link, record: PeerRecord, hello: Hello, now: Instant) -> list[MembershipAction]:
        """Make an admitted node a live peer, if there is room or room is made for it."""
        sender = record.node_id
        actions: list[MembershipAction] = []
        known = self.links.peers.get(sender)
        if known is not None and self.links.is_of_peer(link) and now.steady < known.met + LEAST_HELLO_PAUSE_S:
            raise MessageError("too_many_hellos")  # also of a process that restarted just now: it repeats its hello
        if known is not None and (known.record.started != record.started or known.link.key != link.key):
            actions += [action for action in self._lose(sender, now) if action != HangUp(link)]
            known = None
        if known is None and not link.dialled:
            evicted = self._room_for(link, record, now, needy=hello.needy)
            if evicted is None:
                self.links.prove(link, sender)
                others = Send(
                    link, self.directory.sample(sender, self.links.scope_of(link), self._setup.limits.max_referrals)
                )
                return [*actions, others, *self._refuse(link, "full", now)]
            actions += evicted
        if known is None and link.dialled and self.links.is_full:
            actions += self._leave(self.links.replaceable(self._rng), "rotated", now)
        actions += self._welcome(link, record, now, needy=hello.needy)
        newest = self.book.get(sender)
        if newest is not None and newest.replaces(record):
            actions.append(Send(link, Peers((newest.encoded,))))  # it has a twin, or its clock was set back
        own = self._setup.gate.revision
        return [*actions, Send(link, AskRevocations(own))] if hello.revision > own else actions

    def _welcome(self, link: Link, record: PeerRecord, now: Instant, *, needy: bool) -> list[MembershipAction]:
        node = record.node_id
        actions: list[MembershipAction] = []
        if not link.dialled:
            actions.append(Send(link, self._greeting(link)))
        attempt = self.links.attempts.get(link)
        surplus = self.links.settle(node, record, link, now.steady, needy=needy)
        peer, self._full = self.links.peers[node], None
        self.refusals.admitted()
        if surplus is not None:
            actions += self._part(surplus, now)
        else:
            self.detector.up(node, now.steady)
            actions += [PeerUp(node, peer.place.voice), Send(link, self.directory.sample(node, peer.scope))]
            if self._setup.manifest == b"":  # The list comes first: who waits for the manifest has then heard all.
                actions += [Send(link, AskRevocations(0)), Send(link, AskManifest())]
            actions += self.directory.introduce(record)
        self.book.add(record, peer.host)
        self.book.trim(self.links.peers, self._rng)
        for contact in (attempt.contact if attempt else None, self.book.contact(node)):
            if contact is not None:
                contact.met()
        return actions

    def _refuse(self, link: Link, reason: str, now: Instant) -> list[MembershipAction]:
        """Say why the link is of no use, and close it once that has arrived."""
        attempt = self.links.attempts.pop(link, None)
        if attempt is not None:
            attempt.contact.busy(now, self._rng)
        return [Send(link, Goodbye(reason)), *self._part(link, now)]

    def _part(self, link: Link, now: Instant) -> list[MembershipAction]:
        return [] if self.links.part(link, now.steady) else [HangUp(link)]

    def _room_for(self, link: Link, record: PeerRecord, now: Instant, *, needy: bool) -> list[MembershipAction] | None:
        """Return the actions that make a place for a caller, none if there is one; None: it gets no place."""
        place, node = self.links.place_of(link, record.endpoints), None
        if self.links.has_room(link, record, place.network):
            return []
        if not record.endpoints:
            node = self.links.displaced_home(place.voice, needy=needy)
        elif needy and not self.links.is_full_of(place.network):
            node = self.links.evictable(self.directory.here(Scope.LOOPBACK), place.voice, now)
        return self._leave(node, "evicted", now) if node is not None else None

    def _leave(self, node: NodeId, reason: str, now: Instant) -> list[MembershipAction]:
        """End a live peer's link with a goodbye. A peer that is not to blame gets records of others to turn to."""
        sample = self.directory.sample(node, self.links.peers[node].scope)
        contact = self.book.contact(node)
        if contact is not None:
            contact.busy(now, self._rng)
        self.detector.down(node)
        actions = self.reachability.gone(node)
        link = self.links.drop(node)
        if reason in NO_ROOM:
            actions.append(Send(link, sample))
        return [*actions, *self._refuse(link, reason, now), PeerDown(node)]

    def _goodbye(self, link: Link, goodbye: Goodbye, now: Instant) -> list[MembershipAction]:
        attempt, node = self.links.attempts.pop(link, None), self.links.live_node(link)
        dialled = attempt.contact if attempt is not None else None
        where = str(attempt.address.endpoint) if attempt is not None else ""
        if goodbye.reason not in NO_ROOM and (who := node or where):
            self.refusals.by(who, goodbye.reason, now)
        for contact in (dialled, self.book.contact(node) if node is not None else None):
            if contact is not None:
                contact.busy(now, self._rng)
        if goodbye.reason == "full" and attempt is not None:
            self.refusals.full = where
            if can_dial_back(attempt.host):
                self._full_since = now.steady if self._full is None else self._full_since
                self._full = attempt.contact
        actions = self._drop(node) if node is not None else [HangUp(link)]
        if node is None and goodbye.reason in NO_ROOM and self._setup.manifest == b"":
            actions = [Send(link, AskManifest()), *self._part(link, now)]  # who has no room for us may yet give it
        return [*actions, *self._dialing.fill(now)]

    def _lose(self, node: NodeId, now: Instant) -> list[MembershipAction]:
        contact = self.book.contact(node)
        if contact is not None:
            contact.failed(now, self._rng)
        return self._drop(node)

    def _drop(self, node: NodeId) -> list[MembershipAction]:
        self.detector.down(node)
        return [*self.reachability.gone(node), HangUp(self.links.drop(node)), PeerDown(node)]

    # Records

    def _hear_of(self, link: Link, sender: NodeId, peers: Peers, now: Instant) -> list[MembershipAction]:
        peer = self.links.peers.get(sender)
        if peer is None and link not in self.links.attempts:
            return []  # the link is ending at both sides: what still comes is nobody's fault
        place = peer.place if peer is not None else self.links.place_of(link)
        was_home = peer is not None and peer.is_home
        self.directory.learn(place.voice, self.links.scope_of(link), peers, now)
        if was_home and peer is not None and not peer.is_home:
            self._dialing.hurry(now)
        return [*self._dialing.fill(now)]

    # The revocation list

    def _obey(self, encoded: bytes, teller: NodeId | None, now: Instant) -> list[MembershipAction]:
        """Take in a revocation list if it is new, and tell it to all peers but its teller."""
        if encoded == self._setup.gate.revocations or not self._setup.gate.obey(encoded):
            return []
        tell = [Send(peer.link, Revocations(encoded)) for node, peer in self.links.peers.items() if node != teller]
        left = self._dismiss(now)
        kept_out = [record for record in self.book.all_records() if self._setup.gate.admits(record, now)]
        self.book.forget(record.node_id for record in kept_out)
        lapsed = [record.node_id for record in self.book.lapsed_records()]  # their grants may be new by now
        self.book.forget(filter(self._setup.gate.is_revoked, lapsed))
        return [*tell, *left]

    # Time

    def _tick(self, now: Instant) -> list[MembershipAction]:
        self.directory.tick(now)
        self.links.is_home = not self.directory.record.endpoints
        self.links.is_small = not self.book.has_more_than(self._setup.limits.max_peers)
        actions: list[MembershipAction] = [HangUp(link) for link in self.links.due(now.steady)]
        for link, attempt in self.links.late(now.steady):
            self._unanswered(attempt, now)
            actions.append(HangUp(link))
        for link, attempt in list(self.links.attempts.items()):
            if attempt.greeted is not None and attempt.greeted + HELLO_RETRY_S <= now.steady:
                actions += self._opened(link, now)
        probes = self.detector.tick(now.steady)
        actions += [Send(self.links.peers[node].link, ping) for node, ping in probes.pings.items()]
        for node in probes.dead:
            self.deaths += 1
            if not self.links.peers[node].record.endpoints:
                self.book.forget([node])  # nobody can dial it; if it lives, it will dial
            actions += self._lose(node, now)
        if now.steady >= self._next_review:
            self._next_review = now.steady + self._setup.timing.exchange_interval
            actions += self._dismiss(now)
        actions += self.reachability.tick(now)
        actions += self.directory.correct(self.reachability.told, now)
        actions += self.directory.exchange(now)
        if (rotated := self._dialing.replaceable(now)) is not None:
            actions += self._leave(rotated, "rotated", now)
        return [*actions, *self._dialing.fill(now), *self._dialing.feel(now), *self._return_as_home(now)]

    def _return_as_home(self, now: Instant) -> list[MembershipAction]:
        """Call a node again that had no room for us, and may have some for a home node (see `reachability`, rule 3)."""
        is_trying = any(not attempt.contact.has_failed for attempt in self.links.attempts.values())
        may_yet = is_trying and now.steady < self._full_since + DIAL_TIMEOUT_S  # some may lead nowhere, as we may
        if self._full is None or self.links.peers or may_yet or not self.reachability.hide():
            return []
        self._full.met()
        return [*self.directory.correct(self.reachability.told, now), *self._dialing.fill(now)]

    def _dismiss(self, now: Instant) -> list[MembershipAction]:
        """Part from live peers that are no longer admitted: their grant has ended, or they are revoked."""
        actions: list[MembershipAction] = []
        for node, peer in list(self.links.peers.items()):
            if reason := self._setup.gate.admits(peer.record, now):
                self.refusals.of(node, reason, now)
                actions += self._leave(node, reason, now)
        return actions


def clock_fault(record: PeerRecord, unix: float) -> str:
    """Return what is wrong with the clock of a node whose hello has this record; "" for one whose record is in time.

    A node renews its record long before it expires.
    """
    if record.expiry_ms <= unix * 1000:
        return CLOCK_BEHIND
    return CLOCK_AHEAD if record.expiry_ms > (unix + MAX_RECORD_LIFE_S) * 1000 else ""
