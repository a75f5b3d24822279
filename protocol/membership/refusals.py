"""Who did not admit whom, and why: counted, and told to a person in a bounded number of lines.

Keys cost nothing, so whoever wants to be refused can be, again and again: the same words about the same
node come once in `AGAIN_S`, and lines in all at the pace of a token bucket. What that leaves out is counted.
"""

from collections import Counter
from typing import NamedTuple

from protocol.config import Instant
from protocol.limits.rate_limits import TokenBucket
from protocol.lru import Recent

AGAIN_S = 3600.0
LINES_PER_SECOND, LINES_BURST = 1 / 60, 10.0
MAX_SAID = 256
MAX_WAITING = 32  # lines that nobody took yet


class Refusal(NamedTuple):
    """Somebody was not admitted: `who` by us, or with `by_them` we by `who`; `unsaid` came before it without a line."""

    who: str
    reason: str
    by_them: bool
    unsaid: int = 0


class Refusals:
    """See the module's comment."""

    def __init__(self, now: Instant) -> None:
        self.counts: Counter[str] = Counter()  # of those that we refused, by reason
        self.latest = ""  # why somebody last did not admit us
        self._said: Recent[tuple[str, str, bool], float] = Recent(MAX_SAID)
        self._lines = TokenBucket(LINES_PER_SECOND, LINES_BURST, now.steady)
        self._waiting: list[Refusal] = []
        self._unsaid = 0

    def of(self, who: str, reason: str, now: Instant) -> None:
        """Note that we do not admit `who`."""
        self.counts[reason] += 1
        self._note(who, reason, False, now)

    def by(self, who: str, reason: str, now: Instant) -> None:
        """Note that `who` does not admit us."""
        self.latest = reason
        self._note(who, reason, True, now)

    def take(self) -> list[Refusal]:
        """Return what a person is to be told, each once."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def _note(self, who: str, reason: str, by_them: bool, now: Instant) -> None:
        said = self._said.get((who, reason, by_them))
        if said is not None and now.steady < said + AGAIN_S:
            return
        if len(self._waiting) >= MAX_WAITING or not self._lines.take(1, now.steady):
            self._unsaid += 1
            return
        self._said.set((who, reason, by_them), now.steady)
        self._waiting.append(Refusal(who, reason, by_them, self._unsaid))
        self._unsaid = 0
