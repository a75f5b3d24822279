"""Getting items around: what is announced, asked for, served and passed on. A pure state machine.

An item is a signed envelope that is passed on as the bytes its signer made. Its id is a hash of the signer's key and
the body. The ledger holds what each peer was told, asked and given of each item.

    message     says                                              is answered by
    HAVE        I hold these items, or these chunks of them       WANT, or nothing
    WANT        give me these items, outlines, chunks             each of them, DONT_HAVE or BUSY
    DONT_HAVE   I do not have these
    BUSY        not these now; without ids: all that you asked for waits for my line
    CANCEL      I do not need these any more
    ACK         these came
    INTEREST    I want these topics, and whether I am sated: more of them is on offer than I can use

Rules
 1. No item is sent unasked. So each node decides how many bytes come to it, and who sends an item or a chunk without
    being asked pays for its size.
 2. A node that publishes an item, or gets a new one, holds it, and announces it to the interested live peers that may
    lack it. Chunks are announced, too, less often. An announcement waits until nothing new came for
    `announce_interval`, and `MOST_PACES` times that at most, so that a burst is announced once. A sated peer draws from
    what is announced a few times a `pull_patience`; announcements to it wait for as long. A peer is told of `MAX_IDS`
    items at a time, the newest first, and of the next after `CATCH_UP_S`.
 3. An announced item that we want and lack is asked for (see `wants`), as far as our demand goes (see `subscriptions`),
    at the next tick. That comes within `announce_interval`, or, if we are sated, a few times a `pull_patience`.
 4. A peer that comes up is told our interest, and what we hold or have chunks of, so a node that was away catches up.
    So is a peer that wants more topics than before; one that says again what it wants, as it had no room for all that
    was announced; and one to which a message found no room.
    Every `sync_interval` the newest items are announced to a random peer, in case something was lost. Sated peers, and
    peers for which something waits, are left out.
 5. An item that a peer wants waits for its line, and becomes a frame when the link is free for it and our own line has
    room (see `pace`): peers take turns. The answer is BUSY beyond `max_served` at a time, and DONT_HAVE for what is not
    here. While wants wait, BUSY without ids says so every half `pull_patience`. So no peer can make us wait or grow,
    and each knows what it waits for. A peer that asks for an item twice spends its own share of the line.
 6. A peer may send an item as often as it was asked for it. An item that two peers were asked for and send is an
    ordinary duplicate.
 7. An item of another topic than those that we want is neither delivered nor held, and costs its sender a little.
 8. What came is acknowledged: a chunk at once, small items together at the next tick. So a giver knows what has left
    its line, and a node that leaves knows which of its items have another holder. What was not acknowledged within
    `LOST_S` does not count as under way any more. Until that peer acknowledges something, it is given one thing in
    that time, which does not count. So who is silent stops nobody else.
 9. An item that our node rejects is announced no more. Peers that were told of it judge it themselves. The signer
    pays, not those who passed it on. An item that will soon be stale is not announced.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain, islice, takewhile

from protocol.config import Instant, Setup
from protocol.events import Blame, Deliver, GossipAction, Item, Outline, Send, Serve, Subscribe
from protocol.gossip.ledger import ALL, WHOLE, ItemLedger, Place, Statement
from protocol.gossip.pace import LEAST_BYTES, LOST_S, UPLINK_QUICK_S, Lines, LineWindow
from protocol.gossip.store import Store
from protocol.gossip.subscriptions import EVERYTHING, Appetite
from protocol.gossip.wants import Took, Wants, naming
from protocol.identity import NodeId
from protocol.lru import Expiring, Recent
from protocol.wire.envelope import CHUNK_BYTES, HEAD_BYTES, ItemId, chunk_count
from protocol.wire.messages import (
    ITEM_OVERHEAD_BYTES,
    MAX_IDS,
    Ack,
    Busy,
    Cancel,
    DontHave,
    Entry,
    Have,
    Interest,
    ItemChunk,
    ItemOutline,
    Want,
    hint,
)

CATCH_UP_S = 2.0  # between two batches of `MAX_IDS`: some 12 kB/s
DRAWS = 4  # in a `pull_patience`: how often silent peers are looked for and items to ask for are drawn
LOOKED_AT = 16  # how many chunks that wait for a line are compared: the one given to fewest peers goes first
SYNC_WINDOW = 4.0  # how many sync intervals back a sync goes
MOST_GIVEN = 2048  # places, of one peer, that await its acknowledgement
HAND_OVER_S = 60.0  # how old an item may be that is handed over before we leave: about one round
MOST_PACES = 4.0  # an id waits so many times `announce_interval` at most, and a chunk always: peers have others to ask
NEVER = float("inf")


@dataclass(slots=True)
class _Unanswered:
    """What a peer was given and did not acknowledge yet."""

    size: int  # bytes under way; 0 once they do not count any more
    at: float


@dataclass(slots=True)
class _Peer:
    """A live peer: what it wants, what it is still to be told, and what it waits for."""

    uplink: LineWindow
    wants: Interest = EVERYTHING
    pending: dict[ItemId, None] = field(default_factory=dict)  # to be announced, the newest last
    tell_at: float = NEVER  # when some of these are announced: once nothing new has come for a while
    tell_by: float = NEVER  # and at the latest
    wants_all: bool = False  # whether it is to be told of all: it wants more topics than before, or missed some
    # What waits for its line, items and outlines before chunks.
    items: dict[Place, None] = field(default_factory=dict)
    chunks: dict[Place, None] = field(default_factory=dict)
    given: dict[Place, _Unanswered] = field(default_factory=dict)  # oldest first
    is_stalled: bool = False  # whether it acknowledged nothing since something did not count any more
    came: dict[ItemId, tuple[int, ...]] = field(default_factory=dict)  # what it gave and is to be acknowledged
    busy_at: float = NEVER  # when it is told that what it wants still waits
    gave_at: float = float("-inf")  # when something last left for it

    @property
    def waiting(self) -> int:
        """How much waits for its line."""
        return len(self.items) + len(self.chunks)

    def drop(self, place: Place) -> None:
        """Let something wait no longer for its line, if it did."""
        self.items.pop(place, None)
        self.chunks.pop(place, None)

    def ends(self, place: Place) -> _Unanswered:
        """Count something as under way no more."""
        given = self.given.pop(place)
        self.uplink.under_way -= given.size
        return given

    def check(self, now: float) -> None:
        """Count no longer what was not acknowledged for long."""
        for given in takewhile(lambda given: given.at + LOST_S <= now, self.given.values()):
            self.is_stalled = self.is_stalled or given.size > 0
            self.uplink.under_way -= given.size
            given.size = 0


@dataclass(frozen=True, slots=True)
class LeftOver:
    """How many of our newest items nobody else has, and whether somebody may still take one."""

    untaken: int
    has_takers: bool


class Gossip:
    """See the module's comment. `due` is when the next tick is needed, by the steady clock."""

    def __init__(self, own: NodeId, setup: Setup, rng: random.Random, now: Instant) -> None:
        self._own = own
        self._limits = limits = setup.limits
        self._timing = setup.timing
        self._rng = rng
        self._peers: dict[NodeId, _Peer] = {}
        # No item's time is further ahead, so what is forgotten here is refused as stale.
        self._seen: Expiring[ItemId, NodeId] = Expiring(
            limits.max_seen, limits.max_item_age_s + limits.max_clock_ahead_s
        )
        self._store = Store(own, limits)
        self._ledger = ItemLedger(lambda item_id: item_id in self._wants, limits)
        self._wants = Wants(self._ledger, setup.timing, limits, rng)
        self._max_item = HEAD_BYTES + ITEM_OVERHEAD_BYTES + limits.max_item_bytes
        self._appetite = Appetite(now)
        self.due = now.steady
        self._next_sync = now.steady + setup.timing.sync_interval
        self._uploads_until = now.steady  # until then a peer is fetching chunks of ours
        self._given: Recent[Place, int] = Recent(limits.max_given)  # how often each chunk was given
        self._uplinks = Lines(LEAST_BYTES, UPLINK_QUICK_S)
        self._in_turn: dict[NodeId, None] = {}  # who waits until our line has room
        # Returns the signer of an accepted item, None if it is not remembered. Called for each item that comes.
        self.signer: Callable[[ItemId], NodeId | None] = self._seen.get
        self.owes: Callable[[NodeId, ItemId], bool] = self._wants.owes
        self.discard: Callable[[ItemId], object] = self._store.withdraw  # announce it no more: the node rejected it

    @property
    def held_bytes(self) -> int:
        return self._store.held_bytes

    @property
    def wanted(self) -> int:
        """How many announced items the node lacks and may ask for."""
        return len(self._wants)

    def size(self, item_id: ItemId) -> int:
        """Return the bytes of an item's frame, 0 if it is not here."""
        entry = self._store.entry(item_id)
        return entry.size if entry is not None else 0

    def may_rest(self, now: Instant) -> bool:
        """Tell whether nobody waits for this node, so that it may look at the network only a few times a second.

        So it is while more is on offer than the node takes, and nothing large comes or goes.
        """
        is_idle = not self._wants.partials and now.steady >= self._uploads_until
        return self._appetite.interest.is_sated and is_idle

    def came(self, node: NodeId, item: ItemId, now: Instant) -> None:
        """Note that `node` sent an item that we asked it for, and that we have by now or refuse."""
        self._wants.arrived(item, node, now.steady)
        self._peers[node].came[item] = ()
        self._soon(now)

    def hand_over(self, now: Instant) -> LeftOver:
        """Tell how many items that we published in the last `HAND_OVER_S` no live peer is known to have."""
        newest = self._store.newest(self._limits.max_held, now.steady - HAND_OVER_S)
        untaken = [
            entry
            for entry in filter(None, map(self._store.entry, newest))
            if self._seen.get(entry.id) == self._own
            and not self._ledger.is_elsewhere(entry.id, chunk_count(entry.size - HEAD_BYTES))
        ]
        return LeftOver(len(untaken), any(map(self._may_be_taken, untaken)))

    def _may_be_taken(self, entry: Entry) -> bool:
        """Tell whether a peer asked for an item, or will: a sated one that was told may draw others."""
        return any(
            peer.wants.covers(entry.topic)
            and (
                not peer.wants.is_sated
                or self._ledger.is_news(node, entry.id)
                or any(place.item == entry.id for place in chain(peer.items, peer.chunks, peer.given))
            )
            for node, peer in self._peers.items()
        )

    def unheard(self, node: NodeId, now: Instant) -> None:
        """Note that a message to a live peer had no room in its send queue."""
        self._wants.unheard(node, now.steady)
        self._tell_again(node, now)

    def withdraw_signed(self, is_by: Callable[[NodeId], bool]) -> None:
        """Stop offering and fetching items for whose signer `is_by` holds."""
        self._store.withdraw_signed(is_by)
        self._wants.forget_signed(is_by)

    # Our own node

    def publish(self, item: Item, now: Instant) -> None:
        """Hold and announce an item that we made."""
        if item.id not in self._seen:
            self._seen.set(item.id, item.signer)
            self._hold(item, now)

    def subscribe(self, wish: Subscribe, now: Instant) -> list[GossipAction]:
        """Want what our node wants from now on."""
        is_news = self._appetite.subscribe(wish.topics, wish.demand, now, wish.beside)
        return self._tell_interest(self._peers) if is_news else []

    def bring(self, item_id: ItemId) -> list[GossipAction]:
        """Deliver an item once more, if it is still held."""
        held = self._store.get(item_id)
        return [Deliver(held, again=True)] if held is not None else []

    # Peers

    def up(self, node: NodeId, now: Instant, voice: str = "") -> list[GossipAction]:
        """Begin with a peer that is live, anew if it was before; `voice` is as whom it counts (see `PeerUp`)."""
        self.down(node, now)
        self._store.expire(now)
        peer = self._peers[node] = _Peer(self._uplinks.to(voice))
        self._ledger.up(node)
        self._wants.up(node, voice)
        catch_up = CATCH_UP_S * self._rng.random()
        # Two nodes that meet again hold much the same. The later to announce leaves out what the other announced.
        ids = [*self._store.newest(self._limits.max_pending), *self._wants.partials]
        self._remind(peer, ids, now, now.steady + catch_up)
        return self._tell_interest([node])

    def down(self, node: NodeId, now: Instant) -> None:
        """Forget a peer that is gone."""
        if (peer := self._peers.pop(node, None)) is not None:
            for place in list(peer.given):
                peer.ends(place)
            self._in_turn.pop(node, None)
            self._wants.lost(node)
            self._ledger.down(node)
            self._soon(now)

    def _tell_interest(self, nodes: Iterable[NodeId]) -> list[GossipAction]:
        return [Send(node, self._appetite.interest) for node in nodes]

    def heard(self, node: NodeId, message: Have | Want | DontHave | Interest, now: Instant) -> list[GossipAction]:
        """Take in what a live peer says about items, or its interest."""
        if node not in self._peers:
            return []
        match message:
            case Have(items):
                return self._offered(node, items, now)
            case Cancel():
                for place in _places(message):
                    self._peers[node].drop(place)
            case Ack():
                return self._acknowledged(node, message, now)
            case Want():
                return self._wanted(node, message, now)
            case Busy(ids):
                self._wants.busy(node, ids, now.steady)
                self._soon(now)
            case DontHave(ids):
                self._soon(now)
                return [Blame(node, "false_have")] * self._wants.lack(node, ids)
            case Interest():
                self._interested(node, message, now)
        return []

    def _interested(self, node: NodeId, wants: Interest, now: Instant) -> None:
        """Note what a peer wants. See rule 4 for the one that is told of all we hold."""
        peer = self._peers[node]
        before, peer.wants = peer.wants, wants
        wants_more = before.topics is not None and (wants.topics is None or not wants.topics <= before.topics)
        if wants_more:
            self._tell_all(peer, now)
        elif before is not EVERYTHING and wants == before:
            self._tell_again(node, now)

    def _tell_again(self, node: NodeId, now: Instant) -> None:
        self._ledger.untell(node)
        self._tell_all(self._peers[node], now)

    def _tell_all(self, peer: _Peer, now: Instant) -> None:
        peer.wants_all = True
        peer.tell_at = min(peer.tell_at, now.steady + CATCH_UP_S)
        peer.tell_by = min(peer.tell_by, now.steady + CATCH_UP_S)
        self.due = min(self.due, peer.tell_at)

    # What comes

    def got(self, node: NodeId, item: Item, now: Instant) -> list[GossipAction]:
        """Take in an item that a peer sent."""
        if node in self._peers:
            self.came(node, item.id, now)
        self._soon(now)
        if item.id in self._seen:
            return []
        if not self._appetite.interest.covers(item.topic):
            return [Blame(node, "unwanted")]
        self._appetite.took(now, is_beside=self._is_beside(item.entry))
        return self._accept(item, now)

    def _accept(self, item: Item, now: Instant) -> list[GossipAction]:
        """Hold and deliver an item, unless it was announced under another topic: then it is not fetched again."""
        self._seen.set(item.id, item.signer)
        if not self._appetite.interest.covers(item.topic):
            return []
        self._hold(item, now)
        return [Deliver(item)] if item.signer != self._own else []  # an item of ours comes back after a restart

    def outlined(self, node: NodeId, outline: Outline, now: Instant) -> list[GossipAction]:
        """Take in the outline of a large item, which a peer sent."""
        ack = naming(Ack, node, {outline.id: ()})
        match self._wants.outlined(node, outline, now.steady):
            case Took.UNASKED:
                return [Blame(node, "unasked")]
            case Took.NO_ROOM:
                return [Blame(node, "no_room"), *ack]
            case Took.TAKEN:
                self._appetite.took(now)
                return [*ack, *self._wants.fill_all(now.steady)]
        return [*ack]

    def chunk_arrived(self, node: NodeId, chunk: ItemChunk, now: Instant) -> list[GossipAction]:
        """Take in a chunk of an item, which a peer sent."""
        partial = self._wants.partial(chunk.id)
        self._soon(now)
        ack = naming(Ack, node, {chunk.id: (chunk.index,)})
        match self._wants.chunk_arrived(node, chunk, now.steady):
            case Took.MISSIZED:
                assert partial is not None
                return [Blame(partial.outline.signer, "malformed")]
            case Took.FALSE:
                return [Blame(node, "false_chunk")]
            case Took.UNASKED:
                return [Blame(node, "unasked")]
            case Took.LATE:
                return [*ack, *self._wants.fill(node, now.steady)]
        item = self._wants.finish(chunk.id)
        answers = [*ack, *self._wants.fill(node, now.steady)]
        if item is None:
            for other, peer in self._peers.items():
                if self._ledger.lacks(other, chunk.id):
                    self._remind(peer, [chunk.id], now, now.steady + MOST_PACES * self._pace(peer.wants))
            return [*answers]
        return [*self._accept(item, now), *answers]

    # What we hold

    def _hold(self, item: Item, now: Instant) -> None:
        self._store.add(item, now)
        for node, peer in self._peers.items():
            if peer.wants.covers(item.topic) and self._ledger.is_news(node, item.id):
                self._remind(peer, [item.id], now, now.steady + self._pace(peer.wants))

    def _wanted(self, node: NodeId, want: Want, now: Instant) -> list[GossipAction]:
        peer = self._peers[node]
        lacking, busy = dict[ItemId, None](), dict[ItemId, None]()
        queued: list[GossipAction] = []
        for place in _places(want):
            if not self._has(place):
                lacking[place.item] = None
            elif place in peer.items or place in peer.chunks:
                pass
            elif peer.waiting >= self._limits.max_served:
                busy[place.item] = None
            else:
                queued = [self._queue(node, place, now)]
        if any(part.chunks for part in want.parts):
            self._uploads_until = now.steady + self._timing.pull_patience
        answers = [message for message in (DontHave(tuple(lacking)), Busy(tuple(busy))) if message.ids]
        return queued + [Send(node, message) for message in answers]

    def _queue(self, node: NodeId, place: Place, now: Instant) -> Serve:
        peer = self._peers[node]
        (peer.items if place.part == WHOLE else peer.chunks)[place] = None
        if peer.busy_at == NEVER:
            peer.busy_at = now.steady + self._timing.pull_patience / 2
            self.due = min(self.due, peer.busy_at)
        return Serve(node)

    def _has(self, place: Place) -> bool:
        """Tell whether a WANT can be answered with what it names."""
        item_id, part = place
        entry, partial = self._store.entry(item_id), self._wants.partial(item_id)
        if entry is not None:
            count = chunk_count(entry.size - HEAD_BYTES)
            return part == WHOLE or (count > 1 and part < count)
        return partial is not None and (part == WHOLE or part in partial.chunks)

    def serve(self, node: NodeId, now: Instant) -> Item | ItemOutline | ItemChunk | DontHave | None:
        """Return what a peer's free line carries next; None if nothing waits for it."""
        peer = self._peers.get(node)
        if peer is None or not peer.waiting or (peer.is_stalled and now.steady < peer.gave_at + LOST_S):
            return None
        if peer.uplink.is_full:
            self._in_turn[node] = None
            return None
        # The chunk that was given to fewest goes first, so more peers can pass it on.
        place = next(iter(peer.items), None) or min(
            islice(peer.chunks, LOOKED_AT), key=lambda chunk: self._given.get(chunk) or 0
        )
        peer.drop(place)
        entry = self._find(place)
        if entry is None:
            return DontHave((place.item,))
        peer.gave_at = now.steady
        if place in peer.given or len(peer.given) == MOST_GIVEN:
            peer.ends(place if place in peer.given else next(iter(peer.given)))
        size = CHUNK_BYTES if place.part != WHOLE else self.size(place.item) if isinstance(entry, Item) else 0
        given = peer.given[place] = _Unanswered(0 if peer.is_stalled else size, now.steady)
        peer.uplink.under_way += given.size
        self._given.set(place, 1 + (self._given.get(place) or 0))
        return entry

    def _acknowledged(self, node: NodeId, ack: Ack, now: Instant) -> list[GossipAction]:
        """Note what came to a peer that we gave it; let others have their turns. An outline is no part of its item."""
        peer = self._peers[node]
        for place in filter(peer.given.__contains__, _places(ack)):
            given = peer.given[place]
            peer.uplink.answered(given.size, now.steady - given.at, now.steady)
            peer.ends(place)
            peer.is_stalled = False
            if place.part != WHOLE:
                self._ledger.row(node, place.item).taken |= 1 << place.part
            elif self._store.outline(place.item) is None:
                self._ledger.row(node, place.item).taken = ALL
        return self._turns()

    def _turns(self) -> list[GossipAction]:
        """Let those who waited for longest be given something, if our line has room; who is not waits again."""
        waited = list(islice(self._in_turn, LOOKED_AT))
        for node in waited:
            del self._in_turn[node]
        return [Serve(node) for node in waited]

    def _find(self, place: Place) -> Item | ItemOutline | ItemChunk | None:
        """Return what a WANT is answered with, if it is here."""
        item_id, part = place
        if part == WHOLE and (outline := self._store.outline(item_id)) is not None:
            return outline
        item, partial = self._store.get(item_id), self._wants.partial(item_id)
        if item is not None:
            return item if part == WHOLE else item.chunk(part)
        if partial is not None:
            return ItemOutline(partial.outline.head, partial.outline.hashes) if part == WHOLE else partial.chunk(part)
        return None

    # Asking

    def _offered(self, node: NodeId, items: tuple[Entry, ...], now: Instant) -> list[GossipAction]:
        peer, wants = self._peers[node], self._appetite.interest
        for entry in items:
            is_whole, is_here = not entry.parts, entry.id in self._seen
            if is_whole:
                peer.pending.pop(entry.id, None)
                peer.drop(Place(entry.id, WHOLE))
            if is_here and is_whole:
                self._ledger.row(node, entry.id).note(Statement.HAVE)
            elif not is_here and entry.size <= self._max_item and wants.covers(entry.topic):
                self._wants.have(node, entry, now.steady, is_beside=self._is_beside(entry))
        self._soon(now)
        return [*self._wants.fill(node, now.steady)]

    def _is_beside(self, entry: Entry) -> bool:
        return entry.topic in self._appetite.beside and entry.size <= self._limits.beside_bytes

    # Time

    def _pace(self, wants: Interest) -> float:
        """Return how long an id waits to be announced together with others, to a node that wants this."""
        return self._timing.pull_patience / DRAWS if wants.is_sated else self._timing.announce_interval

    def _soon(self, now: Instant) -> None:
        """Let a tick come soon, as what we may ask for has changed."""
        self.due = min(self.due, now.steady + self._pace(self._appetite.interest))

    def _remind(self, peer: _Peer, ids: list[ItemId], now: Instant, by: float) -> None:
        """Let ids be announced to a peer; beyond the bound the oldest are dropped."""
        is_behind = len(peer.pending) > MAX_IDS
        peer.pending.update(dict.fromkeys(ids))
        while len(peer.pending) > self._limits.max_pending:
            del peer.pending[next(iter(peer.pending))]
        if ids and not is_behind:
            if peer.tell_at == NEVER:
                peer.tell_by = max(by, now.steady + MOST_PACES * self._pace(peer.wants))
            peer.tell_at = min(peer.tell_by, by)
            self.due = min(self.due, peer.tell_at)

    def tick(self, now: Instant) -> list[GossipAction]:
        """Do what is due."""
        self._store.expire(now)
        self._seen.expire(now.steady)
        for peer in self._peers.values():
            peer.check(now.steady)
        acks = [send for node, peer in self._peers.items() for send in self._take_acks(node, peer)]
        silent = self._wants.check(now.steady, bounded=self._appetite.bounded)
        actions: list[GossipAction] = [*acks, *self._turns(), *(Blame(node, "unanswered") for node in silent)]
        actions += self._wants.draw(now.steady, self._appetite.level(now), self._appetite.level_beside(now))
        actions += self._wants.fill_all(now.steady)
        if self._appetite.adjust(now):
            actions += self._tell_interest(self._peers)
        elif not self._appetite.interest.is_sated:
            actions += self._tell_interest(self._wants.missed())
        if now.steady >= self._next_sync:
            self._next_sync = now.steady + self._timing.sync_interval * self._rng.uniform(0.75, 1.25)
            actions += self._sync(now)
        self.due = self._next_sync
        if len(self._wants):
            self.due = min(self.due, now.steady + self._timing.pull_patience / DRAWS)
        for node, peer in self._peers.items():
            if now.steady >= peer.tell_at:
                actions += self._announce(node, peer, now)
            if now.steady >= peer.busy_at:
                peer.busy_at = now.steady + self._timing.pull_patience / 2 if peer.waiting else NEVER
                actions += [Send(node, Busy(())), Serve(node)] if peer.waiting else []  # it may be given something now
            self.due = min(self.due, peer.tell_at, peer.busy_at)
        return actions

    def _take_acks(self, node: NodeId, peer: _Peer) -> list[Send]:
        """Return the acknowledgement of what a peer gave."""
        came, peer.came = peer.came, {}
        return naming(Ack, node, came)

    def _sync(self, now: Instant) -> list[GossipAction]:
        """Announce the newest items once more, to a random peer that is not sated and has nothing on its way."""
        quiet = [
            node
            for node, peer in self._peers.items()
            if not (peer.wants.is_sated or peer.waiting or now.steady < peer.gave_at + self._timing.pull_patience)
        ]
        if not quiet:
            return []
        node = self._rng.choice(quiet)
        newest = self._store.newest(MAX_IDS, since=now.steady - SYNC_WINDOW * self._timing.sync_interval)
        return self._tell(node, [item_id for item_id in newest if self._ledger.lacks(node, item_id)], now)

    def _announce(self, node: NodeId, peer: _Peer, now: Instant) -> list[GossipAction]:
        """Announce the newest of what waits to be announced."""
        if peer.wants_all:
            peer.wants_all = False
            held = dict.fromkeys([*self._store.newest(self._limits.max_pending), *self._wants.partials])
            peer.pending = held | peer.pending
        batch: list[ItemId] = []
        while peer.pending and len(batch) < MAX_IDS:
            item_id, _ = peer.pending.popitem()
            if self._ledger.is_news(node, item_id):
                batch.append(item_id)
        peer.tell_at = peer.tell_by = now.steady + CATCH_UP_S if peer.pending else NEVER
        return self._tell(node, batch, now)

    def _tell(self, node: NodeId, ids: list[ItemId], now: Instant) -> list[GossipAction]:
        """Announce those items that interest the peer and that we hold, or hold chunks of."""
        wants = self._peers[node].wants
        entries = [entry for item_id in ids if (entry := self._entry(item_id, now)) and wants.covers(entry.topic)]
        for entry in entries:
            if not entry.parts:
                self._ledger.row(node, entry.id).told = True
        return [Send(node, Have(tuple(entries)))] if entries else []

    def _entry(self, item_id: ItemId, now: Instant) -> Entry | None:
        """Return what is announced of an item."""
        partial = self._wants.partial(item_id)
        if partial is None or not partial.chunks:
            return self._store.offered(item_id, now)
        topic = self._wants.topic(item_id)
        return Entry(item_id, HEAD_BYTES + partial.size, topic, hint(partial.outline.signer), partial.parts)


def _places(want: Want) -> list[Place]:
    """Return all that a WANT or a CANCEL names."""
    return [Place(item_id, part) for item_id, chunks in want.parts for part in chunks or (WHOLE,)]
