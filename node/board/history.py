"""A board's memory: each node's last report, and curves that get thinner with age, in one SQLite file.

nodes    a row a node: its last report, when the board first and last heard one, whom it learned from, its standing
points   a node's curve, or the swarm's under the name "": points a minute, an hour and a day apart
seeds    nodes that a person named

Bounds
 1. `MAX_NODES` nodes. Beyond them those go that were silent for longest, first those that have no standing and are no
    seeds: whoever makes up thousands of identities pushes out no one who taught somebody, and no one whose word counts.
 2. Points a minute apart are kept for the last hour and the one in progress, an hour apart for a week, a day apart for
    ten years. One an hour or a day apart is the mean of what was seen in it.
 3. Of whom a node learned from, the last reports count most: what is `HALF_LIFE_S` older counts half.

The swarm's reward and accuracy are medians over nodes that reported lately, weighted by standing, so that liars whom
nobody learns from do not move them. While no one has standing, all count alike.

WAL with NORMAL synchronisation keeps the file through kill -9. Times are Unix seconds. Any thread may call a method.
"""

import json
import sqlite3
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Self

from node.board.standing import standing, weighted_median
from node.swarm.reports import MAX_TEACHERS, NodeReport

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 24 * 3600
KEPT_S = {MINUTE_S: HOUR_S, HOUR_S: 7 * DAY_S, DAY_S: 3650 * DAY_S}
COARSER = {
    MINUTE_S: HOUR_S,
    HOUR_S: DAY_S,
    DAY_S: DAY_S,
}  # old points are deleted by whole steps of these, whose coarser point stays
MAX_NODES = 2048
HALF_LIFE_S = DAY_S
LEAST_GROUPS = 0.01  # fewer are forgotten
SWARM = ""  # the swarm's own curve
_SCHEMA = """
CREATE TABLE IF NOT EXISTS nodes (
    id TEXT PRIMARY KEY, first REAL NOT NULL, last REAL NOT NULL, agent TEXT NOT NULL, model TEXT NOT NULL,
    rounds INTEGER NOT NULL, reward REAL, accuracy REAL, rewards TEXT NOT NULL, taught_by TEXT NOT NULL,
    standing REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS points (
    node TEXT NOT NULL, step INTEGER NOT NULL, at INTEGER NOT NULL,
    seen INTEGER NOT NULL, nodes REAL NOT NULL, reward REAL, accuracy REAL, PRIMARY KEY (node, step, at)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seeds (id TEXT PRIMARY KEY) WITHOUT ROWID;
"""
_ADD_POINT = """
INSERT INTO points VALUES (?, ?, ?, 1, ?, ?, ?) ON CONFLICT DO UPDATE SET
    seen = seen + 1,
    nodes = nodes + (excluded.nodes - nodes) / (seen + 1),
    reward = coalesce(reward + (excluded.reward - reward) / (seen + 1), excluded.reward, reward),
    accuracy = coalesce(accuracy + (excluded.accuracy - accuracy) / (seen + 1), excluded.accuracy, accuracy)
"""


class Remembered(NamedTuple):
    """A node: when its reports came first and last, what the last one said, and what it is worth by what others say.

    `rewards` are by task; `taught_by` holds groups by who signed them, faded by their age.
    """

    id: str
    first: float
    last: float
    agent: str
    model: str
    rounds: int
    reward: float | None
    accuracy: float | None
    rewards: Mapping[str, float]
    taught_by: Mapping[str, float]
    standing: float


class CurvePoint(NamedTuple):
    """One point of a curve: the `step` seconds from `at` on, how many nodes reported, and what."""

    at: int
    step: int
    nodes: float
    reward: float | None
    accuracy: float | None


