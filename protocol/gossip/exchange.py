"""Getting items around: what is announced, asked for, served and passed on. A pure state machine.

An item is a signed envelope that is passed on as the bytes its signer made. Its id is a hash of the signer's key and
the body. The ledger holds what each peer was told, asked and given of each item.

    message     says                                              is answered by
    HAVE        I hold these items, or these chunks of them       WANT, or nothing
    WANT        give me these items, outlines, chunks             each of them, DONT_HAVE or BUSY
    DONT_HAVE   I do not have these
    BUSY        not now; without ids: what you asked for waits for my line
    CANCEL      I do not need these any more
    IDONTWANT   I have these, or refuse them: do not send or name them
    INTEREST    I want these topics, or only their announcements

Rules
 1. A publisher sends an item of at most `push_bytes` to `max_pushes` live peers, drawn by lot from those that are
    interested and did not ask for announcements only. All else is announced.
 2. A node that gets a new item delivers it, holds it, and announces it to the interested live peers that are not known
    to have it. It announces once nothing new has come for `announce_interval`, and at the latest `MAX_HOLD` times that
    after the first, so that a burst is announced once. A node announces chunks in the same way. A peer that asked for
    announcements only, and draws from them, is told no more often than it draws.
 3. An announced item that we want and lack is asked for (see `wants`), as far as our demand goes (see
    `subscriptions`): at once, unless it is small and its signer is a live peer of ours, whose push is probably on its
    way: then after `pull_delay`. A node that asked for announcements only draws by lot what it asks for, at its ticks.
 4. A peer that comes up is told our interest and announced what we hold, so a node that was
    away catches up: the newest at once, the rest in batches that leave out what it has got
    meanwhile. Now and then the newest items are announced to a random peer, in case something was lost. Peers that
    asked for announcements only, or for whom something waits, are left out.
 5. An item that a peer wants is queued by its id, and becomes a frame when the line is free for it. The answer is BUSY
    beyond `max_served` at a time, and DONT_HAVE for what is not here. While wants wait, BUSY without ids says so every
    half `pull_patience`. So no peer can make us wait or grow, and each knows what it waits for. An item that a peer
    asks for again uses up its own share of the line.
 6. Bytes that a peer sends twice, and was not asked for again, are a replay; an item that two peers send is an
    ordinary duplicate. If an item comes from another peer before its signer, a peer of ours, pushed it, we tell the
    signer that we do not want it.
 7. An item of a topic that we did not ask for is neither delivered nor held, nor is one pushed beyond our demand. That
    costs a little: an honest node pushes no more once it is asked for announcements only.
 8. A node gives what it announced. An item found bad is announced to nobody any more; peers that were told of it may
    have it, and judge it themselves. It costs its signer, not those who passed it on. An item that will soon be stale
    is not announced.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from protocol.config import Instant, Setup
from protocol.events import (
    Blame,
    Bring,
    ChunkArrived,
    Deliver,
    Discard,
    Fetched,
    GossipAction,
    GossipEvent,
    Got,
    Heard,
    Item,
    Outlined,
    PeerDown,
    PeerUp,
    Publish,
    Send,
    Serve,
    Subscribe,
    Tick,
)
from protocol.gossip.ledger import WHOLE, ItemLedger, LedgerRow, Ours, Place, Statement, Theirs
from protocol.gossip.store import Store
from protocol.gossip.subscriptions import Appetite, Filter
from protocol.gossip.wants import Asks, Took, Wants
from protocol.identity import NodeId
from protocol.lru import Expiring, Recent
from protocol.wire.envelope import CHUNK_BYTES, HASH_BYTES, HEAD_BYTES, ItemId, chunk_count
from protocol.wire.messages import (
    ITEM_OVERHEAD_BYTES,
    MAX_IDS,
    Busy,
    Cancel,
    DontHave,
    Entry,
    Have,
    IDontWant,
    Interest,
    ItemChunk,
    ItemOutline,
    Want,
    hint,
)

CATCH_UP_S = 2.0  # seconds between further batches of `MAX_IDS`, some 12 kB/s; the next ones omit what it has pulled
DRAWS = 4  # in a `pull_patience`: how often silent peers are looked for and items to ask for are drawn
LOOKED_AT = 16  # so many chunks that wait for a line are compared: the one given to fewest goes first
SYNC_WINDOW = 4.0  # sync intervals
MAX_HOLD = 4.0  # announce intervals: what a hop costs at the most while items come all the time


class AnnounceTimer:
    """Due once nothing new has come for `interval` seconds, or `MAX_HOLD` times that after the first."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._settled = math.inf
        self._burst_end = math.inf
        self._fixed = math.inf

    @property
    def due(self) -> float:
        """The moment, infinity when there is nothing to announce."""
        return min(self._settled, self._fixed)

    def news(self, now: float) -> None:
        """Something new is to be announced."""
        if self._settled == math.inf:
            self._burst_end = now + MAX_HOLD * self._interval
        self._settled = min(self._burst_end, now + self._interval)

    def by(self, due: float) -> None:
        """Something is to be announced by `due`, whatever else comes."""
        self._fixed = min(self._fixed, due)

    def clear(self) -> None:
        self._settled = self._fixed = math.inf


