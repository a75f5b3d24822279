"""Records about the members: our own, reading others', and what to tell of them."""

import random
from collections.abc import Iterator

from protocol.config import Instant, Setup
from protocol.credentials.records import RECORD_LIFE_S, REFUTATION_BITS, Endpoint, PeerRecord, Service, make_record
from protocol.identity import KEY_BYTES, NodeId, node_id
from protocol.membership.address_book import Book
from protocol.wire.messages import MAX_DIGEST, MAX_RECORDS, Digest, Peers

EXPIRY_INTERVAL_S = 60.0
MAX_ANSWERS = 4  # messages of MAX_RECORDS in answer to one digest: half of the largest directory


class Directory:
    """Our own record, and the book as others are told of it."""

    def __init__(self, setup: Setup, book: Book, rng: random.Random, now: Instant) -> None:
        self._setup = setup
        self._book = book
        self._rng = rng
        self._endpoints = setup.endpoints
        self._services: tuple[Service, ...] = ()
        self._next_expiry = now.steady
        self.record = self._make(now, int(now.unix * 1000) << REFUTATION_BITS)

    def _make(self, now: Instant, incarnation: int) -> PeerRecord:
        setup = self._setup
        expiry_ms = int((now.unix + RECORD_LIFE_S) * 1000)
        return make_record(
            setup.identity,
            setup.swarm,
            self._endpoints,
            incarnation,
            setup.agent,
            expiry_ms,
            setup.grant,
            self._services,
        )

    def renew(self, now: Instant, incarnation: int) -> None:
        """Sign a new record of ourselves."""
        self.record = self._make(now, incarnation)

    def move(self, endpoints: tuple[Endpoint, ...], services: tuple[Service, ...], now: Instant) -> None:
        """Say from now on that we can be dialled there, and these services."""
        self._endpoints, self._services = endpoints, services
        self.renew(now, self.record.incarnation + 1)

    def outbid(self, record: PeerRecord, now: Instant) -> None:
        """Take note of a record of ourselves: ours must be the newer one."""
        if record.replaces(self.record):
            self.renew(now, max(self.record.incarnation, record.incarnation + 1))

    def tick(self, now: Instant) -> None:
        """Renew our record in good time, and let go of expired ones."""
        if self.record.expiry_ms / 1000 - now.unix < RECORD_LIFE_S / 2:
            self.renew(now, self.record.incarnation)
        if now.steady >= self._next_expiry:
            self._next_expiry = now.steady + EXPIRY_INTERVAL_S
            self._book.expire(now)

    def knows(self, encoded: bytes) -> bool:
        """Tell whether these bytes are the newest record of their author: no signature need be checked again."""
        author = node_id(encoded[:KEY_BYTES])
        known = self.record if author == self._setup.identity.node_id else self._book.get(author)
        return known is not None and known.encoded == encoded

    def read(self, encoded: bytes, now: Instant) -> PeerRecord:
        """Verify a record of this swarm.

        Raises:
            RecordError: as `open_record`.
        """
        setup = self._setup
        return setup.reader.open(encoded, setup.swarm, now.unix, setup.identity.verify)

    def sample(self, reader: NodeId) -> Peers:
        """Return a peer exchange: our own record and a random sample of the good ones."""
        good = self._book.good_records()
        chosen = self._rng.sample(good, min(MAX_RECORDS, len(good)))
        others = [record.encoded for record in chosen if record.node_id != reader]
        return Peers((self.record.encoded, *others[: MAX_RECORDS - 1]))

    def digest(self) -> Digest:
        """Return what we know, in short."""
        known = [self.record, *self._book.good_records()][:MAX_DIGEST]
        return Digest(tuple(record.summary for record in known))

    def lacking(self, digest: Digest, reader: NodeId) -> Iterator[Peers]:
        """Yield peer exchanges with what is not in a peer's digest."""
        theirs = dict(digest.entries)
        lacking = [
            record.encoded
            for record in (self.record, *self._book.good_records())
            if record.node_id != reader and theirs.get(record.summary[0]) != record.summary[1]
        ][: MAX_ANSWERS * MAX_RECORDS]
        for start in range(0, len(lacking), MAX_RECORDS):
            yield Peers(tuple(lacking[start : start + MAX_RECORDS]))
