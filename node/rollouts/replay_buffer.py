"""The pool: peers' verified groups, on disk, bounded by age, count and bytes.

Bodies live in SQLite; what a sampling rule looks at (who, when, which rewards) is
also kept in memory, so that a draw reads only the bodies it takes. Uses are recorded
with the round that made them: a node that resumes from an older checkpoint forgets
the uses of the rounds it will do again.

One thread owns a pool. WAL with NORMAL synchronisation keeps the file consistent
through kill -9; a power cut may lose the last transactions, never the file.
"""

import array
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from node.config import PoolConfig
from node.rollouts.group import Group, decode
from node.rollouts.sampling import Candidate

_SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
    id BLOB PRIMARY KEY, peer TEXT NOT NULL, task TEXT NOT NULL, received REAL NOT NULL,
    rewards BLOB NOT NULL, body BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS uses (id BLOB NOT NULL, round INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS uses_by_round ON uses (round);
"""


class Shared(NamedTuple):
    """A verified group: its content id, who signed it, when it came (Unix seconds), and the bytes it came as."""

    id: bytes
    peer: str
    received: float
    group: Group
    body: bytes


@dataclass(slots=True)
class _Entry:
    candidate: Candidate
    size: int
    uses: int


class ReplayBuffer:
    """Open or make the pool at `path`; a context manager that closes it."""

    def __init__(self, path: Path, bounds: PoolConfig) -> None:
        self._bounds = bounds
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(_SCHEMA)
        self._newest = 0.0
        self._load()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, group_id: object) -> bool:
        return group_id in self._entries

    def close(self) -> None:
        """Close the file; the pool is unusable afterwards."""
        self._db.close()

    def add(self, shared: Iterable[Shared], now: float) -> int:
        """Store groups not seen before, then restore the bounds; return how many were new."""
        rows = []
        for item in shared:
            if item.id in self._entries:
                continue
            rewards = item.group.rewards
            # A clock that was set back must not make the newest group the oldest.
            self._newest = max(self._newest, item.received)
            self._remember(Candidate(item.id, item.peer, self._newest, rewards), len(item.body), uses=0)
            packed = array.array("d", rewards).tobytes()
            rows.append((item.id, item.peer, item.group.task.name, self._newest, packed, item.body))
        evicted = self._evict(now)
        if rows or evicted:
            with _Transaction(self._db):
                self._db.executemany("INSERT OR REPLACE INTO groups VALUES (?, ?, ?, ?, ?, ?)", rows)
                self._db.executemany("DELETE FROM groups WHERE id = ?", [(i,) for i in evicted])
                self._db.executemany("DELETE FROM uses WHERE id = ?", [(i,) for i in evicted])
        return len(rows)

    def candidates(self, now: float, max_uses: int) -> list[Candidate]:
        """Return what may be drawn: fresh groups used fewer than `max_uses` times, in the order of their coming."""
        oldest = now - self._bounds.max_age
        return [
            entry.candidate
            for entry in self._entries.values()
            if entry.uses < max_uses and entry.candidate.received >= oldest
        ]

    def take(self, ids: Sequence[bytes], round_number: int) -> dict[bytes, Group]:
        """Return the groups with these ids and record that `round_number` used them."""
        unique = list(dict.fromkeys(ids))
        groups = {}
        for group_id in unique:
            (body,) = self._db.execute("SELECT body FROM groups WHERE id = ?", (group_id,)).fetchone()
            groups[group_id] = decode(body)
            self._entries[group_id].uses += 1
        if unique:
            with _Transaction(self._db):
                self._db.executemany("INSERT INTO uses VALUES (?, ?)", [(i, round_number) for i in unique])
        return groups

    def rewind(self, round_number: int) -> None:
        """Forget the uses made by rounds after `round_number`."""
        with _Transaction(self._db):
            self._db.execute("DELETE FROM uses WHERE round > ?", (round_number,))
        self._load()

    def _load(self) -> None:
        self._entries: dict[bytes, _Entry] = {}  # oldest first
        self._bytes = 0
        self._peer_count: Counter[str] = Counter()
        self._peer_bytes: Counter[str] = Counter()
        uses = dict(self._db.execute("SELECT id, COUNT(*) FROM uses GROUP BY id"))
        rows = self._db.execute("SELECT id, peer, received, rewards, length(body) FROM groups ORDER BY received, id")
        for group_id, peer, received, rewards, size in rows:
            self._newest = received
            candidate = Candidate(group_id, peer, received, tuple(array.array("d", rewards)))
            self._remember(candidate, size, uses.get(group_id, 0))

    def _remember(self, candidate: Candidate, size: int, uses: int) -> None:
        self._entries[candidate.id] = _Entry(candidate, size, uses)
        self._bytes += size
        self._peer_count[candidate.peer] += 1
        self._peer_bytes[candidate.peer] += size

    def _evict(self, now: float) -> list[bytes]:
        """Drop entries from memory until every bound holds, oldest first; return their ids."""
        evicted = []
        for peer in [peer for peer in self._peer_count if self._fills_too_much(peer)]:
            for group_id in [i for i, entry in self._entries.items() if entry.candidate.peer == peer]:
                if not self._fills_too_much(peer):
                    break
                evicted.append(self._drop(group_id))
        while self._entries and self._is_over(now):
            evicted.append(self._drop(next(iter(self._entries))))
        return evicted

    def _fills_too_much(self, peer: str) -> bool:
        part = self._bounds.max_peer_share
        most = max(self._bounds.max_groups * part, 1)
        return self._peer_count[peer] > most or self._peer_bytes[peer] > self._bounds.max_bytes * part

    def _is_over(self, now: float) -> bool:
        bounds = self._bounds
        oldest = next(iter(self._entries.values())).candidate.received
        return len(self._entries) > bounds.max_groups or self._bytes > bounds.max_bytes or oldest < now - bounds.max_age

    def _drop(self, group_id: bytes) -> bytes:
        entry = self._entries.pop(group_id)
        peer = entry.candidate.peer
        self._bytes -= entry.size
        self._peer_count[peer] -= 1
        self._peer_bytes[peer] -= entry.size
        if not self._peer_count[peer]:
            del self._peer_count[peer], self._peer_bytes[peer]
        return group_id


class _Transaction:
    """BEGIN ... COMMIT, or ROLLBACK when the block raises."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")
