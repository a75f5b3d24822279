"""Operator notices: what a person would want to know of the network and would not see in any count.

Who was refused by whom and why, that this node's own right to be here has ended, and that nobody answers.
Decided here without I/O, in a bounded number of lines; the host writes them into its log.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from protocol.config import Instant
from protocol.credentials.grants import grant_expiry
from protocol.credentials.records import Address
from protocol.membership.refusals import Case, Refusal, Refusals

ALONE_S = 60.0  # a seed that is there answers within seconds; a machine that loads models may take tens of them
AGAIN_S = 1800.0
SOON_S = 24 * 3600.0  # before a grant's end: time to ask for another
REMEDIES = {
    "not_admitted": "ask the swarm's owner for an invite and `gossamer join` with it",
    "invite_used": "ask the swarm's owner for another invite and `gossamer join` with it",
    "invite_expired": "ask the swarm's owner for a newer invite and `gossamer join` with it",
    "invite_revoked": "ask the swarm's owner for another invite and `gossamer join` with it",
    "revoked": "the swarm's owner took this node back",
    "graylisted": "refused for minutes or hours for what it did: are its clock, its line and its version in order?",
}


class Notice(NamedTuple):
    """A line for the log: what happened, whether a person should act, and the fields."""

    event: str
    is_warning: bool
    fields: dict[str, Any]


class Notices:
    """Notes what was said. `seeds` are the node's, `grant` what admits it, empty for nothing."""

    def __init__(self, seeds: Sequence[Address], grant: bytes, now: Instant) -> None:
        self._seeds = [str(seed.endpoint) for seed in seeds]
        self._expires = grant_expiry(grant)
        self._warned_of_end = self._warned_of_expiry = False
        self._alone_since = now.steady
        self._next_alone = now.steady + ALONE_S

    def due(self, refusals: Refusals, peers: int, now: Instant) -> list[Notice]:
        """Return what is to be said now, with `peers` live."""
        return [*map(_of_refusal, refusals.take()), *self._of_grant(now), *self._of_solitude(refusals, peers, now)]

    def _of_grant(self, now: Instant) -> list[Notice]:
        if self._expires is None:
            return []
        left = self._expires - now.unix
        if left <= 0 and not self._warned_of_expiry:
            self._warned_of_expiry = True
            return [Notice("this node's grant has expired", True, {"remedy": REMEDIES["invite_expired"]})]
        if 0 < left < SOON_S and not self._warned_of_end:
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
        why = "they do not admit this node" if refusals.latest else "are they up, and in this swarm?"
        fields = {"seconds": round(now.steady - self._alone_since), "seeds": self._seeds, "why": why}
        return [Notice("no peer: this node is alone", True, fields)]


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
