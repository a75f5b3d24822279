"""Limits on strangers: handshakes by address prefix. Who has completed one has the secret, or may join.

    not proven      a slot among MAX_UNPROVEN and MAX_UNPROVEN_OF_PREFIX, for at most `HANDSHAKE_S`; if all are taken, a
                    newcomer takes the oldest of the prefix that holds most, so idle connections keep nobody out
    proven          a link among MAX_LINKS; no data stream, and so no thread and no buffer for pieces
    a member        data streams, and its own window for early pieces

A prefix is the least that an attacker can rent (`protocol.limits`). Handshakes cost a key exchange and two
signatures, about 0.3 ms: their rate is bounded before any of that, and so is that of accepting what is then
closed.
"""

from protocol.limits.rate_limits import TokenBucket
from protocol.lru import Recent

MAX_UNPROVEN, MAX_UNPROVEN_OF_PREFIX = 256, 128  # a group's streams may all be dialled at once, from one machine
MAX_LINKS = 512  # with those who are no members: a whole other view, and equally many who ask to be let in
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
