"""Time quotas: the seconds that worker processes may spend on somebody's texts in a round.

A quota is charged while a text is scored, for as long as that takes. A text that would outlast it is ended
(`node.tasks.scoring.verdicts`), and none is begun once it is spent. A quota may lie within another one, which is
charged, too.
"""

import math
import threading

LEAST_S = 0.25  # with less left a quota is spent: a usual text, begun then, might be ended for what others took


class TimeQuota:
    """A quota of some seconds. Any thread may charge it; times are seconds of one clock.

    Args:
        seconds: that may be spent; its owner may raise them.
        within: the quota that all of this is charged to as well.
    """

    def __init__(self, seconds: float = math.inf, within: "TimeQuota | None" = None) -> None:
        self.seconds = seconds
        self.within = within
        self._lock = threading.Lock()
        self._running = 0  # texts that are being scored
        self._done = 0.0  # seconds of those that are scored, less the times at which the running ones began

    def begin(self, now: float) -> None:
        """Charge a text from `now` on."""
        self._change(1, -now)

    def end(self, now: float) -> None:
        """Charge that text no more."""
        self._change(-1, now)

    def _change(self, running: int, seconds: float) -> None:
        with self._lock:
            self._running += running
            self._done += seconds
        if self.within is not None:
            self.within._change(running, seconds)

    def spent(self, now: float) -> float:
        """Return the seconds spent until `now`."""
        with self._lock:
            return max(0.0, self._done + self._running * now)

    def left(self, now: float) -> float:
        """Return the seconds that a text may take at most."""
        left = self.seconds - self.spent(now)
        return left if self.within is None else min(left, self.within.left(now))

    def is_exceeded(self, now: float) -> bool:
        """Tell whether its own seconds are spent, whatever it lies within."""
        return self.seconds - self.spent(now) < LEAST_S

    def is_spent(self, now: float) -> bool:
        """Tell whether no further text is begun."""
        return self.left(now) < LEAST_S
