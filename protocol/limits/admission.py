"""Who may still speak: allowances of each link, scores of each node, and the counts of what was refused."""

from collections import Counter

from protocol.config import Instant, Limits
from protocol.identity import NodeId
from protocol.limits.rate_limits import PENALTIES, Allowance, ScoreBoard
from protocol.lru import Recent
from protocol.transport import Link

MAX_ALLOWANCES = 1024


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