@dataclass(slots=True)
class _Peer:
    """A live peer: what it wants, what it is still to be told, and what it waits for."""

    wants: Filter
    bound: int  # of ids that wait to be announced
    backlog: list[ItemId]  # what it may have missed, the newest last
    backlog_due: float
    pending: dict[ItemId, None] = field(default_factory=dict)
    quiet_until: float = 0.0
    # What waits for its line, small items first: whether it is pushed, and was not asked for.
    small: dict[Place, bool] = field(default_factory=dict)
    large: dict[Place, bool] = field(default_factory=dict)
    gave_at: float = float("-inf")  # when something last left for it
    waiting_since: float = 0.0  # for its line, or when it was last told so

    def remind(self, *ids: ItemId) -> None:
        """Let ids be announced at the next tick; beyond the bound the oldest are dropped."""
        for item_id in ids:
            self.pending[item_id] = None
        while len(self.pending) > self.bound:
            del self.pending[next(iter(self.pending))]

    @property
    def waiting(self) -> int:
        """How much waits for its line."""
        return len(self.small) + len(self.large)

    def waits_for(self, place: Place) -> bool:
        return place in self.small or place in self.large


class Gossip:
    """See the module's comment."""

    def __init__(self, own: NodeId, setup: Setup, rng: random.Random, now: Instant) -> None:
        self._own = own
        self._limits = limits = setup.limits
        self._timing = setup.timing
        self._rng = rng
        self._peers: dict[NodeId, _Peer] = {}
        self._neighbours: Counter[bytes] = Counter()  # hints of the live peers
        # No item's time is further ahead, so what is forgotten here is refused as stale.
        self._seen: Expiring[ItemId, NodeId] = Expiring(
            limits.max_seen, limits.max_item_age_s + limits.max_clock_ahead_s
        )
        self._store = Store(own, limits, setup.shelf)
        self._to_bring: set[ItemId] = set()  # what waits for the shelf, and for our own node: one at a time
        self._ledger = ItemLedger(lambda item_id: item_id in self._wants, limits)
        self._wants = Wants(self._ledger, setup.timing, limits, rng)
        self._max_item = HEAD_BYTES + ITEM_OVERHEAD_BYTES + limits.max_item_bytes
        self._appetite = Appetite(now)
        self._next_sync = now.steady + setup.timing.sync_interval
        self._uploads_until = now.steady  # when nobody fetches chunks of ours any more
        self._ticked = now.steady
        self._given: Recent[Place, int] = Recent(limits.max_given)  # how often each chunk was given
        self._serving = 0  # how much waits for peers' lines
        self._catching_up = False  # whether a peer is yet to be announced what we held when it came
        self._timer = AnnounceTimer(setup.timing.announce_interval)
        # Return the signer of an accepted item, None if that is not remembered; asked for each that comes.
        self.signer: Callable[[ItemId], NodeId | None] = self._seen.get

    @property
    def held_bytes(self) -> int:
        return self._store.in_memory

    @property
    def wanted(self) -> int:
        """How many announced items the node lacks and may ask for."""
        return len(self._wants)

    def withdraw_signed(self, is_by: Callable[[NodeId], bool]) -> None:
        """Stop offering and fetching items for whose signer `is_by` holds."""
        self._store.withdraw_signed(is_by)
        self._wants.forget_signed(is_by)

    def wait(self) -> float:
        """Return how many seconds after the last tick the next one is of use."""
        timing = self._timing
        wait = max(0.0, self._timer.due - self._ticked)
        if len(self._wants):
            return min(wait, timing.announce_interval if self._wants.delayed else timing.pull_patience / DRAWS)
        if self._catching_up:
            return min(wait, CATCH_UP_S / 4)
        if self._serving:
            return min(wait, timing.pull_patience / DRAWS)
        return min(wait, timing.sync_interval)

    def may_rest(self, now: Instant) -> bool:
        """Tell whether the node may look at the network only a few times a second, as nobody waits for it.

        It draws what it asks for at its ticks, has more on offer than it takes, and nothing large comes or goes.
        """
        is_idle = not self._wants.partials and now.steady >= self._uploads_until
        return self._appetite.filter.announce_only and is_idle

    def duplicate(self, node: NodeId, item: ItemId, now: Instant) -> bool:
        """Note that `node` sent bytes that were accepted before; True if it had sent this item itself (a replay)."""
        if node not in self._peers:
            return False
        row = self._ledger.row(node, item)
        had_sent = row.theirs is Theirs.SENT
        return not self._wants.arrived(item, node, now.steady) and had_sent

    def declines(self, node: NodeId, item: ItemId, now: Instant) -> bool:
        """Tell whether what `node` sends, if it is this item, is more than we take.

        Then it need not be verified: nobody asked for it, and the demand is met.
        """
        if self._wants.is_asked(item, node) or self._appetite.has_room(now):
            return False
        self._appetite.came(now)
        return True

    def handle(self, event: GossipEvent, now: Instant) -> list[GossipAction]:  # noqa: C901  # an arm an event
        """Advance by one event."""
        match event:
            case Got(node, item):
                asked = self._wants.arrived(item.id, node, now.steady)
                more = self._ask(now) if asked and not self._appetite.filter.announce_only else []
                return [*self._take(node, item, asked, now), *more]
            case Heard(node, message):
                return self._heard(node, message, now) if node in self._peers else []
            case Publish(item):
                return self._publish(item, now)
            case Outlined():
                return self._outlined(event, now)
            case ChunkArrived(node, chunk):
                return self._chunk_arrived(node, chunk, now)
            case PeerUp(node):
                return self._up(node, now)
            case PeerDown(node):
                self._down(node)
            case Subscribe(topics, demand, beside):
                is_news = self._appetite.subscribe(topics, demand, now, beside)
                return self._tell_interest(self._peers) if is_news else []
            case Fetched(item_id, frame):
                return self._fetched(item_id, frame)
            case Bring(item_id):
                return self._bring(item_id)
            case Discard(item_id):
                self._store.withdraw(item_id)
            case Tick():
                return self._tick(now)
        return []

    def serve(self, node: NodeId, now: Instant) -> Item | ItemOutline | ItemChunk | DontHave | None:
        """Return what a peer's line, which is free, carries next; None: nothing that waits for it is here yet."""
        peer = self._peers.get(node)
        if peer is None:
            return None
        # The chunk that was given to fewest goes first, so more peers can pass it on.
        large = sorted(islice(peer.large, LOOKED_AT), key=lambda place: self._given.get(place) or 0)
        for place in (*islice(peer.small, LOOKED_AT), *large):
            found = self._find(*place)
            if found is None and self._store.fetch(place.item):
                continue  # it comes from the shelf
            self._forget_served(peer, place)
            if found is None:
                return DontHave((place.item,))
            peer.gave_at = now.steady
            self._ledger.row(node, place.item).note(Statement.WE_GAVE)
            self._given.set(place, 1 + (self._given.get(place) or 0))
            return found
        return None

    def _fetched(self, item_id: ItemId, frame: bytes) -> list[GossipAction]:
        """Give what waited for the shelf, and deliver it if our own node waits for it."""
        self._store.fetched(item_id, frame)
        brought = self._bring(item_id) if item_id in self._to_bring else list[GossipAction]()
        return brought + [Serve(node) for node, peer in self._peers.items() if peer.waiting]

    def _bring(self, item_id: ItemId) -> list[GossipAction]:
        self._to_bring.discard(item_id)
        if (item := self._store.get(item_id)) is not None:
            return [Deliver(item, again=True)]
        if self._store.fetch(item_id):
            self._to_bring.add(item_id)
        return []

    def size(self, item_id: ItemId) -> int:
        """Return the bytes of an item's frame, in memory or on the shelf; 0 if it is not here."""
        entry = self._store.entry(item_id)
        return entry.size if entry is not None else 0

    def unheard(self, node: NodeId, now: Instant) -> None:
        """Note that something said to a live peer had no room in its queue; what is to be asked is at the next tick."""
        self._wants.unheard(node, now.steady)

    # Peers

    def _up(self, node: NodeId, now: Instant) -> list[GossipAction]:
        self._down(node)
        self._store.expire(now)
        limits = self._limits
        held = self._store.newest(limits.max_pending)
        # Two nodes that meet again hold much the same: the later to announce leaves out what the other did.
        due = now.steady + CATCH_UP_S * self._rng.random()
        peer = self._peers[node] = _Peer(Filter(), limits.max_pending, held[: -limits.first_ids], due)
        self._ledger.up(node)
        self._wants.up(node)
        if held:
            peer.remind(*held[-limits.first_ids :])
            self._timer.by(now.steady)
        self._catching_up = self._catching_up or bool(peer.backlog)
        self._neighbours[hint(node)] += 1
        return self._tell_interest([node]) if self._appetite.told else []

    def _down(self, node: NodeId) -> None:
        peer = self._peers.pop(node, None)
        if peer is None:
            return
        self._neighbours -= Counter([hint(node)])
        for place in (*peer.small, *peer.large):
            self._forget_served(peer, place)
        self._wants.lost(node)
        self._ledger.down(node)

    def _tell_interest(self, nodes: Iterable[NodeId]) -> list[GossipAction]:
        return [Send(node, self._appetite.filter.interest) for node in nodes]

    def _heard(self, node: NodeId, message: Have | Want | DontHave | Interest, now: Instant) -> list[GossipAction]:
        peer = self._peers[node]
        match message:
            case Have(items):
                return self._offered(node, items, now)
            case Cancel():
                self._cancelled(node, message)
            case Want():
                return self._wanted(node, message, now)
            case Busy(ids):
                return self._ask_all(now) if self._wants.busy(node, ids, now.steady) else []
            case IDontWant(ids):
                for item_id in ids:
                    self._forget_served(peer, Place(item_id, WHOLE))
                    self._ledger.row(node, item_id).note(Statement.THEY_DECLINE)
                    peer.pending.pop(item_id, None)
            case DontHave(ids):
                lies = self._wants.lack(node, ids, now.steady)
                return [Blame(node, "false_have")] * lies + self._ask_all(now) if lies else []
            case Interest():
                peer.wants = Filter.of(message)
                if peer.wants.announce_only:
                    self._keep_pushes(node, peer)
        return []

    def _keep_pushes(self, node: NodeId, peer: _Peer) -> None:
        """Let go of what waits to be pushed to a peer that asked for announcements only, and announce it."""
        for place in [place for place, is_push in peer.small.items() if is_push]:
            self._forget_served(peer, place)
            row = self._ledger.row(node, place.item)
            row.note(Statement.WE_KEPT)
            row.told = False
            peer.remind(place.item)

    # What comes

    def _take(self, node: NodeId, item: Item, asked: bool, now: Instant) -> list[GossipAction]:
        if self._seen.get(item.id) is not None:
            return []
        if not self._appetite.filter.covers(item.topic):
            if not item.is_large:
                return [Blame(node, "unwanted")]
            # The peer that gave the last chunk of a large item did not lie about its topic. It is not fetched once
            # more.
            self._seen.set(item.id, item.signer)
            return []
        self._appetite.came(now)
        if not asked and not self._appetite.take_push(now):
            return [Blame(node, "over_demand")]
        if node in self._peers:
            self._ledger.row(node, item.id).note(Statement.THEY_GAVE_ALL)
        self._seen.set(item.id, item.signer)
        self._hold(item, now)
        actions: list[GossipAction] = []
        if item.signer in self._peers and self._ledger.row(item.signer, item.id).theirs is Theirs.NONE:
            actions.append(Send(item.signer, IDontWant((item.id,))))  # its push is yet to come
        # Our own came back: we were restarted.
        return [Deliver(item), *actions] if item.signer != self._own else actions

    def _outlined(self, event: Outlined, now: Instant) -> list[GossipAction]:
        node, outline = event.node, event.outline
        if not self._wants.was_asked(outline.id, node):
            return [Blame(node, "unasked")]
        if outline.id not in self._wants or self._wants.partial(outline.id) is not None:
            self._wants.late(outline.id, node)
            return []
        if not self._wants.outlined(node, outline, now.steady):
            self._appetite.spend(-1)
            return [Blame(node, "no_room")]
        return self._ask_all(now)

    def _chunk_arrived(self, node: NodeId, chunk: ItemChunk, now: Instant) -> list[GossipAction]:
        partial = self._wants.partial(chunk.id)
        match self._wants.chunk_arrived(node, chunk, now.steady):
            case Took.MISSIZED:
                assert partial is not None
                self._appetite.spend(-1)
                return [Blame(partial.outline.signer, "malformed"), *self._ask_all(now)]
            case Took.FALSE:
                return [Blame(node, "false_chunk"), *self._ask_all(now)]
            case Took.UNASKED:
                return [Blame(node, "unasked_chunk")]
            case Took.LATE:
                return self._sent(self._wants.fill(node, now.steady))
        item = self._wants.finish(chunk.id, node)
        asks = self._sent([*self._wants.fill(node, now.steady), *self._wants.take_cancels()])
        if item is not None:
            return [*self._take(node, item, True, now), *asks]
        self._remind_of_parts(chunk.id, now)
        return asks

    def _remind_of_parts(self, item_id: ItemId, now: Instant) -> None:
        for node, peer in self._peers.items():
            row = self._ledger.find(node, item_id)
            if row is None or not (row.has_all or row.ours is Ours.DECLINED):
                peer.remind(item_id)
        self._timer.by(now.steady + MAX_HOLD * self._timing.announce_interval)

    # What we hold

    def _hold(self, item: Item, now: Instant) -> None:
        self._store.add(item, now)
        earliest = float("inf")
        for node, peer in self._peers.items():
            row = self._ledger.find(node, item.id)
            if (row is None or row.is_news) and peer.wants.covers(item.topic):
                peer.remind(item.id)
                earliest = min(earliest, peer.quiet_until)
        if earliest <= now.steady:
            self._timer.news(now.steady)
        elif earliest < float("inf"):
            self._timer.by(earliest)

    def _publish(self, item: Item, now: Instant) -> list[GossipAction]:
        if item.id in self._seen:
            return []
        self._seen.set(item.id, item.signer)
        actions: list[GossipAction] = []
        if len(item.frame) <= self._limits.push_bytes:
            eager = [
                node
                for node, peer in self._peers.items()
                if not peer.wants.announce_only and peer.wants.covers(item.topic)
            ]
            for node in self._rng.sample(eager, most) if len(eager) > (most := self._limits.max_pushes) else eager:
                if self._peers[node].waiting < self._limits.max_served:
                    actions.append(self._queue(node, Place(item.id, WHOLE), len(item.frame), now, is_push=True))
                    self._ledger.row(node, item.id).told = True
        self._hold(item, now)
        if len(item.frame) > self._limits.push_bytes:
            self._timer.by(now.steady)
        return actions

    def _find(self, item_id: ItemId, part: int) -> Item | ItemOutline | ItemChunk | None:
        """Return what a WANT is answered with, if it is here."""
        if part == WHOLE and (outline := self._store.outline(item_id)) is not None:
            return outline
        item, partial = self._store.get(item_id), self._wants.partial(item_id)
        if item is not None:
            if part == WHOLE:
                return item
            chunk = item.chunk(part) if item.is_large else None
            return chunk if chunk is not None and chunk.data else None
        if partial is not None:
            return ItemOutline(partial.outline.head, partial.outline.hashes) if part == WHOLE else partial.chunk(part)
        return None

    def _wanted(self, node: NodeId, want: Want, now: Instant) -> list[GossipAction]:
        peer = self._peers[node]
        actions: list[GossipAction] = []
        lacking: dict[ItemId, None] = {}
        busy: dict[ItemId, None] = {}
        for item_id, chunks in want.parts:
            row = self._ledger.row(node, item_id)
            was_offered = row.ours is not Ours.NONE or self._store.offered(item_id, now) is not None
            is_held = item_id in self._store
            for part in chunks or (WHOLE,):
                place = Place(item_id, part)
                if peer.waits_for(place):
                    continue
                size = self._size_of(item_id, part) if was_offered or not is_held else 0
                if not size:
                    lacking[item_id] = None
                elif peer.waiting >= self._limits.max_served:
                    busy[item_id] = None
                else:
                    actions = [self._queue(node, place, size, now)]
        if any(part.chunks for part in want.parts):
            self._uploads_until = now.steady + self._timing.pull_patience
        if lacking:
            actions.append(Send(node, DontHave(tuple(lacking))))
        if busy:
            actions.append(Send(node, Busy(tuple(busy))))
        return actions

    def _size_of(self, item_id: ItemId, part: int) -> int:
        """Return how many bytes a WANT is answered with, 0 if it is not here."""
        entry, partial = self._store.entry(item_id), self._wants.partial(item_id)
        if entry is not None:
            body = entry.size - HEAD_BYTES
            if part == WHOLE:
                return HEAD_BYTES + HASH_BYTES * chunk_count(body) if body > CHUNK_BYTES else entry.size
            return min(CHUNK_BYTES, max(0, body - part * CHUNK_BYTES)) if body > CHUNK_BYTES else 0
        if partial is None:
            return 0
        return HEAD_BYTES + len(partial.outline.hashes) if part == WHOLE else len(partial.chunks.get(part, b""))

    def _queue(self, node: NodeId, place: Place, size: int, now: Instant, *, is_push: bool = False) -> Serve:
        peer = self._peers[node]
        if not peer.waiting:
            peer.waiting_since = now.steady
        (peer.small if size <= self._limits.push_bytes else peer.large)[place] = is_push
        self._serving += 1
        self._store.serve(place.item)
        self._ledger.row(node, place.item).note(Statement.THEY_WANT)
        return Serve(node)

    def _cancelled(self, node: NodeId, cancel: Cancel) -> None:
        for item_id, chunks in cancel.parts:
            for part in chunks or (WHOLE,):
                self._forget_served(self._peers[node], Place(item_id, part))
            self._ledger.row(node, item_id).note(Statement.THEY_CANCEL)

    def _forget_served(self, peer: _Peer, place: Place) -> None:
        """Let something wait no longer for a peer's line, if it did."""
        if peer.waits_for(place):
            del (peer.small if place in peer.small else peer.large)[place]
            self._serving -= 1
            self._store.served(place.item)

    # What we ask for

    def _offered(self, node: NodeId, items: tuple[Entry, ...], now: Instant) -> list[GossipAction]:
        peer, holder = self._peers[node], hint(node)
        wants, seen = self._appetite.filter, self._seen.get
        for entry in items:
            if not entry.parts:
                peer.pending.pop(entry.id, None)
            if seen(entry.id) is not None:
                self._ledger.row(node, entry.id).note(Statement.THEY_HAVE)
            elif entry.size <= self._max_item and wants.covers(entry.topic):
                is_small = entry.size <= self._limits.push_bytes
                is_pushed = is_small and entry.signer != holder and entry.signer in self._neighbours
                delay = self._timing.pull_delay if is_pushed and not wants.announce_only else 0.0
                self._wants.have(node, entry, now.steady, delay)
                if entry.topic in self._appetite.beside and entry.size <= self._limits.beside_bytes:
                    self._wants.have_beside(node, entry.id)
        # If there is more than we take, the next tick draws from all that was announced, and not from what the quickest
        # holder has. Each holder gets one message.
        if self._appetite.has_room(now) and not wants.announce_only:
            return [*self._ask(now), *self._sent(self._wants.fill(node, now.steady))]
        return self._sent(self._wants.fill(node, now.steady))

    def _ask(self, now: Instant) -> list[GossipAction]:
        self._appetite.spend(-self._wants.take_failed())
        beside = self._wants.due_beside(now.steady, self._appetite.level_beside(now)) if self._appetite.beside else []
        self._appetite.spend_beside(sum(len(want.parts) for _, want in beside))
        asked: list[GossipAction] = [Send(node, want) for node, want in beside]
        return asked + self._sent(self._wants.due(now.steady, self._appetite.level(now)))

    def _ask_all(self, now: Instant) -> list[GossipAction]:
        return [*self._ask(now), *self._sent(self._wants.fill_all(now.steady))]

    def _sent(self, asks: Asks) -> list[GossipAction]:
        self._appetite.spend(
            sum(not part.chunks for _, want in asks for part in want.parts if not isinstance(want, Cancel))
        )
        return [Send(node, want) for node, want in asks]

    # Time

    def _tick(self, now: Instant) -> list[GossipAction]:
        self._ticked = now.steady
        self._store.expire(now)
        self._seen.expire(now.steady)
        silent = self._wants.check(now.steady, bounded=self._appetite.bounded)
        actions: list[GossipAction] = [Blame(node, "unanswered") for node in silent]
        actions += self._ask_all(now)
        if self._appetite.adjust(now):
            actions += self._tell_interest(self._peers)
        if now.steady >= self._next_sync and self._peers:
            self._next_sync = now.steady + self._timing.sync_interval * self._rng.uniform(0.75, 1.25)
            if eager := [node for node, peer in self._peers.items() if self._may_lack(peer, now)]:
                actions += self._remind(self._rng.choice(eager), now)
        flush = now.steady >= self._timer.due
        if flush:
            self._timer.clear()
        for node, peer in self._peers.items():
            actions += self._answer(node, peer, now)
            if now.steady < peer.quiet_until:
                if peer.pending:
                    self._timer.by(peer.quiet_until)
                continue
            if flush and peer.pending:
                actions += self._announce(node, [one for one in peer.pending if self._is_news(node, one)], now)
                peer.pending.clear()
                if peer.wants.announce_only:
                    peer.quiet_until = now.steady + self._timing.pull_patience / DRAWS
            actions += self._catch_up(node, peer, now)
        self._catching_up = any(peer.backlog for peer in self._peers.values())
        return actions

    def _answer(self, node: NodeId, peer: _Peer, now: Instant) -> list[GossipAction]:
        """Tell a peer that what it wants still waits."""
        if peer.waiting and now.steady >= peer.waiting_since + self._timing.pull_patience / 2:
            peer.waiting_since = now.steady
            return [Send(node, Busy(()))]
        return []

    def _is_news(self, node: NodeId, item_id: ItemId) -> bool:
        row = self._ledger.find(node, item_id)
        return row is None or row.is_news or (self._wants.partial(item_id) is not None and not row.has_all)

    def _may_lack(self, peer: _Peer, now: Instant) -> bool:
        """Tell whether a peer may be reminded: it takes everything, and nothing that it lacks is on its way."""
        is_served = peer.waiting or now.steady < peer.gave_at + self._timing.pull_patience
        return not (peer.wants.announce_only or is_served)

    def _remind(self, node: NodeId, now: Instant) -> list[GossipAction]:
        newest = self._store.newest(MAX_IDS, since=now.steady - SYNC_WINDOW * self._timing.sync_interval)
        return self._announce(node, [one for one in newest if not _has_surely(self._ledger.find(node, one))], now)

    def _catch_up(self, node: NodeId, peer: _Peer, now: Instant) -> list[GossipAction]:
        if not peer.backlog or now.steady < peer.backlog_due:
            return []
        peer.backlog_due = now.steady + CATCH_UP_S
        batch: list[ItemId] = []
        while peer.backlog and len(batch) < MAX_IDS:
            item_id = peer.backlog.pop()
            if self._ledger.find(node, item_id) is None:
                batch.append(item_id)
        return self._announce(node, batch, now)

    def _announce(self, node: NodeId, ids: list[ItemId], now: Instant) -> list[GossipAction]:
        """Announce those that are held, or chunks of them, and that the peer is interested in."""
        peer = self._peers[node]
        told = [entry for one in ids if (entry := self._entry(one, now)) and peer.wants.covers(entry.topic)]
        for entry in told:
            if not entry.parts:
                row = self._ledger.row(node, entry.id)
                row.note(Statement.WE_HAVE)
                row.told = True
        return [Send(node, Have(tuple(told[i : i + MAX_IDS]))) for i in range(0, len(told), MAX_IDS)]

    def _entry(self, item_id: ItemId, now: Instant) -> Entry | None:
        """Return what is announced of an item."""
        partial = self._wants.partial(item_id)
        if partial is None or not partial.chunks:
            return self._store.offered(item_id, now)
        header = partial.outline.header
        topic = self._wants.topic(item_id)
        return Entry(item_id, HEAD_BYTES + header.size, topic, hint(partial.outline.signer), partial.parts)


def _has_surely(row: LedgerRow | None) -> bool:
    """Tell whether a peer has an item for sure: it sent it to us or announced it."""
    return row is not None and row.has_all
