"""Whom a node dials, and when: while it has too few links, in place of a link that it chose, and as a feeler.

Rules
 1. While there are too few links (`Links.wanted`), a node dials: first neighbours in its own network, `max_near_links`
    at most; then contacts, a random one and the nearest of those drawn in turn (see `links`: near ones are likelier to
    have room); and the seeds, last if it has a peer, else before the contacts.
 2. It does not dial an endpoint of its own (two networks may use the same private one), a graylisted node, or a key
    that has a link already. It dials no more nodes of one public network than may have links. Seeds, a person's choice,
    are not bounded by network.
 3. Every `rotate_interval` a link that we chose ends if there is another node to dial in its place: so the overlay
    stays random, and a node that hostile peers surround finds others. When a small swarm grows and there are more links
    than room, one ends each `SHED_S`: a caller's if callers have too many.
 4. Feelers (Bitcoin Core's word; Heilman and others 2015, section 8): now and then a node calls a seed, or a node that
    lapsed (see `address_book`), that it has lost sight of, however many links it has. This joins two halves of a swarm
    that were apart for longer than a record lives and know nobody of each other. A node that answers tells us records
    of its side, and becomes a peer if there is room. The pause grows from `FEELER_S` until each is called once in
    `LAST_FEELER_S`: a seed that ten thousand nodes have is called three times a second.
"""

import random
from collections.abc import Callable, Iterator
from itertools import chain, islice

from protocol.config import Instant, Setup
from protocol.events import Dial, Link
from protocol.identity import NodeId
from protocol.limits.networks import Scope, counts_as, scope_of
from protocol.membership.address_book import Book, Contact
from protocol.membership.directory import RecordDirectory
from protocol.membership.links import Links, distance

# Contacts that are drawn for each that is dialled. The nearest of eight is on average nearer than eight of nine random
# callers. To draw more, a node would look through its whole book.
DRAWN = 8
SHED_S = 10.0  # time for a node that is sent away to find room elsewhere before the next is
FEELER_S, LAST_FEELER_S = 60.0, 3600.0


Refuses = Callable[[NodeId, Instant], bool]  # whether a node is graylisted just now


class Dialing:
    """See the module's comment."""

    def __init__(  # all of these have other owners
        self,
        setup: Setup,
        book: Book,
        directory: RecordDirectory,
        links: Links,
        refuses: Refuses,
        rng: random.Random,
        now: Instant,
    ) -> None:
        self._own_key = setup.identity.curve_key
        self._limits = setup.limits
        self._interval = setup.timing.rotate_interval
        self._book = book
        self._directory = directory
        self._links = links
        self._refuses = refuses
        self._rng = rng
        self._next_rotation = now.steady + self._interval * rng.uniform(0.5, 1.0)
        self._feeler_pause = FEELER_S
        self._next_feeler = now.steady + FEELER_S * rng.uniform(0.5, 1.5)

    def fill(self, now: Instant) -> list[Dial]:
        """Dial while there are too few links. Rules 1 and 2."""
        wanted = self._links.wanted
        if wanted == 0:
            return []
        dials: list[Dial] = []
        busy = self._busy_keys()
        due = (contact for contact in self._book.contacts_due(now, self._rng) if contact.key not in busy)
        contacts = self._near_and_random(due, wanted, now)
        seeds = self._book.seeds_due(now)
        may_be_near = max(0, self._limits.max_near_links - self._links.near)
        near = [contact for contact in self._book.neighbours_due(now) if contact.key not in busy][:may_be_near]
        for contact in chain(near, *((contacts, seeds) if self._links.peers else (seeds, contacts))):
            if len(dials) == wanted:
                break
            is_bounded = contact not in seeds
            if is_bounded and self._links.is_full_of(self._links.network_of(contact.address.endpoint.host)):
                continue
            if contact.key not in busy and self._may_dial(contact, now):
                busy.add(contact.key)
                dials.append(self._dial(contact, now))
        return dials

    def feel(self, now: Instant) -> list[Dial]:
        """Call somebody whom we lost sight of, if it is time. Rule 4."""
        if now.steady < self._next_feeler:
            return []
        seen = {record.curve_key for record in self._book.good_records()}
        lost = self._book.lost(seen | self._busy_keys())
        longest = max(FEELER_S, LAST_FEELER_S / max(1, len(lost)))
        self._feeler_pause = min(longest, 2 * self._feeler_pause) if lost else FEELER_S
        self._next_feeler = now.steady + self._feeler_pause * self._rng.uniform(0.5, 1.5)
        contact = self._rng.choice(lost) if lost else None
        return [self._dial(contact, now)] if contact is not None and self._may_dial(contact, now) else []

    def replaceable(self, now: Instant) -> NodeId | None:
        """Return a peer whose link ends now by rule 3, if it is time for one."""
        if now.steady < self._next_rotation:
            return None
        is_crowded = self._links.is_crowded
        self._next_rotation = now.steady + (SHED_S if is_crowded else self._interval) * self._rng.uniform(0.75, 1.25)
        if is_crowded and (caller := self._links.surplus_caller) is not None:
            return caller
        peers = self._links.peers
        chosen = [node for node, peer in peers.items() if peer.link.dialled]
        if not chosen or len(peers) < self._links.target:
            return None
        busy = self._busy_keys()
        due = self._book.contacts_due(now, self._rng)
        is_due = is_crowded or any(not contact.has_failed and contact.key not in busy for contact in due)
        return self._rng.choice(chosen) if is_due else None

    def hurry(self, now: Instant) -> None:
        """Let surplus links end soon: a home node turned out to be one that can be dialled, and counts from now on."""
        if self._links.is_crowded:
            self._next_rotation = min(self._next_rotation, now.steady + SHED_S)

    def _dial(self, contact: Contact, now: Instant) -> Dial:
        self._links.dial(contact, now.steady)
        return Dial(contact.address, contact.scope)

    def _near_and_random(self, contacts: Iterator[Contact], wanted: int, now: Instant) -> Iterator[Contact]:
        """Return contacts, by turns the nearest of those drawn and a random one; some come twice.

        If none were random, an attacker that invents nodes in near networks would have us dial only these.
        """
        own_scopes = {scope: self._directory.here(scope) for scope in Scope}

        def far(contact: Contact) -> int:
            host = contact.address.endpoint.host
            return distance(own_scopes[scope_of(host)], counts_as(host, contact.key.hex()), now.unix)

        drawn = list(islice(contacts, DRAWN * wanted))
        return chain(chain.from_iterable(zip(sorted(drawn, key=far), drawn, strict=True)), contacts)

    def _may_dial(self, contact: Contact, now: Instant) -> bool:
        if contact.address.endpoint in (*self._directory.record.endpoints, *self._directory.given):
            contact.failed(now, self._rng)  # so that its next endpoint has its turn
            return False
        holder = self._links.proven_node(Link(contact.key, dialled=True))
        return holder is None or not self._refuses(holder, now)

    def _busy_keys(self) -> set[bytes]:
        return self._links.busy_keys() | {self._own_key}
