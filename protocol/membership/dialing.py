"""Whom a node dials, and when: while it has too few links, in place of a link that it chose, and as a feeler.

Rules
 1. While there are too few links (`Links.wanted`), neighbours, `max_near_links` at most; random contacts, and by turns
    the nearest of those drawn (see `links`), where there is likelier to be room; the seeds when we have no peer or
    nobody else to dial. Two ends that hear of each other would both dial, so the larger id waits `DIAL_YIELD_S`.
 2. Nobody at an endpoint of our own, as private ones occur twice; nobody who is graylisted, or whose key has a link
    already; of one public network no more than may have links. Seeds, a person's choice, are not bounded by network.
 3. Now and then (`rotate_interval`) a link that we chose is due to be replaced by a random other, if there is one:
    so the overlay stays random, and whoever was surrounded by hostile peers finds others. If there are more links than
    room, one ends each `SHED_INTERVAL_S`: that of the last caller, or a random one if nobody called.
 4. Feelers (Bitcoin Core's word; Heilman and others 2015, section 8): about once in `FEELER_INTERVAL_S` one more call,
    however many links there are, to a seed or to a node that we met and whose record has gone from the book. For two
    halves of a swarm that are apart for longer than a record lives know nobody of each other any more. A node that
    answers tells records of its side, and with room becomes a peer. A contact's interval grows from `FIRST_S` to
    `LAST_S`: a seed that ten thousand nodes have is called three times a second. `max_lapsed` are remembered, over a
    restart too, a fair sample of all that lapsed (Vitter 1985, algorithm R), so whoever lets many invented nodes lapse
    gets its share. An expired record proves nothing and is told to nobody.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from protocol.config import Instant, Limits, Setup
from protocol.credentials.records import Address, PeerRecord
from protocol.events import Dial, Link
from protocol.identity import NodeId
from protocol.limits.networks import Scope, counts_as, netgroup, scope_of
from protocol.membership.address_book import Acquaintance, Book, Contact, usable
from protocol.membership.directory import RecordDirectory
from protocol.membership.links import Links, distance

# Contacts that are drawn for each that is dialled: the nearest of eight is on average nearer than eight of nine who
# call everybody, and to find more that are due a node would look through its whole book.
DRAWN = 8
SHED_INTERVAL_S = 10.0  # so that who is sent away finds room elsewhere before the next
FEELER_INTERVAL_S = FIRST_S = 60.0
LAST_S = 3600.0


Refuses = Callable[[NodeId, Instant], bool]  # whether a node is graylisted just now


@dataclass(slots=True)
class _Turn:
    contact: Contact
    tries: int = 0
    not_before: float = 0.0


class Feelers:
    """Seeds, and some nodes that we met and forgot, to be called for good; see the module's comment, rule 4."""

    def __init__(self, seeds: tuple[Address, ...], limits: Limits, rng: random.Random) -> None:
        self._limits = limits
        self._rng = rng
        self._seeds = tuple(_Turn(Contact((seed,))) for seed in seeds)
        self._records: dict[NodeId, PeerRecord] = {}
        self._turns: dict[NodeId, _Turn] = {}
        self._lapses = 0
        self._next: float | None = None

    @property
    def records(self) -> list[PeerRecord]:
        """The records of those who lapsed: to be kept on disk, and passed on to nobody."""
        return list(self._records.values())

    def lapse(self, acquaintances: Iterable[Acquaintance]) -> None:
        """Remember nodes that were met and whose records have gone from the book."""
        for record, scope in acquaintances:
            addresses = usable(record, scope)
            if not addresses:
                continue
            node = record.node_id
            if node not in self._records:
                self._lapses += 1
                if len(self._records) >= self._limits.max_lapsed:
                    place = self._rng.randrange(self._lapses)
                    if place >= self._limits.max_lapsed:
                        continue
                    self.met(list(self._records)[place])
            self._records[node] = record
            self._turns[node] = _Turn(Contact(addresses, scope=scope))

    def met(self, node: NodeId) -> None:
        self._records.pop(node, None)
        self._turns.pop(node, None)

    def next(self, known_keys: Callable[[], set[bytes]], now: Instant) -> Contact | None:
        """Return whom to call now, if it is time: nobody with a CURVE key that is known."""
        if not (self._seeds or self._turns):
            return None
        if self._next is None:
            self._next = now.steady + FEELER_INTERVAL_S * self._rng.uniform(0.5, 1.5)
        if now.steady < self._next:
            return None
        known = known_keys()
        self._next = now.steady + FEELER_INTERVAL_S * self._rng.uniform(0.5, 1.5)
        due = [
            turn
            for turn in (*self._seeds, *self._turns.values())
            if turn.not_before <= now.steady and turn.contact.key not in known
        ]
        if not due:
            return None
        turn = self._rng.choice(due)
        turn.not_before = now.steady + min(LAST_S, FIRST_S * 2.0 ** min(turn.tries, 16)) * self._rng.uniform(0.5, 1.0)
        turn.tries += 1
        return turn.contact


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
        self.feelers = Feelers(book.seeds, setup.limits, rng)
        self._next_rotation = now.steady + self._interval * rng.uniform(0.5, 1.0)
        self._next_shed = now.steady

    def fill(self, now: Instant) -> list[Dial]:
        wanted = self._links.wanted
        if wanted == 0:
            return []
        dials: list[Dial] = []
        busy = self._busy_keys()
        due = self._book.contacts_due(now, self._rng, lambda node: self._refuses(node, now))
        contacts = self._near_and_random((one for one in due if one.key not in busy), wanted, now)
        seeds = self._book.seeds_due(now)
        near = [one for one in self._book.neighbours_due(now) if one.key not in busy]
        near = near and near[: max(0, self._limits.max_near_links - self._links.near)]
        for contact in chain(near, *((contacts, seeds) if self._links.peers else (seeds, contacts))):
            if len(dials) == wanted:
                break
            if contact not in seeds and self._links.is_full_of(netgroup(contact.address.endpoint.host)):
                continue
            if contact.key in busy or self._is_refused(contact, now):
                continue
            busy.add(contact.key)
            if self._is_ours(contact):
                contact.failed(now, self._rng)  # the next of its endpoints may be another
            else:
                dials.append(self._dial(contact, now))
        return dials

    def feel(self, now: Instant) -> list[Dial]:
        contact = self.feelers.next(self._seen_keys, now)
        if contact is None or self._is_ours(contact) or self._is_refused(contact, now):
            return []
        return [self._dial(contact, now)]

    def replaceable(self, now: Instant) -> NodeId | None:
        """Return a peer whose link ends now by rule 3, if it is time for one."""
        peers = self._links.peers
        if self._links.is_crowded and now.steady >= self._next_shed:
            self._next_shed = now.steady + SHED_INTERVAL_S
            return self._links.last_caller or self._links.replaceable(self._rng)
        if now.steady < self._next_rotation:
            return None
        self._next_rotation = now.steady + self._interval * self._rng.uniform(0.75, 1.25)
        chosen = [node for node, peer in peers.items() if peer.link.dialled]
        if not chosen or len(peers) < self._links.target:
            return None
        busy = self._busy_keys()
        due = self._book.contacts_due(now, self._rng)
        return self._rng.choice(chosen) if any(one.failures == 0 and one.key not in busy for one in due) else None

    def _dial(self, contact: Contact, now: Instant) -> Dial:
        self._links.dial(contact, now.steady)
        return Dial(contact.address, contact.scope)

    def _near_and_random(self, contacts: Iterator[Contact], wanted: int, now: Instant) -> Iterator[Contact]:
        """Return contacts of which every other is the nearest that is left of some, twice those that are both.

        Were none random, whoever invents nodes in near networks would have us dial these only.
        """
        here = {scope: self._directory.here(scope) for scope in Scope}
        drawn = list(islice(contacts, DRAWN * wanted))
        near = sorted(drawn, key=lambda contact: distance(here[_scope(contact)], _name(contact), now.unix))
        return chain(chain.from_iterable(zip(near, drawn, strict=True)), contacts)

    def _is_ours(self, contact: Contact) -> bool:
        return contact.address.endpoint in self._directory.record.endpoints

    def _is_refused(self, contact: Contact, now: Instant) -> bool:
        holder = self._links.proven_node(Link(contact.key, dialled=True))
        return holder is not None and self._refuses(holder, now)

    def _busy_keys(self) -> set[bytes]:
        return self._links.busy_keys() | {self._own_key}

    def _seen_keys(self) -> set[bytes]:
        return {record.curve_key for record in self._book.good_records()} | self._busy_keys()


def _scope(contact: Contact) -> Scope:
    return scope_of(contact.address.endpoint.host)


def _name(contact: Contact) -> str:
    host = contact.address.endpoint.host
    return counts_as(netgroup(host), host, contact.key.hex())
