"""Who may still speak: a score for each peer's behaviour, its allowance, and the counts of what was refused."""

from collections import Counter
from dataclasses import dataclass, field

from protocol.config import Instant, Limits
from protocol.events import Link
from protocol.identity import NodeId
from protocol.limits.rate_limits import Allowance
from protocol.lru import Recent

MAX_ALLOWANCES = 1024
# Points that one offence costs. Nothing here can happen to an honest node on a working machine,
# except "replayed" and "flood" in small numbers and "stale" when clocks differ.
PENALTIES = {
    "oversized": 2.0,
    "malformed": 2.0,
    "forged": 4.0,
    "impostor": 4.0,
    "wrong_swarm": 2.0,
    "replayed": 0.2,
    "flood": 0.02,
    "stale": 0.1,
    # Items of topics that it was told we do not want, or pushed long after we asked for announcements: some
    # may be on the way when we say so.
    "unwanted": 0.05,
    "unasked": 0.05,
    # Eight items announced, asked for and never delivered while the peer talked on, at a lie each: three
    # times within ten minutes get it refused. An honest node whose line is full for once pays for one.
    "broken_promise": 8.0,
}
REJECT_PENALTY = 1.0


@dataclass(slots=True)
class _Standing:
    score: float
    updated: float


@dataclass(slots=True)
class ScoreBoard:
    """Scores of subjects (node ids, and CURVE keys in hex of strangers), 0 at best, halved every half-life.

    A score belongs to the subject and not to a connection: hanging up does not clear it.
    Only offenders take up memory, at most `max_subjects`; the mildest is forgotten first.
    """

    limits: Limits
    _standings: dict[str, _Standing] = field(default_factory=dict)

    def score(self, subject: str, now: float) -> float:
        """Return the subject's score as of now, 0 for one without offences."""
        standing = self._standings.get(subject)
        if standing is None:
            return 0.0
        age = max(0.0, now - standing.updated)
        return float(standing.score * 0.5 ** (age / self.limits.score_half_life_s))

    def penalise(self, subject: str, points: float, now: float) -> None:
        """Take `points` off the subject's score."""
        self._standings[subject] = _Standing(self.score(subject, now) - points, now)
        if len(self._standings) > self.limits.max_subjects:
            mildest = max(self._standings, key=lambda name: self.score(name, now))
            del self._standings[mildest]

    def is_refused(self, subject: str, now: float) -> bool:
        """Tell whether nothing more is taken from the subject for now (it is graylisted)."""
        return subject in self._standings and self.score(subject, now) < self.limits.graylist_score


class Admission:
    """Counts every refusal by reason and makes the offender pay for it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._scores = ScoreBoard(limits)
        self._allowances: Recent[bytes, Allowance] = Recent(MAX_ALLOWANCES)
        self.rejected: Counter[str] = Counter()

    def may_send(self, link: Link, size: int, now: Instant) -> bool:
        """Account for a frame of `size` bytes on the link; False: its holder sends too much."""
        allowance = self._allowances.get(link.key)
        if allowance is None:
            allowance = Allowance(self._limits, now.steady)
            self._allowances.set(link.key, allowance)
        return allowance.take(size, now.steady)

    def is_refused(self, subject: str, now: Instant) -> bool:
        """Tell whether the subject is graylisted."""
        return self._scores.is_refused(subject, now.steady)

    def offence(self, reason: str, subject: str | None, now: Instant, points: float | None = None) -> None:
        """Count one refusal; `subject` pays `points`, or what the reason costs."""
        self.rejected[reason] += 1
        points = PENALTIES.get(reason, 0.0) if points is None else points
        if subject is not None and points:
            self._scores.penalise(subject, points, now.steady)


def subject_of(link: Link, node: NodeId | None) -> str:
    """Return the name under which a link's holder is scored: its node id once proven, its key before."""
    return node if node is not None else link.key.hex()
