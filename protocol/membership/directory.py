"""Our own record and those of others: how they are made, read and told.

Rules
 1. Two peers exchange a random sample of records when they go live. If a node has few peers, it tells the others of the
    newcomer at once: if it dies, they find each other. Every `exchange_interval` a node starts an exchange with a
    random peer. It sends a digest while its book is not full, and else a random sample again. So in a swarm of up to
    512 nodes each comes to know most of those that can be dialled.
 2. Only records in the book are told, never candidates (see `protocol.membership.address_book`). A record in a peer's
    digest that is a candidate here counts as told by that peer. While there are candidates, exchanges are more
    frequent. So they are while a node has few peers: if the only node that it knows dies, it finds nobody.
 3. Private endpoints are told only to peers that are seen at private addresses; loopback ones only to peers on this
    machine.
"""

import random
from itertools import islice

from protocol.config import Instant, Setup
from protocol.credentials.records import RECORD_LIFE_S, RENEWAL_BITS, Endpoint, PeerRecord, Service, make_record
from protocol.events import MembershipAction, Send
from protocol.identity import KEY_BYTES, NodeId, node_id
from protocol.limits.networks import Scope, counts_as, netgroup, scope_of
from protocol.membership.address_book import Book, shuffled
from protocol.membership.links import FEW_PEERS, Links
from protocol.wire.messages import MAX_DIGEST, MAX_RECORDS, AskRevocations, Digest, Peers

EXPIRY_INTERVAL_S = 60.0
# The part of an exchange_interval until the first exchange, and between exchanges while those are more frequent.
HURRY = 1 / 4


