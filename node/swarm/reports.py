"""Reports: what a node tells its swarm of itself, where the manifest asks for it. A codec, and when one is due.

    report = MessagePack [1, since (Unix s), agent, model, rounds, reward, held-out accuracy,
                          [[task, reward], ...], [[node id (20), groups], ...]]

The groups are those of peers that the node has trained on `since` then, by who signed them. Rewards are means over the
rounds since then; a task that none of them asked keeps its last mean. The accuracy is the last one. Rewards and
accuracies are millionths; one that is not known is nil. These are the metrics of `Display.BOARD` (node/metrics.py). All
of it is the node's own word: what it says of others counts for them (`node.board.standing`), and what it says of itself
counts for nothing. A newer version may append fields.

A report travels as an item under `REPORTS_TOPIC`, so it is signed and dated as any item is. One comes at the node's
first round, and then one in `ManifestLimits.reports_s` seconds. A receiver takes one report of each signer in half of
that time.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from node.metrics import METRICS
from protocol.errors import PeerError
from protocol.identity import NODE_ID_BYTES, NodeId, id_bytes, id_of_bytes
from protocol.lru import Recent
from protocol.wire.encoding import is_bytes, is_uint, pack, unpack
from protocol.wire.messages import TOPIC_BYTES

FORMAT = 1
REPORTS_TOPIC = hashlib.sha256(b"gossamer/reports/1").digest()[:TOPIC_BYTES]
MAX_BYTES = 4096
MAX_TEXT_BYTES = 128  # of a task's name, as in a manifest, and of a model's
MAX_TASKS = 16
MAX_TEACHERS = 48  # three times a node's links; with the tasks and all texts some 3.9 kB
MAX_GROUPS = 2**32 - 1
MAX_COUNT = 2**48  # rounds, or Unix seconds
SCALE = 1_000_000
MAX_VALUE = 1000 * SCALE
MAX_SIGNERS = 1 << 16  # whose last report is remembered, some 200 bytes each


class ReportError(PeerError):
    """A report that is not taken."""


class NodeReport(NamedTuple):
    """A node's report on itself.

    `taught_by` holds how many groups of whom it has trained on since `since`, Unix s, and rewards are means since then.
    """

    since: int
    agent: str
    model: str
    rounds: int
    reward: float | None
    accuracy: float | None
    rewards: Mapping[str, float]
    taught_by: Mapping[NodeId, int]


def encode(report: NodeReport) -> bytes:
    """Return a report as bytes: its first tasks by name, and the best teachers; texts are cut and made printable."""
    tasks = sorted(report.rewards.items())[:MAX_TASKS]
    teachers = sorted(report.taught_by.items(), key=lambda item: (-item[1], item[0]))[:MAX_TEACHERS]
    return pack(
        [
            FORMAT,
            report.since,
            _printable(report.agent),
            _printable(report.model),
            report.rounds,
            _millionths(report.reward),
            _millionths(report.accuracy),
            [[_printable(task), _millionths(reward)] for task, reward in tasks],
            [[id_bytes(node), min(groups, MAX_GROUPS)] for node, groups in teachers],
        ]
    )


def decode(body: bytes, signer: NodeId) -> NodeReport:
    """Return the report in `body`, which `signer` has signed.

    Raises:
        ReportError: reason "malformed" or "self_praise".
    """
    _check(len(body) <= MAX_BYTES, "size")
    fields = unpack(
        body, 9, error=ReportError, max_bytes=NODE_ID_BYTES, max_text=MAX_TEXT_BYTES, max_array=MAX_TEACHERS
    )
    form, since, agent, model, rounds, reward, accuracy, rewards, teachers = fields
    _check(form == FORMAT, "format")
    _check(is_uint(since, MAX_COUNT) and is_uint(rounds, MAX_COUNT), "integers")
    _check(_is_text(agent) and _is_text(model), "texts")
    _check(_is_list(rewards, MAX_TASKS) and _is_list(teachers, MAX_TEACHERS), "lists")
    by_task = dict(map(_task, rewards))
    taught = dict(map(_teacher, teachers))
    _check(len(by_task) == len(rewards) and len(taught) == len(teachers), "a name twice")
    if signer in taught:
        raise ReportError("self_praise", "a node learns nothing from itself")
    return NodeReport(since, agent, model, rounds, _value(reward), _value(accuracy), by_task, taught)


class ReportIntake:
    """Takes incoming reports: one of each signer in half of `every` seconds, by the times that it signed."""

    def __init__(self, every: float, last: Mapping[NodeId, float] = MappingProxyType({})) -> None:
        """Begin where `last` says when each signer last signed a report, Unix s."""
        self._gap = every / 2
        self._last: Recent[NodeId, float] = Recent(MAX_SIGNERS)
        for signer, time in last.items():
            self._last.set(signer, time)

    def take(self, body: bytes, signer: NodeId, time: float) -> NodeReport:
        """Return the report that `signer` signed at `time`, Unix s.

        Raises:
            ReportError: as `decode`, or reason "early_report", which is nobody's fault.
        """
        last = self._last.get(signer)
        if last is not None and time < last + self._gap:
            raise ReportError("early_report", "its node has reported a moment ago")
        report = decode(body, signer)
        self._last.set(signer, time)
        return report


@dataclass(slots=True)
class Reporter:
    """Sums a node's rounds into reports, one in `every` seconds; the first is due with the first round. Pure."""

    every: float
    agent: str
    _since: float | None = None
    _taught_by: Counter[NodeId] = field(default_factory=Counter)
    _rewards: dict[str, float] = field(default_factory=dict)  # by task, of the last period that asked it
    _sums: dict[str, tuple[float, int]] = field(default_factory=dict)  # of this period's rounds; under "" of all tasks
    _accuracy: float | None = None

    def after_round(self, row: Mapping[str, Any], model: str, now: float) -> bytes | None:
        """Take the row of a round of `model` that ended at `now`, Unix s; return a report if one is due."""
        taught_by = METRICS["swarm/taught_by"].found_in(row)
        self._taught_by.update({NodeId(node): groups for node, groups in taught_by.items()})
        whole = {"": row["reward"]} if row.get("reward") is not None else {}
        for task, reward in {**METRICS["rewards/*/mean"].found_in(row), **whole}.items():
            total, rounds = self._sums.get(task, (0.0, 0))
            self._sums[task] = total + reward, rounds + 1
        self._accuracy = row.get("eval/accuracy", self._accuracy)
        if self._since is not None and now < self._since + self.every:
            return None
        since = int(now if self._since is None else self._since)
        means = {task: total / rounds for task, (total, rounds) in self._sums.items()}
        reward = means.pop("", None)
        self._rewards |= means
        fields = (self.agent, model, row["round"], reward, self._accuracy)
        report = encode(NodeReport(since, *fields, self._rewards, self._taught_by))
        self._since = now
        self._taught_by.clear()
        self._sums.clear()
        return report


