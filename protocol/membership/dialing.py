"""Whom a node dials, and when: while it has too few links, in place of a link that it chose, and as a feeler.

Rules
 1. While there are too few links (`Links.wanted`), neighbours, `max_near_links` at most; random contacts, and by turns
    the nearest of those drawn (see `links`), where there is likelier to be room; the seeds when we have no peer or
    nobody else to dial.
 2. Nobody at an endpoint of our own, as private ones occur twice; nobody who is graylisted, or whose key has a link
    already; of one public network no more than may have links. Seeds, a person's choice, are not bounded by network.
 3. Now and then (`rotate_interval`) a link that we chose is due to be replaced by a random other, if there is one:
    so the overlay stays random, and a node that hostile peers surround finds others. Of more links than there is
    room for, as a small swarm grows, one ends each `SHED_S` from then on, a caller's where callers have too many.
 4. Feelers (Bitcoin Core's word; Heilman and others 2015, section 8): now and then one more call, however many links
    there are, to a seed or a node that lapsed (see `address_book`), of those whom we do not see. For two halves of a
    swarm that are apart for longer than a record lives know nobody of each other any more. A node that answers tells
    records of its side, and with room becomes a peer. The pause grows from `FEELER_S` until each is called once in
    `LAST_FEELER_S`: a seed that ten thousand nodes have is called three times a second.
"""

import random
from collections.abc import Callable, Iterator
from itertools import chain, islice

from protocol.config import Instant, Setup
from protocol.events import Dial, Link
from protocol.identity import NodeId
from protocol.limits.networks import Scope, counts_as, netgroup, scope_of
from protocol.membership.address_book import Book, Contact
from protocol.membership.directory import RecordDirectory
from protocol.membership.links import Links, distance

# Contacts that are drawn for each that is dialled: the nearest of eight is on average nearer than eight of nine who
# call everybody, and to find more that are due a node would look through its whole book.
DRAWN = 8
SHED_S = 10.0  # so that a node that is sent away finds room elsewhere before the next
FEELER_S, LAST_FEELER_S = 60.0, 3600.0


Refuses = Callable[[NodeId, Instant], bool]  # whether a node is graylisted just now


class Dialing:
    """See the module's comment."""

    def __init__(  # what it looks at, each of which has another owner
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
            if is_bounded and self._links.is_full_of(netgroup(contact.address.endpoint.host)):
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
        is_due = is_crowded or any(not one.has_failed and one.key not in busy for one in due)
        return self._rng.choice(chosen) if is_due else None

    def _dial(self, contact: Contact, now: Instant) -> Dial:
        self._links.dial(contact, now.steady)
        return Dial(contact.address, contact.scope)

    def _near_and_random(self, contacts: Iterator[Contact], wanted: int, now: Instant) -> Iterator[Contact]:
        """Return contacts of which every other is the nearest that is left of some, twice those that are both.

        Were none random, whoever invents nodes in near networks would have us dial these only.
        """
        here = {scope: self._directory.here(scope) for scope in Scope}

        def far(contact: Contact) -> int:
            host = contact.address.endpoint.host
            return distance(here[scope_of(host)], counts_as(netgroup(host), host, contact.key.hex()), now.unix)

        drawn = list(islice(contacts, DRAWN * wanted))
        return chain(chain.from_iterable(zip(sorted(drawn, key=far), drawn, strict=True)), contacts)

    def _may_dial(self, contact: Contact, now: Instant) -> bool:
        if contact.address.endpoint in self._directory.record.endpoints:
            contact.failed(now, self._rng)  # the next of its endpoints may be another
            return False
        holder = self._links.proven_node(Link(contact.key, dialled=True))
        return holder is None or not self._refuses(holder, now)

    def _busy_keys(self) -> set[bytes]:
        return self._links.busy_keys() | {self._own_key}
