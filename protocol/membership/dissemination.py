"""How peer records and the revocation list travel.

Rules
 1. Peers exchange records on going live, a random sample, and every `exchange_interval` with a
    random peer: while the book is not full by digest, so that everybody comes to know everybody
    (512 at most), else again a random sample.
 2. Only what is in the book is passed on, never a candidate (see `protocol.membership.address_book`). In a
    small swarm a record that is new there is passed on to a few peers at once. A digest counts as telling
    those of its records that are candidates here; while there are any, exchanges follow each other sooner.
 3. Live peers that nobody can dial are told of every newcomer, which cannot dial them.
 4. Private endpoints are told to peers that are seen at private addresses, loopback ones on the machine.
 5. A peer may tell only so many records; what it tells beyond that is dropped. One public network, or one node
    that is in none, is told only so many in answer to its digests; who lacks more at a time than are left is told by
    others, or later.
 6. A revocation list is up to 24 KiB and a signature to check: a link has an allowance of lists that it brings or asks
    for.
"""

import random

from protocol.config import NOT_KEPT, Gate, Instant, Setup
from protocol.credentials.records import PeerRecord
from protocol.errors import MessageError
from protocol.events import Link, MembershipAction, Message, Send
from protocol.identity import KEY_BYTES, NodeId, node_id
from protocol.limits.networks import Scope
from protocol.limits.rate_limits import TokenBucket
from protocol.lru import Recent
from protocol.membership.address_book import Book
from protocol.membership.directory import Directory, meant_for
from protocol.membership.links import MAX_PROVEN, Links
from protocol.wire.messages import MAX_DIGEST, AskRevocations, Digest, Peers, Revocations

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
# Records that one network is told in answer to digests: whole directories at once, and then what changes in a swarm of
# 512 of whom one restarts every second. A digest that lacks everything is small, and its answer a thousand times that.
ANSWERS_PER_SECOND = 2.0
ANSWERS_BURST = 2.0 * MAX_DIGEST
MAX_VOICES = 1024
LIST_S, LISTS = 10.0, 4  # a link may bring, and ask for, so many lists at once, and one in 10 s
LIST_WAIT_S = 10.0  # as long as a stranger has for its hello
HURRY = 1 / 4  # of an exchange_interval, between exchanges while candidates wait for a second word


