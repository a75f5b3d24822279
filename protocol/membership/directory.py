"""Records about the members: our own, reading others', and what to tell of them."""

import random
from collections.abc import Iterable, Iterator

from protocol.config import Instant, Setup
from protocol.credentials.records import RECORD_LIFE_S, RENEWAL_BITS, Endpoint, PeerRecord, Service, make_record
from protocol.events import MembershipAction, Send
from protocol.identity import KEY_BYTES, NodeId, node_id
from protocol.limits.networks import Scope, counts_as, netgroup, scope_of
from protocol.membership.address_book import Book
from protocol.membership.links import Peer
from protocol.wire.messages import MAX_DIGEST, MAX_RECORDS, Digest, Peers

EXPIRY_INTERVAL_S = 60.0
MAX_ANSWERS = 4  # messages of MAX_RECORDS in answer to one digest: half of the largest directory


class Directory:
    """Our own record, and the book as others are told of it."""

    def __init__(self, setup: Setup, book: Book, rng: random.Random, now: Instant) -> None:
        self._setup = setup
        self._own = setup.identity.node_id
        self._book = book
        self._rng = rng
        self._endpoints = self.given = setup.endpoints
        self._services: tuple[Service, ...] = ()
        self._next_expiry = now.steady
        self._raised = False
        self.twin: PeerRecord | None = None  # of another process that runs with our key
        self.renew(now, int(now.unix * 1000) << RENEWAL_BITS)

    def renew(self, now: Instant, incarnation: int) -> None:
        """Sign a new record of ourselves."""
        self._incarnation = incarnation
        self._expiry_ms = int((now.unix + RECORD_LIFE_S) * 1000)
        self._variants: dict[tuple[tuple[Endpoint, ...], tuple[Service, ...]], PeerRecord] = {}
        self.record = self.record_for(Scope.LOOPBACK)

    def record_for(self, scope: Scope) -> PeerRecord:
        """Return our record for readers of that scope: what is nearer is nobody's business, and no use, out there.

        Of two records of one renewal the one with more endpoints holds, wherever both come.
        """
        endpoints = tuple(endpoint for endpoint in self._endpoints if scope_of(endpoint.host) >= scope)
        services = tuple(service for service in self._services if scope_of(service.endpoint.host) >= scope)
        variant = endpoints, services
        if variant not in self._variants:
            setup = self._setup
            self._variants[variant] = make_record(
                setup.identity,
                setup.swarm,
                endpoints,
                self._incarnation,
                setup.agent,
                self._expiry_ms + len(endpoints) + len(services),
                setup.grant,
                services,
            )
        return self._variants[variant]

    def here(self, scope: Scope) -> str:
        """Return as whom we are near to nodes of that scope (see `links`).

        A node that cannot be dialled from there does not know as whom it is seen: were all such the same, all would
        look for room with the same others.
        """
        key = self._setup.identity.curve_key.hex()
        hosts = [endpoint.host for endpoint in self.record_for(scope).endpoints]
        if not hosts:
            return key
        host = next(filter(netgroup, hosts), hosts[0])
        return counts_as(netgroup(host), host, key)

    def announce(self, peers: Iterable[Peer]) -> list[MembershipAction]:
        """Show our newest record to live peers."""
        return [Send(peer.link, Peers((self.record_for(peer.scope).encoded,))) for peer in peers]

    def move(self, endpoints: tuple[Endpoint, ...], services: tuple[Service, ...], now: Instant) -> None:
        """Say from now on that we can be dialled there, and these services."""
        self._endpoints, self._services = endpoints, services
        self.given = endpoints
        self.renew(now, self.record.incarnation + 1)

    def correct(self, endpoints: tuple[Endpoint, ...], now: Instant) -> bool:
        """Tell these endpoints instead of those that were `given`; False if we do already."""
        if endpoints == self._endpoints:
            return False
        self._endpoints = endpoints
        self.renew(now, self.record.incarnation + 1)
        return True

    def outbid(self, record: PeerRecord, now: Instant) -> None:
        """Take note of a record of ourselves: ours must be the newer one.

        One that is newer was made with our key by another process: an earlier one of ours, before our clock was set
        back, or one that runs now. We raise our start above it. Only a process that runs now answers that by raising
        its own to the next one, so nobody can make us see a twin who does not have our key.
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
        if left > 2 * RECORD_LIFE_S:  # our clock was set back: to others it may hold for too long to be one
            self.renew(now, self.record.incarnation + 1)
        elif left < RECORD_LIFE_S / 2:
            self.renew(now, self.record.incarnation)
        if now.steady >= self._next_expiry:
            self._next_expiry = now.steady + EXPIRY_INTERVAL_S
            self._book.expire(now)

    def known(self, encoded: bytes) -> PeerRecord | None:
        """Return the newest record of its author if these are its bytes: no signature need be checked again."""
        author = node_id(encoded[:KEY_BYTES])
        if author == self._own:
            return next((record for record in self._variants.values() if record.encoded == encoded), None)
        record = self._book.get(author)
        return record if record is not None and record.encoded == encoded else None

    def read(self, encoded: bytes, now: Instant) -> PeerRecord:
        """Verify a record of this swarm.

        Raises:
            RecordError: as `open_record`.
        """
        setup = self._setup
        return setup.reader.open(encoded, setup.swarm, now.unix, setup.identity.verify)

    def sample(self, reader: NodeId, scope: Scope, count: int = MAX_RECORDS) -> Peers:
        """Return a peer exchange for a reader of that scope: our own record and a random sample of the good ones."""
        chosen = self._book.good_sample(count, self._rng, lambda record: means_something(record, scope))
        others = [record.encoded for record in chosen if record.node_id != reader]
        return Peers((self.record_for(scope).encoded, *others[: count - 1]))

    def digest(self, voice: str, scope: Scope) -> Digest:
        """Return what we know, in short, and what the reader, who counts as `voice`, told us itself."""
        known = [self.record_for(scope), *self._book.good_records(), *self._book.candidates(voice)][:MAX_DIGEST]
        return Digest(tuple(record.summary for record in known))

    def lacking(self, digest: Digest, reader: NodeId, scope: Scope) -> Iterator[Peers]:
        """Yield peer exchanges with what is not in the digest of a reader of that scope."""
        theirs = dict(digest.entries)
        lacking = [
            record.encoded
            for record in (self.record_for(scope), *meant_for(scope, self._book.good_records()))
            if record.node_id != reader and theirs.get(record.summary[0]) != record.summary[1]
        ][: MAX_ANSWERS * MAX_RECORDS]
        for start in range(0, len(lacking), MAX_RECORDS):
            yield Peers(tuple(lacking[start : start + MAX_RECORDS]))


def meant_for(scope: Scope, records: Iterable[PeerRecord]) -> list[PeerRecord]:
    """Return the records that mean something to a reader of that scope."""
    return [record for record in records if means_something(record, scope)]


def means_something(record: PeerRecord, scope: Scope) -> bool:
    """Tell whether a record is for readers of that scope.

    One that names anything nearer is not, be there other endpoints beside: its node signs another for those out there.
    """
    return record.nearest >= scope
