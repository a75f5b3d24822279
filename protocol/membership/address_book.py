"""The address book: everybody we know of, which is the passive view of HyParView (Leitao 2007).

Rules
 1. The seeds, which a person gave, are never forgotten. A node enters the book when we meet it (it is admitted, whoever
    dialled) or when two voices (see `counts_as`) have told of it. A node that only one voice told of is a *candidate*:
    we dial it, and tell nobody of it. So no single peer makes us spread nodes that it invented (compare the new and the
    tried table of Bitcoin's addrman).
 2. Beside the book are the last `max_neighbours` addresses that were announced in our own network. They are dialled,
    and enter the book once they are admitted.
 3. A new contact is tried at once, then after 0.5, 1, 2, ... up to 60 s. Each pause is drawn from the upper half of its
    interval, so that nodes do not dial in step. The addresses of one contact are tried in turn, and share the pauses of
    one. A contact that failed is dialled after the others. Nobody is told of it
    until we meet it again or its record names another address.
 4. When the book is full, entries that failed go first, then those of the source that has the most: no peer can push
    out what others told us. Nodes that we met go last.
 5. Keys cost nothing, addresses do: one network (see `netgroup`) has `max_prefix_records` places. A node takes one
    where it was seen. If it was not seen in a public network, it takes one in each network where it says that it can be
    dialled. Nodes that were seen elsewhere take none of these, and have as many of their own: otherwise callers from a
    few networks could make us dial all over another one.
 6. A private or loopback endpoint counts only if the node, or somebody who told of it, was itself seen at such an
    address. So nobody outside can make us connect into our own network (see `Scope`). Where a gateway hides the
    addresses of callers, all who come through it look local. The addresses of an endpoint's name are looked up and
    then judged in the same way (see `transport`). A service counts only at an address: who dials it is another part of
    the program, and a name, or "127.1", would be looked up there without a judge.
 7. Of the nodes that we met and whose records left the book, `max_lapsed` are remembered: a fair sample of all that
    lapsed (Vitter 1985, algorithm R). So an attacker that invents many nodes gets only its share. See `dialing`,
    rule 4.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from typing import TypeVar

from protocol.config import Instant
from protocol.credentials.records import Address, PeerRecord, Service
from protocol.identity import NodeId
from protocol.limits.limits import Limits
from protocol.limits.networks import Scope, netgroup, read_address, scope_of
from protocol.lru import Recent

FIRST_RETRY_S = 0.5
LAST_RETRY_S = 60.0  # a dead peer costs one connection attempt a minute until its record expires
BUSY_S = 60.0  # a peer that had no room is asked again within this time
CANDIDATES = 2  # the book's capacity divided by this is how many candidates there may be
# When there are more, an eighth goes at a time. To find whom to forget, a node looks at all of them; in a large swarm
# every message brings more, so it would look at all at every message.
THINNING = 8
NOWHERE = "nowhere"  # the network of nodes that nobody can dial and that we did not meet
NAMED = "named "  # before a network: its places for nodes that only name it and were seen elsewhere

V = TypeVar("V")


@dataclass(slots=True, eq=False)
class Contact:
    """Somebody to dial: under one CURVE key, at one or more endpoints, tried in turn."""

    addresses: tuple[Address, ...]
    scope: Scope = Scope.LOOPBACK  # of the nearest address that its host name may be resolved to
    failures: int = 0
    not_before: float = 0.0

    @property
    def key(self) -> bytes:
        return self.addresses[0].key

    @property
    def address(self) -> Address:
        """The address whose turn it is."""
        return self.addresses[self.failures % len(self.addresses)]

    @property
    def has_failed(self) -> bool:
        return self.failures > 0

    def is_due(self, now: Instant) -> bool:
        return bool(self.addresses) and self.not_before <= now.steady

    def failed(self, now: Instant, rng: random.Random) -> None:
        count = max(1, len(self.addresses))
        delay = min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(self.failures // count, 16) / count)
        self.failures += 1
        self.not_before = now.steady + delay * rng.uniform(0.5, 1.0)

    def busy(self, now: Instant, rng: random.Random) -> None:
        """Note that it answered and has no room, which is no failure."""
        self.failures = 0
        self.not_before = now.steady + BUSY_S * rng.uniform(0.25, 1.0)

    def met(self) -> None:
        self.failures = 0
        self.not_before = 0.0


@dataclass(slots=True, eq=False)
class BookEntry(Contact):
    """A node that we know of: its endpoints of `scope` and farther count."""

    record: PeerRecord = field(kw_only=True)
    source: str = field(kw_only=True)  # the node itself once we met it, else the network of who told us first
    network: str = ""  # the public network where it was seen, "" if it was in none

    @property
    def is_met(self) -> bool:
        return self.source == self.record.node_id

    @property
    def networks(self) -> frozenset[str]:
        """The networks in which it takes a place."""
        if self.network:
            return frozenset({self.network, *(NAMED + other for other in self.record.networks - {self.network})})
        return self.record.networks if self.is_met or self.record.endpoints else frozenset({NOWHERE})

    def see_from(self, scope: Scope) -> None:
        """Let endpoints of that scope and farther count."""
        self.scope = scope
        before, self.addresses = self.addresses, usable(self.record, scope)
        if self.addresses != before:
            self.met()  # nothing was tried there

    def update(self, record: PeerRecord) -> bool:
        """Take a newer record of the same node; False if it is not."""
        if not record.replaces(self.record):
            return False
        self.record = record
        self.see_from(self.scope)
        return True


class Book:
    """Seeds, and about `max_known_peers` records. See the module's comment."""

    def __init__(self, seeds: tuple[Address, ...], limits: Limits) -> None:
        self._limits = limits
        self.capacity = limits.max_known_peers
        self.seeds = seeds
        keys = dict.fromkeys(seed.key for seed in seeds)
        self._seeds = tuple(Contact(tuple(seed for seed in seeds if seed.key == key)) for key in keys)
        self._entries: dict[NodeId, BookEntry] = {}
        self._candidates: dict[NodeId, BookEntry] = {}
        self._neighbours: Recent[bytes, Contact] = Recent(limits.max_neighbours)  # by key
        self._lapsed: dict[NodeId, BookEntry] = {}
        self._lapses = 0  # in all
        self._has_grown = False  # since it was trimmed
        self.revision = 0  # grows when there is something new to save

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, node: object) -> bool:
        return node in self._entries

    def _find(self, node: NodeId) -> BookEntry | None:
        return self._entries.get(node) or self._candidates.get(node)

    def get(self, node: NodeId) -> PeerRecord | None:
        """Return the newest record of a node in the book or of a candidate."""
        entry = self._find(node)
        return entry.record if entry else None

    def contact(self, node: NodeId) -> Contact | None:
        """Return how to dial `node`, if it said so."""
        entry = self._find(node)
        return entry if entry and entry.addresses else None

    def add(self, record: PeerRecord, host: str | None = None) -> None:
        """Take in a verified record of a node that we met, seen at `host` ("": unknown), or that was saved (None)."""
        node = record.node_id
        entry = self._find(node) or BookEntry((), record=record, source=node)
        entry.update(record)
        entry.see_from(_saved_scope(record) if host is None else scope_of(host))
        entry.source, entry.network = node, netgroup(host or "")
        self._enter(node, entry)

    def load(self, saved: Iterable[PeerRecord], now: Instant, rng: random.Random) -> None:
        """Take in saved records. Those that have expired since tell where to look for their nodes."""
        for record in saved:
            self.add(record)
        self.expire(now, rng)

    def hear(self, record: PeerRecord, teller: str, scope: Scope = Scope.PUBLIC) -> bool:
        """Take in a verified record that somebody of the network `teller` told us; True if it is news in the book.

        The teller was seen at an address of `scope`: endpoints of that scope count, and farther ones.
        """
        node = record.node_id
        entry = self._find(node)
        if entry is None:
            entry = self._candidates[node] = BookEntry((), record=record, source=teller)
            entry.see_from(scope)
            return False
        is_newer = entry.update(record)
        entry.see_from(min(scope, entry.scope))
        is_news = is_newer if node in self._entries else entry.source != teller
        if is_news:
            self._enter(node, entry)
        return is_news

    def _enter(self, node: NodeId, entry: BookEntry) -> None:
        self._candidates.pop(node, None)
        self._lapsed.pop(node, None)
        self._entries[node] = entry
        self._has_grown = True
        self.revision += 1

    def trim(self, live: Iterable[NodeId], rng: random.Random) -> None:
        """Forget entries beyond the capacity, and beyond the places of a network; those of `live` stay."""
        if self._has_grown:
            self._has_grown = False
            kept = set(live)
            most = self._limits.max_prefix_records
            places = Counter(chain.from_iterable(entry.networks for entry in self._entries.values()))
            for network in sorted(network for network, count in places.items() if count > most):
                crowd = {node: entry for node, entry in self._entries.items() if network in entry.networks}
                self._remove(_worst(crowd, kept, len(crowd) - most, rng), rng)
            self._remove(_worst(self._entries, kept, len(self._entries) - self.capacity, rng), rng)
        most = max(1, self.capacity // CANDIDATES)
        if len(self._candidates) > most:
            excess = len(self._candidates) - (most - most // THINNING)
            for node in _worst(self._candidates, set(), excess, rng):
                del self._candidates[node]

    def _remove(self, nodes: Iterable[NodeId], rng: random.Random) -> None:
        for node in nodes:
            entry = self._entries.pop(node)
            if entry.is_met:
                self._lapse(entry, rng)

    def _lapse(self, entry: BookEntry, rng: random.Random) -> None:
        if not entry.addresses:
            return
        self._lapses += 1
        if len(self._lapsed) >= self._limits.max_lapsed:
            place = rng.randrange(self._lapses)
            if place >= self._limits.max_lapsed:
                return
            del self._lapsed[list(self._lapsed)[place]]
        self._lapsed[entry.record.node_id] = entry

    def forget(self, nodes: Iterable[NodeId]) -> None:
        """Drop the records of nodes that are not to be dialled or passed on any more."""
        for node in nodes:
            self._candidates.pop(node, None)
            self._lapsed.pop(node, None)
            if self._entries.pop(node, None) is not None:
                self.revision += 1

    def expire(self, now: Instant, rng: random.Random) -> None:
        limit = now.unix * 1000
        self._remove([node for node, entry in self._entries.items() if entry.record.expiry_ms <= limit], rng)
        for node in [node for node, entry in self._candidates.items() if entry.record.expiry_ms <= limit]:
            del self._candidates[node]

    def seeds_due(self, now: Instant) -> list[Contact]:
        return [seed for seed in self._seeds if seed.is_due(now)]

    def meet(self, addresses: tuple[Address, ...]) -> None:
        """Take in a neighbour: addresses in our own network, of one key, at which a node of our swarm is said to be."""
        key = addresses[0].key
        known = self._neighbours.get(key)
        if known is None or known.addresses != addresses:
            scope = min(scope_of(address.endpoint.host) for address in addresses)
            self._neighbours.set(key, Contact(addresses, scope))

    def neighbours_due(self, now: Instant) -> list[Contact]:
        return [neighbour for neighbour in self._neighbours.values() if neighbour.is_due(now)]

    def contacts_due(self, now: Instant, rng: random.Random) -> Iterator[Contact]:
        """Yield contacts to dial now, from book and candidates in turn, in random order, those that failed last.

        The book may not change meanwhile.
        """
        for failed in (False, True):
            known, told = (
                (entry for entry in shuffled(table.values(), rng) if entry.has_failed is failed and entry.is_due(now))
                for table in (self._entries, self._candidates)
            )
            yield from filter(None, chain.from_iterable(zip_longest(known, told)))

    def lost(self, seen: set[bytes]) -> list[Contact]:
        """Return the seeds and the nodes that lapsed whose CURVE keys are not among those `seen`."""
        return [contact for contact in (*self._seeds, *self._lapsed.values()) if contact.key not in seen]

    def has_more_than(self, count: int) -> bool:
        """Tell whether more than `count` nodes, candidates included, said where they can be dialled.

        Those that we failed to reach count: otherwise links would swing with each node that goes and comes.
        """
        known = chain(self._entries.values(), self._candidates.values())
        return next(islice((entry for entry in known if entry.addresses), count, None), None) is not None

    def good_records(self) -> list[PeerRecord]:
        """Return the records of nodes that we did not fail to reach."""
        return [entry.record for entry in self._entries.values() if not entry.has_failed]

    def records(self) -> list[PeerRecord]:
        return [entry.record for entry in self._entries.values()]

    def all_records(self) -> list[PeerRecord]:
        """Return every record, those of candidates too."""
        return [entry.record for entry in chain(self._entries.values(), self._candidates.values())]

    def lapsed_records(self) -> list[PeerRecord]:
        """Return the records of those that lapsed: to be kept on disk, and passed on to nobody."""
        return [entry.record for entry in self._lapsed.values()]

    @property
    def dialable(self) -> int:
        """How many nodes can be dialled from here, as far as is known: they say where, and none failed to answer."""
        return sum(bool(entry.addresses) and not entry.has_failed for entry in self._entries.values())

    def dialable_records(self) -> list[PeerRecord]:
        """Return the records of nodes that we may dial: what is worth saving."""
        return [entry.record for entry in self._entries.values() if entry.addresses]

    def services(self) -> list[tuple[NodeId, Service]]:
        """Return what good nodes say that they run, where we may reach it. Rule 6."""
        return [
            (node, service)
            for node, entry in self._entries.items()
            if not entry.has_failed
            for service in entry.record.services
            if read_address(service.endpoint.host) is not None and scope_of(service.endpoint.host) >= entry.scope
        ]

    @property
    def has_candidates(self) -> bool:
        """Whether there are candidates: one more teller brings each into the book."""
        return bool(self._candidates)

    def vouch(self, summaries: dict[bytes, bytes], teller: str, scope: Scope = Scope.PUBLIC) -> list[PeerRecord]:
        """Let `teller` tell us of the records with these summaries; return those that are now in the book."""
        records = [
            entry.record
            for entry in self._candidates.values()
            if entry.source != teller and summaries.get(entry.record.summary[0]) == entry.record.summary[1]
        ]
        return [record for record in records if self.hear(record, teller, scope)]

    def candidates(self, teller: str) -> list[PeerRecord]:
        """Return the records of candidates that the network `teller` told us of."""
        return [entry.record for entry in self._candidates.values() if entry.source == teller]


def usable(record: PeerRecord, scope: Scope) -> tuple[Address, ...]:
    """Return the record's addresses that are at least of that scope."""
    if record.nearest >= scope:
        return record.addresses  # the very tuple that all nodes of a simulation share
    return tuple(address for address in record.addresses if scope_of(address.endpoint.host) >= scope)


def _saved_scope(record: PeerRecord) -> Scope:
    """Return the scope from which endpoints of a saved record count: only public ones, or all if none is public."""
    return Scope.PUBLIC if usable(record, Scope.PUBLIC) else Scope.LOOPBACK


def _worst(entries: dict[NodeId, BookEntry], kept: set[NodeId], count: int, rng: random.Random) -> list[NodeId]:
    """Return the `count` nodes to forget first. Rule 4."""
    if count <= 0:
        return []
    by_source = Counter(entry.source for entry in entries.values())
    ranks: defaultdict[tuple[bool, int], list[NodeId]] = defaultdict(list)
    for node, entry in entries.items():
        if node not in kept:
            ranks[not entry.has_failed, -by_source[entry.source]].append(node)
    worst: list[NodeId] = []
    for _, nodes in sorted(ranks.items()):
        room = count - len(worst)
        worst += nodes if len(nodes) <= room else rng.sample(nodes, room)
    return worst


def shuffled(things: Iterable[V], rng: random.Random) -> Iterator[V]:
    """Yield things in uniformly random order (Fisher and Yates, as far as is asked)."""
    left = list(things)
    while left:
        at = int(rng.random() * len(left))
        left[at], left[-1] = left[-1], left[at]
        yield left.pop()
