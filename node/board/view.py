"""A board at one moment, as plain values: the pages, the JSON and the CSV are all made from a `BoardView`.

Rollouts are kept in memory, those of the last minutes: of each signer the newest few. A board loads no task, so right
and wrong are what their maker says.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from node.board.history import CurvePoint, Remembered
from node.rollouts.group import Episode, Group
from node.rollouts.rule import is_right
from node.telemetry.names import short_name
from protocol.credentials.manifest import SwarmManifest

ROLLOUTS_S = 15 * 60  # how long a rollout is shown
MAX_ROLLOUTS = 40
MAX_SIGNERS_SHOWN = 256  # whose rollouts are kept
ROLLOUTS_EACH = 3
MAX_TEXT = 600  # characters of a question, or of an answer's texts together


class ShownAnswer(NamedTuple):
    """A model's answer to a question, and the reward that its maker claims.

    In an episode of several turns, `before` are the policy's and its environment's texts before the last one.
    """

    text: str
    reward: float
    finished: bool
    before: Sequence[str] = ()

    @property
    def texts(self) -> list[str]:
        """All texts in turn, the policy's first and last."""
        return [*self.before, self.text]

    @property
    def is_right(self) -> bool:
        """Whether it earned all there is."""
        return is_right(self.reward)


class ShownRollout(NamedTuple):
    """A shared group, cut to what a person looks at: its best and its worst answer."""

    at: float
    node: str
    model: str
    task: str
    question: str
    answers: Sequence[ShownAnswer]

    @property
    def name(self) -> str:
        """The short name of who made it."""
        return short_name(self.node)


class Lesson(NamedTuple):
    """How many groups of `teacher` a node reports to have trained on; older ones count less.

    `weight` is their share of all that the learner reports, times its standing, or 1 where it is a seed: 0 of a node
    whose word counts for nothing.
    """

    teacher: str
    learner: str
    groups: float
    weight: float


class ShownSwarm(NamedTuple):
    """The constants of a swarm: its manifest, and the line by which others join it ("" if that is no secret)."""

    name: str
    id: str
    founder: str
    policy: str
    created: float
    tasks: Sequence[tuple[str, int]]
    reports_s: int
    invite: str

    @classmethod
    def of(cls, manifest: SwarmManifest, invite: str = "") -> "ShownSwarm":
        """Return what a manifest says."""
        return cls(
            manifest.name,
            manifest.swarm.hex(),
            manifest.founder,
            str(manifest.policy),
            manifest.created_ms / 1000,
            [(task.name, task.version) for task in manifest.tasks],
            manifest.limits.reports_s,
            invite,
        )


class BoardView(NamedTuple):
    """All that is shown at Unix time `at`: `here` are the ids of nodes that reported in the `lately` seconds before.

    If `is_alike`, no seed has reported, and all nodes count as if they were seeds.
    """

    swarm: ShownSwarm
    at: float
    lately: float
    nodes: Sequence[Remembered]
    here: frozenset[str]
    seeds: frozenset[str]
    is_alike: bool
    lessons: Sequence[Lesson]
    curve: Sequence[CurvePoint]
    rollouts: Sequence[ShownRollout]

    def tree(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        return {
            "swarm": self.swarm._asdict(),
            "time": self.at,
            "nodes": [self.node_tree(node) for node in self.nodes],
            "history": [point._asdict() for point in self.curve],
            "rollouts": [
                rollout._asdict() | {"answers": [answer._asdict() for answer in rollout.answers]}
                for rollout in self.rollouts
            ],
        }

    def node_tree(self, node: Remembered) -> dict[str, Any]:
        """Return one node as JSON has it: what it says of itself stands apart."""
        return {
            "id": node.id,
            "name": short_name(node.id),
            "here": node.id in self.here,
            "seed": node.id in self.seeds,
            "standing": node.standing,
            "first_report": node.first,
            "last_report": node.last,
            "taught_by": dict(node.taught_by),
            "says_of_itself": {
                "model": node.model,
                "agent": node.agent,
                "rounds": node.rounds,
                "reward": node.reward,
                "accuracy": node.accuracy,
                "rewards": dict(node.rewards),
            },
        }


class Rollouts:
    """The newest groups of each signer, in memory. For one thread.

    Identities that somebody makes up push out nobody of `trusted`: nodes of some standing, and seeds.
    """

    def __init__(self) -> None:
        self.trusted: frozenset[str] = frozenset()
        self._of: OrderedDict[str, deque[ShownRollout]] = OrderedDict()

    def add(self, node: str, group: Group, now: float) -> None:
        """Keep a group that `node` signed and that came at `now`, Unix s."""
        ranked = sorted(group.completions, key=lambda completion: -completion.reward)
        kept = ranked[:1] if ranked[0].reward == ranked[-1].reward else [ranked[0], ranked[-1]]
        answers = [_answer(episode) for episode in kept]
        rollout = ShownRollout(now, node, _cut(group.policy), _cut(group.task.name), _cut(group.question), answers)
        self._of.setdefault(node, deque(maxlen=ROLLOUTS_EACH)).append(rollout)
        self._of.move_to_end(node)
        if len(self._of) > MAX_SIGNERS_SHOWN:
            oldest = next((signer for signer in self._of if signer not in self.trusted), next(iter(self._of)))
            del self._of[oldest]

    def newest(self, now: float) -> list[ShownRollout]:
        """Return rollouts of the last minutes: first the newest of each signer, then their second, and so on.

        Those of trusted signers come before all others.
        """
        fresh = [
            (rollout.node not in self.trusted, place, -rollout.at, rollout)
            for kept in self._of.values()
            for place, rollout in enumerate(reversed(kept))
            if rollout.at > now - ROLLOUTS_S
        ]
        return [rollout for *_, rollout in sorted(fresh, key=lambda entry: entry[:3])[:MAX_ROLLOUTS]]


def lessons_of(nodes: Sequence[Remembered], seeds: Collection[str]) -> list[Lesson]:
    """Return who taught whom: first what counts most, then what most is said of."""
    lessons = [
        Lesson(teacher, node.id, groups, groups / whole * (1.0 if node.id in seeds else node.standing))
        for node in nodes
        if (whole := sum(node.taught_by.values())) > 0
        for teacher, groups in node.taught_by.items()
    ]
    return sorted(lessons, key=lambda lesson: (-lesson.weight, -lesson.groups, lesson.teacher, lesson.learner))


def rewards_by_task(nodes: Sequence[Remembered]) -> Mapping[str, list[tuple[float, float]]]:
    """Return (reward, standing) of each node that has reported one, by task."""
    rewards: dict[str, list[tuple[float, float]]] = {}
    for node in nodes:
        for task, reward in node.rewards.items():
            rewards.setdefault(task, []).append((reward, node.standing))
    return rewards


def moment(at: float) -> str:
    """Return Unix seconds as a person reads them, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))


def day(at: float) -> str:
    """Return the day of Unix seconds, in UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime(at))


def ago(seconds: float) -> str:
    """Return how long ago something was, in its largest unit."""
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"


def _answer(episode: Episode) -> ShownAnswer:
    *before, text = (_cut(part, MAX_TEXT // len(episode.texts)) for part in episode.texts)
    return ShownAnswer(text, episode.reward, episode.finished, before)


def _cut(text: str, most: int = MAX_TEXT) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
