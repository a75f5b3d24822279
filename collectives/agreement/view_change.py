"""View change: how the survivors of a view agree on the next one.

    disturbed -> the first member that nobody misses proposes a ballot to those it can reach
      -> each that has promised no greater one leaves its view's operations alone for good (it is
         *fenced*) and reports what it knows of them
      -> with all reports in, the proposer rules on the operations and draws up the next view
      -> it goes over to the next view and tells the others

A fenced member that hears no decision proposes a greater ballot after a while, each member later than those before it.
A proposer goes on without those who do not report. Members that miss each other cannot be in one view: those with most
such pairs are left out. Epochs rise because a new one is above all that were reported.

Every side of a split group decides for itself: any members that report to one of them make a view. A report from a
later view than the proposer's brings in the members of that one.

The fate of operations does not depend on any of this choosing well: see `recovery`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from collectives.agreement.failure_detector import FailureDetector
from collectives.agreement.fields import MARK_BYTES
from collectives.agreement.messages import (
    BallotReport,
    Decide,
    Ledger,
    Propose,
)
from collectives.agreement.outbox import Outbox
from collectives.agreement.recovery import rule
from collectives.agreement.views import NO_BALLOT, Ballot, Member, View
from collectives.types import GroupTiming
from protocol.identity import NodeId

Ledgers = Callable[[], tuple[Ledger, ...]]


@dataclass
class Proposal:
    """A ballot of one's own that is not decided yet."""

    ballot: Ballot
    view: View  # that this member is in
    members: frozenset[NodeId]
    since: float
    reports: dict[NodeId, BallotReport] = field(default_factory=dict)


class ViewChange:
    """One member's part in it. `fenced` from the first promise to the next view."""

    def __init__(
        self,
        own: NodeId,
        timing: GroupTiming,
        rng: Random,
        outbox: Outbox,
        detector: FailureDetector,
    ) -> None:
        self._own = own
        self._timing = timing
        self._rng = rng
        self._out = outbox
        self._detector = detector
        self.promised = NO_BALLOT
        self.fenced = False
        self._proposal: Proposal | None = None
        self._invited: set[NodeId] = set()  # members of a later view, each of whom was asked once: some never answer
        self._needed_since: float | None = None

    def enter(self) -> None:
        """A view was installed, or this node is out of the group."""
        self.fenced = False
        self._proposal = None
        self._invited = set()
        self._needed_since = None

    # --- the proposer ---

    def tick(self, view: View, ledgers: Ledgers, now: float) -> Decide | None:
        """Propose if it is time to. Returns the decision where this member is alone in it."""
        missing = self._detector.missing(view, now)
        if not self.fenced and not self._detector.disturbed(view, missing, now):
            self._needed_since = None
            return None
        if self._needed_since is None:
            self._needed_since = now
        if self._proposal is not None:
            patience = self._timing.patience
            lost = self._proposal.members - self._proposal.reports.keys() - {self._own}
            if now - self._proposal.since < patience and not (lost & missing):
                return None
        else:
            present = [member for member in view.members if member not in missing]
            rank = present.index(self._own) + (1 if self.fenced else 0)
            if now - self._needed_since < rank * self._timing.patience:
                return None
        reached = (m for m in view.members if m == self._own or (m not in missing and m in self._detector.linked))
        return self._propose(view, ledgers, now, frozenset(reached))

    def round_seen(self, number: int) -> None:
        """Somebody has promised a ballot of this round: one's own next one must be above it."""
        if number > self.promised.round and not self.fenced:
            self.promised = Ballot(number, NodeId(""))
        elif number > self.promised.round and self._proposal is not None:
            self._proposal.since = float("-inf")  # outbid: try again at the next tick
            self.promised = Ballot(number, self._own)

    def reported(self, member: NodeId, message: BallotReport, now: float) -> Decide | None:
        """Count a report; return the decision once all are in."""
        proposal = self._proposal
        if proposal is None or message.ballot != proposal.ballot or member not in proposal.members:
            return None
        proposal.reports[member] = message
        return self._conclude(proposal, now)

    # --- the acceptor ---

    def proposed(self, member: NodeId, message: Propose, view: View, ledgers: Ledgers, now: float) -> bool:
        """Promise, fence and report. Returns whether the ballot counts."""
        if message.ballot <= self.promised or self._own not in message.members:
            return False
        self._promise(message.ballot, now)
        missing = tuple(sorted(self._detector.missing(view, now)))
        self._out.send(member, BallotReport(message.ballot, view, missing, ledgers()))
        return True

    def accepts(self, message: Decide) -> bool:
        """Tell whether a decision binds this member."""
        return self.fenced and message.ballot == self.promised and self._own in message.view.ids

    # --- within ---

    def _promise(self, ballot: Ballot, now: float) -> None:
        self.promised = ballot
        self.fenced = True
        self._proposal = None
        self._needed_since = now

    def _propose(self, view: View, ledgers: Ledgers, now: float, members: frozenset[NodeId]) -> Decide | None:
        ballot = self.promised.above(self._own)
        self.promised = ballot
        self.fenced = True
        proposal = self._proposal = Proposal(ballot, view, members, now)
        missing = tuple(sorted(self._detector.missing(view, now)))
        proposal.reports[self._own] = BallotReport(ballot, view, missing, ledgers())
        for member in sorted(members - {self._own}):
            self._out.send(member, Propose(ballot, view.epoch, tuple(sorted(members))))
        return self._conclude(proposal, now)

    def _conclude(self, proposal: Proposal, now: float) -> Decide | None:
        if proposal.reports.keys() < proposal.members:
            return None
        reports = proposal.reports
        newest = max((report.view for report in reports.values()), key=lambda view: (view.epoch, view.mark))
        more = {
            member
            for member in newest.ids - proposal.members - self._invited
            if member in self._detector.linked and member not in self._detector.outside
        }
        own = reports[self._own]
        if more and newest.mark != own.view.mark:
            self._invited |= more
            return self._propose(own.view, lambda: own.ledgers, now, proposal.members | more)
        decision = self._draw_up(proposal, newest)
        for member in decision.view.members:
            if member != self._own:
                self._out.send(member, decision)
        return decision

    def _draw_up(self, proposal: Proposal, newest: View) -> Decide:
        """Return the next view, of members that can work together, and what became of the operations."""
        reports = proposal.reports
        members = compatible(self._own, {member: report.missing for member, report in reports.items()})
        roster = self._roster(members, reports)
        epoch = max(report.view.epoch for report in reports.values()) + 1
        rulings = rule({member: report.ledgers for member, report in reports.items()})
        after = View.of(newest.group, epoch, self._rng.randbytes(MARK_BYTES), roster)
        return Decide(proposal.ballot, after, rulings)

    def _roster(self, members: Iterable[NodeId], reports: dict[NodeId, BallotReport]) -> list[Member]:
        """Return each one's own line, from its own view."""
        lines = {member: {line.id: line for line in reports[member].view.roster} for member in members}
        return [lines[member][member] for member in members if member in lines[member]]


def compatible(own: NodeId, missing: dict[NodeId, tuple[NodeId, ...]]) -> list[NodeId]:
    """Return members that do not miss each other, this one among them: again and again, drop the one in most pairs."""
    members = set(missing)
    pairs = {frozenset((member, other)) for member, lost in missing.items() for other in lost if other in members} - {
        frozenset((member,)) for member in members
    }
    while pairs:
        worst = max(members - {own}, key=lambda member: (sum(member in pair for pair in pairs), member))
        members.discard(worst)
        pairs = {pair for pair in pairs if worst not in pair}
    return sorted(members)
