"""What a peer may cost us: token buckets for its traffic, and a score for its behaviour."""

from dataclasses import dataclass, field

from protocol.config import Limits

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


class TokenBucket:
    """Allows `rate` units a second on average and `burst` at once."""

    __slots__ = ("_burst", "_level", "_rate", "_updated")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._updated = now

    def take(self, amount: float, now: float) -> bool:
        """Take `amount` units if they are there; otherwise take none and return False."""
        self._level = min(self._burst, self._level + max(0.0, now - self._updated) * self._rate)
        self._updated = now
        if amount > self._level:
            return False
        self._level -= amount
        return True


class Allowance:
    """What one subject may send: messages and bytes."""

    __slots__ = ("_bytes", "_messages")

    def __init__(self, limits: Limits, now: float) -> None:
        self._messages = TokenBucket(limits.messages_per_second, limits.messages_burst, now)
        self._bytes = TokenBucket(limits.bytes_per_second, limits.bytes_burst, now)

    def take(self, size: int, now: float) -> bool:
        """Account for one message of `size` bytes; False: it is too much."""
        return self._messages.take(1, now) and self._bytes.take(size, now)


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
