"""Feelers: now and then one connection more, to a seed or to an old acquaintance, however many links there are.

The name is Bitcoin Core's, whose feelers test the addresses of its new table (Heilman and others 2015,
section 8). Here they end a split. Two halves of a swarm that are apart for longer than a record lives
(`RECORD_LIFE_S`) know nobody of each other any more, and each half has links enough: two swarms would
remain. So a node remembers some of those that it met itself and whose records have gone from its
book, also over a restart, and tries them and its seeds for good.

Rules
 1. One feeler in about `FEELER_INTERVAL_S`, to somebody who is due and not known to be in the swarm that
    we see. A contact's interval grows from `FIRST_S` to `LAST_S`: a seed that ten thousand nodes have is
    called three times a second.
 2. A node that answers tells records of its side. With room it becomes a peer; without, a link that we chose gives way
    to it.
 3. `MAX_LAPSED` are remembered, a fair sample of all that lapsed (Vitter 1985, algorithm R): whoever lets
    many invented nodes lapse gets its share of the places, and never those of the seeds.
 4. An expired record proves nothing and is told to nobody. It says where to call, and which key has to
    be proven there.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from protocol.config import Instant
from protocol.credentials.records import Address, PeerRecord
from protocol.identity import NodeId
from protocol.membership.address_book import Acquaintance, Contact, usable

FEELER_INTERVAL_S = 60.0
FIRST_S = 60.0
LAST_S = 3600.0
MAX_LAPSED = 64  # at an hour each, one call a minute


@dataclass(slots=True)
class _Turn:
    contact: Contact
    tries: int = 0
    not_before: float = 0.0


class Feelers:
    """See the module's comment."""

    def __init__(self, seeds: tuple[Address, ...], rng: random.Random) -> None:
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
                if len(self._records) >= MAX_LAPSED:
                    place = self._rng.randrange(self._lapses)
                    if place >= MAX_LAPSED:
                        continue
                    self.met(list(self._records)[place])
            self._records[node] = record
            self._turns[node] = _Turn(Contact(addresses, scope=scope))

    def met(self, node: NodeId) -> None:
        """The node is in the book again."""
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
