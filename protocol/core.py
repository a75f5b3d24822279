"""One node's protocol, whole and without I/O: `handle(event, now) -> actions`.

It joins the cores. Every frame takes the same path, cheapest check first:

    who is it -> graylisted? -> within its allowance? -> bytes seen before? -> signature
    -> swarm -> membership (control messages) or gossip (items)

A control message counts only over a link whose proven holder signed it, in rising
sequence. An item may come from any live peer, whoever signed it. The first failing check
drops the frame, counts it by reason, and costs whoever is to blame.
"""

import hashlib
import random

from protocol.config import Instant, Setup
from protocol.errors import EnvelopeError, MessageError, PeerError, RevocationError
from protocol.events import (
    Announced,
    Arrived,
    Blame,
    ChargePrefix,
    Closed,
    CoreAction,
    CoreEvent,
    Deliver,
    Dial,
    Discard,
    Expel,
    GossipAction,
    Got,
    HangUp,
    Interested,
    Item,
    Link,
    MembershipAction,
    Message,
    Moved,
    NotSent,
    Offer,
    Opened,
    PeerDown,
    PeerUp,
    Publish,
    Pulled,
    Received,
    Refused,
    Report,
    Revoked,
    Send,
    SendFrame,
    Stored,
    Subscribe,
    Tick,
    Unsent,
    Verdict,
)
from protocol.gossip.gossip import Gossip
from protocol.identity import NodeId, node_id
from protocol.limits.peer_scores import REJECT_PENALTY, Admission, subject_of
from protocol.limits.rate_limits import TokenBucket
from protocol.lru import Recent
from protocol.membership.address_book import Book
from protocol.membership.membership import BEFORE_HELLO, TICK_S, Membership
from protocol.wire.envelope import Envelope, ItemId, Kind, item_id, open_frame, seal
from protocol.wire.messages import TOPIC_BYTES, Announce, AskManifest, Body, Interest, Manifest, Pull

MAX_REMEMBERED_FRAMES = 1 << 15
MAX_LINKS = 1024  # whose last sequence number is remembered
# A manifest has up to 64 KiB. Whoever lacks it asks once each time that a peer comes up.
MANIFEST_ASK_S, MANIFEST_ASKS = 10.0, 4


