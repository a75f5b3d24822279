"""Token buckets: what a peer, and the network prefix that it speaks from, may cost us.

The table of prefixes is bounded; the one that was silent for longest is forgotten first.
"""

from collections.abc import Hashable
from typing import TypeVar

from protocol.config import Limits
from protocol.lru import Recent

K = TypeVar("K", bound=Hashable)


class TokenBucket:
    """Allows `rate` units a second on average and `burst` at once. `now` is a steady clock, in seconds."""

    __slots__ = ("_burst", "_level", "_rate", "_updated")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._updated = now

    def take(self, amount: float, now: float) -> bool:
        """Take `amount` units if they are there; otherwise take none and return False."""
        if amount > self.level(now):
            return False
        self._level -= amount
        return True

    def level(self, now: float) -> float:
        self._level = min(self._burst, self._level + max(0.0, now - self._updated) * self._rate)
        self._updated = now
        return self._level

    def spend(self, amount: float) -> None:
        """Take units, also such as are not there yet; less than 0 gives some back."""
        self._level = min(self._burst, self._level - amount)


class Allowance:
    """The rate of one subject: messages and bytes."""

    __slots__ = ("_bytes", "_messages")

    def __init__(self, limits: Limits, now: float) -> None:
        self._messages = TokenBucket(limits.messages_per_second, limits.messages_burst, now)
        self._bytes = TokenBucket(limits.bytes_per_second, limits.bytes_burst, now)

    def take(self, size: int, now: float, messages: int = 1) -> bool:
        """Account for `size` bytes that count as so many messages; False: it is too much."""
        return self._messages.take(messages, now) and self._bytes.take(size, now)


class Prefixes:
    """Token buckets of each prefix. `now` is a steady clock in seconds."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._handshakes: Recent[str, TokenBucket] = Recent(self._limits.max_prefixes)
        self._messages: Recent[tuple[str, bool], TokenBucket] = Recent(2 * self._limits.max_prefixes)
        self._bytes: Recent[tuple[str, bool], TokenBucket] = Recent(2 * self._limits.max_prefixes)

    def may_connect(self, prefix: str, now: float) -> bool:
        """Account for one handshake; False: there are too many of them."""
        limits = self._limits
        return self._take(
            self._handshakes, prefix, limits.prefix_handshakes_per_second, limits.prefix_handshakes_burst, 1, now
        )

    def may_send(self, prefix: str, messages: int, size: int, now: float, *, answered: bool) -> bool:
        """Account for `messages` messages and `size` bytes from the prefix; False: that is too much.

        Connections that we `answered` are counted apart from the others.
        """
        limits, whose = self._limits, (prefix, answered)
        few = self._take(
            self._messages, whose, limits.prefix_messages_per_second, limits.prefix_messages_burst, messages, now
        )
        small = self._take(self._bytes, whose, limits.prefix_bytes_per_second, limits.prefix_bytes_burst, size, now)
        return few and small

    def _take(
        self, table: Recent[K, TokenBucket], whose: K, rate: float, burst: float, amount: float, now: float
    ) -> bool:
        bucket = table.get(whose)
        if bucket is None:
            bucket = TokenBucket(rate, burst, now)
        table.set(whose, bucket)
        return bucket.take(amount, now)