class Dissemination:
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
        self._answers: Recent[str, TokenBucket] = Recent(MAX_VOICES)  # by voice: keys cost nothing
        self._passed = TokenBucket(PASSED_PER_SECOND, PASSED_BURST, now.steady)

    def learn(self, sender: NodeId, voice: str, scope: Scope, peers: Peers, now: Instant) -> list[PeerRecord]:
        """Take in what a node tells, who counts as `voice`, from that scope; return what is now to be passed on.

        Raises:
            RecordError: a record is malformed, forged or another swarm's; those before it were taken in.
            MessageError: the peer tells too many.
        """
        try:
            return self._take_in(sender, voice, scope, peers, now)
        finally:  # those before a bad one were taken in
            self._book.trim(self._links.peers, self._rng)

    def _take_in(self, sender: NodeId, voice: str, scope: Scope, peers: Peers, now: Instant) -> list[PeerRecord]:
        teller = self._links.peers.get(sender)
        fresh: list[PeerRecord] = []
        for encoded in peers.records:
            if self._book.holds(node_id(encoded[:KEY_BYTES]), encoded, scope):
                continue  # as most that is told: the dearest line of a swarm in which thousands join
            record = self._directory.known(encoded)
            if record is None:
                if teller is not None and not teller.told.take(1, now.steady):
                    raise MessageError("too_many_records")
                record = self._directory.read(encoded, now)
            if record.node_id == self._own:
                self._directory.outbid(record, now)
            elif self._setup.gate.admits(record, now) in ("", NOT_KEPT):
                first = self._own < record.node_id
                not_before = now.steady + (0.0 if first else DIAL_YIELD_S)
                if self._book.hear(record, voice, not_before, scope):
                    fresh.append(record)
        return fresh

    def pass_on(self, fresh: list[PeerRecord], teller: NodeId, now: Instant) -> list[MembershipAction]:
        """Rule 2."""
        if not fresh or len(self._book) > SMALL_BOOK or not self._passed.take(1, now.steady):
            return []
        others = [peer for node, peer in self._links.peers.items() if node != teller]
        chosen = self._rng.sample(others, min(FANOUT, len(others)))
        return [
            Send(peer.link, Peers(tuple(record.encoded for record in told)))
            for peer in chosen
            if (told := meant_for(peer.scope, fresh))
        ]

    def introduce(self, record: PeerRecord) -> list[MembershipAction]:
        """Rule 3."""
        if not record.endpoints:
            return []
        told = Peers((record.encoded,))
        return [
            Send(peer.link, told)
            for node, peer in self._links.peers.items()
            if node != record.node_id and not peer.record.endpoints and meant_for(peer.scope, [record])
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
        fresh = self._book.vouch(dict(digest.entries), peer.voice, peer.scope)
        self._book.trim(self._links.peers, self._rng)
        lacking = [*self._directory.lacking(digest, sender, peer.scope)]
        answers = self._answers.get(peer.voice) or TokenBucket(ANSWERS_PER_SECOND, ANSWERS_BURST, now.steady)
        self._answers.set(peer.voice, answers)
        if not answers.take(sum(len(told.records) for told in lacking), now.steady):
            lacking = []
        return [*(Send(peer.link, told) for told in lacking), *self.pass_on(fresh, sender, now)]

    def tick(self, now: Instant) -> list[MembershipAction]:
        """Begin an exchange, if it is time."""
        if not self._links.peers or now.steady < self._next:
            return []
        is_full = len(self._book) >= self._book.capacity
        pace = self._interval if is_full or not self._book.has_candidates else self._interval * HURRY
        self._next = now.steady + pace * self._rng.uniform(0.75, 1.25)
        node = self._rng.choice(list(self._links.peers))
        peer = self._links.peers[node]
        gate = self._setup.gate
        asks: list[MembershipAction] = [Send(peer.link, AskRevocations(gate.revision))] if gate.is_owned else []
        if is_full:
            return [*asks, Send(peer.link, self._directory.sample(node, peer.scope))]
        return [*asks, Send(peer.link, self._directory.digest(peer.voice, peer.scope))]


class RevocationExchange:
    """Rule 6. The list itself, and what it means, is the gate's."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._asked: Recent[Link, None] = Recent(MAX_PROVEN)  # before they were taken in
        self._budgets: Recent[Link, TokenBucket] = Recent(MAX_PROVEN)

    def ask(self, link: Link) -> Send:
        """Ask for a list newer than ours."""
        return Send(link, AskRevocations(self._gate.revision))

    def ask_first(self, link: Link) -> Send:
        """As `ask`, of somebody who is not admitted by ours."""
        self._asked.set(link, None)
        return self.ask(link)

    def awaits(self, link: Link) -> bool:
        """Tell whether who is not yet a peer was asked for a list over this link."""
        return link in self._asked

    def forget(self, link: Link) -> None:
        """The link is gone."""
        self._asked.pop(link)

    def answer(self, message: Message, now: Instant) -> list[Send]:
        """Send our list to who asks, if it is newer than theirs.

        Raises:
            MessageError: the body is malformed, or the link asks too often.
        """
        if AskRevocations.decode(message.body).revision >= self._gate.revision:
            return []
        self._spend(message.link, now)
        return [Send(message.link, Revocations(self._gate.revocations))]

    def take(self, message: Message, now: Instant) -> bytes:
        """Return the list that came, empty if it is ours. Raises as `answer`."""
        encoded = Revocations.decode(message.body).encoded
        if encoded == self._gate.revocations:
            return b""
        self._spend(message.link, now)
        return encoded

    def _spend(self, link: Link, now: Instant) -> None:
        budget = self._budgets.get(link) or TokenBucket(1 / LIST_S, LISTS, now.steady)
        self._budgets.set(link, budget)
        if not budget.take(1, now.steady):
            raise MessageError("too_many_lists")