def reporter_of(reports_s: int, enabled: bool | str, agent: str) -> Reporter | None:
    """Return a node's reporter; None if its swarm has no reports, or `observe.enabled` forbids them.

    `reports_s` are the seconds between two reports of the swarm's manifest, 0 for none.
    """
    return Reporter(reports_s, agent) if reports_s and enabled is True else None


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise ReportError("malformed", what)


def _printable(text: str) -> str:
    kept = "".join(character if character.isprintable() else "?" for character in text)
    return kept.encode(errors="replace")[:MAX_TEXT_BYTES].decode(errors="ignore")


def _millionths(value: float | None) -> int | None:
    return None if value is None else round(SCALE * max(-1000.0, min(1000.0, value)))


def _value(number: object) -> float | None:
    if number is None:
        return None
    _check(isinstance(number, int) and not isinstance(number, bool) and abs(number) <= MAX_VALUE, "a reward")
    assert isinstance(number, int)
    return number / SCALE


def _is_text(text: object) -> bool:
    return isinstance(text, str) and len(text.encode()) <= MAX_TEXT_BYTES and text.isprintable()


def _is_list(items: object, most: int) -> bool:
    return isinstance(items, list) and len(items) <= most


def _task(pair: object) -> tuple[str, float]:
    _check(isinstance(pair, list) and len(pair) >= 2, "a task")
    assert isinstance(pair, list)
    _check(_is_text(pair[0]) and pair[1] is not None, "a task")
    return pair[0], _value(pair[1]) or 0.0


def _teacher(pair: object) -> tuple[NodeId, int]:
    _check(isinstance(pair, list) and len(pair) >= 2, "a teacher")
    assert isinstance(pair, list)
    _check(is_bytes(pair[0], NODE_ID_BYTES) and is_uint(pair[1], MAX_GROUPS) and pair[1] > 0, "a teacher")
    return id_of_bytes(pair[0]), pair[1]