class Core:
    """See the module's comment. Attributes are for reading."""

    def __init__(
        self,
        setup: Setup,
        book: Book,
        rng: random.Random,
        now: Instant,
    ) -> None:
        self._identity = setup.identity
        self._swarm = setup.swarm
        self._limits = setup.limits
        self.admission = Admission(setup.limits)
        self._gate = setup.gate
        self._obeyed = 0  # the revision of the revocation list for which gossip let go of what it names
        self.membership = Membership(setup, book, rng, now, self.admission.is_refused)
        self.gossip = Gossip(setup.identity.node_id, setup, rng, now)
        self.manifest = setup.manifest  # empty until a peer sent it
        self._frames: Recent[bytes, ItemId] = Recent(MAX_REMEMBERED_FRAMES)
        self._sequences: Recent[Link, int] = Recent(MAX_LINKS)
        self._manifest_asks: Recent[bytes, TokenBucket] = Recent(MAX_LINKS)
        # In microseconds, so that a restarted node goes on above what it used before.
        self._sequence = int(now.unix * 1e6)
        self._members_ticked = self._items_ticked = now.steady - TICK_S  # the first tick is due at once
        self.bytes_received = 0
        self.bytes_sent = 0
        self.items_received = 0
        self.items_sent = 0
        self.duplicates = 0

    def wait(self, now: Instant) -> float:
        """Return how many seconds may pass before the next `Tick`."""
        members = self._members_ticked + TICK_S
        items = self._items_ticked + self.gossip.wait()
        return max(0.0, min(members, items) - now.steady)

    def note_sent(self, action: SendFrame) -> None:
        """Count a frame that the transport took."""
        self.bytes_sent += len(action.frame)
        self.items_sent += action.is_item

    def refuses(self, key: bytes, now: Instant) -> bool:
        """Tell whether the holder of a CURVE key is graylisted, under its node id if it ever proved one."""
        return self.admission.is_refused(self._subject(Link(key, dialled=False)), now)

    def handle(self, event: CoreEvent, now: Instant) -> list[CoreAction]:
        """Advance by one event. Nothing that a peer sends raises: it is counted."""
        match event:
            case Arrived(link, frame):
                return self._arrived(link, frame, now)
            case Offer(body, topic):
                return self._offer(topic + body, now)
            case Subscribe():
                return self._items(self.gossip.handle(event, now), now)
            case Opened() | Closed() | Moved() | Stored():
                return self._members(self.membership.handle(event, now), now)
            case Revoked():
                return self._revoked(event, now)
            case Unsent(link, ids):
                node = self.membership.live_node(link)
                return self._items(self.gossip.handle(NotSent(node, ids), now), now) if node else []
            case Report():
                return self._report(event, now)
            case Refused(reason, offender):
                return self._offence(reason, offender, self._subject(offender) if offender else None, now)
            case Tick():
                return self._tick(now)

    def _revoked(self, event: Revoked, now: Instant) -> list[CoreAction]:
        try:
            return self._members(self.membership.handle(event, now), now)
        except RevocationError as error:
            self.admission.offence(error.reason, None, now)
            return []

    def _subject(self, link: Link) -> str:
        return subject_of(link, self.membership.proven_node(link))

    def _offence(
        self, reason: str, link: Link | None, subject: str | None, now: Instant, points: float | None = None
    ) -> list[CoreAction]:
        """Count one refusal; `subject` pays, and the network that it dialled from by `link`."""
        paid = self.admission.offence(reason, subject, now, points)
        return [ChargePrefix(link, paid)] if paid and link is not None and not link.dialled else []

    def _arrived(self, link: Link, frame: bytes, now: Instant) -> list[CoreAction]:
        self.bytes_received += len(frame)
        node = self.membership.live_node(link)
        subject = self._subject(link)
        if self.admission.is_refused(subject, now):
            self.admission.offence("graylisted", None, now)
            return self._members(self.membership.handle(Expel(node), now), now) if node else []
        if not self.admission.may_send(link, len(frame), now):
            return self._offence("flood", link, subject, now)
        # A digest is 20 times cheaper than a signature check, and only frames that passed one are remembered.
        digest = hashlib.sha256(frame).digest()
        known = self._frames.get(digest)
        try:
            if known is not None and node is not None:
                self._repeated(node, known)
                return []
            envelope = open_frame(frame, self._identity.verify)
            if envelope.swarm != self._swarm:
                raise EnvelopeError("wrong_swarm")
            if node is None and envelope.kind not in (BEFORE_HELLO if link.dialled else {Kind.HELLO}):
                if self.membership.is_parting(link):
                    return []
                if not (envelope.kind == Kind.REVOCATIONS and self.membership.awaits_list(link)):
                    raise MessageError("no_hello")
            if envelope.kind == Kind.ITEM and node is not None:
                return self._item(node, frame, digest, envelope, now)
            return self._control(link, node, envelope, now)
        except PeerError as error:
            return self._offence(error.reason, link, subject, now)

    def _repeated(self, node: NodeId, known: ItemId) -> None:
        if self.gossip.duplicate(node, known):
            raise MessageError("replayed", "the same frame from the same peer")
        self.duplicates += 1

    def _item(self, node: NodeId, frame: bytes, digest: bytes, envelope: Envelope, now: Instant) -> list[CoreAction]:
        actions = self._members(self.membership.heard(node, now), now)
        stamp = envelope.time_ms / 1000
        signer = node_id(envelope.public_key)
        if not -self._limits.max_clock_ahead_s <= now.unix - stamp <= self._limits.max_item_age_s:
            # The stamp is its signer's. Whoever passed it on kept a promise, and its clock may differ from ours.
            self.gossip.duplicate(node, item_id(envelope.public_key, envelope.body))
            blamed = node if node == signer else None
            return actions + self._offence("stale", self.membership.link_of(node), blamed, now)
        if self._gate.is_revoked(signer):
            self.admission.offence("revoked", None, now)
            return actions
        if self.admission.is_refused(signer, now):
            self.admission.offence("graylisted", None, now)
            return actions
        if len(envelope.body) < TOPIC_BYTES:
            raise MessageError("malformed", "item")
        topic = envelope.body[:TOPIC_BYTES]
        item = Item(item_id(envelope.public_key, envelope.body), signer, stamp, topic, frame)
        self.duplicates += self.gossip.signer(item.id) is not None
        actions += self._items(self.gossip.handle(Got(node, item), now), now, envelope.body[TOPIC_BYTES:])
        if self.gossip.signer(item.id) is not None:  # what was not taken may be asked for later
            self._frames.set(digest, item.id)
        return actions

    def _control(self, link: Link, node: NodeId | None, envelope: Envelope, now: Instant) -> list[CoreAction]:
        sender = node_id(envelope.public_key)
        if node is not None and envelope.kind != Kind.HELLO:
            if sender != node:
                raise MessageError("impostor", "signed by another node than the link's")
            if envelope.sequence <= (self._sequences.get(link) or 0):
                raise MessageError("replayed", "sequence")
        actions: list[CoreAction]
        match envelope.kind:
            case Kind.ANNOUNCE:
                announced = Announced(sender, Announce.decode(envelope.body).items)
                actions = self._items(self.gossip.handle(announced, now), now)
            case Kind.PULL:
                actions = self._items(self.gossip.handle(Pulled(sender, Pull.decode(envelope.body).ids), now), now)
            case Kind.INTEREST:
                interested = Interested(sender, Interest.decode(envelope.body))
                actions = self._items(self.gossip.handle(interested, now), now)
            case Kind.ASK_MANIFEST:
                actions = self._answer_manifest(link, now)
            case Kind.MANIFEST:
                self._take_manifest(Manifest.decode(envelope.body).encoded)
                actions = []
            case _:
                message = Message(link, sender, envelope.kind, envelope.body)
                actions = self._members(self.membership.handle(message, now), now)
        if self.membership.live_node(link) == sender:
            self._sequences.set(link, envelope.sequence)
            actions += self._members(self.membership.heard(sender, now), now)
        return actions

    def _ask_manifest(self, node: NodeId, now: Instant) -> list[CoreAction]:
        link = self.membership.link_of(node)
        return [] if link is None else [self._send(link, AskManifest(), now)]

    def _answer_manifest(self, link: Link, now: Instant) -> list[CoreAction]:
        if not self.manifest:
            return []
        asks = self._manifest_asks.get(link.key) or TokenBucket(1 / MANIFEST_ASK_S, MANIFEST_ASKS, now.steady)
        self._manifest_asks.set(link.key, asks)
        if not asks.take(1, now.steady):
            raise MessageError("too_many_asks", "for the manifest")
        return [self._send(link, Manifest(self.manifest), now)]

    def _take_manifest(self, encoded: bytes) -> None:
        if self.manifest != b"":
            return  # there is none, or we have it
        if hashlib.sha256(encoded).digest()[: len(self._swarm)] != self._swarm:
            raise MessageError("false_manifest", "its hash is not the swarm's id")
        self.manifest = encoded

    def _offer(self, body: bytes, now: Instant) -> list[CoreAction]:
        frame = self._seal(Kind.ITEM, body, now)
        own = self._identity
        item = Item(item_id(own.public_key, body), own.node_id, now.unix, body[:TOPIC_BYTES], frame)
        self._frames.set(hashlib.sha256(frame).digest(), item.id)
        return self._items(self.gossip.handle(Publish(item), now), now)

    def _report(self, report: Report, now: Instant) -> list[CoreAction]:
        if report.verdict is Verdict.IGNORE:
            self.admission.offence(report.reason, None, now)
        elif report.verdict is Verdict.REJECT:
            signer = self.gossip.signer(report.id)
            self.gossip.handle(Discard(report.id), now)
            link = self.membership.link_of(signer) if signer is not None else None
            return self._offence(report.reason, link, signer, now, REJECT_PENALTY)
        return []

    def _tick(self, now: Instant) -> list[CoreAction]:
        actions: list[CoreAction] = []
        if now.steady >= self._members_ticked + TICK_S:
            self._members_ticked = now.steady
            actions += self._members(self.membership.handle(Tick(), now), now)
        if now.steady >= self._items_ticked + self.gossip.wait():
            self._items_ticked = now.steady
            actions += self._items(self.gossip.handle(Tick(), now), now)
        return actions

    def _members(self, wanted: list[MembershipAction], now: Instant) -> list[CoreAction]:
        if self._gate.revision != self._obeyed:
            self._obeyed = self._gate.revision
            self.gossip.withdraw_signed(self._gate.is_revoked)
        actions: list[CoreAction] = []
        for action in wanted:
            match action:
                case Send(link, message):
                    assert isinstance(link, Link)
                    actions.append(self._send(link, message, now))
                case Dial() | HangUp():
                    actions.append(action)
                case PeerUp() | PeerDown():
                    actions += self._items(self.gossip.handle(action, now), now)
                    if isinstance(action, PeerUp) and self.manifest == b"":
                        actions += self._ask_manifest(action.node, now)
        return actions

    def _items(self, wanted: list[GossipAction], now: Instant, body: bytes = b"") -> list[CoreAction]:
        """Carry out what gossip asks for; `body` is that of the item it was just given."""
        actions: list[CoreAction] = []
        for action in wanted:
            if isinstance(action, Deliver):
                self.items_received += 1
                item = action.item
                actions.append(Received(item.id, item.signer, body, item.time, item.topic))
                continue
            if isinstance(action, Blame):
                blamed = self.membership.link_of(action.node)
                actions += self._offence(action.reason, blamed, action.node, now)
                continue
            link = action.to if isinstance(action.to, Link) else self.membership.link_of(action.to)
            if link is not None:
                actions.append(self._send(link, action.message, now))
        return actions

    def _send(self, link: Link, message: Body | Item, now: Instant) -> SendFrame:
        match message:
            case Item(id_, frame=frame):
                return SendFrame(link, frame, (id_,), is_item=True)
            case Announce(items):
                return SendFrame(link, self._seal_message(message, now), tuple(entry.id for entry in items))
            case _:
                return SendFrame(link, self._seal_message(message, now))

    def _seal_message(self, message: Body, now: Instant) -> bytes:
        return self._seal(message.kind, message.encode(), now)

    def _seal(self, kind: Kind, body: bytes, now: Instant) -> bytes:
        self._sequence += 1
        return seal(self._identity, self._swarm, kind, self._sequence, int(now.unix * 1000), body)
