"""Who refused whom, and why: told to a person in a bounded number of lines.

Keys cost nothing, so whoever wants to be refused can be, again and again: the same words about the same
node come once in `AGAIN_S`, and lines in all at the pace of a token bucket. What that leaves out is counted.
"""

from collections import Counter
from enum import Enum, auto
from typing import NamedTuple

from protocol.config import Instant
from protocol.limits.rate_limits import TokenBucket
from protocol.lru import Recent

GRAYLISTED = "graylisted"  # what who is refused for what it did is told
AGAIN_S = 3600.0
LINES_PER_SECOND, LINES_BURST = 1 / 60, 10.0
MAX_SAID = 256
MAX_WAITING = 32  # lines that nobody took yet


class Case(Enum):
    """Who refused whom."""

    NOT_ADMITTED = auto()  # we somebody, at the hello
    OFFENDER = auto()  # we a node, a key or a network, for what it did
    BY_THEM = auto()  # somebody us


class Refusal(NamedTuple):
    """Who was refused, or refused us, and why; `unsaid` others came before it without a line."""

    case: Case
    who: str
    reason: str
    unsaid: int = 0


class Refusals:
    """See the module's comment."""

    def __init__(self, now: Instant) -> None:
        self.counts: Counter[str] = Counter()  # of those that we did not admit, by reason
        self.latest = ""  # why somebody last did not admit us
        self._said: Recent[tuple[Case, str, str], float] = Recent(MAX_SAID)
        self._lines = TokenBucket(LINES_PER_SECOND, LINES_BURST, now.steady)
        self._waiting: list[Refusal] = []
        self._unsaid = 0

    def of(self, who: str, reason: str, now: Instant) -> None:
        """Note that we do not admit `who`."""
        self.counts[reason] += 1
        self._note(Case.NOT_ADMITTED, who, reason, now)

    def offender(self, who: str, reason: str, now: Instant) -> None:
        """Note that we take nothing more from `who` for now, most of all for `reason`."""
        self._note(Case.OFFENDER, who, reason, now)

    def by(self, who: str, reason: str, now: Instant) -> None:
        """Note that `who` does not admit us."""
        self.latest = reason
        self._note(Case.BY_THEM, who, reason, now)

    def take(self) -> list[Refusal]:
        """Return what a person is to be told, each once."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def _note(self, case: Case, who: str, reason: str, now: Instant) -> None:
        said = self._said.get((case, who, reason))
        if said is not None and now.steady < said + AGAIN_S:
            return
        if len(self._waiting) >= MAX_WAITING or not self._lines.take(1, now.steady):
            self._unsaid += 1
            return
        self._said.set((case, who, reason), now.steady)
        self._waiting.append(Refusal(case, who, reason, self._unsaid))
        self._unsaid = 0
