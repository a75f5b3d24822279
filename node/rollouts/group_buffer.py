"""The group buffer: peers' groups, bounded by age, count and bytes; in memory, and in SQLite for the next start.

What else a node must not do twice lies in the same file: a round is one transaction.

- **A group is used once.** A hash of its question and its completions' texts names it (`texts_id`). So somebody who
  sends it again under another id gains no further use. A use is remembered though the group is gone. An item that was
  signed before the use may come for `item_life` and then wait here for `max_age`. The use is forgotten after both.
- **A question stands once in a draw.** Of several groups on one question the first to come may be drawn. The others may
  follow in later rounds.
- **No group is verified** before a round draws it. A group that the round finds false or of no use is *buried*. No
  round draws it again. It stays here, so that it is not taken in again.
- **A round that is done again may draw the same**, and what came since. A group is stored with the first round that may
  draw it. A use or a burial is stored with the round that made it. A node that goes on from an older checkpoint forgets
  what later rounds used and buried.
- **Time does not go back** behind the newest group. If the clock was set back, the newest group's time counts. So a
  group is evicted before its uses are forgotten.

The rows of a table lie in the order of arrival, and their random ids in an index. In a tree sorted by id, a burst of
bodies would cost twice as much to store.

One thread owns a buffer. WAL with NORMAL synchronisation keeps the file consistent through kill -9. A power cut may
lose the last transactions, never the file.
"""

import array
import hashlib
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from node.config import BufferConfig
from node.errors import UserError
from node.rollouts.group import Group, content_id, decode, encode
from node.rollouts.own_results import OwnResult, OwnResults
from node.rollouts.rule import Candidate
from node.tasks.questions import question_id

_SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
    id BLOB PRIMARY KEY, peer TEXT NOT NULL, task TEXT NOT NULL, question BLOB NOT NULL, texts BLOB NOT NULL,
    received REAL NOT NULL, first_round INTEGER NOT NULL, rewards BLOB NOT NULL, body BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS uses (texts BLOB NOT NULL, round INTEGER NOT NULL, time REAL NOT NULL);
