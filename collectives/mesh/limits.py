"""Limits on strangers: handshakes and links by address prefix, frames by link.

    not proven      a slot among MAX_UNPROVEN and MAX_UNPROVEN_OF_PREFIX, for at most `HANDSHAKE_S`; if all are taken, a
                    newcomer takes the oldest of the prefix that holds most, so idle connections keep nobody out
    proven          a link among MAX_STRANGERS and MAX_STRANGERS_OF_PREFIX, which it keeps for STRANGER_S at least;
                    small frames, read at the pace of `Pace`; no data stream, and so no thread and no buffer for pieces
    a member        frames of any size that a message may have, data streams, and its own window for early pieces

A prefix is the least that an attacker can rent (`protocol.limits`). Handshakes cost a key exchange and two
signatures, about 0.3 ms: their rate is bounded before any of that, and so is that of accepting what is then
closed. What is read too fast is not refused but read later, and TCP makes its sender wait.
"""

from collectives.agreement.message_codec import form_of
from collectives.agreement.messages import Apply, Beat, Goodbye, Pending, Propose, ViewNotice, Welcome
from collectives.mesh.sealing import TAG_BYTES
from protocol.limits.rate_limits import TokenBucket
from protocol.lru import Recent

MAX_UNPROVEN, MAX_UNPROVEN_OF_PREFIX = 256, 128  # a group's streams may all be dialled at once, from one machine
# In a closed group a stranger is one that may join, and there may be a whole other view of them. In an open one it is
# anybody: each link costs a notice and an answer a second or two, and, as it asks to be let in, tries to dial it.
MAX_STRANGERS, MAX_STRANGERS_OF_PREFIX = 64, 16
MAX_STRANGERS_WHO_MAY_JOIN = 256  # and of those whom an open group dials, because one that applied gave an address
MAX_LINKS_OUTSIDE = 512  # of a node in no view: the members of a full view, who dial it, and equally many strangers
STRANGER_S = 30.0  # a link's turn: until then an admission may be under way
# A group that comes from one place dials at once; one and what follows it costs about 1 ms, so 16 a second are 2 % of a
# core. Members on this machine dial all their streams at once, over Unix sockets that nobody else reaches.
PREFIX_HANDSHAKES_PER_S, PREFIX_HANDSHAKES_AT_ONCE, LOCAL_HANDSHAKES_AT_ONCE = 16.0, 64.0, 512.0
HANDSHAKES_PER_S, HANDSHAKES_AT_ONCE = 64.0, 1024.0
# A prefix's first few handshakes have another rate: if many prefixes below their own limits use up the first one, a
# newcomer still gets in. Each prefix has so many, and one more a minute; all together have as much again.
FIRST_HANDSHAKES, FIRST_HANDSHAKES_PER_S = 8.0, 1 / 60
# Accepting only to close costs 0.1 ms: after a few, nothing is accepted for a while, and all wait in the backlog.
REFUSED_AT_ONCE, REFUSED_PAUSE_S = 4, 0.05
MAX_PREFIXES = 4096
THIS_MACHINE = "this machine"  # the prefix of Unix sockets
# The largest of the messages that one who is no member has any use for.
_OF_STRANGERS = (Apply, Beat, Goodbye, Pending, Propose, ViewNotice, Welcome)
MAX_STRANGER_FRAME_BYTES = max(form_of(kind).bytes for kind in _OF_STRANGERS) + 1024 + TAG_BYTES  # 1 KiB: newer fields
MAX_STRANGER_UNSENT_BYTES = 1 << 20
STRANGER_READ_BYTES = 4096
# An applicant says four things a second, and its whole view when it comes: that is 22 reads.
READS_PER_S, READS_AT_ONCE = 10.0, 40.0


class Pace:
    """How fast one who is no member is read: so many reads, or frames, a second."""

    __slots__ = ("_level", "_updated")

    def __init__(self) -> None:
        self._level = READS_AT_ONCE
        self._updated = 0.0

    def spend(self, frames: int, now: float) -> float:
        """Account for a read that brought so many frames; return when there may be another one."""
        self._level = min(READS_AT_ONCE, self._level + (now - self._updated) * READS_PER_S) - max(1, frames)
        self._updated = now
        return now - min(0.0, self._level) / READS_PER_S


class HandshakeRates:
    """How many handshakes may begin."""

    def __init__(self, now: float) -> None:
        self._all = TokenBucket(HANDSHAKES_PER_S, HANDSHAKES_AT_ONCE, now)
        self._first = TokenBucket(HANDSHAKES_PER_S, HANDSHAKES_AT_ONCE, now)
        self._prefixes: Recent[str, tuple[TokenBucket, TokenBucket]] = Recent(MAX_PREFIXES)  # its own; its first few

    def take(self, prefix: str, now: float) -> bool:
        """Account for one from `prefix`; False: it is one too many."""
        buckets = self._prefixes.get(prefix)
        if buckets is None:
            burst = LOCAL_HANDSHAKES_AT_ONCE if prefix == THIS_MACHINE else PREFIX_HANDSHAKES_AT_ONCE
            first = TokenBucket(FIRST_HANDSHAKES_PER_S, FIRST_HANDSHAKES, now)
            buckets = TokenBucket(PREFIX_HANDSHAKES_PER_S, burst, now), first
        self._prefixes.set(prefix, buckets)
        own, first = buckets
        return own.take(1, now) and ((first.take(1, now) and self._first.take(1, now)) or self._all.take(1, now))
