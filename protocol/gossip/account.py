"""A peer's allowance: how much it may get from us, and push to us. It outlives the link, so dialling again renews
nothing.
"""

from protocol.config import Limits
from protocol.limits.rate_limits import TokenBucket

AGAIN_S = 600.0
AGAIN_BYTES = 1 << 10  # what giving something again counts for at least: to send a small one costs time, not bytes
# After we asked a peer to announce only: what it had pushed by then has left its queues.
PUSH_GRACE_S, PUSH_GRACE_BYTES = 10.0, 8 << 20


class Account:
    """An allowance of bytes, one more for what it was given before, and what it pushed since it was told not to."""

    def __init__(self, limits: Limits, now: float) -> None:
        self._all = TokenBucket(limits.bytes_per_second, limits.bytes_burst, now)
        # A peer that lost its memory asks for everything that we hold again; twice in ten minutes it has other holders.
        self._again = TokenBucket(limits.held_bytes / AGAIN_S, limits.held_bytes, now)
        self._declined = float("inf")  # when it was asked to announce only
        self._pushed_since = 0  # bytes

    def take(self, size: int, now: float, *, again: bool) -> bool:
        """Account for `size` bytes, which it may have had before (`again`); False: it is too much for now."""
        if again and not self._again.take(max(size, AGAIN_BYTES), now):
            return False
        return self._all.take(size, now)

    def linked(self, now: float) -> None:
        """Its link begins, and it may push until it is told otherwise, as it may have done ten minutes ago."""
        if now >= self._declined + AGAIN_S:
            self._declined, self._pushed_since = float("inf"), 0

    def told(self, announce_only: bool, now: float) -> None:
        """Note that it is told our interest."""
        if announce_only:
            self._declined = min(self._declined, now)
        else:
            self._declined, self._pushed_since = float("inf"), 0

    def pushed(self, size: int) -> None:
        """Note that it sent so many bytes that nobody asked for."""
        if self._declined < float("inf"):
            self._pushed_since += size

    def should_know(self, now: float) -> bool:
        """Tell whether a push from it is an offence by now."""
        return now >= self._declined + PUSH_GRACE_S and self._pushed_since > PUSH_GRACE_BYTES
