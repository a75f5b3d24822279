"""The address book: everybody we know of, which is the passive view of HyParView (Leitao 2007).

Three ways into it: the seeds a person gave, which are never forgotten; to have been admitted, by dialling us or by
being dialled; and to be told of by two voices (see `counts_as`). Beside it are the last `max_neighbours` addresses that
were called out in our own network: they are dialled, and in the book once they are admitted. A node that one peer told
of is a *candidate*: it is dialled as others are, and passed on to nobody. So no peer alone, and no caller that was
turned away, makes us speak of whom it invented (compare the new and the tried table of Bitcoin's addrman, where a
candidate is passed on).

A contact is tried at once when it is new, then after 0.5, 1, 2, ... up to 60 s, each drawn from
the upper half of its interval so that nodes do not dial in step.

When the book is full, whom we failed to reach goes first, then entries of the source that has the most: no peer can
push out what others told us, and what we found out by meeting a node ourselves goes last. Keys cost nothing and
addresses do: one network (see `netgroup`) has a bounded number of places, and a node takes one where it was seen, and
one in each network in which it says that it can be dialled: else callers from a few networks make us, and all whom we
tell, dial into another. There, who was seen elsewhere goes first. Whom we failed to reach is dialled after the others,
and passed on to nobody until it is met again or shows a record with another address.

Endpoints count from whom they mean something to: a private or a loopback one only if the node, or
whoever told of it, was itself seen at such an address. So nobody out there can make us connect
into our own network (see `Scope`; where a gateway hides the address of who dials in, all who come
through it look local).
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import NamedTuple, TypeVar

from protocol.config import Instant, Limits
from protocol.credentials.records import Address, PeerRecord, Service
from protocol.identity import NodeId
from protocol.limits.networks import Scope, netgroup, scope_of
from protocol.lru import Recent

FIRST_RETRY_S = 0.5
LAST_RETRY_S = 60.0  # a dead peer costs one connection attempt a minute until its record expires
BUSY_S = 60.0  # a peer that had no room is asked again after this at the latest
CANDIDATES = 2  # the part of the capacity that candidates may have, beside it
# The part of the candidates that goes at a time: whom to forget is found by looking at all, and every message brings
# more of them, so a node in a swarm of thousands would look at all at every message.
THINNING = 8
NOWHERE = "nowhere"  # the network of nodes that were only told of and that nobody can dial

V = TypeVar("V")


@dataclass(slots=True)
class Contact:
    """Somebody to dial: under one CURVE key, at one or more endpoints, tried in turn."""

    addresses: tuple[Address, ...]
    failures: int = 0
    not_before: float = 0.0
    scope: Scope = Scope.LOOPBACK  # of the nearest address that its host names may mean

    @property
    def key(self) -> bytes:
        return self.addresses[0].key

    @property
    def address(self) -> Address:
        """The address whose turn it is."""
        return self.addresses[self.failures % len(self.addresses)]

    def failed(self, now: Instant, rng: random.Random) -> None:
        delay = min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(self.failures, 16))
        self.failures += 1
        self.not_before = now.steady + delay * rng.uniform(0.5, 1.0)

    def busy(self, now: Instant, rng: random.Random) -> None:
        """It answered, and has no room: that is no failure."""
        self.failures = 0
        self.not_before = now.steady + BUSY_S * rng.uniform(0.25, 1.0)

    def met(self) -> None:
        self.failures = 0
        self.not_before = 0.0


class Acquaintance(NamedTuple):
    """A node that we met: its last record, of which the endpoints of `scope` and farther count."""

    record: PeerRecord
    scope: Scope


def saved_scope(record: PeerRecord) -> Scope:
    """Return from where the endpoints of a saved record count: all if none is public, else the public ones."""
    return Scope.PUBLIC if usable(record, Scope.PUBLIC) else Scope.LOOPBACK


@dataclass(slots=True)
class _BookEntry:
    record: PeerRecord
    source: str  # the node itself once we met it, else the network of who told us first
    group: str  # the network where it was seen, "" if that is not known or not public
    scope: Scope  # of the nearest endpoints that count
    claimed: frozenset[str] = frozenset()  # the networks in which it says that it can be dialled
    addresses: tuple[Address, ...] = ()  # those that do
    contact: Contact | None = None  # made when it is first asked for: most entries are never dialled

    @property
    def networks(self) -> frozenset[str]:
        return self.claimed | {self.group} if self.group else self.claimed

    @property
    def has_failed(self) -> bool:
        return self.contact is not None and self.contact.failures > 0

    def is_due(self, now: Instant) -> bool:
        if self.contact is None:
            return bool(self.addresses)
        return self.contact.not_before <= now.steady

    def dialable(self) -> Contact | None:
        if self.contact is None:
            self.aim()
        return self.contact

    def aim(self, not_before: float = 0.0) -> None:
        self.contact = Contact(self.addresses, not_before=not_before, scope=self.scope) if self.addresses else None

    def see_from(self, scope: Scope) -> None:
        """Let endpoints of that scope count, and nearer ones not."""
        self.scope = scope
        counting = usable(self.record, scope)
        if counting != self.addresses:
            self.addresses, self.contact = counting, None

    def update(self, record: PeerRecord, not_before: float) -> bool:
        """Take a newer record of the same node; False if it is not."""
        old = self.record
        if not record.replaces(old):
            return False
        self.record = record
        if (old.endpoints, old.curve_key) != (record.endpoints, record.curve_key):
            self.addresses = usable(record, self.scope)
            self.aim(not_before)
        return True


class Book:
    """Seeds, and about `max_known_peers` records, at most `max_prefix_records` of one network: see `trim`."""

    def __init__(self, seeds: tuple[Address, ...], limits: Limits) -> None:
        self._limits = limits
        self.capacity = limits.max_known_peers
        self.seeds = seeds
        self._seeds = tuple(Contact((seed,)) for seed in seeds)
        self._entries: dict[NodeId, _BookEntry] = {}
        self._candidates: dict[NodeId, _BookEntry] = {}
        self._groups: Counter[str] = Counter()  # entries by network
        self._crowded: set[str] = set()
        self.revision = 0  # grows when there is something new to save
        self._lapsed: list[Acquaintance] = []
        self._neighbours: Recent[bytes, Contact] = Recent(self._limits.max_neighbours)  # by key

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, node: object) -> bool:
        return node in self._entries

    def _find(self, node: NodeId) -> _BookEntry | None:
        return self._entries.get(node) or self._candidates.get(node)

    def get(self, node: NodeId) -> PeerRecord | None:
        """Return the newest record of `node`, be it a candidate or in the book."""
        entry = self._find(node)
        return entry.record if entry else None

    def holds(self, node: NodeId, encoded: bytes, scope: Scope) -> bool:
        """Tell whether the book has this very record of `node`, and no teller of that scope can add to it."""
        entry = self._entries.get(node)
        return entry is not None and entry.scope <= scope and entry.record.encoded == encoded

    def contact(self, node: NodeId) -> Contact | None:
        """Return how to dial `node`, if it said so."""
        entry = self._find(node)
        return entry.dialable() if entry else None

    def add(self, record: PeerRecord, host: str = "", scope: Scope | None = None) -> None:
        """Take in a verified record whose node we met, seen at `host` if that is known, or that was saved.

        Of its endpoints count those of `scope` and farther. Without one, as for what was saved, all
        count if none is public, else the public ones.
        """
        node = record.node_id
        if scope is None:
            scope = saved_scope(record)
        entry = self._find(node)
        if entry is None:
            entry = _BookEntry(record, node, "", scope)
        else:
            entry.update(record, 0.0)
        entry.see_from(scope)
        entry.source = node
        self._enter(node, entry, netgroup(host))

    def hear(self, record: PeerRecord, teller: str, not_before: float = 0.0, scope: Scope = Scope.PUBLIC) -> bool:
        """Take in a verified record that somebody of the network `teller` told us; True if it is news in the book.

        Its endpoints of `scope`, at which the teller was seen, count, and farther ones.
        """
        node = record.node_id
        known = self._entries.get(node)
        if known is not None:
            if scope < known.scope:
                known.see_from(scope)
            if not known.update(record, not_before):
                return False
            self._enter(node, known, known.group if known.source == node else _nowhere(record))
            return True
        candidate = self._candidates.get(node)
        if candidate is None:
            candidate = _BookEntry(record, teller, "", scope)
            self._candidates[node] = candidate
            candidate.see_from(scope)
            if not_before:
                candidate.aim(not_before)
            return False
        if scope < candidate.scope:
            candidate.see_from(scope)
        candidate.update(record, not_before)
        if candidate.source == teller:
            return False
        self._enter(node, candidate, _nowhere(candidate.record))
        return True

    def _enter(self, node: NodeId, entry: _BookEntry, group: str) -> None:
        self._candidates.pop(node, None)
        if self._entries.get(node) is entry:
            self._leave_groups(entry)
        self._entries[node] = entry
        entry.group, entry.claimed = group, entry.record.networks
        for network in entry.networks:
            self._groups[network] += 1
            if self._groups[network] > self._limits.max_prefix_records:
                self._crowded.add(network)
        self.revision += 1

    def _leave_groups(self, entry: _BookEntry) -> None:
        for network in entry.networks:
            self._groups[network] -= 1
            if not self._groups[network]:
                del self._groups[network]

    def trim(self, live: Iterable[NodeId], rng: random.Random) -> None:
        """Forget what is over the capacity, or over the places of a network, nobody of `live`."""
        kept = set(live) if self._crowded or len(self._entries) > self.capacity else set()
        for group in sorted(self._crowded):
            crowd = [(node, entry) for node, entry in self._entries.items() if group in entry.networks]
            self._remove(_worst(crowd, kept, len(crowd) - self._limits.max_prefix_records, rng, group))
        self._crowded.clear()
        if len(self._entries) > self.capacity:
            self._remove(_worst(self._entries.items(), kept, len(self._entries) - self.capacity, rng))
        most = max(1, self.capacity // CANDIDATES)
        if len(self._candidates) > most:
            excess = len(self._candidates) - (most - most // THINNING)
            for node in _worst(self._candidates.items(), set(), excess, rng):
                del self._candidates[node]

    def _remove(self, nodes: Iterable[NodeId]) -> None:
        for node in nodes:
            entry = self._entries.pop(node)
            self._leave_groups(entry)
            if entry.source == node and entry.addresses:
                self._lapsed.append(Acquaintance(entry.record, entry.scope))

    def take_lapsed(self) -> list[Acquaintance]:
        """Return the nodes that we had met, and may dial, whose records have gone since the last call."""
        lapsed, self._lapsed = self._lapsed, []
        return lapsed

    def forget(self, nodes: Iterable[NodeId]) -> None:
        """Drop the records of nodes that are not to be dialled or passed on any more."""
        for node in nodes:
            self._candidates.pop(node, None)
            if node in self._entries:
                self._remove([node])
                self._lapsed = [lapsed for lapsed in self._lapsed if lapsed.record.node_id != node]
                self.revision += 1

    def expire(self, now: Instant) -> None:
        limit = now.unix * 1000
        self._remove([node for node, entry in self._entries.items() if entry.record.expiry_ms <= limit])
        for node in [node for node, entry in self._candidates.items() if entry.record.expiry_ms <= limit]:
            del self._candidates[node]

    def seeds_due(self, now: Instant) -> list[Contact]:
        return [seed for seed in self._seeds if seed.not_before <= now.steady]

    def meet(self, address: Address) -> None:
        """Take note of a neighbour: an address in our own network at which a node of our swarm is said to be."""
        known = self._neighbours.get(address.key)
        if known is None or known.address != address:
            self._neighbours.set(address.key, Contact((address,), scope=scope_of(address.endpoint.host)))

    def neighbours_due(self, now: Instant) -> list[Contact]:
        return [one for one in self._neighbours.values() if one.not_before <= now.steady]

    def contacts_due(
        self, now: Instant, rng: random.Random, avoid: Callable[[NodeId], bool] = lambda _: False
    ) -> Iterator[Contact]:
        """Yield what else may be dialled now, in random order: of book and candidates in turn, those that failed last.

        Nobody to `avoid`. The book may not change meanwhile.
        """
        for failed in (False, True):
            known, told = (
                (e for e in shuffled(table.values(), rng) if e.has_failed is failed and e.is_due(now))
                for table in (self._entries, self._candidates)
            )
            for entry in chain.from_iterable(zip_longest(known, told)):
                if entry is not None and not avoid(entry.record.node_id) and (contact := entry.dialable()) is not None:
                    yield contact

    def good_sample(
        self, count: int, rng: random.Random, suits: Callable[[PeerRecord], bool] = lambda _: True
    ) -> list[PeerRecord]:
        """Return `count` of the good records that suit, or all of them where there are fewer, drawn uniformly."""
        good = (e.record for e in shuffled(self._entries.values(), rng) if not e.has_failed and suits(e.record))
        return list(islice(good, count))

    def has_more_prospects_than(self, count: int) -> bool:
        """Tell whether more nodes than `count`, be they candidates, may be dialled and did not fail."""
        known = chain(self._entries.values(), self._candidates.values())
        prospects = (entry for entry in known if entry.addresses and not entry.has_failed)
        return next(islice(prospects, count, None), None) is not None

    def good_records(self) -> list[PeerRecord]:
        """Return the records of nodes that we did not fail to reach."""
        return [entry.record for entry in self._entries.values() if not entry.has_failed]

    def records(self) -> list[PeerRecord]:
        return [entry.record for entry in self._entries.values()]

    def all_records(self) -> list[PeerRecord]:
        """Return every record, those of candidates too."""
        return [entry.record for entry in chain(self._entries.values(), self._candidates.values())]

    @property
    def dialable(self) -> int:
        """How many nodes can be dialled from here, as far as is known: they say where, and none failed to answer."""
        return sum(bool(entry.addresses) and not entry.has_failed for entry in self._entries.values())

    def dialable_records(self) -> list[PeerRecord]:
        """Return the records of nodes that we may dial: what is worth saving."""
        return [entry.record for entry in self._entries.values() if entry.addresses]

    def services(self) -> list[tuple[NodeId, Service]]:
        """Return what good nodes say that they run, where we may reach it."""
        return [
            (node, service)
            for node, entry in self._entries.items()
            if not entry.has_failed
            for service in entry.record.services
            if scope_of(service.endpoint.host) >= entry.scope
        ]

    @property
    def has_candidates(self) -> bool:
        """Whether there is somebody whom one more teller would bring into the book."""
        return bool(self._candidates)

    def vouch(self, entries: dict[bytes, bytes], teller: str, scope: Scope = Scope.PUBLIC) -> list[PeerRecord]:
        """Let `teller` tell us of the records with these summaries; return those that are now in the book."""
        found = [
            entry.record
            for entry in self._candidates.values()
            if entry.source != teller and entries.get(entry.record.summary[0]) == entry.record.summary[1]
        ]
        return [record for record in found if self.hear(record, teller, scope=scope)]

    def candidates(self, teller: str) -> list[PeerRecord]:
        """Return the records of candidates that the network `teller` told us of."""
        return [entry.record for entry in self._candidates.values() if entry.source == teller]


def usable(record: PeerRecord, scope: Scope) -> tuple[Address, ...]:
    """Return the record's addresses that are at least of that scope."""
    if record.nearest >= scope:
        return record.addresses  # the very tuple that all nodes of a simulation share
    return tuple(address for address in record.addresses if scope_of(address.endpoint.host) >= scope)


