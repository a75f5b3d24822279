"""One node's protocol, whole and without I/O: `handle(event, now) -> actions`.

It joins the cores. Every frame takes the same path, cheapest check first:

    every frame      who sent it -> graylisted? -> is there a quota? (`limits.quotas`)
    a message to us  -> membership or gossip
    an item          -> asked for? -> seen before? -> version -> signature -> digest -> swarm -> gossip
    a hello          -> version -> signature -> digest -> swarm -> membership

CURVE proves the key at the other end of a link, and a signed record binds that key to a node id. So a message needs no
signature. An item may come from any live peer, whoever signed it. If a check fails, the frame is dropped and counted by
reason, and whoever is to blame pays.
"""

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from protocol.config import Instant, Setup
from protocol.errors import EnvelopeError, MessageError, PeerError, RevocationError
from protocol.events import (
    Accepted,
    Arrived,
    Blame,
    Bring,
    ChargePrefix,
    Closed,
    CoreAction,
    CoreEvent,
    Deliver,
    Dial,
    FillLink,
    GossipAction,
    HangUp,
    Item,
    ItemVerdict,
    Judgement,
    Link,
    MembershipAction,
    Message,
    Moved,
    Moving,
    Neighbour,
    Offer,
    Opened,
    Outline,
    PeerDown,
    PeerUp,
    PortMapped,
    RefusedEarly,
    Revoked,
    Send,
    SendFrame,
    Serve,
    Subscribe,
    Tick,
    TurnedAway,
)
from protocol.gossip.exchange import Gossip
from protocol.identity import NodeId, node_id
from protocol.limits.peer_scores import NODE_ALONE, PENALTIES, REJECT_PENALTY, PeerScores
from protocol.limits.quotas import GIVEN_S, SENT_BYTE_S, Quotas, price
from protocol.lru import Recent
from protocol.membership.address_book import Book
from protocol.membership.membership import BEFORE_HELLO, TICK_S, Membership
from protocol.refusals import PeerClocks
from protocol.wire.envelope import (
    CHUNK_BYTES,
    CONTENT,
    HASH_BYTES,
    HEAD_BYTES,
    Control,
    Envelope,
    Header,
    ItemId,
    Kind,
    chunk_count,
    chunk_hashes,
    claimed_id,
    content_id,
    control_frame,
    digest_of_hashes,
    kind_of,
    open_frame,
    open_header,
    read_control,
    seal,
)
from protocol.wire.messages import (
    ITEM_OVERHEAD_BYTES,
    TOPIC_BYTES,
    Ack,
    Body,
    Busy,
    Cancel,
    DontHave,
    Goodbye,
    Have,
    Hello,
    Interest,
    ItemChunk,
    ItemOutline,
    Manifest,
    Want,
)
from protocol.wire.version import OTHER_VERSION, spoken_version

QUEUE_FULL = "queue_full"  # the reason of a `RefusedEarly`: a message to a peer had no room in its send queue


KINDS = frozenset(Kind)


@dataclass(slots=True)
class Traffic:
    """Bytes of frames from and to a peer, `since` when it is live (steady clock)."""

    since: float
    received: int = 0
    sent: int = 0


