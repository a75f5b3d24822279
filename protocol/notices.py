"""Operator notices: what a person would want to know of the network and would not see in any count.

They say who was refused by whom and why, and that this node's grant has ended. They say that nobody answers, which
endpoint leads nowhere, that the swarm depends on one node, and that this machine's clock differs from its peers'. They
are decided here without I/O; the host writes them to its log.

Keys cost nothing, so an attacker can be refused again and again. So the number of lines is bounded: the same words
about the same node come once in `SAME_S`, and a token bucket bounds all lines. Lines that are left out are counted.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

from protocol.config import Instant
from protocol.credentials.grants import grant_expiry
from protocol.credentials.records import Address, Endpoint
from protocol.limits.rate_limits import TokenBucket
from protocol.lru import Recent

GRAYLISTED = "graylisted"  # the reason that a node is told if it is refused for its offences
CLOCK_BEHIND, CLOCK_AHEAD = "clock_behind", "clock_ahead"  # if by its hello the node's clock is off by a day or more
SAME_S = 3600.0
LINES_PER_SECOND, LINES_BURST = 1 / 60, 10.0
MAX_SAID = 256
MAX_WAITING = 32  # lines that the host has not taken yet

ALONE_S = 60.0  # a seed that is up answers within seconds, or tens of them while its machine loads models
AGAIN_S = 1800.0
DOWN = "are they up, and in this swarm? Where one member alone listens (--listen), the others need it to be up"
MAX_CLOCKS = 64
CLOCK_OFF_S = 300.0  # half of `max_clock_ahead_s`
DRIFT_S = 60.0  # a fifth of that
SET_CLOCK = "set this machine's clock (`timedatectl set-ntp true`)"
FEW_AGAIN_S = 24 * 3600.0  # seldom, as people may want it so
SOON_S = 24 * 3600.0  # before a grant's end: time to ask for another
SOON_PART = (
    0.25  # of what was left at the start, if that is less: a grant for one day does not end soon at its beginning
)
REMEDIES = {
    "not_admitted": "ask the swarm's owner for an invite and `gossamer join` with it",
    "invite_used": "ask the swarm's owner for another invite and `gossamer join` with it",
    "invite_expired": "ask the swarm's owner for a newer invite and `gossamer join` with it",
    "invite_revoked": "ask the swarm's owner for another invite and `gossamer join` with it",
    "revoked": "the swarm's owner took this node back",
    CLOCK_BEHIND: f"{SET_CLOCK}, unless it is the other's that is ahead",
    CLOCK_AHEAD: f"{SET_CLOCK}, unless it is the other's that is behind",
    GRAYLISTED: "refused for minutes or hours for what it did: are its clock, its line and its version in order?",
}


class Case(Enum):
    """Who refused whom."""

    NOT_ADMITTED = auto()  # we did not admit a node, at its hello
    OFFENDER = auto()  # we refuse a node, a key or a network for its offences
    BY_THEM = auto()  # a node did not admit us


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


class Notice(NamedTuple):
    """A line for the log: what happened, whether a person should act, and the fields."""

    event: str
    is_warning: bool
    fields: dict[str, Any]


class Notices:
    """Decides which lines are due. `seeds` are the node's; `grant` is what admits it, empty if nothing has to."""

    def __init__(self, seeds: Sequence[Address], grant: bytes, now: Instant) -> None:
        self._seeds = [str(seed.endpoint) for seed in seeds]
        self._expires = grant_expiry(grant)
        left = 0.0 if self._expires is None else self._expires - now.unix
        self._soon = min(SOON_S, SOON_PART * left)
        self._warned_of_end = self._warned_of_expiry = False
        self._alone_since = now.steady
        self._next_alone = now.steady + ALONE_S
        self._next_clock = now.steady
        self._next_few = now.steady + ALONE_S
        self._said_unreached: Recent[Endpoint, float] = Recent(MAX_SAID)

    def due(
        self,
        refusals: Refusals,
        clocks: PeerClocks,
        peers: int,
        dialable: int,
        failures: Sequence[Failure],
        now: Instant,
    ) -> list[Notice]:
        """Return the lines to log now.

        `peers` are live; `dialable` members can be dialled, this node included; `failures` are its endpoints that
        cannot.
        """
        return [
            *map(_of_refusal, refusals.take()),
            *self._of_grant(now),
            *self._of_solitude(refusals, peers, now),
            *self._of_few(peers, dialable, now),
            *self._of_unreached(failures, now),
            *self._of_clock(clocks.difference(now), now),
        ]

    def _of_clock(self, difference: ClockDifference | None, now: Instant) -> list[Notice]:
        if difference is None or now.steady < self._next_clock:
            return []
        self._next_clock = now.steady + AGAIN_S
        how = f"{abs(difference.ahead):.0f} s {'behind' if difference.ahead > 0 else 'ahead'}"
        remedy = f"{SET_CLOCK}: peers and this node refuse each other's items as stale"
        fields = {"this_machine_is": how, "peers": difference.peers, "remedy": remedy}
        return [Notice("this machine's clock differs from its peers'", True, fields)]

    def _of_grant(self, now: Instant) -> list[Notice]:
        if self._expires is None:
            return []
        left = self._expires - now.unix
        if left <= 0 and not self._warned_of_expiry:
            self._warned_of_expiry = True
            return [Notice("this node's grant has expired", True, {"remedy": REMEDIES["invite_expired"]})]
        if 0 < left < self._soon and not self._warned_of_end:
            self._warned_of_end = True
            remedy = REMEDIES["invite_expired"]
            return [Notice("this node's grant expires soon", True, {"hours": round(left / 3600, 1), "remedy": remedy})]
        return []

    def _of_solitude(self, refusals: Refusals, peers: int, now: Instant) -> list[Notice]:
        if peers:
            self._alone_since, self._next_alone = now.steady, now.steady + ALONE_S
            return []
        if not self._seeds or now.steady < self._next_alone:
            return []
        self._next_alone = now.steady + AGAIN_S
        why = "they do not admit this node" if refusals.latest else DOWN
        if refusals.full and not refusals.latest:
            why = f"{refusals.full} is full: others have to be able to dial one more node, this one or another"
        fields = {"seconds": round(now.steady - self._alone_since), "seeds": self._seeds, "why": why}
        return [Notice("no peer: this node is alone", True, fields)]

    def _of_unreached(self, failures: Sequence[Failure], now: Instant) -> list[Notice]:
        news = []
        for failure in failures:
            said_at = self._said_unreached.get(failure.endpoint)
            if said_at is None or now.steady >= said_at + SAME_S:
                self._said_unreached.set(failure.endpoint, now.steady)
                news.append(failure)
        remedy = "forward the port and open the firewall; until then this node works through peers that it dials"
        return [
            Notice(
                "peers cannot dial this node",
                False,
                {"endpoint": str(failure.endpoint), "tried_from": failure.tried_from, "remedy": remedy},
            )
            for failure in news
        ]

    def _of_few(self, peers: int, dialable: int, now: Instant) -> list[Notice]:
        if not peers or dialable > 1:
            self._next_few = max(self._next_few, now.steady + ALONE_S)
            return []
        if now.steady < self._next_few:
            return []
        self._next_few = now.steady + FEW_AGAIN_S
        remedy = "start one more with --listen tcp://0.0.0.0:4001: when the one stops, the others lose each other"
        return [Notice("only one member of this swarm can be dialled", True, {"remedy": remedy})]


def _of_refusal(refusal: Refusal) -> Notice:
    reason, more = refusal.reason, {"and_more": refusal.unsaid} if refusal.unsaid else {}
    match refusal.case:
        case Case.NOT_ADMITTED:
            return Notice("a node was not admitted", False, {"node": refusal.who, "reason": reason, **more})
        case Case.OFFENDER:
            fields = {"who": refusal.who, "most_of_all": reason, **more}
            return Notice("refused for a while for what it did", True, fields)
        case Case.BY_THEM:
            remedy = {"remedy": REMEDIES[reason]} if reason in REMEDIES else {}
            return Notice("this node is not admitted", True, {"by": refusal.who, "reason": reason, **remedy, **more})