class RecordDirectory:
    """Our own record, and the book as others are told of it."""

    def __init__(self, setup: Setup, book: Book, links: Links, rng: random.Random, now: Instant) -> None:
        self._setup = setup
        self._limits = setup.limits
        self._own = setup.identity.node_id
        self._book = book
        self._links = links
        self._rng = rng
        self._interval = setup.timing.exchange_interval
        self._next_exchange = now.steady + self._interval * rng.uniform(HURRY / 4, HURRY)
        self._endpoints = self.given = setup.endpoints
        self._services: tuple[Service, ...] = ()
        self._next_expiry = now.steady
        self._raised = False
        self.twin: PeerRecord | None = None  # the record of another process that runs with our key
        self.renew(now, int(now.unix * 1000) << RENEWAL_BITS)

    def renew(self, now: Instant, incarnation: int) -> None:
        self._incarnation = incarnation
        self._expiry_ms = int((now.unix + RECORD_LIFE_S) * 1000)
        self._variants: dict[Scope, PeerRecord] = {}
        self.record = self.record_for(Scope.LOOPBACK)
        # By what a person or this machine says: peers who name an address as ours may be in its network.
        self._links.listen_at(self.given)

    def record_for(self, scope: Scope) -> PeerRecord:
        """Return our record for readers of that scope; nearer endpoints are left out.

        Where two records of one renewal meet, the one with more endpoints replaces the other: it expires later.
        """
        if scope not in self._variants:
            endpoints = tuple(endpoint for endpoint in self._endpoints if scope_of(endpoint.host) >= scope)
            services = tuple(service for service in self._services if scope_of(service.endpoint.host) >= scope)
            setup = self._setup
            self._variants[scope] = make_record(
                setup.identity,
                setup.swarm,
                endpoints,
                self._incarnation,
                setup.agent,
                self._expiry_ms + len(endpoints) + len(services),
                setup.grant,
                services,
            )
        return self._variants[scope]

    def here(self, scope: Scope) -> str:
        """Return the name by which our distance to nodes of that scope is computed (see `links`, `counts_as`).

        A node that cannot be dialled from there does not know its network. It goes by its key: if all such nodes had
        one name, all would look for room at the same others.
        """
        hosts = [endpoint.host for endpoint in self.record_for(scope).endpoints] or [""]
        host = next(filter(netgroup, hosts), hosts[0])
        return counts_as(host, self._setup.identity.curve_key.hex())

    def move(
        self,
        given: tuple[Endpoint, ...],
        told: tuple[Endpoint, ...],
        services: tuple[Service, ...],
        now: Instant,
    ) -> list[MembershipAction]:
        """Listen at the endpoints that are `given` from now on, and tell those in `told`, and these services."""
        self.given, self._services = given, services
        return self._announce(told, now)

    def correct(self, endpoints: tuple[Endpoint, ...], now: Instant) -> list[MembershipAction]:
        """Tell these endpoints instead of those that were `given`, unless we do already."""
        return self._announce(endpoints, now) if endpoints != self._endpoints else []

    def _announce(self, endpoints: tuple[Endpoint, ...], now: Instant) -> list[MembershipAction]:
        self._endpoints = endpoints
        self.renew(now, self.record.incarnation + 1)
        peers = self._links.peers.values()
        return [Send(peer.link, Peers((self.record_for(peer.scope).encoded,))) for peer in peers]

    def outbid(self, record: PeerRecord, now: Instant) -> None:
        """Make our record newer than this one, which names ourselves.

        If it is newer than ours, another process made it with our key: an earlier one of ours, before our clock was set
        back, or a twin that runs now. We raise our start above it. A twin answers by raising its own to the next
        number: only a holder of our key can do that.
        """
        if not record.replaces(self.record):
            return
        if self._raised and record.started == self.record.started + 1:
            self.twin = record
        self._raised = True
        self.renew(now, record.started + 1 << RENEWAL_BITS)

    def tick(self, now: Instant) -> None:
        """Renew our record in good time, and let go of expired ones."""
        left = self.record.expiry_ms / 1000 - now.unix
        # If more is left, our clock was set back: others may refuse a record that expires so late.
        if not RECORD_LIFE_S / 2 <= left <= 2 * RECORD_LIFE_S:
            self.renew(now, self.record.incarnation + 1)
        if now.steady >= self._next_expiry:
            self._next_expiry = now.steady + EXPIRY_INTERVAL_S
            self._book.expire(now, self._rng)

    def sample(self, reader: NodeId, scope: Scope, referrals: int = 0) -> Peers:
        """Return a peer exchange for a reader of that scope: our own record and a random sample of the good ones.

        A caller that we have no room for gets only so many `referrals`, all of nodes that can be dialled.
        """
        others = (
            record.encoded
            for record in shuffled(self._book.good_records(), self._rng)
            if means_something(record, scope) and record.node_id != reader and (record.endpoints or not referrals)
        )
        return Peers((self.record_for(scope).encoded, *islice(others, (referrals or MAX_RECORDS) - 1)))

    def _digest(self, voice: str, scope: Scope) -> Digest:
        """Return a digest of what we know, and of the candidates that the reader, who counts as `voice`, told us of."""
        known = [self.record_for(scope), *self._book.good_records(), *self._book.candidates(voice)][:MAX_DIGEST]
        return Digest(tuple(record.summary for record in known))

    def _lacking(self, digest: Digest, reader: NodeId, scope: Scope) -> list[bytes]:
        """Return the records that are not in the digest of a reader of that scope."""
        theirs = dict(digest.entries)
        return [
            record.encoded
            for record in (self.record_for(scope), *self._book.good_records())
            if means_something(record, scope)
            and record.node_id != reader
            and theirs.get(record.summary[0]) != record.summary[1]
        ][: self._limits.max_answers * MAX_RECORDS]

    # What travels

    def learn(self, voice: str, scope: Scope, peers: Peers, now: Instant) -> None:
        """Take in what a node tells, who counts as `voice`, from that scope.

        Raises:
            RecordError: a record is malformed, forged or another swarm's; those before it were taken in.
        """
        try:
            for encoded in peers.records:
                self._take_in(voice, scope, encoded, now)
        finally:  # those before a bad one were taken in
            self._book.trim(self._links.peers, self._rng)

    def _take_in(self, voice: str, scope: Scope, encoded: bytes, now: Instant) -> None:
        known = self._book.get(node_id(encoded[:KEY_BYTES]))
        if known is not None and known.encoded == encoded:  # so it is with most records
            self._book.hear(known, voice, scope)
            return
        setup = self._setup
        record = setup.reader.open(encoded, setup.swarm, now.unix, setup.identity.verify)
        if record.node_id == self._own:
            self.outbid(record, now)
        elif not self._setup.gate.admits(record, now):
            self._book.hear(record, voice, scope)
            live = self._links.peers.get(record.node_id)
            if live is not None and record.replaces(live.record):
                live.record = record

    def introduce(self, record: PeerRecord) -> list[MembershipAction]:
        """Tell our peers, if they are few, of a newcomer that can be dialled."""
        if not record.endpoints or len(self._links.peers) > FEW_PEERS:
            return []
        others = [peer for node, peer in self._links.peers.items() if node != record.node_id]
        return [Send(peer.link, Peers((record.encoded,))) for peer in others if means_something(record, peer.scope)]

    def answer(self, sender: NodeId, digest: Digest, now: Instant) -> list[MembershipAction]:
        """Tell a live peer what its digest lacks."""
        peer = self._links.peers[sender]
        self._book.vouch(dict(digest.entries), peer.place.voice, peer.scope)
        self._book.trim(self._links.peers, self._rng)
        lacking = self._lacking(digest, sender, peer.scope)
        starts = range(0, len(lacking), MAX_RECORDS)
        return [Send(peer.link, Peers(tuple(lacking[start : start + MAX_RECORDS]))) for start in starts]

    def exchange(self, now: Instant) -> list[MembershipAction]:
        """Begin an exchange, if it is time."""
        if not self._links.peers or now.steady < self._next_exchange:
            return []
        is_full = len(self._book) >= self._book.capacity
        hurries = not is_full and (self._book.has_candidates or len(self._links.peers) < FEW_PEERS)
        pace = self._interval * (HURRY if hurries else 1)
        self._next_exchange = now.steady + pace * self._rng.uniform(0.75, 1.25)
        node = self._rng.choice(list(self._links.peers))
        peer = self._links.peers[node]
        gate = self._setup.gate
        asks: list[MembershipAction] = [Send(peer.link, AskRevocations(gate.revision))] if gate.is_owned else []
        if is_full:
            return [*asks, Send(peer.link, self.sample(node, peer.scope))]
        return [*asks, Send(peer.link, self._digest(peer.place.voice, peer.scope))]


def means_something(record: PeerRecord, scope: Scope) -> bool:
    """Tell whether a record is for readers of that scope.

    A record that names anything nearer is not: its node signs another one for such readers.
    """
    return record.nearest >= scope
