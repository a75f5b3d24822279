"""How peer records travel.

Rules
 1. Peers exchange records on going live, a random sample, and every `exchange_interval` with a
    random peer: while the book is not full by digest, so that everybody comes to know everybody
    (512 at most), else again a random sample.
 2. In a small swarm a record that is new is passed on to a few peers at once.
 3. Live peers that nobody can dial are told of every newcomer, which cannot dial them.
 4. A peer may tell only so many records; what it tells beyond that is dropped.
"""

import random

from protocol.config import NOT_KEPT, Instant, Setup
from protocol.credentials.records import PeerRecord
from protocol.errors import MessageError
from protocol.events import Link, MembershipAction, Send
from protocol.identity import NodeId
from protocol.limits.rate_limits import TokenBucket
from protocol.membership.address_book import Book
from protocol.membership.directory import Directory
from protocol.membership.links import Links
from protocol.wire.messages import AskRevocations, Digest, Peers

# Two ends that hear of each other would both dial: the larger id waits.
DIAL_YIELD_S = 1.0
# Tens of nodes know each other within a second by rule 2. In a larger swarm it would cost each node its whole
# directory three times over; digests take their time.
FANOUT = 3
SMALL_BOOK = 64
# So often, that is for a full small book at once and then for a restart every other second: whoever makes others renew
# their records by slandering them cannot make everybody talk of it.
PASSED_PER_SECOND = 0.5
PASSED_BURST = 4.0 * SMALL_BOOK
# A digest that comes sooner after the last than this part of an exchange_interval is not answered.
LEAST_PAUSE = 1 / 8


class Exchange:
    """See the module's comment."""

    def __init__(
        self, setup: Setup, book: Book, directory: Directory, links: Links, rng: random.Random, now: Instant
    ) -> None:
        self._setup = setup
        self._own = setup.identity.node_id
        self._interval = setup.timing.exchange_interval
        self._book = book
        self._directory = directory
        self._links = links
        self._rng = rng
        self._next = now.steady + self._interval * rng.uniform(0.25, 1.0)
        self._passed = TokenBucket(PASSED_PER_SECOND, PASSED_BURST, now.steady)

    def learn(self, sender: NodeId, peers: Peers, now: Instant) -> list[PeerRecord]:
        """Take in what a peer tells; return the records that are new.

        Raises:
            RecordError: a record is malformed, forged or another swarm's; those before it were taken in.
            MessageError: the peer tells too many.
        """
        teller = self._links.peers.get(sender)
        fresh: list[PeerRecord] = []
        for encoded in peers.records:
            if self._directory.knows(encoded):
                continue
            if teller is not None and not teller.told.take(1, now.steady):
                raise MessageError("too_many_records")
            record = self._directory.read(encoded, now)
            if record.node_id == self._own:
                self._directory.outbid(record, now)
            elif self._setup.gate.admits(record, now) in ("", NOT_KEPT):
                first = self._own < record.node_id
                if self._book.add(record, sender, now.steady + (0.0 if first else DIAL_YIELD_S)):
                    fresh.append(record)
        self._book.trim(self._links.peers, self._rng)
        return fresh

    def pass_on(self, fresh: list[PeerRecord], teller: NodeId, now: Instant) -> list[MembershipAction]:
        """Rule 2."""
        if not fresh or len(self._book) > SMALL_BOOK or not self._passed.take(1, now.steady):
            return []
        others = [node for node in self._links.peers if node != teller]
        told = Peers(tuple(record.encoded for record in fresh))
        chosen = self._rng.sample(others, min(FANOUT, len(others)))
        return [Send(self._links.peers[node].link, told) for node in chosen]

    def introduce(self, record: PeerRecord) -> list[MembershipAction]:
        """Rule 3."""
        if not record.endpoints:
            return []
        told = Peers((record.encoded,))
        return [
            Send(peer.link, told)
            for node, peer in self._links.peers.items()
            if node != record.node_id and not peer.record.endpoints
        ]

    def answer(self, sender: NodeId, digest: Digest, now: Instant) -> list[MembershipAction]:
        """Tell a live peer what its digest lacks.

        Raises:
            MessageError: it sent another one just now.
        """
        peer = self._links.peers[sender]
        if now.steady < peer.digested + LEAST_PAUSE * self._interval:
            raise MessageError("too_many_digests")
        peer.digested = now.steady
        return [Send(peer.link, told) for told in self._directory.lacking(digest, sender)]

    def tick(self, now: Instant) -> list[MembershipAction]:
        """Begin an exchange, if it is time."""
        if not self._links.peers or now.steady < self._next:
            return []
        self._next = now.steady + self._interval * self._rng.uniform(0.75, 1.25)
        node = self._rng.choice(list(self._links.peers))
        link = self._links.peers[node].link
        gate = self._setup.gate
        asks = [Send(link, AskRevocations(gate.revision))] if gate.is_owned else []
        return [*asks, *self._compare(node, link)]

    def _compare(self, node: NodeId, link: Link) -> list[MembershipAction]:
        if len(self._book) < self._book.capacity:
            return [Send(link, self._directory.digest())]
        return [Send(link, self._directory.sample(node))]
