"""Peer scores: a score for each peer's behaviour, its allowance, and the counts of what was refused."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from protocol.config import Instant, Limits
from protocol.events import Link
from protocol.identity import NodeId
from protocol.limits.rate_limits import Allowance
from protocol.lru import Recent

# The bytes that take as long to read and to act on as any message: 512 announced ids are 24 kB, and 5 ms.
MESSAGE_BYTES = 1 << 10
# Points that one offence costs. Nothing here can happen to an honest node on a working machine, except "replayed",
# "flood", "no_hello", "unasked_chunk" and "unanswered" in small numbers, and "stale" when clocks differ.
PENALTIES = {
    "oversized": 2.0,
    "malformed": 2.0,
    "forged": 4.0,
    "impostor": 4.0,
    "wrong_swarm": 2.0,
    "replayed": 0.2,
    "flood": 0.02,
    # A signature is checked before it is known that nobody there said hello. A link that was just lost may bring a few.
    "no_hello": 0.02,
    "stale": 0.1,
    "false_chunk": 2.0,
    # As large as a message gets. An answer that comes too late to be of use is no offence.
    "unasked_chunk": 0.01,
    # Items of topics that it was told we do not want: some may be on the way when we say so.
    "unwanted": 0.05,
    "unasked": 0.05,
    # Pushed beyond our demand. A burst brings a hundred of honest peers, until they are asked for announcements only.
    "over_demand": 0.005,
    # libzmq ends a connection for what breaks ZMTP or CURVE, and for a frame of twice the largest that there is.
    "framing": 2.0,
    "endless_message": 2.0,
    "false_manifest": 2.0,
    # More than its allowance of one thing, or later than it was asked: as a flood. A node that starts again and
    # again, or a swarm in which thousands do at once, gets there in small numbers.
    "too_many_asks": 0.02,
    "too_many_digests": 0.02,
    "too_many_hellos": 0.02,
    "too_many_lists": 0.02,
    "too_many_records": 0.02,
    "unasked_answer": 0.02,
    # It was asked for what it had announced, and talked on without an answer for seconds. A node whose line is full
    # says that it is busy; one that is blocked says nothing at all.
    "unanswered": 4.0,
    # It was asked for what it had announced, and does not have it: at some 4 GiB of others' items an hour, or a lie.
    "false_have": 0.1,
}
# Offences that the network does not pay for: its lines are full together, or its nodes publish together, and the points
# of a few would close it.
NODE_ALONE = frozenset({"unanswered", "over_demand"})
# Refusals that cost nobody score, and why.
FREE = {
    "backlog": "the heaviest is cut, and somebody has to be",
    "graylisted": "it is refused already, and pays no longer for more of it",
    "handshake_flood": "no key was proven, and a network has a rate of handshakes",
    "handshake_malformed": "no key was proven, and a network has a rate of handshakes",
    "handshake_unfinished": "no key was proven, and a network has a rate of handshakes",
    "inbox_full": "our own owner does not take what came",
    "internal": "a defect of ours",
    "no_room": "its large item waits until others are there",
    "other_version": "it is told so once, and is no offender",
    "outbox_full": "our own owner says too much",
    "prefix_flood": "the heaviest is cut, or a record is not read, for what its neighbours do as well",
    "prefix_refused": "it is refused already, and pays no longer for more of it",
    "queue_full": "it reads too slowly, and hears less",
    "revoked": "it is refused for as long as the list says so",
    "superseded": "its own newer connection takes its place",
    "too_many_connections": "the oldest that was never answered makes room",
}
REJECT_PENALTY = 1.0
THINNING = 8  # the part of a full board that is forgotten at a time


@dataclass(slots=True)
class _Standing:
    score: float
    updated: float
    points: dict[str, float] = field(default_factory=dict)  # by reason, since it was last refused; fading as well
    refusals: int = 0
    refused_until: float = float("-inf")


@dataclass(slots=True)
class ScoreBoard:
    """Scores of subjects (node ids, CURVE keys in hex of strangers; network prefixes), 0 at best.

    A score is halved every half-life. It belongs to the subject and not to a connection: hanging up
    does not clear it. A subject whose score falls below `limit` is refused for `first_refusal_s`, and
    each further time for twice as long as the last, up to `last_refusal_s`; as long as that without a
    refusal takes one doubling back, so that a bad hour of an honest peer does not follow it for months. Only
    offenders take up memory, at most `capacity`; beyond that the mildest eighth is forgotten, who is refused last, and
    of those whose refusal ends first: a score fades within hours, and a refusal lasts for up to a day. So whoever wants
    to be forgotten needs seven eighths of `capacity` others that are refused for longer.
    To find them is to look at all, and keys cost nothing: whoever has many must not make us do that each time.
    """

    limit: float
    half_life_s: float
    capacity: int
    first_refusal_s: float
    last_refusal_s: float
    _standings: dict[str, _Standing] = field(default_factory=dict)

    def score(self, subject: str, now: float) -> float:
        """Return the subject's score as of now, 0 for one without offences."""
        standing = self._standings.get(subject)
        if standing is None:
            return 0.0
        age = max(0.0, now - standing.updated)
        return float(standing.score * 0.5 ** (age / self.half_life_s))

    def penalise(self, subject: str, points: float, now: float, reason: str = "") -> str | None:
        """Take `points` off the subject's score; return what most were for if it is refused from now on, else None."""
        before = self.score(subject, now)
        score = before - points
        standing = self._standings.setdefault(subject, _Standing(score, now))
        left = before / standing.score if before else 0.0
        standing.points = {one: paid * left for one, paid in standing.points.items()}
        standing.score, standing.updated = score, now
        standing.points[reason] = standing.points.get(reason, 0.0) + points
        worst = None
        if score < self.limit and now >= standing.refused_until:
            worst = max(standing.points, key=standing.points.__getitem__)
            standing.points.clear()
            if standing.refusals:
                atoned = int((now - standing.refused_until) / self.last_refusal_s)
                standing.refusals = max(0, standing.refusals - atoned)
            delay = min(self.last_refusal_s, self.first_refusal_s * 2.0 ** min(standing.refusals, 32))
            standing.refusals += 1
            standing.refused_until = now + delay
        if len(self._standings) > self.capacity:
            kept = self.capacity - self.capacity // THINNING
            by_harm = sorted(
                self._standings,
                key=lambda name: (-max(now, self._standings[name].refused_until), self.score(name, now)),
            )
            for mild in by_harm[kept:]:
                del self._standings[mild]
        return worst

    def is_refused(self, subject: str, now: float) -> bool:
        """Tell whether nothing more is taken from the subject for now (it is graylisted)."""
        standing = self._standings.get(subject)
        return standing is not None and now < standing.refused_until


