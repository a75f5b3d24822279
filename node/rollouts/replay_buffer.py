"""The replay buffer: peers' groups, bounded by age, count and bytes; in memory, and in SQLite for the next start.

**Uses belong to a question**, not to a group: whoever sends a question again, with other
completions or under another name, gains no further use of it, and of several groups of
one question the first to come is the one that may be drawn. A use is remembered for as
many uses as the buffer holds groups, whether its group is still here or not.

**What is here is not verified** before a round draws it. What that round finds to be false or of no use is buried: it
stays, so that it does not come again, and is drawn no more.

**Rounds that are done again** draw the same: a group has the first round that may draw
it, a use and a burial the round that made it, and a node that goes on from an older checkpoint forgets
those of the rounds it will do again.

Rows lie in the order of their coming, and their random ids in an index: in a tree of the ids themselves, which files
of before 2.0 have, a burst of bodies costs twice as much to store.

One thread owns a buffer. WAL with NORMAL synchronisation keeps the file consistent
through kill -9; a power cut may lose the last transactions, never the file.
"""

import array
import hashlib
import math
import sqlite3
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

from node.config import PoolConfig
from node.rollouts.group import Group, content_id, decode, encode
from node.rollouts.lengths import OwnLength, OwnLengths
from node.rollouts.sampling import Candidate
from node.rollouts.usefulness import KEPT, Lesson

_SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
    id BLOB PRIMARY KEY, peer TEXT NOT NULL, task TEXT NOT NULL, question BLOB NOT NULL, received REAL NOT NULL,
    first_round INTEGER NOT NULL, rewards BLOB NOT NULL, body BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS uses (number INTEGER PRIMARY KEY, question BLOB NOT NULL, round INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS uses_by_round ON uses (round);
CREATE TABLE IF NOT EXISTS buried (id BLOB PRIMARY KEY, round INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS probes (round INTEGER PRIMARY KEY, score REAL NOT NULL);
CREATE TABLE IF NOT EXISTS pulls (round INTEGER NOT NULL, peer TEXT NOT NULL, share REAL NOT NULL);
CREATE TABLE IF NOT EXISTS own_lengths (round INTEGER NOT NULL, task TEXT NOT NULL, correct REAL, made REAL NOT NULL);
CREATE INDEX IF NOT EXISTS own_lengths_by_round ON own_lengths (round);
"""
OWN = "self"  # who signed this node's own groups: no peer's id
_FORMAT = 2  # of the tables: a file of another is emptied


K = TypeVar("K")


class Shared(NamedTuple):
    """A group: its content id, who signed it, when it came (Unix seconds), and the bytes it came as."""

    id: bytes
    peer: str
    received: float
    group: Group
    body: bytes


def own_shared(group: Group, now: float) -> Shared:
    """Return a group of this node's own as if it had come from a peer at `now` (Unix seconds)."""
    body = encode(group)
    return Shared(content_id(body), OWN, now, group, body)


class Snapshot(NamedTuple):
    """All that is held: (id, peer, received, first round, body) of groups, (question, round) of uses, (id, round)
    of burials, (round, score) of probes, (round, peer, share) of pulls, (round, task, right, made) of own lengths.
    """

    groups: Sequence[tuple[bytes, str, float, int, bytes]]
    uses: Sequence[tuple[bytes, int]]
    buried: Sequence[tuple[bytes, int]]
    probes: Sequence[tuple[int, float]] = ()
    pulls: Sequence[tuple[int, str, float]] = ()
    own_lengths: Sequence[tuple[int, str, float | None, float]] = ()


@dataclass(slots=True)
class _Entry:
    candidate: Candidate
    body: bytes


class _Drawable:
    """What rounds may draw, kept up from one round to the next: of thousands of groups a round changes a few.

    It serves while time and rounds only go on, and groups come for the same or for later rounds.
    """

    def __init__(self, candidates: Iterable[Candidate], max_uses: int) -> None:
        """Take all groups, in the order of their coming, of which a question is drawn `max_uses` times."""
        self.first: dict[bytes, Candidate] = {}  # by question, in the order of their coming
        self.coming: deque[Candidate] = deque()  # not looked at yet, or for later rounds
        self.max_uses = max_uses
        self.is_ordered = True
        self._last_round = 0
        self.asked = -math.inf, 0  # of when, and of which round, it was last asked
        for one in candidates:
            self.came(one)

    def came(self, candidate: Candidate) -> None:
        """Note a group that is here from now on."""
        self.is_ordered = self.is_ordered and candidate.first_round >= self._last_round
        self._last_round = candidate.first_round
        self.coming.append(candidate)

    def serves(self, now: float, round_number: int, max_uses: int) -> bool:
        """Tell whether it need not be made again to say what may be drawn now."""
        last, last_round = self.asked
        return self.is_ordered and max_uses == self.max_uses and now >= last and round_number >= last_round


class ReplayBuffer:
    """Open or make the buffer at `path`; a context manager that closes it."""

    def __init__(self, path: Path, bounds: PoolConfig) -> None:
        self._bounds = bounds
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        if self._db.execute("PRAGMA user_version").fetchone() != (_FORMAT,):
            self._db.executescript(
                "DROP TABLE IF EXISTS groups; DROP TABLE IF EXISTS uses; DROP TABLE IF EXISTS buried"
            )
            self._db.execute(f"PRAGMA user_version = {_FORMAT}")
        self._db.executescript(_SCHEMA)
        self._newest = 0.0
        self._drawable: _Drawable | None = None
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
    def signers(self) -> int:
        """How many peers have a group here."""
        return len(self._peer_count)

    @property
    def left(self) -> int:
        """How many groups the last round has left for the next, as far as that is known without another look."""
        return 0 if self._drawable is None else len(self._drawable.first)

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

    def add(self, shared: Iterable[Shared], now: float, first_round: int) -> int:
        """Store groups not seen before, then restore the bounds; return how many were new.

        Args:
            shared: from anybody, as `node.rollouts.screening.read` lets them in.
            now: Unix seconds.
            first_round: the first round that may draw them.
        """
        rows = []
        for item in sorted(shared, key=lambda one: (one.received, one.id)):  # the order they have when read again
            if item.id in self._entries:
                continue
            group = item.group
            # A clock that was set back must not make the newest group the oldest.
            self._newest = max(self._newest, item.received)
            question, rewards = question_id(group), group.rewards
            candidate = Candidate(item.id, item.peer, question, self._newest, first_round, rewards)
            self._remember(candidate, item.body)
            packed = array.array("d", rewards).tobytes()
            rows.append((item.id, item.peer, group.task.name, question, self._newest, first_round, packed, item.body))
        evicted = self._evict(now)
        if rows or evicted:
            with self.transaction():
                self._db.executemany("INSERT OR REPLACE INTO groups VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
                self._db.executemany("DELETE FROM groups WHERE id = ?", [(i,) for i in evicted])
                self._db.executemany("DELETE FROM buried WHERE id = ?", [(i,) for i in evicted])
        return len(rows)

    def candidates(self, now: float, round_number: int, max_uses: int) -> list[Candidate]:
        """Return what `round_number` may draw, in the order of their coming: at most one group of a question.

        Left out are groups that are buried, those over `max_age` or `max_age_rounds`, those that later rounds may draw
        first, and those whose question was used `max_uses` times. Age is counted from a group's coming: what a peer
        says of its own rounds or clock plays no part.
        """
        found = self._drawable
        if found is None or not found.serves(now, round_number, max_uses):
            found = self._drawable = _Drawable((entry.candidate for entry in self._entries.values()), max_uses)
        found.asked = now, round_number
        first, coming = found.first, found.coming
        oldest = now - self._bounds.max_age
        stay = self._bounds.max_age_rounds
        first_from = 0 if stay is None else round_number - stay
        for one in list(takewhile(lambda one: one.received < oldest or one.first_round < first_from, first.values())):
            self._withdraw(one)
        if self._drawable is not found:
            return self.candidates(now, round_number, max_uses)
        while coming and (coming[0].first_round <= round_number or not found.is_ordered):
            one = coming.popleft()
            is_ripe = first_from <= one.first_round <= round_number and one.received >= oldest
            is_free = one.id in self._entries and one.id not in self._buried and self._uses[one.question] < max_uses
            if is_ripe and is_free:
                first.setdefault(one.question, one)
        return list(first.values())

    def candidate(self, group_id: bytes) -> Candidate:
        """Return what there is to know of a group that is here."""
        return self._entries[group_id].candidate

    def read(self, ids: Iterable[bytes]) -> dict[bytes, Group]:
        """Return the groups with these ids, of those that are here; that is no use of them."""
        found = {group_id: self._entries[group_id].body for group_id in ids if group_id in self._entries}
        return {group_id: decode(body, len(body)) for group_id, body in found.items()}

    def use(self, ids: Iterable[bytes], round_number: int) -> None:
        """Record that `round_number` used the questions of these groups."""
        questions = [self._entries[group_id].candidate.question for group_id in dict.fromkeys(ids)]
        self._uses.update(questions)
        if self._drawable is not None:
            for question in questions:
                if self._uses[question] >= self._drawable.max_uses:
                    self._drawable.first.pop(question, None)
        if questions:
            with self.transaction():
                rows = [(question, round_number) for question in questions]
                self._db.executemany("INSERT INTO uses (question, round) VALUES (?, ?)", rows)
            self._forget_uses()

    def bury(self, ids: Collection[bytes], round_number: int) -> None:
        """Let nobody draw these groups any more, as `round_number` found out."""
        self._buried.update(ids)
        for group_id in ids:
            if group_id in self._entries:
                self._withdraw(self._entries[group_id].candidate)
        with self.transaction():
            self._db.executemany("INSERT OR IGNORE INTO buried VALUES (?, ?)", [(one, round_number) for one in ids])

    def lessons(self, before: int) -> list[Lesson]:
        """Return the newest rounds before round `before` that follow on each other and were measured."""
        return read_lessons(self._db, before)

    def learned(self, round_number: int, lesson: Lesson) -> None:
        """Record the probe's score before round `round_number`, and each peer's share of its pull."""
        pulls = [(round_number, peer, share) for peer, share in lesson.pulls.items()]
        with self.transaction():
            self._db.execute("INSERT OR REPLACE INTO probes VALUES (?, ?)", (round_number, lesson.score))
            self._db.execute("DELETE FROM pulls WHERE round = ?", (round_number,))
            self._db.executemany("INSERT INTO pulls VALUES (?, ?, ?)", pulls)
            self._db.execute("DELETE FROM probes WHERE round <= ?", (round_number - KEPT,))
            self._db.execute("DELETE FROM pulls WHERE round <= ?", (round_number - KEPT,))

    def made(self, round_number: int, lengths: Sequence[OwnLength]) -> OwnLengths:
        """Record the lengths of the groups that this node made in a round; return those of the last rounds too."""
        gone = self._own_lengths.put(round_number, lengths)
        with self.transaction():
            self._db.executemany("DELETE FROM own_lengths WHERE round = ?", [(number,) for number in gone])
            self._db.executemany("INSERT INTO own_lengths VALUES (?, ?, ?, ?)", [(round_number, *o) for o in lengths])
        return self._own_lengths

    def rewind(self, round_number: int) -> None:
        """Forget the uses, burials, lessons and own lengths of rounds after `round_number`."""
        with self.transaction():
            self._db.execute("DELETE FROM uses WHERE round > ?", (round_number,))
            self._db.execute("DELETE FROM buried WHERE round > ?", (round_number,))
            self._db.execute("DELETE FROM probes WHERE round > ?", (round_number,))
            self._db.execute("DELETE FROM pulls WHERE round > ?", (round_number,))
            self._db.execute("DELETE FROM own_lengths WHERE round > ?", (round_number,))
        self._load()

    def snapshot(self) -> Snapshot:
        """Return all that is here, bodies too."""
        groups = self._db.execute("SELECT id, peer, received, first_round, body FROM groups ORDER BY received, id")
        uses = self._db.execute("SELECT question, round FROM uses ORDER BY number")
        buried = self._db.execute("SELECT id, round FROM buried ORDER BY id")
        probes = self._db.execute("SELECT round, score FROM probes ORDER BY round")
        pulls = self._db.execute("SELECT round, peer, share FROM pulls ORDER BY rowid")
        lengths = self._db.execute("SELECT round, task, correct, made FROM own_lengths ORDER BY rowid")
        return Snapshot(*(rows.fetchall() for rows in (groups, uses, buried, probes, pulls, lengths)))

    def restore(self, snapshot: Snapshot) -> None:
        """Hold what `snapshot` does, and nothing else."""
        rows = []
        for group_id, peer, received, first_round, body in snapshot.groups:
            group = decode(body, len(body))
            packed = array.array("d", group.rewards).tobytes()
            rows.append((group_id, peer, group.task.name, question_id(group), received, first_round, packed, body))
        with self.transaction():
            self._db.execute("DELETE FROM groups")
            self._db.execute("DELETE FROM uses")
            self._db.execute("DELETE FROM buried")
            self._db.execute("DELETE FROM probes")
            self._db.execute("DELETE FROM pulls")
            self._db.execute("DELETE FROM own_lengths")
            self._db.executemany("INSERT INTO groups VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            self._db.executemany("INSERT INTO uses (question, round) VALUES (?, ?)", snapshot.uses)
            self._db.executemany("INSERT INTO buried VALUES (?, ?)", snapshot.buried)
            self._db.executemany("INSERT INTO probes VALUES (?, ?)", snapshot.probes)
            self._db.executemany("INSERT INTO pulls VALUES (?, ?, ?)", snapshot.pulls)
            self._db.executemany("INSERT INTO own_lengths VALUES (?, ?, ?, ?)", snapshot.own_lengths)
        self._load()

    def _forget_uses(self) -> None:
        """Keep the newest uses, as many as groups may be here: what a use keeps from being drawn is mostly gone."""
        old = self._db.execute(
            "SELECT number, question FROM uses WHERE number <= (SELECT MAX(number) FROM uses) - ?",
            (self._bounds.max_groups,),
        ).fetchall()
        for _, question in old:
            _take_one(self._uses, question)
            if question in self._questions:
                self._drawable = None
        self._db.executemany("DELETE FROM uses WHERE number = ?", [(number,) for number, _ in old])

    def _load(self) -> None:
        self._entries: dict[bytes, _Entry] = {}  # oldest first
        self._questions: Counter[bytes] = Counter()
        self._drawable = None
        self._bytes = 0
        self._peer_count: Counter[str] = Counter()
        self._peer_bytes: Counter[str] = Counter()
        self._uses = Counter(question for (question,) in self._db.execute("SELECT question FROM uses"))
        self._buried = {group_id for (group_id,) in self._db.execute("SELECT id FROM buried")}
        self._own_lengths = OwnLengths()
        own: dict[int, list[OwnLength]] = {}
        for number, *length in self._db.execute("SELECT round, task, correct, made FROM own_lengths ORDER BY rowid"):
            own.setdefault(number, []).append(OwnLength(*length))
        for number, lengths in own.items():
            self._own_lengths.put(number, lengths)
        rows = self._db.execute(
            "SELECT id, peer, question, received, first_round, rewards, body FROM groups ORDER BY received, id"
        )
        for group_id, peer, question, received, first_round, rewards, body in rows:
            self._newest = received
            unpacked = tuple(array.array("d", rewards))
            self._remember(Candidate(group_id, peer, question, received, first_round, unpacked), body)

    def _remember(self, candidate: Candidate, body: bytes) -> None:
        self._entries[candidate.id] = _Entry(candidate, body)
        self._questions[candidate.question] += 1
        if self._drawable is not None:
            self._drawable.came(candidate)
        self._bytes += len(body)
        self._peer_count[candidate.peer] += 1
        self._peer_bytes[candidate.peer] += len(body)

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

    def _withdraw(self, candidate: Candidate) -> None:
        """Let no round draw a group any more; where its question has another, that is found anew."""
        question = candidate.question
        if self._drawable is not None and self._drawable.first.get(question) is candidate:
            del self._drawable.first[question]
            if self._questions[question] > 1:
                self._drawable = None

    def _drop(self, group_id: bytes) -> bytes:
        entry = self._entries.pop(group_id)
        self._withdraw(entry.candidate)
        self._buried.discard(group_id)
        _take_one(self._questions, entry.candidate.question)
        peer = entry.candidate.peer
        self._bytes -= len(entry.body)
        self._peer_bytes[peer] -= len(entry.body)
        _take_one(self._peer_count, peer)
        if peer not in self._peer_count:
            del self._peer_bytes[peer]
        return group_id


def question_id(group: Group) -> bytes:
    """Return 16 bytes that name the question of `group`, whoever answers it: of a SHA-256 over task and seed."""
    text = "\x1f".join(map(str, (*group.task, group.seed)))
    return hashlib.sha256(text.encode()).digest()[:16]


def read_lessons(db: sqlite3.Connection, before: int) -> list[Lesson]:
    """Return the rounds of `ReplayBuffer.lessons` from a buffer's file."""
    scores = dict(db.execute("SELECT round, score FROM probes WHERE round < ?", (before,)))
    pulls: dict[int, dict[str, float]] = {}
    for number, peer, share in db.execute("SELECT round, peer, share FROM pulls ORDER BY rowid"):
        pulls.setdefault(number, {})[peer] = share
    first = before
    while first - 1 in scores:
        first -= 1
    return [Lesson(scores[number], pulls.get(number, {})) for number in range(first, before)]


def _take_one(counts: Counter[K], key: K) -> None:
    """Count one less of `key`, and forget it where none is left."""
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
