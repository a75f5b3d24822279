"""Getting items around. A pure state machine: `handle(event, now) -> actions`.

An item is a signed envelope that is passed on as the bytes its signer made. Its id is a
hash of the signer's key and the body.

Rules
 1. Whoever publishes an item of at most `PUSH_BYTES` sends it to every live peer, and
    announces the id of a larger one instead, so that a large item crosses a link once.
 2. Whoever gets an item for the first time delivers it, holds it, and announces its id at the
    next tick to the live peers that are not known to have it.
 3. An announced item that we lack is pulled: at once when it is too large to be pushed,
    otherwise after `PULL_DELAY_S`, as the push is probably on its way. When a holder does not
    deliver in time, the next one that announced the item is asked.
 4. A peer that comes up is announced everything that is held, so a node that was away catches
    up. Now and then a random peer is announced what is newest, in case something was lost.
 5. What could not be sent (a full queue) is announced later: no peer can make us wait or
    grow.
 6. A peer is known to have what it sent, announced or was sent. Bytes that a peer sends twice
    are a replay; an item that two peers send is an ordinary duplicate.
"""

import random
from dataclasses import dataclass, field

from protocol.clock import Instant
from protocol.envelope import ItemId
from protocol.events import PeerDown, PeerUp, Tick
from protocol.gossip_events import (
    Announced,
    Deliver,
    Discard,
    GossipAction,
    GossipEvent,
    Got,
    Item,
    NotSent,
    Publish,
    Pulled,
    SendAnnounce,
    SendItem,
)
from protocol.identity import NodeId
from protocol.limits import TokenBucket
from protocol.messages import MAX_IDS, Entry
from protocol.pulls import Pulls
from protocol.recent import Recent
from protocol.setup import Setup
from protocol.store import Store

# Below this a push costs less than the announcement and the pull that it saves cost in time: at
# 64 KiB a transfer takes about one round trip on a line of 10 Mbit/s and 50 ms.
PUSH_BYTES = 64 << 10
TICK_S = 0.1  # how long announcements wait for company
PULL_DELAY_S = 0.5
SEEN_ITEMS = 1 << 17  # at 32 items a second, the hour after which items are stale anyway
KNOWN_ITEMS = 4096  # remembered for each peer
MAX_PENDING = 8192  # ids that wait to be announced to one peer
SYNC_INTERVAL_S = 15.0
SYNC_WINDOW_S = 4 * SYNC_INTERVAL_S
RETRY_S = 1.0  # after a full queue


@dataclass(slots=True)
class _Peer:
    known: Recent[ItemId, bool]  # True: it sent us the item itself
    serving: TokenBucket
    pending: dict[ItemId, None] = field(default_factory=dict)
    quiet_until: float = 0.0


