"""Peer scores: a score for each peer's behaviour, and the counts of what was refused."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from protocol.config import Instant
from protocol.identity import KEY_BYTES
from protocol.limits.limits import Limits
from protocol.lru import Recent

# Points that one offence costs. Nothing here can happen to an honest node on a working machine, except "flood",
# "no_hello" and "unanswered" in small numbers, and "stale" when clocks differ.
PENALTIES = {
    "oversized": 2.0,
    "malformed": 2.0,
    "forged": 4.0,
    "impostor": 4.0,
    "wrong_swarm": 2.0,
    "flood": 100.0,  # for each second of processor time that it would have cost (see `quotas`)
    # Each costs us the check of a signature. A link that was just lost may bring a few.
    "no_hello": 0.02,
    "stale": 0.1,
    "false_chunk": 2.0,
    # An item or a chunk that we did not ask the sender for, for each second of its price. An answer that comes late was
    # asked for.
    "unasked_item": 100.0,
    "unasked": 0.05,  # an outline
    # Items of topics that it was told we do not want: some may be on the way when we say so.
    "unwanted": 0.05,
    # libzmq ends a connection for what breaks ZMTP or CURVE, and for a frame of twice the largest that there is.
    "framing": 2.0,
    "endless_message": 2.0,
    "false_manifest": 2.0,
    # More of one thing than its allowance, or an answer that nobody waits for. A node that restarts again
    # and again gets there in small numbers, as do nodes of a swarm in which thousands start at once.
    "too_many_asks": 0.02,
    "too_many_hellos": 0.02,
    "unasked_answer": 0.02,
    # It was asked for what it had announced, and talked on without an answer for seconds. A node whose line is full
    # says that it is busy; one that is blocked says nothing at all.
    "unanswered": 4.0,
    # It was asked for what it had announced, and does not have it. It lies, or deletes items soon: it gets more than
    # some 4 GiB an hour.
    "false_have": 0.1,
}
# What only the node pays for, and not its network: nodes of one network have full lines at the same time, and the
# points of a few would shut out all.
NODE_ALONE = "unanswered"
REJECT_PENALTY = 1.0  # for an item that the node rejects


@dataclass(slots=True)
class _Offender:
    points: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # by reason, as of `updated`
    updated: float = 0.0
    refusals: int = 0
    refused_until: float = float("-inf")


class ScoreBoard:
    """Scores of subjects (node ids, or CURVE keys in hex of strangers), 0 at best.

    A score is minus the points of all offences, and is halved every half-life. It belongs to the subject and not to a
    connection: hanging up does not clear it. A subject whose score falls below `graylist_score` is refused for
    `first_refusal_s`, and each further time for twice as long, up to `last_refusal_s`. Each `last_refusal_s` without a
    refusal takes one doubling back, so that a bad hour of an honest peer does not follow it for months. Of more than
    `max_remembered` offenders, the one that offended longest ago is forgotten: an attacker with so many keys needs no
    old one.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._offenders: Recent[str, _Offender] = Recent(limits.max_remembered)

    def score(self, subject: str, now: float) -> float:
        """Return the subject's score as of now, 0 for one without offences."""
        offender = self._offenders.get(subject)
        return -sum(offender.points.values()) * self._left(offender, now) if offender is not None else 0.0

    def _left(self, offender: _Offender, now: float) -> float:
        return float(0.5 ** (max(0.0, now - offender.updated) / self._limits.score_half_life_s))

    def penalise(self, subject: str, points: float, now: float, reason: str = "") -> str | None:
        """Take `points` off the subject's score; return the main reason if it is refused from now on, else None."""
        limits, offender = self._limits, self._offenders.get(subject) or _Offender()
        self._offenders.set(subject, offender)
        left = self._left(offender, now)
        for point in offender.points:
            offender.points[point] *= left
        offender.points[reason] += points
        offender.updated = now
        if -sum(offender.points.values()) >= self._limits.graylist_score or now < offender.refused_until:
            return None
        if offender.refusals:
            atoned = int((now - offender.refused_until) / limits.last_refusal_s)
            offender.refusals = max(0, offender.refusals - atoned)
        delay = min(limits.last_refusal_s, limits.first_refusal_s * 2.0 ** min(offender.refusals, 32))
        offender.refusals += 1
        offender.refused_until = now + delay
        return max(offender.points, key=offender.points.__getitem__)

    def is_refused(self, subject: str, now: float) -> bool:
        """Tell whether nothing more is taken from the subject for now (it is graylisted)."""
        offender = self._offenders.get(subject)
        return offender is not None and now < offender.refused_until


class Charge(NamedTuple):
    """The price of an offence and, if the offender is refused from now on, the main reason."""

    points: float
    refused_for: str | None = None


class PeerScores:
    """Counts every refusal by reason, and makes the offender pay for it."""

    def __init__(self, limits: Limits) -> None:
        # Strangers' keys cost nothing: apart, they make no node forgotten.
        self._nodes, self._strangers = ScoreBoard(limits), ScoreBoard(limits)
        self.rejected: Counter[str] = Counter()

    def _board(self, subject: str) -> ScoreBoard:
        """Return where a node id is scored, or a key in hex."""
        return self._strangers if len(subject) == 2 * KEY_BYTES else self._nodes

    def score(self, subject: str, now: Instant) -> float:
        """Return the subject's score: 0 at best, refused for a while once it is below `Limits.graylist_score`."""
        return self._board(subject).score(subject, now.steady)

    def is_refused(self, subject: str, now: Instant) -> bool:
        """Tell whether the subject is graylisted."""
        return self._board(subject).is_refused(subject, now.steady)

    def offence(self, reason: str, subject: str | None, now: Instant, points: float | None = None) -> Charge:
        """Count one refusal; `subject` pays `points`, or what the reason costs."""
        self.rejected[reason] += 1
        points = PENALTIES.get(reason, 0.0) if points is None else points
        if subject is None or not points:
            return Charge(0.0)
        return Charge(points, self._board(subject).penalise(subject, points, now.steady, reason))
