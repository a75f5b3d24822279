"""Token buckets: one by itself, or one for each of many subjects."""

from collections.abc import Hashable
from typing import Generic, TypeVar

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
        """Take units, even if they are not there yet. A negative amount gives units back."""
        self._level = min(self._burst, self._level - amount)


class TokenBuckets(Generic[K]):
    """A token bucket for each subject. Of more than `capacity`, the one that was asked for longest ago is forgotten."""

    def __init__(self, rate: float, burst: float, capacity: int) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: Recent[K, TokenBucket] = Recent(capacity)

    def of(self, subject: K, now: float) -> TokenBucket:
        """Return the subject's bucket."""
        bucket = self._buckets.get(subject) or TokenBucket(self._rate, self._burst, now)
        self._buckets.set(subject, bucket)
        return bucket

    def take(self, subject: K, amount: float, now: float) -> bool:
        """Take `amount` units of the subject's if they are there; otherwise take none and return False."""
        return self.of(subject, now).take(amount, now)