GOSSIP: dict[int, Callable[[bytes], Have | Want | DontHave | Interest]] = {
    message.kind: message.decode for message in (Have, Want, Cancel, Ack, DontHave, Busy, Interest)
}


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
        self.scores = PeerScores(setup.limits)
        self._quotas = Quotas(setup.limits)
        self._gate = setup.gate
        self._obeyed = 0  # the revision of the revocation list that gossip was last told of
        self.membership = Membership(setup, book, rng, now, self.scores.is_refused)
        self.gossip = Gossip(setup.identity.node_id, setup, rng, now)
        self.manifest = setup.manifest  # empty until a peer sent it
        self.clocks = PeerClocks()
        most = setup.limits.max_remembered
        self._ended: Recent[Link, None] = Recent(most)  # links whose last frames may still come: nobody's fault
        self._misfits: Recent[bytes, None] = Recent(most)  # CURVE keys whose holders speak another version
        # In microseconds, so that a restarted node goes on above what it used before.
        self._sequence = int(now.unix * 1e6)
        self._members_ticked = now.steady - TICK_S  # the first tick is due at once
        self.traffic: dict[NodeId, Traffic] = {}  # of the live peers
        self.bytes_received = 0
        self.bytes_sent = 0
        self.items_received = 0
        self.items_sent = 0
        self.duplicates = 0

    def wait(self, now: Instant) -> float:
        """Return how many seconds may pass before the next `Tick`."""
        return max(0.0, min(self._members_ticked + TICK_S, self.gossip.due, self._quotas.due) - now.steady)

    def note_sent(self, action: SendFrame) -> None:
        """Count a frame that the transport took."""
        self._count(self.membership.live_node(action.link), sent=len(action.frame))

    def make_frame(self, link: Link, now: Instant) -> bytes:
        """Return the frame of the next item that waits for a link, now that the link is free; empty if none waits."""
        node = self.membership.live_node(link)
        payer = self.membership.links.payer(link)
        may_take = node is not None and self._quotas.may_take(payer, now.steady)
        served = self.gossip.serve(node, now) if node is not None and may_take else None
        match served:
            case None:
                return b""
            case Item(frame=frame):
                self.items_sent += 1
            case ItemChunk(index=index):
                frame = _frame(served)
                self.items_sent += index == 0
            case _:
                frame = _frame(served)
        self._count(node, sent=len(frame))
        self._quotas.spend(payer, GIVEN_S + len(frame) * SENT_BYTE_S, now.steady)
        return frame

    def _count(self, node: NodeId | None, *, received: int = 0, sent: int = 0) -> None:
        self.bytes_received += received
        self.bytes_sent += sent
        if node is not None and (traffic := self.traffic.get(node)) is not None:
            traffic.received += received
            traffic.sent += sent

    def refuses(self, key: bytes, now: Instant) -> bool:
        """Tell whether the holder of a CURVE key is graylisted: by its node id if it proved one, else by the key."""
        return self.scores.is_refused(self._subject(Link(key, dialled=False)), now)

    def handle(self, event: CoreEvent, now: Instant) -> list[CoreAction]:  # an arm an event
        """Advance by one event. Nothing that a peer sends raises: it is counted."""
        match event:
            case Arrived(link, frame):
                return self._arrived(link, frame, now)
            case Offer(body, hashes):
                return self._offer(body, hashes, now)
            case Subscribe():
                return self._do(self.gossip.subscribe(event, now), now)
            case Bring(item_id):
                return self._do(self.gossip.bring(item_id), now)
            case Opened(link) | Accepted(link):
                self._ended.pop(link)
                return self._do(self.membership.handle(event, now), now)
            case Closed(link):
                self._quotas.drop(link)
                self._ended.set(link, None)
                actions = self._do(self.membership.handle(event, now), now)
                return [*actions, *self._refill(link)]
            case Moving() | Moved() | PortMapped() | Neighbour() | TurnedAway():
                return self._do(self.membership.handle(event, now), now)
            case Revoked():
                return self._revoked(event, now)
            case Judgement():
                return self._judged(event, now)
            case RefusedEarly():
                return self._refused(event, now)
            case Tick():
                return self._tick(now)

    def _refused(self, event: RefusedEarly, now: Instant) -> list[CoreAction]:
        link = event.link
        node = self.membership.live_node(link) if link is not None else None
        if node is not None and event.reason == QUEUE_FULL:
            self.gossip.unheard(node, now)
        return self._offence(event.reason, link, self._subject(link) if link is not None else None, now)

    def _refill(self, link: Link) -> list[CoreAction]:
        """When one of a peer's two links ends, let what waited for it wait for the other."""
        node = self.membership.live_node(link)
        other = self.membership.link_of(node) if node is not None else None
        return [FillLink(other)] if other not in (None, link) else []

    def _revoked(self, event: Revoked, now: Instant) -> list[CoreAction]:
        try:
            return self._do(self.membership.handle(event, now), now)
        except RevocationError as error:
            self.scores.offence(error.reason, None, now)
            return []

    def _subject(self, link: Link) -> str:
        """Return the name under which a link's holder is scored: its node id once proven, its key before."""
        return self.membership.links.proven_node(link) or link.key.hex()

    def _offence(
        self, reason: str, link: Link | None, subject: str | None, now: Instant, points: float | None = None
    ) -> list[CoreAction]:
        """Count one refusal. `subject` pays, and so does its network unless the reason is `NODE_ALONE`."""
        paid, refused_for = self.scores.offence(reason, subject, now, points)
        if subject is not None and refused_for is not None:
            self.membership.refusals.offender(subject, refused_for, now)
        return [ChargePrefix(link, paid)] if paid and link is not None and reason != NODE_ALONE else []

    def _arrived(self, link: Link, frame: bytes, now: Instant) -> list[CoreAction]:
        node = self.membership.live_node(link)
        self._count(node, received=len(frame))
        subject: str = node if node is not None else self._subject(link)
        if self.scores.is_refused(subject, now):
            self.scores.offence("graylisted", None, now)
            return self._do(self._expel(node, link, frame, now), now)
        payer = self.membership.links.payer(link)
        if node is not None and kind_of(frame) in CONTENT:
            if self.gossip.owes(node, content_id(frame)):
                return self._handled(link, node, frame, now)
            self._quotas.spend(payer, price(frame), now.steady)
            return self._priced("unasked_item", link, frame, now)
        if self._quotas.may_speak(payer, link, now.steady):
            return self._paid(link, frame, now)
        if node is not None:
            self.membership.heard(node, now)
        dropped = self._quotas.put(payer, link, frame, now.steady)
        return [action for other, lost in dropped for action in self._priced("flood", other, lost, now)]

    def _priced(self, reason: str, link: Link, frame: bytes, now: Instant) -> list[CoreAction]:
        """Refuse a frame whose sender loses points by its price."""
        return self._offence(reason, link, self._subject(link), now, PENALTIES[reason] * price(frame))

    def _expel(self, node: NodeId | None, link: Link, frame: bytes, now: Instant) -> list[MembershipAction]:
        """Part from a graylisted peer, or from a stranger; from one that is parting already once it floods us."""
        if node is not None:
            return self.membership.expel(node, now)
        payer = self.membership.links.payer(link)
        self._quotas.spend(payer, price(frame), now.steady)
        may_stay = self._is_parting(link) and self._quotas.may_speak(payer, link, now.steady)
        return [] if may_stay else [HangUp(link)]

    def _paid(self, link: Link, frame: bytes, now: Instant) -> list[CoreAction]:
        """Handle a frame, and let its payer pay for it and for what is answered at once."""
        payer = self.membership.links.payer(link)
        actions = self._handled(link, self.membership.live_node(link), frame, now)
        sent = sum(len(action.frame) for action in actions if isinstance(action, SendFrame) and action.link == link)
        self._quotas.spend(payer, price(frame) + sent * SENT_BYTE_S, now.steady)
        return actions

    def _handled(self, link: Link, node: NodeId | None, frame: bytes, now: Instant) -> list[CoreAction]:
        subject: str = node if node is not None else self._subject(link)
        try:
            if node is not None and kind_of(frame) == Kind.ITEM:
                claimed = claimed_id(frame)
                if self.gossip.signer(claimed) is None:
                    return self._item(node, claimed, frame, now)
                self.gossip.came(node, claimed, now)
                self.duplicates += 1
                return []
            control = read_control(frame)
            if control is None:
                return self._greeted(link, frame, now)
            if node is None and not (link.dialled and control.kind in BEFORE_HELLO):
                if control.kind == Kind.ASK_MANIFEST and self.membership.links.proven_node(link) is not None:
                    return self._answer_manifest(link, now)  # an admitted node that we had no room for
                if control.kind != Kind.REVOCATIONS:  # which may show that its holder is to be admitted
                    # One whom we dialled may hold us for live since an earlier hello: it takes one a second.
                    if self._is_parting(link) or link in self.membership.links.attempts:
                        return []
                    raise MessageError("no_hello")
            return self._control(link, node, control, now)
        except PeerError as error:
            if error.reason == OTHER_VERSION and node is None:
                return self._other_version(link, frame, now)
            # No live peer changes its version.
            return self._offence("forged" if error.reason == OTHER_VERSION else error.reason, link, subject, now)

    def _is_parting(self, link: Link) -> bool:
        """Tell whether the link is ending, so that frames without a hello are nobody's fault."""
        return self.membership.links.is_parting(link) or link in self._ended

    def _other_version(self, link: Link, frame: bytes, now: Instant) -> list[CoreAction]:
        """Part from a node of another major version, and tell it ours."""
        theirs = spoken_version(frame)
        self.scores.offence(OTHER_VERSION, None, now)
        if theirs is None or self.membership.links.is_parting(link):
            return []
        self._misfits.set(link.key, None)
        return self._do(self.membership.misfit(link, theirs, now), now)

    def _open(self, frame: bytes) -> Envelope:
        envelope = open_frame(frame, self._identity.verify)
        if envelope.swarm != self._swarm:
            raise EnvelopeError("wrong_swarm")
        return envelope

    def _item(self, node: NodeId, claimed: ItemId, frame: bytes, now: Instant) -> list[CoreAction]:
        envelope = self._open(frame)  # so it is what it claims to be
        self.membership.heard(node, now)
        signer = node_id(envelope.public_key)
        if refusal := self._item_refusal(node, signer, envelope, now):
            return self._refuse_item(refusal, node, signer, claimed, now)
        if envelope.size < TOPIC_BYTES:
            raise MessageError("malformed", "item")
        if envelope.size > CHUNK_BYTES:
            raise MessageError("oversized", "an item of several chunks in one frame")
        topic = frame[HEAD_BYTES : HEAD_BYTES + TOPIC_BYTES]
        item = Item(claimed, signer, envelope.time_ms / 1000, topic, frame)
        return self._do(self.gossip.got(node, item, now), now)

    def _item_refusal(self, node: NodeId, signer: NodeId, header: Header, now: Instant) -> str:
        age = now.unix - header.time_ms / 1000
        if not -self._limits.max_clock_ahead_s <= age <= self._limits.max_item_age_s:
            return "stale"
        if self._gate.is_revoked(signer):
            return "revoked"
        return "graylisted" if signer != node and self.scores.is_refused(signer, now) else ""

    def _refuse_item(self, refusal: str, node: NodeId, signer: NodeId, item: ItemId, now: Instant) -> list[CoreAction]:
        # The time stamp is its signer's. A peer that only passed the item on is not to blame.
        self.gossip.came(node, item, now)
        blamed = node if node == signer and refusal == "stale" else None
        return self._offence(refusal, self.membership.link_of(node), blamed, now)

    def _outline(self, node: NodeId, body: bytes, now: Instant) -> list[CoreAction]:
        message = ItemOutline.decode(body)
        header = open_header(message.head, self._identity.verify)
        if header.digest != digest_of_hashes(message.hashes) or header.kind != Kind.ITEM:
            raise MessageError("malformed", "outline")
        if len(message.hashes) != HASH_BYTES * chunk_count(header.size) or header.size <= CHUNK_BYTES:
            raise MessageError("malformed", "outline's size")
        if header.swarm != self._swarm:
            raise EnvelopeError("wrong_swarm")
        if header.size > self._limits.max_item_bytes + ITEM_OVERHEAD_BYTES:
            raise MessageError("oversized", f"an item of {header.size} bytes")
        signer = node_id(header.public_key)
        if refusal := self._item_refusal(node, signer, header, now):
            return self._refuse_item(refusal, node, signer, header.item_id, now)
        outline = Outline(header, message.head, message.hashes)
        return self._do(self.gossip.outlined(node, outline, now), now)

    def _greeted(self, link: Link, frame: bytes, now: Instant) -> list[CoreAction]:
        """Handle a sealed frame that is no item: it must be a hello, or of a kind that a newer minor version added."""
        envelope = self._open(frame)
        if envelope.kind != Kind.HELLO:
            is_newer = envelope.kind not in KINDS and self.membership.live_node(link) is not None
            if is_newer or self._is_parting(link):
                return []
            raise MessageError("no_hello" if envelope.kind == Kind.ITEM else "malformed")
        sender = node_id(envelope.public_key)
        actions = self._do(self.membership.handle(Message(link, sender, Kind.HELLO, envelope.body), now), now)
        if self.membership.live_node(link) == sender:
            self.membership.heard(sender, now)
            self.clocks.said(self.membership.links.peers[sender].place.voice, envelope.time_ms / 1000, now)
        return actions

    def _control(self, link: Link, node: NodeId | None, said: Control, now: Instant) -> list[CoreAction]:
        sender = node or self.membership.links.proven_node(link) or NodeId(link.key.hex())
        actions: list[CoreAction]
        match said.kind:
            case Kind.CHUNK:
                actions = self._do(self.gossip.chunk_arrived(sender, ItemChunk.decode(said.body), now), now)
            case Kind.HELLO | Kind.ITEM:
                raise MessageError("malformed", "it has to be sealed")
            case kind if (read := GOSSIP.get(kind)) is not None:
                actions = self._do(self.gossip.heard(sender, read(said.body), now), now)
            case Kind.OUTLINE:
                actions = self._outline(sender, said.body, now)
            case Kind.ASK_MANIFEST:
                actions = self._answer_manifest(link, now)
            case Kind.MANIFEST:
                self._take_manifest(Manifest.decode(said.body).encoded)
                actions = []
            case _:
                message = Message(link, sender, said.kind, said.body)
                actions = self._do(self.membership.handle(message, now), now)
        if self.membership.live_node(link) == sender:
            self.membership.heard(sender, now)
        return actions

    def _answer_manifest(self, link: Link, now: Instant) -> list[CoreAction]:
        if not self.manifest:
            return []
        return [self._send(link, Manifest(self.manifest), now)]

    def _take_manifest(self, encoded: bytes) -> None:
        if self.manifest != b"":
            return  # the swarm has no manifest, or we have it
        if hashlib.sha256(encoded).digest()[: len(self._swarm)] != self._swarm:
            raise MessageError("false_manifest", "its hash is not the swarm's id")
        self.manifest = encoded

    def _offer(self, body: bytes, hashes: bytes | None, now: Instant) -> list[CoreAction]:
        hashes = chunk_hashes(body) if hashes is None else hashes
        frame = self._seal(Kind.ITEM, body, now, hashes)
        own = self._identity
        item = Item(claimed_id(frame), own.node_id, now.unix, body[:TOPIC_BYTES], frame, hashes)
        self.gossip.publish(item, now)
        return []

    def _judged(self, judgement: Judgement, now: Instant) -> list[CoreAction]:
        if judgement.verdict is ItemVerdict.IGNORE:
            self.scores.offence(judgement.reason, None, now)
        elif judgement.verdict is ItemVerdict.REJECT:
            signer = self.gossip.signer(judgement.id)
            self.gossip.discard(judgement.id)
            link = self.membership.link_of(signer) if signer is not None else None
            return self._offence(judgement.reason, link, signer, now, REJECT_PENALTY)
        return []

    def _tick(self, now: Instant) -> list[CoreAction]:
        actions: list[CoreAction] = []
        while now.steady >= self._quotas.due and (waited := self._quotas.next(now.steady)) is not None:
            actions += self._paid(*waited, now)
        if now.steady >= self._members_ticked + TICK_S:
            self._members_ticked = now.steady
            actions += self._do(self.membership.handle(Tick(), now), now)
        if now.steady >= self.gossip.due:
            actions += self._do(self.gossip.tick(now), now)
        return actions

    def _do(self, wanted: Iterable[MembershipAction | GossipAction], now: Instant) -> list[CoreAction]:
        """Turn what membership and gossip ask for into what the transport and the node are to do."""
        if self._gate.revision != self._obeyed:
            self._obeyed = self._gate.revision
            self.gossip.withdraw_signed(self._gate.is_revoked)
        actions: list[CoreAction] = []
        for action in wanted:
            match action:
                case Send(to) | Serve(to):
                    link = to if isinstance(to, Link) else self.membership.link_of(to)
                    if link is not None and isinstance(action, Send):
                        actions.append(self._send(link, action.message, now))
                    elif link is not None:
                        actions.append(FillLink(link))
                case Blame(node, reason):
                    actions += self._offence(reason, self.membership.link_of(node), node, now)
                case Deliver(_, again):
                    self.items_received += not again
                    actions.append(action)
                case Dial():
                    actions.append(action)
                case HangUp(link):
                    self._quotas.drop(link)
                    self._ended.set(link, None)
                    actions += [action, *self._refill(link)]
                case PeerUp(node, voice):
                    self.traffic.setdefault(node, Traffic(now.steady))
                    actions += self._do(self.gossip.up(node, now, voice), now)
                case PeerDown(node):
                    self.traffic.pop(node, None)
                    self.gossip.down(node, now)
        return actions

    def _send(self, link: Link, message: Body, now: Instant) -> SendFrame:
        says_version = isinstance(message, Hello) or (isinstance(message, Goodbye) and link.key in self._misfits)
        return SendFrame(link, self._seal(message.kind, message.encode(), now) if says_version else _frame(message))

    def _seal(self, kind: Kind, body: bytes, now: Instant, hashes: bytes | None = None) -> bytes:
        self._sequence += 1
        return seal(self._identity, self._swarm, kind, self._sequence, int(now.unix * 1000), body, hashes)


def _frame(message: Body) -> bytes:
    """Return the frame of what is said to one peer only."""
    return control_frame(message.kind, message.encode())
