"""When to announce: a burst of new items once, after it has ended or has gone on for too long."""

import math

MAX_HOLD = 4.0  # intervals: what a hop costs at the most while items come all the time


class AnnounceTimer:
    """Due once nothing new has come for `interval` seconds, or `MAX_HOLD` times that after the first."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._settled = math.inf
        self._burst_end = math.inf
        self._fixed = math.inf

    @property
    def due(self) -> float:
        """The moment, infinity when there is nothing to announce."""
        return min(self._settled, self._fixed)

    def news(self, now: float) -> None:
        """Something new is to be announced."""
        if self._settled == math.inf:
            self._burst_end = now + MAX_HOLD * self._interval
        self._settled = min(self._burst_end, now + self._interval)

    def by(self, due: float) -> None:
        """Something is to be announced by `due`, whatever else comes."""
        self._fixed = min(self._fixed, due)

    def clear(self) -> None:
        """All has been announced."""
        self._settled = self._fixed = math.inf
