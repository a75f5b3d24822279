"""Notices: what an operator would want to know of the network and would not see in any count.

They say who was refused by whom and why, and that this node's grant has ended. They say that nobody answers, which
endpoint leads nowhere, that the swarm depends on one node, and that this machine's clock differs from its peers'. They
are decided without I/O; the network thread has them written to the log now and then.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import structlog

from protocol.config import Instant
from protocol.core import Core
from protocol.credentials.grants import grant_expiry
from protocol.credentials.records import Address, Endpoint
from protocol.host import dialable_members
from protocol.lru import Recent
from protocol.refusals import (
    CLOCK_AHEAD,
    CLOCK_BEHIND,
    GRAYLISTED,
    MAX_SAID,
    SAME_S,
    Case,
    ClockDifference,
    Failure,
    PeerClocks,
    Refusal,
    Refusals,
)
from protocol.wire.version import VERSION, said, version_in

ALONE_S = 60.0  # a seed that is up answers within seconds, or tens of them while its machine loads models
AGAIN_S = 1800.0
DOWN = "are they up, and in this swarm? Where one member alone listens (--listen), the others need it to be up"
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

log = structlog.get_logger()


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

    def write(self, core: Core, now: Instant) -> None:
        """Write the lines that are due to the log."""
        membership = core.membership
        failures = membership.reachability.standing.failures
        peers, dialable = len(membership.peers), dialable_members(core)
        for notice in self.due(membership.refusals, core.clocks, peers, dialable, failures, now):
            (log.warning if notice.is_warning else log.info)(notice.event, **notice.fields)

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
        case Case.OTHER_VERSION:
            fields = {"peer": refusal.who, "theirs": version_in(reason), "ours": said(VERSION), **more}
            return Notice("refused a peer that speaks another version of the protocol", True, fields)
        case Case.BY_THEM:
            remedy = {"remedy": REMEDIES[reason]} if reason in REMEDIES else {}
            return Notice("this node is not admitted", True, {"by": refusal.who, "reason": reason, **remedy, **more})
