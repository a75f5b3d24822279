"""Getting items around. A pure state machine: `handle(event, now) -> actions`.

An item is a signed envelope that is passed on as the bytes its signer made. Its id is a
hash of the signer's key and the body.

Rules
 1. Whoever publishes an item of at most `PUSH_BYTES` sends it to every live peer that is
    interested and did not ask for announcements only, and announces it to those. A larger one is announced
    to all, and at once, so that it crosses a link once.
 2. Whoever gets an item for the first time delivers it, holds it, and announces its id to the
    interested live peers that are not known to have it: once nothing new has come for
    `announce_interval`, or `MAX_HOLD` times that after the first, so that a burst is announced once. A peer that asked
    for announcements only, and draws from them `DRAWS` times in `pull_patience`, is told no more often than it draws.
 3. An announced item that we want and lack is pulled (see `protocol.gossip.want_list`), as far as our
    demand goes (see `protocol.gossip.subscriptions`): at once, unless it is small and its signer is a live
    peer of ours, whose push is probably on its way: then after `pull_delay`. A node that asked for announcements
    only draws by lot what it pulls, at its ticks.
 4. A peer that comes up is told our interest and announced what we hold, so a node that was
    away catches up: the newest at once, the rest in batches that leave out what it has got
    meanwhile. Now and then a random peer is announced what is newest, in case something was lost: one that did not ask
    for announcements only, as that has more on offer than it takes; and not while items wait for it, as announcements
    would overtake them. It is asked for what it left out by rule 7, in case something of that was lost or withheld
    (anti-entropy both ways: Demers et al. 1987).
 5. What could not be sent (a full queue) is announced once nothing waits for the peer any more, or `FULL_S` later: it
    would be asked for at once, and the answer wait behind all that does, or find the queue full again. No peer can make
    us wait or grow.
 6. A peer is known to have what it sent, announced or was sent. Bytes that a peer sends twice
    are a replay; an item that two peers send is an ordinary duplicate.
 7. One word of a small item is enough, and a second one in case the first is lost. A node hears of what live peers sign
    from themselves, and of what another signs from `SOURCES` of the peers that told it first. Whoever announces such
    an item beside them is told so, and announces none of this signer's any more: until a link to whom the node
    relies on ends, or one of those does not bring what it was asked for, or none says anything of what another brings
    (rule 4) until we tell them, or nothing more comes of the signer while others lack a place for theirs.
    A source takes at least what the node takes; where more is on offer than that, no other is left out.
 8. An item of a topic that we did not ask for is neither delivered nor held, nor is one pushed
    beyond our demand, or long after we asked for announcements only.
 9. An item is served to a peer once. Whoever asks again, for lines break, pays out of a small allowance of
    its own, which outlives its link: what is beyond that, or named again in one request, is an offence. Of what
    still waits for it, but outlines, no copy is put into its queue (see `protocol.driver`).
10. A promise is kept. An item found bad is announced to nobody any more, but whoever was told of
    it may have it, and judges for itself: that costs its signer, not whoever passed it on. An item
    that will soon be stale is not announced.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from protocol.config import Instant, Setup
from protocol.events import (
    Announced,
    Blame,
    ChunkArrived,
    ChunksPulled,
    Deliver,
    Discard,
    GossipAction,
    GossipEvent,
    Got,
    Interested,
    Item,
    Link,
    NotSent,
    Outline,
    Outlined,
    PeerDown,
    PeerUp,
    Publish,
    Pulled,
    Send,
    Subscribe,
    Tick,
)
from protocol.gossip.announce_timer import AnnounceTimer
from protocol.gossip.downloads import Downloads, Took
from protocol.gossip.item_store import Store
from protocol.gossip.peer_state import KNOWN_ITEMS, MAX_PENDING, Account, Knows, Peer
from protocol.gossip.subscriptions import Appetite, Filter
from protocol.gossip.want_list import WANT_LIFE_S, Pulls
from protocol.identity import NodeId
from protocol.lru import Expiring, Recent
from protocol.wire.envelope import HASH_BYTES, HEAD_BYTES, ItemId
from protocol.wire.messages import (
    ITEM_OVERHEAD_BYTES,
    MAX_DIRECT,
    MAX_IDS,
    Announce,
    Entry,
    ItemChunk,
    PullChunks,
    hint,
)

# Below this a push costs less than the announcement and the pull that it saves cost in time: at
# 64 KiB a transfer takes about one round trip on a line of 10 Mbit/s and 50 ms.
PUSH_BYTES = 64 << 10
SEEN_ITEMS = 1 << 17  # at 32 items a second, the hour after which items are stale anyway
FIRST_IDS = 64  # announced at once to a peer that comes up: about 3 kB, whatever it turns out to want
CATCH_UP_S = 2.0  # between its further batches of `MAX_IDS`: 12 kB a second, and what it pulls strikes out the next
DRAWS = 4  # in the patience for a pull: how often it is looked for what stalls, and drawn what is pulled
MAX_ACCOUNTS = 256  # that outlive their links
SYNC_WINDOW = 4.0  # sync intervals
SOURCES = 2  # peers that a node relies on for what a signer makes that is none of its peers
SILENT_S = 600.0  # after which a signer's sources make room: longer than a round of most nodes


@dataclass(slots=True)
class _Relied:
    """The peers that a node relies on for what a signer makes, and when something of it last came."""

    sources: tuple[NodeId, ...]
    heard: float


class Gossip:
    """See the module's comment."""

    def __init__(self, own: NodeId, setup: Setup, rng: random.Random, now: Instant) -> None:
        self._own = own
        self._hint = hint(own)
        self._limits = limits = setup.limits
        self._timing = setup.timing
        self._rng = rng
        self._peers: dict[NodeId, Peer] = {}
        self._neighbours: Counter[bytes] = Counter()  # hints of the live peers
        # Nobody's stamp is further ahead, so whatever is forgotten is refused as stale.
        self._seen: Expiring[ItemId, NodeId] = Expiring(SEEN_ITEMS, limits.max_item_age_s + limits.max_clock_ahead_s)
        self._store = Store(limits.held_bytes, limits.max_item_age_s)
        self._pulls = Pulls(setup.timing, rng)
        self._accounts: Recent[NodeId, Account] = Recent(MAX_ACCOUNTS)
        self._downloads = Downloads(limits.held_bytes, setup.timing.pull_patience)
        self._max_item = HEAD_BYTES + ITEM_OVERHEAD_BYTES + limits.max_item_bytes
        self._appetite = Appetite(own, now)
        self._next_sync = now.steady + setup.timing.sync_interval
        self._next_choice = now.steady
        self._relied: dict[NodeId, _Relied] = {}  # by signers that are no live peers; see rule 7
        self._uploads_until = now.steady  # when nobody fetches chunks of ours any more
        self._ticked = now.steady
        self._catching_up = False  # whether a peer is yet to be announced what we held when it came
        self._timer = AnnounceTimer(setup.timing.announce_interval)
        # Who signed an item that was accepted, None if that is not remembered: asked for each that comes.
        self.signer: Callable[[ItemId], NodeId | None] = self._seen.get

    @property
    def held_bytes(self) -> int:
        """How many bytes of items it holds for others."""
        return self._store.size

    @property
    def wanted(self) -> int:
        """How many items were announced that it lacks and may ask for."""
        return len(self._pulls)

    def withdraw_signed(self, is_by: Callable[[NodeId], bool]) -> None:
        """Offer nobody any more what somebody signed for whom `is_by` holds, and fetch no more of it."""
        self._store.withdraw_signed(is_by)
        self._downloads.forget_signed(is_by)

    def wait(self) -> float:
        """Return how many seconds after the last tick the next one is of use."""
        timing = self._timing
        wait = max(0.0, self._timer.due - self._ticked)
        if len(self._pulls):
            return min(wait, timing.announce_interval if self._pulls.delayed else timing.pull_patience / DRAWS)
        if len(self._downloads):
            return min(wait, timing.pull_patience / DRAWS)
        if self._catching_up:
            return min(wait, CATCH_UP_S / 4)
        return min(wait, timing.sync_interval)

    def may_rest(self, now: Instant) -> bool:
        """Tell whether nobody waits for a node that looks at the network a few times a second only.

        It draws what it pulls at its ticks, has more on offer than it takes, and nothing large comes or goes.
        """
        return self._appetite.filter.announce_only and not len(self._downloads) and now.steady >= self._uploads_until

    def heard(self, node: NodeId, now: Instant) -> None:
        """Note that a frame with an item came of `node`, whatever becomes of it."""
        self._downloads.heard(node, now.steady)

    def duplicate(self, node: NodeId, item: ItemId, now: Instant) -> bool:
        """Note that `node` sent bytes that were accepted before; True if it had sent this item itself (a replay)."""
        peer = self._peers.get(node)
        if peer is None:
            return False
        is_answer = self._pulls.arrived(item, node, now.steady)
        replayed = peer.known.get(item) is Knows.SENT and not is_answer
        peer.note(item, Knows.SENT)
        return replayed

    def declines(self, node: NodeId, item: ItemId, size: int, now: Instant) -> bool:
        """Tell whether the `size` bytes that `node` sends, if they are this item, are more than we take.

        Then they need not be verified: nobody asked for them, the demand is met, and the sender may not know that we
        asked for announcements.
        """
        peer = self._peers.get(node)
        if self._pulls.is_asked(item, node):
            return False
        if peer is not None:
            peer.account.pushed(size)
        if self._appetite.has_room(now):
            return False
        if peer is not None and peer.account.should_know(now.steady):
            return False
        self._appetite.offered(now)
        return True

    def handle(self, event: GossipEvent, now: Instant) -> list[GossipAction]:  # noqa: C901, PLR0912  # one arm for each event
        """Advance by one event."""
        match event:
            case Got(node, item):
                return self._got(node, item, now)
            case Publish(item):
                return self._publish(item, now)
            case Announced(node, items):
                return self._announced(node, items, now)
            case Pulled(node, ids):
                return self._pulled(node, ids, now)
            case Outlined(node, outline):
                return self._outlined(node, outline, now)
            case ChunksPulled(node, pull):
                return self._chunks_pulled(node, pull, now)
            case ChunkArrived(node, chunk):
                return self._chunk_arrived(node, chunk, now)
            case PeerUp(node):
                return self._up(node, now)
            case PeerDown(node):
                self._down(node)
                return self._distrust(node, now)
            case Interested(node, interest):
                if node in self._peers:
                    self._interested(self._peers[node], Filter.of(node, interest), now)
            case Subscribe(topics, demand):
                return self._tell_interest(self._peers, now) if self._appetite.subscribe(topics, demand, now) else []
            case NotSent(node, ids):
                self._not_sent(node, ids, now)
            case Discard(item_id):
                self._store.withdraw(item_id)
            case Tick(congested):
                return self._tick(congested, now)
        return []

    def _up(self, node: NodeId, now: Instant) -> list[GossipAction]:
        self._down(node)
        account = self._accounts.get(node) or Account(self._limits, now.steady)
        account.linked(now.steady)
        self._accounts.set(node, account)
        self._store.expire(now)
        held = self._store.newest(MAX_PENDING)
        # Two nodes that meet again hold much the same: of the two, whose batch is later leaves out the other's.
        due = now.steady + CATCH_UP_S * self._rng.random()
        peer = Peer(Filter(hint(node)), Recent(KNOWN_ITEMS), account, held[:-FIRST_IDS], due)
        if held:
            peer.remind(*held[-FIRST_IDS:])
            self._timer.by(now.steady)
        self._peers[node] = peer
        self._relied.pop(node, None)
        self._catching_up = self._catching_up or bool(peer.backlog)
        self._neighbours[hint(node)] += 1
        return self._tell_interest([node], now) if self._appetite.told else []

    def _down(self, node: NodeId) -> None:
        if self._peers.pop(node, None) is not None:
            self._neighbours -= Counter([hint(node)])
        self._appetite.refund(self._pulls.lost(node))
        self._downloads.lost(node)

    def _tell_interest(self, nodes: Iterable[NodeId], now: Instant) -> list[GossipAction]:
        for node in nodes:
            self._peers[node].account.told(self._appetite.filter.announce_only, now.steady)
        return [Send(node, self._appetite.filter.interest(self._peers[node].direct)) for node in nodes]

    def _interested(self, peer: Peer, wants: Filter, now: Instant) -> None:
        """Take a peer's wish; what it no longer hears from signers themselves it may have missed."""
        missed = peer.wants.direct - wants.direct
        peer.wants = wants
        if missed:
            ids = self._store.newest(MAX_IDS)
            peer.remind(*(one for one in ids if self._seen.get(one) in missed and peer.known.get(one) is None))
            self._timer.news(now.steady)

    def _rely_on_few(self, now: Instant) -> list[GossipAction]:
        """Rule 7: choose whom to hear of items from, and tell the peers that announce them beside those."""
        if now.steady < self._next_choice:
            return []
        self._next_choice = now.steady + self._timing.pull_patience
        actions = self._hear_of_again(self._badly_heard(), now)
        brought = self._brought()
        actions += self._hear_of_again(self._silent(len(brought), now), now)
        self._choose_sources(brought, now)
        told = []
        for node, peer in self._peers.items():
            if peer.repeats:
                peer.repeats = False
                peer.brought.clear()
                direct = self._heard_without(node)
                if not peer.direct.issuperset(direct):
                    peer.direct = direct
                    told.append(node)
        return [*actions, *self._tell_interest(told, now)]

    def _badly_heard(self) -> set[NodeId]:
        """Return the signers whose sources do not take all that we take, or said nothing of what another brought."""
        found = {signer for signer, relied in self._relied.items() if not self._are_fit(relied.sources)}
        for peer in self._peers.values():
            for item_id in peer.brought:
                signer = self._seen.get(item_id)
                relied = self._relied.get(signer) if signer is not None else None
                if signer and relied and not any(self._peers[one].told_us(item_id) for one in relied.sources):
                    found.add(signer)
        return found

    def _brought(self) -> dict[NodeId, list[NodeId]]:
        """Return the signers that are no peers and have no sources yet, and which of the peers told of each first."""
        brought: dict[NodeId, dict[NodeId, None]] = {}
        for node, peer in self._peers.items():
            if self._are_fit([node]) and not self._pulls.owes(node):
                for item_id in peer.brought:
                    signer = self._seen.get(item_id)
                    if signer is not None and signer not in self._peers and signer not in self._relied:
                        brought.setdefault(signer, {})[node] = None
        return {signer: [*nodes] for signer, nodes in brought.items() if len(nodes) >= SOURCES}

    @property
    def _places(self) -> int:
        """How many signers more may have sources, as an interest names no more; below 0 where peers became more."""
        return MAX_DIRECT - len(self._peers) - len(self._relied)

    def _silent(self, wanted: int, now: Instant) -> list[NodeId]:
        """Return the signers of whom nothing came for long, as many as others lack places: they may be gone."""
        lacking = max(0, wanted - self._places)
        silent = sorted(self._relied, key=lambda signer: self._relied[signer].heard)[:lacking]
        return [signer for signer in silent if self._relied[signer].heard + SILENT_S <= now.steady]

    def _choose_sources(self, brought: Mapping[NodeId, Sequence[NodeId]], now: Instant) -> None:
        """Choose two of the peers that told us first, for each signer that has none yet."""
        used = Counter(chain.from_iterable(relied.sources for relied in self._relied.values()))
        for signer, nodes in islice(brought.items(), max(0, self._places)):
            # Few for all signers, as each takes a message; which, is drawn, so that no node has to serve many.
            drawn = sorted(self._rng.sample(nodes, len(nodes)), key=lambda one: -used[one])
            self._relied[signer] = _Relied(tuple(drawn[:SOURCES]), now.steady)
            used.update(drawn[:SOURCES])

    def _are_fit(self, sources: Iterable[NodeId]) -> bool:
        """Tell whether we take everything, and these peers all that we take."""
        ours = self._appetite.filter
        return not ours.announce_only and all(self._peers[one].wants.includes(ours) for one in sources)

    def _heard_without(self, node: NodeId) -> frozenset[NodeId]:
        """Return the signers of whose small items we hear without the peer `node`."""
        linked = (one for one in self._peers if one != node and not self._pulls.owes(one))
        others = (signer for signer, relied in self._relied.items() if node not in relied.sources)
        return frozenset((*linked, *others))

    def _hear_of_again(self, signers: Iterable[NodeId], now: Instant) -> list[GossipAction]:
        """Let all peers announce what these signed."""
        lost = frozenset(signers)
        for signer in lost:
            self._relied.pop(signer, None)
        told = [node for node, peer in self._peers.items() if not lost.isdisjoint(peer.direct)]
        for node in told:
            self._peers[node].direct -= lost
        return self._tell_interest(told, now)

    def _distrust(self, node: NodeId, now: Instant) -> list[GossipAction]:
        """Rely on a peer no more that is gone, or does not bring what it was asked for."""
        relying = [signer for signer, relied in self._relied.items() if node in relied.sources]
        return self._hear_of_again([node, *relying], now)

    def _got(self, node: NodeId, item: Item, now: Instant) -> list[GossipAction]:
        peer = self._peers.get(node)
        if peer is not None:
            peer.note(item.id, Knows.SENT)
        return self._take(node, item, self._pulls.arrived(item.id, node, now.steady, item.signer), now)

    def _take(self, node: NodeId, item: Item, asked: bool, now: Instant) -> list[GossipAction]:
        peer = self._peers.get(node)
        if self._seen.get(item.id) is not None:
            return []
        if not self._appetite.filter.covers_topic(item.topic):
            return [Blame(node, "unwanted")]
        if not asked:
            self._appetite.offered(now)
            if peer is not None and peer.account.should_know(now.steady):
                return [Blame(node, "unasked")]
            if not self._appetite.take_push(now):
                return [Blame(node, "over_demand")]
        self._seen.set(item.id, item.signer)
        if (relied := self._relied.get(item.signer)) is not None:
            relied.heard = now.steady
        self._hold(item, now)
        return [Deliver(item)] if item.signer != self._own else []  # our own came back: we were restarted

    def _hold(self, item: Item, now: Instant) -> None:
        self._store.add(item, now, spare=self._is_spare)
        pusher, may = _pusher(item), math.inf
        for peer in self._peers.values():
            wants = peer.wants
            if pusher not in wants.direct and peer.known.get(item.id) is None and wants.covers_topic(item.topic):
                peer.remind(item.id)
                may = min(may, peer.quiet)
        if may <= now.steady:
            self._timer.news(now.steady)
        elif may < math.inf:
            self._timer.by(may)

    def _is_spare(self, held: Item) -> bool:
        """Tell whether all who are near have an item, or hear of it without us."""
        pusher = _pusher(held)
        return all(pusher in peer.wants.direct or peer.has(held.id) for peer in self._peers.values())

    def _publish(self, item: Item, now: Instant) -> list[GossipAction]:
        if item.id in self._seen:
            return []
        self._seen.set(item.id, item.signer)
        small = len(item.frame) <= PUSH_BYTES
        actions: list[GossipAction] = []
        for node, peer in self._peers.items():
            if small and not peer.wants.announce_only and peer.wants.covers_topic(item.topic):
                peer.note(item.id, Knows.HAS)
                actions.append(Send(node, item))
        self._hold(item, now)
        if not small:
            self._timer.by(now.steady)
        return actions

    def _announced(self, node: NodeId, items: tuple[Entry, ...], now: Instant) -> list[GossipAction]:
        peer = self._peers.get(node)
        if peer is None:
            return []
        holder = hint(node)
        wants, seen, is_fetching = self._appetite.filter, self._seen.get, len(self._downloads) > 0
        neighbours, fresh = self._neighbours, 0
        for entry in items:
            peer.said(entry.id)
            is_relayed = entry.signer != holder and entry.size <= PUSH_BYTES
            peer.repeats = peer.repeats or (is_relayed and (entry.signer in neighbours or not wants.announce_only))
            if is_fetching and entry.id in self._downloads:
                self._downloads.offered(node, entry.id)
                continue
            if (
                seen(entry.id) is not None
                or entry.size > self._max_item
                or not wants.covers(entry.topic, entry.signer, holder, now.unix)
            ):
                continue
            delay = 0.0
            if is_relayed and not wants.announce_only:
                delay = self._timing.pull_delay if entry.signer in neighbours else 0.0
                peer.bring(entry.id)
            fresh += self._pulls.offered(node, entry, now.steady, delay)
        if fresh:
            self._appetite.offered(now, fresh)
        # Where there is more than we take, it is drawn at the next tick from what all have announced, and not from what
        # the quickest has; in one pull of each holder.
        return self._fetch(now) if wants.announce_only else [*self._ask(now), *self._fetch(now)]

    def _outlined(self, node: NodeId, outline: Outline, now: Instant) -> list[GossipAction]:
        holders = self._pulls.holders(outline.id)
        if not self._pulls.arrived(outline.id, node, now.steady):
            return [Blame(node, "unasked")]
        if outline.id in self._seen or outline.id in self._downloads:
            return []
        if not self._downloads.begin(outline, dict.fromkeys([node, *holders]), now.steady):
            self._appetite.refund(1)
            return [Blame(node, "no_room")]
        return self._fetch(now)

    def _chunk_arrived(self, node: NodeId, chunk: ItemChunk, now: Instant) -> list[GossipAction]:
        signer = self._downloads.signer(chunk.id)
        match self._downloads.arrived(node, chunk, now.steady):
            case Took.MISSIZED:
                assert signer is not None
                self._appetite.refund(1)
                return [Blame(signer, "malformed"), *self._fetch(now)]
            case Took.FALSE:
                return [Blame(node, "false_chunk"), *self._fetch(now)]
            case Took.LATE:
                return []
            case Took.UNASKED:
                return [Blame(node, "unasked_chunk")]
        item = self._downloads.finish(chunk.id)
        if item is None:
            return self._fetch(now)
        if node in self._peers:
            self._peers[node].note(item.id, Knows.SENT)
        return [*self._take(node, item, True, now), *self._fetch(now)]

    def _fetch(self, now: Instant) -> list[GossipAction]:
        return [Send(node, pull) for node, pull in self._downloads.due(now.steady)]

    def _chunks_pulled(self, node: NodeId, pull: PullChunks, now: Instant) -> list[GossipAction]:
        peer = self._peers.get(node)
        item = self._store.get(pull.id) if peer is not None and pull.id in peer.known else None
        if peer is None or item is None or not item.is_large:
            return []
        self._uploads_until = now.steady + self._timing.pull_patience
        actions: list[GossipAction] = []
        for index in dict.fromkeys(pull.indices):
            chunk = item.chunk(index)
            if not chunk.data:
                continue
            if not peer.account.take(chunk.place, len(chunk.data), now.steady):
                if peer.account.had(chunk.place):
                    return [*actions, Blame(node, "asked_again")]
                self._not_sent(node, (chunk.place,), now)
                break
            actions.append(Send(node, chunk))
        return actions + _named_again(node, pull.indices)

    def _ask(self, now: Instant) -> list[GossipAction]:
        pulls = [*self._pulls.due(now.steady, self._appetite.level(now))]
        self._appetite.spend(sum(len(pull.ids) for _, pull in pulls))
        return [Send(node, pull) for node, pull in pulls]

    def _pulled(self, node: NodeId, ids: tuple[ItemId, ...], now: Instant) -> list[GossipAction]:
        peer = self._peers.get(node)
        if peer is None:
            return []
        actions: list[GossipAction] = []
        later: list[ItemId] = []
        for item_id in dict.fromkeys(ids):
            may_have = item_id in peer.known or self._store.offered(item_id, now) is not None
            item = self._store.get(item_id) if may_have else None
            if item is None:
                continue
            size = len(item.hashes) if item.is_large else len(item.frame)
            if peer.account.take(item_id, size, now.steady):
                peer.note(item_id, Knows.HAS)
                actions.append(Send(node, item))
            elif peer.account.had(item_id):
                actions.append(Blame(node, "asked_again"))
            else:
                later.append(item_id)
        if later:
            self._not_sent(node, tuple(later), now)
        return actions + _named_again(node, ids)

    def _not_sent(self, node: NodeId, ids: tuple[bytes, ...], now: Instant) -> None:
        peer = self._peers.get(node)
        if peer is not None:
            peer.found_full(now.steady)
            for what in ids:
                peer.account.undo(what)
                item_id = ItemId(what[:HASH_BYTES])
                peer.known.pop(item_id)
                peer.remind(item_id)
            self._timer.by(peer.quiet_until)

    def _tick(self, congested: Container[Link | NodeId], now: Instant) -> list[GossipAction]:
        self._ticked = now.steady
        self._store.expire(now)
        self._seen.expire(now.steady)
        failed, liars = self._pulls.check(now.steady, WANT_LIFE_S if self._appetite.bounded else math.inf)
        self._appetite.refund(failed + self._downloads.check(now.steady))
        actions: list[GossipAction] = [Blame(node, "broken_promise") for node in liars]
        actions += [*self._ask(now), *self._fetch(now), *self._rely_on_few(now)]
        for node in [one for one in self._peers if self._pulls.owes(one)]:
            actions += self._distrust(node, now)
        if self._appetite.adjust(len(self._peers), now):
            actions += self._tell_interest(self._peers, now)
        if now.steady >= self._next_sync and self._peers:
            self._next_sync = now.steady + self._timing.sync_interval * self._rng.uniform(0.75, 1.25)
            if eager := [node for node, peer in self._peers.items() if not peer.wants.announce_only]:
                chosen = self._rng.choice(eager)
                actions += self._remind(chosen, now) if chosen not in congested else []
                actions += self._ask_for_what_is_left_out(chosen, now)
        flush = now.steady >= self._timer.due
        if flush:
            self._timer.clear()
        for node, peer in self._peers.items():
            peer.look_at_queue(node in congested, now.steady)
            if now.steady < peer.quiet:
                if peer.pending:
                    self._timer.by(peer.quiet)
                continue
            if flush and peer.pending:
                actions += self._announce(
                    node, [item_id for item_id in peer.pending if peer.known.get(item_id) is None], now
                )
                peer.pending.clear()
                if peer.wants.announce_only:
                    peer.quiet_until = now.steady + self._timing.pull_patience / DRAWS
            if not peer.pending:
                peer.full_since = math.inf
            actions += self._catch_up(node, peer, now)
        self._catching_up = any(peer.backlog for peer in self._peers.values())
        return actions

    def _remind(self, node: NodeId, now: Instant) -> list[GossipAction]:
        newest = self._store.newest(MAX_IDS, since=now.steady - SYNC_WINDOW * self._timing.sync_interval)
        known = self._peers[node].known
        return self._announce(node, [item_id for item_id in newest if known.get(item_id) is not Knows.SENT], now)

    def _ask_for_what_is_left_out(self, node: NodeId, now: Instant) -> list[GossipAction]:
        """Ask a peer for what it left out until now, and not for what is next."""
        if not self._peers[node].direct:
            return []
        return [Send(node, self._appetite.filter.interest(())), *self._tell_interest([node], now)]

    def _catch_up(self, node: NodeId, peer: Peer, now: Instant) -> list[GossipAction]:
        if not peer.backlog or now.steady < peer.backlog_due:
            return []
        peer.backlog_due = now.steady + CATCH_UP_S
        batch: list[ItemId] = []
        while peer.backlog and len(batch) < MAX_IDS:
            item_id = peer.backlog.pop()
            if item_id not in peer.known:
                batch.append(item_id)
        return self._announce(node, batch, now)

    def _announce(self, node: NodeId, ids: list[ItemId], now: Instant) -> list[GossipAction]:
        """Announce those that are still held and that the peer is interested in."""
        peer = self._peers[node]
        found = (self._store.offered(item_id, now) for item_id in ids)
        told = [
            entry for entry in found if entry and peer.wants.covers(entry.topic, entry.signer, self._hint, now.unix)
        ]
        for entry in told:
            peer.note(entry.id, Knows.TOLD)
        return [Send(node, Announce(tuple(told[i : i + MAX_IDS]))) for i in range(0, len(told), MAX_IDS)]


def _named_again(node: NodeId, named: Sequence[ItemId] | Sequence[int]) -> list[GossipAction]:
    """Return a blame for each time that one request names again what it named."""
    return [Blame(node, "asked_again")] * (len(named) - len(set(named)))


def _pusher(item: Item) -> NodeId | None:
    """Return the signer of a small item: who hears of such from the signer itself hears of it without us."""
    return item.signer if len(item.frame) <= PUSH_BYTES else None
