"""Refusals, of us and by us, and how far peers' clocks are from ours: what a person may want to be told. No I/O.

Keys cost nothing, so an attacker can be refused again and again. So the number of notes is bounded: the same words
about the same node come once in `SAME_S`, and a token bucket bounds all. What is left out is counted.
"""

import statistics
from collections import Counter
from enum import Enum, auto
from typing import NamedTuple

from protocol.config import Instant
from protocol.credentials.records import Endpoint
from protocol.limits.rate_limits import TokenBucket
from protocol.lru import Recent
from protocol.wire.version import goodbye_reason

GRAYLISTED = "graylisted"  # the reason that a node is told if it is refused for its offences
CLOCK_BEHIND, CLOCK_AHEAD = "clock_behind", "clock_ahead"  # if by its hello the node's clock is off by a day or more
SAME_S = 3600.0
LINES_PER_SECOND, LINES_BURST = 1 / 60, 10.0
MAX_SAID = 256
MAX_WAITING = 32  # that nobody has taken yet
MAX_CLOCKS = 64
CLOCK_OFF_S = 300.0  # half of `max_clock_ahead_s`
DRIFT_S = 60.0  # a fifth of that


class Case(Enum):
    """Who refused whom."""

    NOT_ADMITTED = auto()  # we did not admit a node, at its hello
    OFFENDER = auto()  # we refuse a node or a key for its offences
    BY_THEM = auto()  # a node did not admit us
    OTHER_VERSION = auto()  # we refuse a node that speaks another major version; the reason is as in a goodbye


class Refusal(NamedTuple):
    """A refusal by us or of us, and why; `unsaid` others came before it without a line."""

    case: Case
    who: str
    reason: str
    unsaid: int = 0


class Refusals:
    """Notes refusals for a person: the same words once in `SAME_S`, in a bounded number of lines."""

    def __init__(self, now: Instant) -> None:
        self.counts: Counter[str] = Counter()  # of those that we did not admit, by reason
        self.latest = ""  # why somebody last did not admit us, since a peer did
        self.full = ""  # who last said that it has no room for us, since a peer had
        self._said: Recent[tuple[Case, str, str], float] = Recent(MAX_SAID)
        self._lines = TokenBucket(LINES_PER_SECOND, LINES_BURST, now.steady)
        self._waiting: list[Refusal] = []
        self._unsaid = 0

    def of(self, who: str, reason: str, now: Instant) -> None:
        """Note that we do not admit `who`."""
        self.counts[reason] += 1
        self._note(Case.NOT_ADMITTED, who, reason, now)

    def offender(self, who: str, reason: str, now: Instant) -> None:
        """Note that we refuse `who` for now; most of its points were for `reason`."""
        self._note(Case.OFFENDER, who, reason, now)

    def misfit(self, who: str, theirs: int, now: Instant) -> None:
        """Note that `who` speaks another version of the protocol."""
        self._note(Case.OTHER_VERSION, who, goodbye_reason(theirs), now)

    def by(self, who: str, reason: str, now: Instant) -> None:
        """Note that `who` does not admit us."""
        self.latest = reason
        self._note(Case.BY_THEM, who, reason, now)

    def admitted(self) -> None:
        """Note that a peer admitted us."""
        self.latest = self.full = ""

    def take(self) -> list[Refusal]:
        """Return the refusals to log, each once."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def _note(self, case: Case, who: str, reason: str, now: Instant) -> None:
        said_at = self._said.get((case, who, reason))
        if said_at is not None and now.steady < said_at + SAME_S:
            return
        if len(self._waiting) >= MAX_WAITING or not self._lines.take(1, now.steady):
            self._unsaid += 1
            return
        self._said.set((case, who, reason), now.steady)
        self._waiting.append(Refusal(case, who, reason, self._unsaid))
        self._unsaid = 0


class Failure(NamedTuple):
    """An endpoint of ours that could not be dialled from an address, so that we tell it to nobody."""

    endpoint: Endpoint
    tried_from: str


class ClockDifference(NamedTuple):
    """How many seconds the clocks of most peers are ahead of ours, and how many peers' they are."""

    peers: int
    ahead: float


class _ClockReading(NamedTuple):
    ahead: float  # of ours, at the same moment
    offset: float  # of our Unix time from our steady clock then


class PeerClocks:
    """How far the clocks of live peers are from ours, by their hellos; each network counts once."""

    def __init__(self) -> None:
        self._readings: Recent[str, _ClockReading] = Recent(MAX_CLOCKS)

    def said(self, network: str, unix: float, now: Instant) -> None:
        """Note that a live peer of that network gives this Unix time now. A node may count as a network of its own."""
        self._readings.set(network, _ClockReading(unix - now.unix, now.unix - now.steady))

    def difference(self, now: Instant) -> ClockDifference | None:
        """Return how far the clocks of more than half of all, ours among them, are from ours on one side; else None.

        A reading no longer counts once our clock was set, or this process was stopped or blocked, by `DRIFT_S` in all.
        """
        offset = now.unix - now.steady
        ahead = [reading.ahead for reading in self._readings.values() if abs(reading.offset - offset) < DRIFT_S]
        for side in (
            [seconds for seconds in ahead if seconds >= CLOCK_OFF_S],
            [seconds for seconds in ahead if seconds <= -CLOCK_OFF_S],
        ):
            if 2 * len(side) > len(ahead) + 1:
                return ClockDifference(len(side), statistics.median(side))
        return None