class Charge(NamedTuple):
    """The price of an offence and, if the offender is refused from now on, the main reason."""

    points: float
    refused_for: str | None = None


class PeerScores:
    """Counts every refusal by reason and makes the offender pay for it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._scores = ScoreBoard(
            limits.graylist_score,
            limits.score_half_life_s,
            limits.max_subjects,
            limits.first_refusal_s,
            limits.last_refusal_s,
        )
        self._allowances: Recent[bytes, Allowance] = Recent(self._limits.max_allowances)
        self.rejected: Counter[str] = Counter()

    def may_send(self, link: Link, size: int, now: Instant, *, is_content: bool = False) -> bool:
        """Account for a frame of `size` bytes on the link; False: its holder sends too much.

        One that is no item's content counts as a message for each begun `MESSAGE_BYTES`.
        """
        allowance = self._allowances.get(link.key)
        if allowance is None:
            allowance = Allowance(self._limits, now.steady)
            self._allowances.set(link.key, allowance)
        return allowance.take(size, now.steady, 1 if is_content else 1 + size // MESSAGE_BYTES)

    def score(self, subject: str, now: Instant) -> float:
        """Return the subject's score: 0 at best, refused for a while once it is below `Limits.graylist_score`."""
        return self._scores.score(subject, now.steady)

    def is_refused(self, subject: str, now: Instant) -> bool:
        """Tell whether the subject is graylisted."""
        return self._scores.is_refused(subject, now.steady)

    def offence(self, reason: str, subject: str | None, now: Instant, points: float | None = None) -> Charge:
        """Count one refusal; `subject` pays `points`, or what the reason costs."""
        self.rejected[reason] += 1
        points = PENALTIES.get(reason, 0.0) if points is None else points
        if subject is None or not points:
            return Charge(0.0)
        return Charge(points, self._scores.penalise(subject, points, now.steady, reason))


def subject_of(link: Link, node: NodeId | None) -> str:
    """Return the name under which a link's holder is scored: its node id once proven, its key before."""
    return node if node is not None else link.key.hex()