class Gossip:
    """See the module's comment."""

    def __init__(self, own: NodeId, setup: Setup, rng: random.Random, now: Instant) -> None:
        self._own = own
        self._limits = limits = setup.limits
        self._rng = rng
        self._peers: dict[NodeId, _Peer] = {}
        self._seen: Recent[ItemId, NodeId] = Recent(SEEN_ITEMS)
        self._store = Store(limits.held_bytes, limits.max_item_age_s)
        self._pulls = Pulls()
        self._next_sync = now.steady + SYNC_INTERVAL_S
        self._urgent = False

    def signer(self, item: ItemId) -> NodeId | None:
        """Return who signed an item that was accepted, if that is still remembered."""
        return self._seen.get(item)

    def wait(self) -> float:
        """Return after how many seconds the next tick is of use, at the latest."""
        if self._urgent:
            return 0.0
        busy = self._pulls or any(peer.pending for peer in self._peers.values())
        return TICK_S if busy else SYNC_INTERVAL_S

    def duplicate(self, node: NodeId, item: ItemId) -> bool:
        """Note that `node` sent bytes that were accepted before; True if it had sent this item itself (a replay)."""
        peer = self._peers.get(node)
        if peer is None:
            return False
        replayed = peer.known.get(item) is True
        peer.known.set(item, True)
        self._pulls.arrived(item)
        return replayed

    def handle(self, event: GossipEvent, now: Instant) -> list[GossipAction]:
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
            case PeerUp(node):
                self._up(node, now)
            case PeerDown(node):
                self._peers.pop(node, None)
                self._pulls.lost(node)
            case NotSent(node, ids):
                self._not_sent(node, ids, now)
            case Discard(item_id):
                self._store.pop(item_id)
            case Tick():
                return self._tick(now)
        return []

    def _up(self, node: NodeId, now: Instant) -> None:
        serving = TokenBucket(self._limits.bytes_per_second, self._limits.bytes_burst, now.steady)
        peer = self._peers[node] = _Peer(Recent(KNOWN_ITEMS), serving)
        self._pulls.lost(node)
        self._store.expire(now)
        peer.pending.update(dict.fromkeys(self._store.newest(MAX_PENDING)))

    def _got(self, node: NodeId, item: Item, now: Instant) -> list[GossipAction]:
        peer = self._peers.get(node)
        if peer is not None:
            peer.known.set(item.id, True)
        self._pulls.arrived(item.id)
        if item.id in self._seen:
            return []
        self._accept(item, now)
        for other in self._peers.values():
            if item.id not in other.known:
                other.pending[item.id] = None
        return [Deliver(item)] if item.signer != self._own else []  # our own came back: we were restarted

    def _accept(self, item: Item, now: Instant) -> None:
        self._seen.set(item.id, item.signer)
        self._store.add(item, now)

    def _publish(self, item: Item, now: Instant) -> list[GossipAction]:
        if item.id in self._seen:
            return []
        self._accept(item, now)
        actions: list[GossipAction] = []
        for node, peer in self._peers.items():
            if len(item.frame) <= PUSH_BYTES:
                peer.known.set(item.id, False)
                actions.append(SendItem(node, item.id, item.frame))
            else:
                peer.pending[item.id] = None
                self._urgent = True
        return actions

    def _announced(self, node: NodeId, items: tuple[Entry, ...], now: Instant) -> list[GossipAction]:
        peer = self._peers.get(node)
        if peer is None:
            return []
        for item_id, size, _ in items:
            if item_id not in peer.known:
                peer.known.set(item_id, False)
            peer.pending.pop(item_id, None)
            if item_id not in self._seen:
                delay = PULL_DELAY_S if size <= PUSH_BYTES else 0.0
                self._pulls.offered(node, item_id, size, now.steady + delay)
        return [*self._pulls.due(now.steady)] if any(entry.size > PUSH_BYTES for entry in items) else []

    def _pulled(self, node: NodeId, ids: tuple[ItemId, ...], now: Instant) -> list[GossipAction]:
        peer = self._peers.get(node)
        if peer is None:
            return []
        actions: list[GossipAction] = []
        for item_id in ids:
            item = self._store.get(item_id)
            if item is not None and peer.serving.take(len(item.frame), now.steady):
                peer.known.set(item_id, peer.known.get(item_id) is True)
                actions.append(SendItem(node, item_id, item.frame))
        return actions

    def _not_sent(self, node: NodeId, ids: tuple[ItemId, ...], now: Instant) -> None:
        peer = self._peers.get(node)
        if peer is not None:
            peer.quiet_until = now.steady + RETRY_S
            for item_id in ids:
                peer.known.pop(item_id)
                peer.pending[item_id] = None

    def _tick(self, now: Instant) -> list[GossipAction]:
        self._urgent = False
        self._store.expire(now)
        actions: list[GossipAction] = [*self._pulls.due(now.steady)]
        if now.steady >= self._next_sync and self._peers:
            self._next_sync = now.steady + SYNC_INTERVAL_S * self._rng.uniform(0.75, 1.25)
            node = self._rng.choice(list(self._peers))
            newest = self._store.newest(MAX_IDS, since=now.steady - SYNC_WINDOW_S)
            actions += self._announce(node, newest)
        for node, peer in self._peers.items():
            if peer.pending and now.steady >= peer.quiet_until:
                ids = [item_id for item_id in peer.pending if item_id not in peer.known][-MAX_PENDING:]
                peer.pending.clear()
                actions += self._announce(node, ids)
        return actions

    def _announce(self, node: NodeId, ids: list[ItemId]) -> list[GossipAction]:
        held = [item.entry for item in map(self._store.get, ids) if item is not None]
        peer = self._peers[node]
        for entry in held:
            if entry.id not in peer.known:
                peer.known.set(entry.id, False)
        return [SendAnnounce(node, tuple(held[i : i + MAX_IDS])) for i in range(0, len(held), MAX_IDS)]