def _nowhere(record: PeerRecord) -> str:
    """Return the network of a node that was only told of, beside those that it names."""
    return "" if record.endpoints else NOWHERE


def _worst(
    table: Iterable[tuple[NodeId, _BookEntry]], kept: set[NodeId], count: int, rng: random.Random, network: str = ""
) -> list[NodeId]:
    """Return whom to forget first, of those who take a place in `network` if there is one; see the module's comment."""
    entries = list(table)
    told = Counter([entry.source for _, entry in entries])
    ranks: defaultdict[tuple[bool, bool, int], list[NodeId]] = defaultdict(list)
    for node, entry in entries:
        if node not in kept:
            is_native = not network or entry.group in ("", network)
            ranks[not entry.has_failed, is_native, -told[entry.source]].append(node)
    worst: list[NodeId] = []
    for _, nodes in sorted(ranks.items()):
        room = max(0, count - len(worst))
        worst += nodes if len(nodes) <= room else rng.sample(nodes, room)
    return worst


def shuffled(things: Iterable[V], rng: random.Random) -> Iterator[V]:
    """Yield things in uniformly random order (Fisher and Yates, as far as is asked)."""
    left = list(things)
    while left:
        at = int(rng.random() * len(left))
        left[at], left[-1] = left[-1], left[at]
        yield left.pop()