CREATE INDEX IF NOT EXISTS uses_by_round ON uses (round);
CREATE INDEX IF NOT EXISTS uses_by_time ON uses (time);
CREATE TABLE IF NOT EXISTS buried (id BLOB PRIMARY KEY, round INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS own_results (
    round INTEGER NOT NULL, task TEXT NOT NULL, right_length REAL, length REAL NOT NULL, reward REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS own_results_by_round ON own_results (round);
CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
"""
FORMAT = 6  # of the tables and the groups in them
LOSES = "delete it; peers' groups and what was counted in it are lost, the key and the checkpoints stay"
_INSERT_GROUP = "INSERT OR REPLACE INTO groups VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
MAX_PEER_SHARE = 0.5  # of the buffer, that one peer's groups may fill: a flood of one's leaves room for all others
OWN = "self"  # who signed this node's own groups: no peer's id


class ReceivedGroup(NamedTuple):
    """A group: its content id, who signed it, when it came (Unix seconds), and the bytes it came as."""

    id: bytes
    peer: str
    received: float
    group: Group
    body: bytes


def as_received(group: Group, now: float) -> ReceivedGroup:
    """Return a group of this node's own as if it had come from a peer at `now` (Unix seconds)."""
    body = encode(group)
    return ReceivedGroup(content_id(body), OWN, now, group, body)


def texts_id(group: Group) -> bytes:
    """Return 16 bytes that name a group by its question and the texts of its episodes, in whatever order these are."""
    digest = hashlib.sha256()
    for texts in ((group.task.name, group.question), *sorted(completion.texts for completion in group.completions)):
        digest.update(len(texts).to_bytes(4, "big"))
        for text in texts:
            data = text.encode(errors="replace")
            digest.update(len(data).to_bytes(4, "big") + data)
    return digest.digest()[:16]


@dataclass(slots=True)
class _BufferedGroup:
    candidate: Candidate
    body: bytes


class GroupBuffer:
    """Open or make the buffer at `path`; a context manager that closes it.

    Args:
        path: of the file; ":memory:" for none.
        bounds: what may be held.
        item_life: seconds from when an item is signed to when it can come no more.

    Raises `UserError` where the file is of another version.
    """

    def __init__(self, path: Path, bounds: BufferConfig, item_life: float = 0.0) -> None:
        self._bounds = bounds
        self._remembers_for = item_life + bounds.max_age
        self._db = sqlite3.connect(path, isolation_level=None)
        check_format(self._db, path)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(f"{_SCHEMA} PRAGMA user_version = {FORMAT};")
        self._load()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._entries) - len(self._buried)

    def __contains__(self, group_id: object) -> bool:
        return group_id in self._entries

    @property
    def signers(self) -> Collection[str]:
        """The peers that have a group here."""
        return self._peer_count.keys()

    @property
    def own_results(self) -> OwnResults:
        """The results of this node's own groups in the last rounds."""
        return self._own_results

    def close(self) -> None:
        """Close the file; the buffer is unusable afterwards."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Let all that the block writes be written at once, or nothing of it where the block raises."""
        if self._db.in_transaction:
            yield
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def add(self, shared: Iterable[ReceivedGroup], now: float, first_round: int) -> int:
        """Store groups that are neither here nor used, then restore the bounds; return how many were stored.

        Args:
            shared: from anybody, once `node.rollouts.screening.read` has accepted them.
            now: Unix seconds.
            first_round: the first round that may draw them.
        """
        rows = []
        for item in sorted(shared, key=lambda group: (group.received, group.id)):
            texts = texts_id(item.group)
            if item.id in self._entries or texts in self._used:
                continue
            received = self._time(item.received)
            candidate = _candidate(item.id, item.peer, item.group, texts, received, first_round)
            self._remember(candidate, item.body)
            rows.append(_row(candidate, item.body))
        evicted = self._evict(self._time(now))
        if rows or evicted:
            with self.transaction():
                self._db.executemany(_INSERT_GROUP, rows)
                self._delete(evicted)
        return len(rows)

    def candidates(self, now: float, round_number: int) -> list[Candidate]:
        """Return the groups that `round_number` may draw, in order of arrival: at most one group for each question.

        Left out are groups that are buried or used, those older than `max_age`, and those that only a later round may
        draw. Age is counted from a group's arrival: a peer's own rounds and clock play no part.
        """
        oldest = self._time(now) - self._bounds.max_age
        drawable: dict[bytes, Candidate] = {}
        for candidate in list(self._free.values()):
            if candidate.texts in self._used:
                del self._free[candidate.id]
            elif candidate.received >= oldest and candidate.first_round <= round_number:
                drawable.setdefault(candidate.question, candidate)
        return list(drawable.values())

    def of_signers(self, peers: Collection[str]) -> list[Candidate]:
        """Return the groups of these peers that are not buried."""
        return [candidate for candidate in self._free.values() if candidate.peer in peers]

    def read(self, ids: Iterable[bytes]) -> dict[bytes, Group]:
        """Return the groups with these ids, if they are here. Reading a group is not a use of it."""
        bodies = {group_id: self._entries[group_id].body for group_id in ids if group_id in self._entries}
        return {group_id: decode(body, len(body)) for group_id, body in bodies.items()}

    def use(self, drawn: Iterable[Candidate], round_number: int, now: float) -> None:
        """Record that `round_number` used these groups at `now` (Unix seconds); forget uses that are too long ago.

        A group that was evicted after it was drawn counts as used all the same.
        """
        time = self._time(now)
        texts = [candidate.texts for candidate in drawn]
        self._used.update(texts)
        with self.transaction():
            self._db.executemany("INSERT INTO uses VALUES (?, ?, ?)", [(text, round_number, time) for text in texts])
            self._delete(self._evict(time))
            old = time - self._remembers_for
            forgotten = self._db.execute("SELECT texts FROM uses WHERE time < ?", (old,)).fetchall()
            self._used.difference_update(texts for (texts,) in forgotten)
            self._db.execute("DELETE FROM uses WHERE time < ?", (old,))

    def bury(self, ids: Iterable[bytes], round_number: int) -> None:
        """Bury these groups: no round draws them again, as `round_number` found out. Ignore those that are gone."""
        held = [group_id for group_id in ids if group_id in self._entries]
        self._buried.update(held)
        for group_id in held:
            self._free.pop(group_id, None)
        with self.transaction():
            self._db.executemany(
                "INSERT OR IGNORE INTO buried VALUES (?, ?)", [(group_id, round_number) for group_id in held]
            )

    def record_own_results(self, round_number: int, results: Sequence[OwnResult]) -> OwnResults:
        """Record the results of the groups that this node made in a round; return those of all the last rounds."""
        gone = self._own_results.put(round_number, results)
        with self.transaction():
            self._db.executemany("DELETE FROM own_results WHERE round = ?", [(number,) for number in gone])
            rows = [(round_number, *result) for result in results]
            self._db.executemany("INSERT INTO own_results VALUES (?, ?, ?, ?, ?)", rows)
        return self._own_results

    def count(self, name: str) -> int:
        """Return the count that `set_count` has set for good, 0 before that."""
        found = self._db.execute("SELECT value FROM counts WHERE name = ?", (name,)).fetchone()
        return found[0] if found else 0

    def set_count(self, name: str, value: int) -> None:
        """Set a count that no rewinding changes."""
        self._db.execute("INSERT OR REPLACE INTO counts VALUES (?, ?)", (name, value))

    def rewind(self, round_number: int) -> None:
        """Forget the uses, burials and own results of rounds after `round_number`."""
        with self.transaction():
            self._db.execute("DELETE FROM uses WHERE round > ?", (round_number,))
            self._db.execute("DELETE FROM buried WHERE round > ?", (round_number,))
            self._db.execute("DELETE FROM own_results WHERE round > ?", (round_number,))
        self._load()

    def _load(self) -> None:
        self._entries: dict[bytes, _BufferedGroup] = {}  # oldest first
        self._free: dict[bytes, Candidate] = {}  # oldest first: those not buried, and not known to be used
        self._bytes = 0
        self._peer_count: Counter[str] = Counter()
        self._peer_bytes: Counter[str] = Counter()
        self._used = {texts for (texts,) in self._db.execute("SELECT texts FROM uses")}
        self._buried = {group_id for (group_id,) in self._db.execute("SELECT id FROM buried")}
        self._own_results = OwnResults()
        own: dict[int, list[OwnResult]] = {}
        for number, *result in self._db.execute(
            "SELECT round, task, right_length, length, reward FROM own_results ORDER BY rowid"
        ):
            own.setdefault(number, []).append(OwnResult(*result))
        for number, results in own.items():
            self._own_results.put(number, results)
        rows = self._db.execute(
            "SELECT id, peer, task, question, texts, received, first_round, rewards, body FROM groups ORDER BY rowid"
        )
        for group_id, peer, task, question, texts, received, first_round, rewards, body in rows:
            unpacked = tuple(array.array("d", rewards))
            self._remember(Candidate(group_id, peer, task, question, texts, received, first_round, unpacked), body)

    def _remember(self, candidate: Candidate, body: bytes) -> None:
        self._entries[candidate.id] = _BufferedGroup(candidate, body)
        if candidate.id not in self._buried:
            self._free[candidate.id] = candidate
        self._bytes += len(body)
        self._peer_count[candidate.peer] += 1
        self._peer_bytes[candidate.peer] += len(body)

    def _time(self, now: float) -> float:
        """Return `now`, or the time of the newest group where the clock was set back."""
        newest = next(reversed(self._entries.values()), None)
        return now if newest is None else max(newest.candidate.received, now)

    def _evict(self, time: float) -> list[bytes]:
        """Drop entries from memory until every bound holds at `time`, oldest first; return their ids."""
        evicted = []
        for peer in [peer for peer in self._peer_count if self._fills_too_much(peer)]:
            for group_id in [i for i, entry in self._entries.items() if entry.candidate.peer == peer]:
                if not self._fills_too_much(peer):
                    break
                evicted.append(self._drop(group_id))
        while self._entries and self._is_over(time):
            evicted.append(self._drop(next(iter(self._entries))))
        return evicted

    def _fills_too_much(self, peer: str) -> bool:
        most = max(self._bounds.max_groups * MAX_PEER_SHARE, 1)
        return self._peer_count[peer] > most or self._peer_bytes[peer] > self._bounds.max_bytes * MAX_PEER_SHARE

    def _is_over(self, time: float) -> bool:
        bounds = self._bounds
        if len(self._entries) > bounds.max_groups or self._bytes > bounds.max_bytes:
            return True
        return next(iter(self._entries.values())).candidate.received < time - bounds.max_age

    def _delete(self, evicted: Sequence[bytes]) -> None:
        ids = [(group_id,) for group_id in evicted]
        self._db.executemany("DELETE FROM groups WHERE id = ?", ids)
        self._db.executemany("DELETE FROM buried WHERE id = ?", ids)

    def _drop(self, group_id: bytes) -> bytes:
        entry = self._entries.pop(group_id)
        self._free.pop(group_id, None)
        self._buried.discard(group_id)
        peer = entry.candidate.peer
        self._bytes -= len(entry.body)
        self._peer_bytes[peer] -= len(entry.body)
        self._peer_count[peer] -= 1
        if not self._peer_count[peer]:
            del self._peer_count[peer], self._peer_bytes[peer]
        return group_id


def check_format(db: sqlite3.Connection, path: Path) -> None:
    """Raise `UserError` where a buffer, in the file `path`, is of another version."""
    if db.execute("PRAGMA user_version").fetchone()[0] not in (0, FORMAT):  # 0: a new one
        raise UserError(f"{path} is of another version: {LOSES}")


def _candidate(group_id: bytes, peer: str, group: Group, texts: bytes, received: float, first_round: int) -> Candidate:
    name = group.task.name
    question = question_id(name, group.question)
    return Candidate(group_id, peer, name, question, texts, received, first_round, group.rewards)


def _row(candidate: Candidate, body: bytes) -> tuple[object, ...]:
    packed = array.array("d", candidate.rewards).tobytes()
    return (
        candidate.id,
        candidate.peer,
        candidate.task,
        candidate.question,
        candidate.texts,
        candidate.received,
        candidate.first_round,
        packed,
        body,
    )
