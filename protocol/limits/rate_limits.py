"""What a peer may cost us: token buckets for its traffic, and a score for its behaviour.

The defaults are far above what an honest node sends (8 nodes x 16 groups of 10 kB a second,
all relayed over one link, are 128 messages and 1.3 MB a second) and exist to stop a broken
or hostile one, whom nobody knows.
"""

from dataclasses import dataclass, field

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of a node; every one of them is a bound on memory, bandwidth or patience."""

    # Live links. A random overlay of degree 8 stays whole when 30 % of its nodes die at once, and has a diameter
    # of about log(n)/log(7): 5 at 10,000. A third more is room for those who dial us.
    max_peers: int = 12
    max_known_peers: int = 512  # records in the book: a full directory up to that size, a random sample beyond

    inbox_items: int = 4096  # received and not yet fetched by the node
    inbox_bytes: int = 64 * MIB
    held_bytes: int = 32 * MIB  # items kept for peers that still lack them

    # Four times the traffic above in messages: at 0.2 ms each they cost a tenth of a core, twice
    # that with a reply to each. In bytes, enough to answer a newcomer's pulls of 1 MiB items. The
    # bursts cover a peer that was blocked for 8 s.
    messages_per_second: float = 500.0
    messages_burst: float = 4000.0
    bytes_per_second: float = 64.0 * MIB
    bytes_burst: float = 512.0 * MIB

    # TCP connections, inbound: a live link each, and strangers that ask, probe or leave. One costs
    # two file descriptors and about 50 kB in libzmq. A prefix may have a quarter of them: 64 nodes
    # on one machine, or in one building behind one address, each with a link and its replacement.
    max_connections: int = 512
    max_prefix_connections: int = 128
    # A CURVE handshake costs about half a millisecond of CPU: 32 a second are under 2 % of a core.
    # The burst lets those 64 nodes start at once and dial again a few times.
    prefix_handshakes_per_second: float = 32.0
    prefix_handshakes_burst: float = 512.0
    # Four peers of one prefix, each at its own full allowance: a new key is a new peer, and costs nothing.
    prefix_messages_per_second: float = 2000.0
    prefix_messages_burst: float = 16000.0
    prefix_bytes_per_second: float = 256.0 * MIB
    prefix_bytes_burst: float = 2048.0 * MIB
    # Received and not yet read, over all connections: twice what 12 links bring at the most of 8 MiB
    # each that we asked them for. The socket queues are bounded in messages only.
    max_backlog_bytes: int = 192 * MIB

    max_item_age_s: float = 3600.0  # older items are of no use to an on-policy learner
    max_clock_ahead_s: float = 600.0  # tolerates clocks off by minutes

    # A subject is refused below this score. At one point a lie (see PENALTIES) and a half-life
    # of 10 minutes, 20 lies at once or 1.4 lies a minute for good get a node refused.
    graylist_score: float = -20.0
    score_half_life_s: float = 600.0
    max_subjects: int = 4096


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
