"""The address book: whom we could dial, and when it makes sense to try again.

Two sources: the seeds a person gave, which are never forgotten, and signed records from
peers. A contact is tried at once when it is new, then after 0.5, 1, 2, ... up to 60 s,
each drawn from the upper half of its interval so that nodes do not dial in step.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from protocol.clock import Instant
from protocol.identity import NodeId
from protocol.records import Address, PeerRecord

FIRST_RETRY_S = 0.5
LAST_RETRY_S = 60.0  # a dead peer costs one connection attempt a minute until its record expires


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

    def met(self) -> None:
        """Forget earlier failures."""
        self.failures = 0
        self.not_before = 0.0


class Book:
    """Seeds, records and their contacts; at most `capacity` records."""

    def __init__(self, seeds: tuple[Address, ...], capacity: int) -> None:
        self._capacity = capacity
        self._seeds = {seed: Contact((seed,)) for seed in seeds}
        self._records: dict[NodeId, PeerRecord] = {}
        self._contacts: dict[NodeId, Contact] = {}
        self.revision = 0  # grows when there is something new to save

    def __len__(self) -> int:
        return len(self._records)

    def get(self, node: NodeId) -> PeerRecord | None:
        """Return the newest record of `node`."""
        return self._records.get(node)

    def contact(self, node: NodeId) -> Contact | None:
        """Return how to dial `node`, if it said so."""
        return self._contacts.get(node)

    def add(self, record: PeerRecord, not_before: float = 0.0) -> bool:
        """Take in a verified record; False if it tells nothing new."""
        node = record.node_id
        known = self._records.get(node)
        if known is not None and not record.replaces(known):
            return False
        self._records[node] = record
        moved = known is None or (known.endpoints, known.curve_key) != (record.endpoints, record.curve_key)
        if moved:
            self._contacts.pop(node, None)
            if record.endpoints:
                addresses = tuple(Address(endpoint, record.curve_key) for endpoint in record.endpoints)
                self._contacts[node] = Contact(addresses, not_before=not_before)
        self.revision += 1
        if len(self._records) > self._capacity:
            self._forget(max(self._records, key=self._uselessness))
        return True

    def _uselessness(self, node: NodeId) -> tuple[int, int]:
        contact = self._contacts.get(node)
        return (contact.failures if contact else 1 << 30, -self._records[node].expiry_ms)

    def _forget(self, node: NodeId) -> None:
        del self._records[node]
        self._contacts.pop(node, None)

    def expire(self, now: Instant) -> None:
        """Drop the records whose time is over."""
        for node in [node for node, record in self._records.items() if record.expiry_ms <= now.unix * 1000]:
            self._forget(node)

    def contacts_due(self, now: Instant) -> Iterator[Contact]:
        """Yield what may be dialled now, seeds first."""
        for contact in (*self._seeds.values(), *self._contacts.values()):
            if contact.not_before <= now.steady:
                yield contact

    def good_records(self, now: Instant) -> list[PeerRecord]:
        """Return the unexpired records of nodes that nobody failed to reach so far."""
        return [record for record in self._records.values() if self._is_good(record, now)]

    def _is_good(self, record: PeerRecord, now: Instant) -> bool:
        contact = self._contacts.get(record.node_id)
        return record.expiry_ms > now.unix * 1000 and (contact is None or contact.failures == 0)

    def records(self) -> list[PeerRecord]:
        """Return every record."""
        return list(self._records.values())
