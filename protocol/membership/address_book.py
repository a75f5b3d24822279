"""The address book: everybody we heard of, which is the passive view of HyParView (Leitao 2007).

Two sources: the seeds a person gave, which are never forgotten, and signed records. A
contact is tried at once when it is new, then after 0.5, 1, 2, ... up to 60 s, each drawn from
the upper half of its interval so that nodes do not dial in step.

A record is remembered with whom we have it from. When the book is full, what failed and what
is said to be dead goes first, then entries of the source that has the most: no peer can push
out what others told us, and what we found out by meeting a node ourselves goes last. A rumour
that a node is dead never removes it: it is dialled and passed on only after the others.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from protocol.config import Instant
from protocol.credentials.records import Address, PeerRecord
from protocol.identity import NodeId

FIRST_RETRY_S = 0.5
LAST_RETRY_S = 60.0  # a dead peer costs one connection attempt a minute until its record expires
BUSY_S = 60.0  # a peer that had no room is asked again after this at the latest


@dataclass(slots=True)
class Contact:
    """Somebody to dial: under one CURVE key, at one or more endpoints, tried in turn."""

    addresses: tuple[Address, ...]
    failures: int = 0
    not_before: float = 0.0

    @property
    def key(self) -> bytes:
        """The CURVE key that the contact has to prove."""
        return self.addresses[0].key

    @property
    def address(self) -> Address:
        """The address whose turn it is."""
        return self.addresses[self.failures % len(self.addresses)]

    def failed(self, now: Instant, rng: random.Random) -> None:
        """Put the next attempt off."""
        delay = min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(self.failures, 16))
        self.failures += 1
        self.not_before = now.steady + delay * rng.uniform(0.5, 1.0)

    def busy(self, now: Instant, rng: random.Random) -> None:
        """It answered, and has no room: that is no failure."""
        self.failures = 0
        self.not_before = now.steady + BUSY_S * rng.uniform(0.25, 1.0)

    def met(self) -> None:
        """Forget earlier failures."""
        self.failures = 0
        self.not_before = 0.0


@dataclass(slots=True)
class _Entry:
    record: PeerRecord
    source: NodeId  # the node itself once we met it
    contact: Contact | None
    dead: bool = False  # said to be, in this incarnation

    @property
    def is_good(self) -> bool:
        return not self.dead and (self.contact is None or self.contact.failures == 0)


class Book:
    """Seeds, and about `capacity` records: `trim` brings it back there."""

    def __init__(self, seeds: tuple[Address, ...], capacity: int) -> None:
        self.capacity = capacity
        self._seeds = tuple(Contact((seed,)) for seed in seeds)
        self._entries: dict[NodeId, _Entry] = {}
        self.revision = 0  # grows when there is something new to save

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, node: object) -> bool:
        return node in self._entries

    def get(self, node: NodeId) -> PeerRecord | None:
        """Return the newest record of `node`."""
        entry = self._entries.get(node)
        return entry.record if entry else None

    def contact(self, node: NodeId) -> Contact | None:
        """Return how to dial `node`, if it said so."""
        entry = self._entries.get(node)
        return entry.contact if entry else None

    def add(self, record: PeerRecord, source: NodeId | None = None, not_before: float = 0.0) -> bool:
        """Take in a verified record that `source` told us; False if it says nothing new."""
        node = record.node_id
        source = source or node
        known = self._entries.get(node)
        if known is None:
            self._entries[node] = _Entry(record, source, _contact_of(record, not_before))
        else:
            if source == node:
                known.source, known.dead = node, False
            if not record.replaces(known.record):
                return False
            if (known.record.endpoints, known.record.curve_key) != (record.endpoints, record.curve_key):
                known.contact = _contact_of(record, not_before)
            known.dead = known.dead and known.record.incarnation == record.incarnation
            known.record = record
        self.revision += 1
        return True

    def bury(self, node: NodeId, incarnation: int) -> bool:
        """Note that `node` is said to be dead in that incarnation; False if that is no news."""
        entry = self._entries.get(node)
        if entry is None or entry.dead or entry.record.incarnation > incarnation:
            return False
        entry.dead = True
        return True

    def is_dead(self, node: NodeId) -> bool:
        """Tell whether a known node is said to be dead."""
        entry = self._entries.get(node)
        return entry is not None and entry.dead

    def trim(self, live: Iterable[NodeId], rng: random.Random) -> None:
        """Forget what is over the capacity, nobody of `live`."""
        excess = len(self._entries) - self.capacity
        if excess <= 0:
            return
        kept = set(live)
        told = Counter([entry.source for entry in self._entries.values()])
        rank = sorted(
            (entry.is_good, -told[entry.source], rng.random(), node)
            for node, entry in self._entries.items()
            if node not in kept
        )
        for *_, node in rank[:excess]:
            del self._entries[node]

    def forget(self, nodes: Iterable[NodeId]) -> None:
        """Drop the records of nodes that are not to be dialled or passed on any more."""
        for node in nodes:
            if self._entries.pop(node, None) is not None:
                self.revision += 1

    def expire(self, now: Instant) -> None:
        """Drop the records whose time is over."""
        limit = now.unix * 1000
        for node in [node for node, entry in self._entries.items() if entry.record.expiry_ms <= limit]:
            del self._entries[node]

    def seeds_due(self, now: Instant) -> list[Contact]:
        """Return the seeds that may be dialled now."""
        return [seed for seed in self._seeds if seed.not_before <= now.steady]

    def contacts_due(
        self,
        now: Instant,
        rng: random.Random,
        limit: int | None = None,
        avoid: Callable[[NodeId], bool] = lambda _: False,
    ) -> list[Contact]:
        """Return what else may be dialled now: at most `limit`, nobody to `avoid`, at random, the dead last."""
        living: list[Contact] = []
        dead: list[Contact] = []
        for node, entry in self._entries.items():
            if entry.contact is not None and entry.contact.not_before <= now.steady and not avoid(node):
                (dead if entry.dead else living).append(entry.contact)
        limit = len(self) if limit is None else limit
        chosen = rng.sample(living, min(limit, len(living)))
        return chosen + rng.sample(dead, min(limit - len(chosen), len(dead)))

    def has_prospect(self, now: Instant, busy: set[bytes]) -> bool:
        """Tell whether somebody who may well answer can be dialled, under a key that is not `busy`."""
        return any(
            entry.contact is not None
            and entry.is_good
            and entry.contact.not_before <= now.steady
            and entry.contact.key not in busy
            for entry in self._entries.values()
        )

    def good_records(self) -> list[PeerRecord]:
        """Return the records of nodes that nobody failed to reach and that are not said to be dead."""
        return [entry.record for entry in self._entries.values() if entry.is_good]

    def records(self) -> list[PeerRecord]:
        """Return every record."""
        return [entry.record for entry in self._entries.values()]


def _contact_of(record: PeerRecord, not_before: float) -> Contact | None:
    if not record.endpoints:
        return None
    return Contact(record.addresses, not_before=not_before)
