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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from node.config import PoolConfig
from node.rollout import Group, decode, encode
from node.sampling import Candidate

_SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
    id BLOB PRIMARY KEY, peer TEXT NOT NULL, task TEXT NOT NULL, received REAL NOT NULL,
    rewards BLOB NOT NULL, body BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS uses (id BLOB NOT NULL, round INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS uses_by_round ON uses (round);
"""


class Shared(NamedTuple):
    """A verified group from a peer: its content id, who signed it, when it came (Unix seconds)."""

    id: bytes
    peer: str
    received: float
    group: Group


@dataclass(slots=True)
class _Entry:
    peer: str
    received: float
    size: int
    rewards: tuple[float, ...]
    uses: int


class Pool:
    """Open or make the pool at `path`; a context manager that closes it."""

    def __init__(self, path: Path, bounds: PoolConfig) -> None:
        self._bounds = bounds
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(_SCHEMA)
        self._entries: dict[bytes, _Entry] = {}
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
            body = encode(item.group)
            rewards = item.group.rewards
            self._entries[item.id] = _Entry(item.peer, item.received, len(body), rewards, uses=0)
            packed = array.array("d", rewards).tobytes()
            rows.append((item.id, item.peer, item.group.task.name, item.received, packed, body))
        evicted = self._over_bounds(now)
        if rows or evicted:
            with _Transaction(self._db):
                self._db.executemany("INSERT OR REPLACE INTO groups VALUES (?, ?, ?, ?, ?, ?)", rows)
                self._forget(evicted)
        return len(rows)

    def candidates(self, now: float, max_uses: int) -> list[Candidate]:
        """Return what may be drawn: fresh groups used fewer than `max_uses` times, in the order of their ids."""
        oldest = now - self._bounds.max_age
        return [
            Candidate(group_id, entry.peer, max(now - entry.received, 0.0), entry.rewards)
            for group_id, entry in sorted(self._entries.items())
            if entry.uses < max_uses and entry.received >= oldest
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
        counts = dict(self._db.execute("SELECT id, COUNT(*) FROM uses GROUP BY id"))
        rows = self._db.execute("SELECT id, peer, received, length(body), rewards FROM groups")
        self._entries = {
            group_id: _Entry(peer, received, size, tuple(array.array("d", rewards)), counts.get(group_id, 0))
            for group_id, peer, received, size, rewards in rows
        }

    def _over_bounds(self, now: float) -> list[bytes]:
        """Drop entries from memory until every bound holds, oldest first; return their ids."""
        bounds = self._bounds
        by_age = sorted(self._entries, key=lambda i: (self._entries[i].received, i), reverse=True)
        kept_count, kept_bytes = 0, 0
        peer_count: dict[str, int] = {}
        peer_bytes: dict[str, int] = {}
        evicted = []
        for group_id in by_age:
            entry = self._entries[group_id]
            count = peer_count.get(entry.peer, 0) + 1
            size = peer_bytes.get(entry.peer, 0) + entry.size
            fits = (
                entry.received >= now - bounds.max_age
                and kept_count < bounds.max_groups
                and kept_bytes + entry.size <= bounds.max_bytes
                and count <= max(bounds.max_groups * bounds.max_peer_share, 1)
                and size <= bounds.max_bytes * bounds.max_peer_share
            )
            if fits:
                kept_count, kept_bytes = kept_count + 1, kept_bytes + entry.size
                peer_count[entry.peer], peer_bytes[entry.peer] = count, size
            else:
                evicted.append(group_id)
        for group_id in evicted:
            del self._entries[group_id]
        return evicted

    def _forget(self, ids: Sequence[bytes]) -> None:
        self._db.executemany("DELETE FROM groups WHERE id = ?", [(i,) for i in ids])
        self._db.executemany("DELETE FROM uses WHERE id = ?", [(i,) for i in ids])


class _Transaction:
    """BEGIN ... COMMIT, or ROLLBACK when the block raises."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")