class BoardHistory:
    """Open or make the history at `path`; a context manager that closes it.

    Args:
        path: of the file.
        lately: seconds for which a node counts as here after its last report.
        max_nodes: that are remembered.

    Raises:
        sqlite3.Error: the file is damaged or cannot be written.
    """

    def __init__(self, path: Path, lately: float, max_nodes: int = MAX_NODES) -> None:
        self.lately = lately
        self._max_nodes = max_nodes
        self._roots: frozenset[str] = frozenset()  # the seeds as of the last tick
        self._lock = Lock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(_SCHEMA)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def add(self, node: str, report: NodeReport, now: float) -> None:
        """Take a node's report, which is of `now`."""
        with self._lock, self._db:
            self._db.execute("BEGIN")
            before = self._db.execute("SELECT first, last, taught_by, standing FROM nodes WHERE id = ?", (node,))
            first, last, taught, stands = before.fetchone() or (now, now, "{}", 0.0)
            faded = _faded(json.loads(taught), report.taught_by, 0.5 ** (max(0.0, now - last) / HALF_LIFE_S))
            values = (report.agent, report.model, report.rounds, report.reward, report.accuracy)
            texts = json.dumps(dict(report.rewards)), json.dumps(faded)
            row = (node, first, now, *values, *texts, stands)
            self._db.execute("INSERT OR REPLACE INTO nodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            self._add_point(node, now, 1, report.reward, report.accuracy)
            self._make_room()

    def tick(self, now: float, seeds: Collection[str]) -> None:
        """Once a minute: work out each node's standing, add a point to the swarm's curve, and let old points go."""
        nodes, self._roots = self.nodes(), frozenset(seeds)
        stands = standing({node.id: node.taught_by for node in nodes}, sorted(seeds))
        present = [node for node in nodes if node.last > now - self.lately]
        weights = {node.id: stands.get(node.id, 0.0) for node in present}
        reward = weighted_median([(node.reward, weights[node.id]) for node in present if node.reward is not None])
        accuracy = weighted_median([(node.accuracy, weights[node.id]) for node in present if node.accuracy is not None])
        with self._lock, self._db:
            self._db.execute("BEGIN")
            self._db.executemany(
                "UPDATE nodes SET standing = ? WHERE id = ?", [(stands.get(node.id, 0.0), node.id) for node in nodes]
            )
            self._add_point(SWARM, now, len(present), reward, accuracy)
            old = [(step, _begin_of(now - kept, COARSER[step])) for step, kept in KEPT_S.items()]
            self._db.executemany("DELETE FROM points WHERE step = ? AND at < ?", old)

    def name_seeds(self, nodes: Iterable[str]) -> None:
        """Remember further nodes whose reports count from the start."""
        with self._lock, self._db:
            self._db.executemany("INSERT OR IGNORE INTO seeds VALUES (?)", [(node,) for node in nodes])

    def seeds(self) -> set[str]:
        """Return the nodes that `name_seeds` named, ever."""
        with self._lock:
            return {node for (node,) in self._db.execute("SELECT id FROM seeds").fetchall()}

    def nodes(self) -> list[Remembered]:
        """Return all nodes, those of the best standing first, then those that reported last."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM nodes ORDER BY standing DESC, last DESC, id").fetchall()
        return [Remembered._make((*row[:8], json.loads(row[8]), json.loads(row[9]), row[10])) for row in rows]

    def curve(self, node: str = SWARM) -> list[CurvePoint]:
        """Return a node's curve, or the swarm's, oldest first: of each time the points that lie closest."""
        with self._lock:
            rows = self._db.execute(
                "SELECT at, step, nodes, reward, accuracy FROM points WHERE node = ? ORDER BY step, at", (node,)
            ).fetchall()
        curve: list[CurvePoint] = []
        for step in KEPT_S:
            oldest = curve[0].at if curve else float("inf")
            curve = [
                point for point in map(CurvePoint._make, rows) if point.step == step and point.at + step <= oldest
            ] + curve
        return curve

    def _add_point(self, name: str, now: float, nodes: int, reward: float | None, accuracy: float | None) -> None:
        points = [(name, step, _begin_of(now, step), nodes, reward, accuracy) for step in KEPT_S]
        self._db.executemany(_ADD_POINT, points)

    def _make_room(self) -> None:
        (count,) = self._db.execute("SELECT count(*) FROM nodes").fetchone()
        if count <= self._max_nodes:
            return
        roots = ", ".join("?" * len(self._roots))
        least = f"SELECT id FROM nodes ORDER BY standing > 0 OR id IN ({roots}), last, id LIMIT ?"  # noqa: S608
        for (node,) in self._db.execute(least, (*self._roots, count - self._max_nodes)).fetchall():
            self._db.execute("DELETE FROM nodes WHERE id = ?", (node,))
            self._db.execute("DELETE FROM points WHERE node = ?", (node,))


def _begin_of(now: float, step: int) -> int:
    return int(now - now % step)


def _faded(before: Mapping[str, float], now: Mapping[Any, int], factor: float) -> dict[str, float]:
    """Return both sums together, the earlier one times `factor`; those who taught most, as many as a report names."""
    both = {teacher: factor * before.get(teacher, 0.0) + now.get(teacher, 0.0) for teacher in {**before, **now}}
    most = sorted(both.items(), key=lambda item: (-item[1], item[0]))[:MAX_TEACHERS]
    return {node: groups for node, groups in most if groups >= LEAST_GROUPS}
