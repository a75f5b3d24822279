"""View change: how the survivors of a view agree on the next one; under `MAJORITY` by consensus (single-decree Paxos).

    disturbed -> the first member that nobody misses proposes a ballot to those it can reach
      -> each that has promised no greater one leaves its view's operations alone for good (it is
         *fenced*) and reports what it knows of them
      -> with all reports in, the proposer rules on the operations and draws up the next view
      -> under MAJORITY: it asks all who reported to accept that, and waits for a majority of the old view
      -> it goes over to the next view and tells the others

A fenced member that hears no decision proposes a greater ballot after a while, each member later than those before it.
A proposer goes on without those who do not report. Members that miss each other cannot be in one view: those with most
such pairs are left out. Epochs rise because a new one is above all that were reported.

Under `CONTINUE` every side of a split group decides for itself: any members that report to one of them
make a view. A report from a later view than the proposer's brings in the members of that one.

Under `MAJORITY` each view has one successor, which its own members choose: an instance of Paxos whose acceptors are the
members of that view (an id and a session: a process that was started anew forgot what it promised, and is another
member). Its value is the next view with the rulings on the operations. (1) A member that reaches a majority of the view
proposes a ballot. Each that reports to it promises to accept nothing of a smaller one, and tells what it has accepted.
(2) The proposer asks for what was accepted under the greatest ballot, if anything was, else for what it draws up. A
view that a majority accepted is *chosen*: any later majority has a member in common with it, so every greater ballot
asks for the same. Nobody enters a view that is not chosen, the proposer neither: so there is one view an epoch, and a
side that cannot reach a majority of its view waits. An admission under way when the newcomers are ready is a ballot of
the coordinator's, with the newcomers in its view and its commit among the rulings. Members that are behind are told of
later views by those who entered them (see dispatch).

A member that leaves on purpose leaves its vote to one that stays (Proxy). The acceptor moves there, with what it
promised and accepted, and never speaks from two places. The proxy merges these bonds with its own: a promise may always
be raised, and of accepted ballots only the greatest counts. The votes count with its own ballots. So a view of two goes
on as one when the other says goodbye. A proxy that is lost loses these votes.

A view whose majority is lost for good is left by hand only: a *forced* ballot counts with any members that report. It
is unsafe: what the others may have chosen, or choose yet, is another view.

The fate of operations does not depend on any of this choosing well: see `recovery`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from collectives.agreement.failure_detector import FailureDetector
from collectives.agreement.fields import MARK_BYTES
from collectives.agreement.messages import (
    Accept,
    BallotAccepted,
    BallotReport,
    Decide,
    Ledger,
    Propose,
    Proxy,
    Ruling,
    Stage,
)
from collectives.agreement.outbox import Outbox
from collectives.agreement.recovery import rule
from collectives.agreement.views import NO_BALLOT, NOWHERE, Ballot, Member, OpId, View
from collectives.types import GroupTiming, Partition
from protocol.identity import NodeId

Ledgers = Callable[[], tuple[Ledger, ...]]


@dataclass
class Proposal:
    """A ballot of one's own that is not decided yet; `asked` is set once it is for the others to accept."""

    ballot: Ballot
    view: View  # that this member is in
    members: frozenset[NodeId]
    votes: frozenset[NodeId]  # that this member had when it made its promise
    since: float  # of this phase
    reports: dict[NodeId, BallotReport] = field(default_factory=dict)
    asked: Accept | None = None
    accepted: set[NodeId] = field(default_factory=set)


@dataclass
class AgreedAdmission:
    """An admission that all have carried out: `op` commits with the entry into a view with the newcomers of `after`."""

    op: OpId
    after: View


class ViewChange:
    """One member's part in it. `fenced` from the first promise to the next view."""

    def __init__(
        self,
        own: NodeId,
        timing: GroupTiming,
        partition: Partition,
        rng: Random,
        outbox: Outbox,
        detector: FailureDetector,
    ) -> None:
        self._own = own
        self._timing = timing
        self._rng = rng
        self._out = outbox
        self._detector = detector
        self.consensus = partition is Partition.MAJORITY
        self.promised = NO_BALLOT
        self.fenced = False
        self.stranded = False  # the view must change, and too few of its members can be reached
        self._left: dict[NodeId, bytes] = {}  # members of the view that left it their votes, and which run of each
        self._accepted: Accept | None = None  # as an acceptor of what follows this view
        self._proposal: Proposal | None = None
        self._admission: AgreedAdmission | None = None
        self._forced = False
        self._invited: set[NodeId] = set()  # members of a later view, each of whom was asked once: some never answer
        self._needed_since: float | None = None

    @property
    def votes(self) -> frozenset[NodeId]:
        """Whose votes this member casts."""
        return frozenset((*self._left, self._own))

    def enter(self, view: View | None = None) -> None:
        """A view was installed, or this node is out of the group."""
        sessions = view.sessions if view is not None else {}
        self._left = {member: session for member, session in self._left.items() if sessions.get(member) == session}
        self.fenced = self.stranded = self._forced = False
        self._accepted = self._proposal = self._admission = None
        self._invited = set()
        self._needed_since = None

    # --- the proposer ---

    def tick(self, view: View, ledgers: Ledgers, now: float) -> Decide | None:
        """Propose if it is time to. Returns the decision where this member is alone in it."""
        missing = self._detector.missing(view, now)
        if not self.fenced and not self._detector.disturbed(view, missing, now):
            self._needed_since = None
            self.stranded = False
            return None
        if self._needed_since is None:
            self._needed_since = now
        electorate = self._electorate(view, missing)
        self.stranded = len(electorate | self.votes) < self._quorum(view)
        if self.stranded and not self._forced:
            return None
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
        return self._propose(view, ledgers, now, electorate)

    def admit(self, op: OpId, after: View) -> None:
        """Let `op`, which all have carried out, commit with the newcomers of `after`: `proceed` proposes."""
        self._admission = AgreedAdmission(op, after)

    def proceed(self, view: View, ledgers: Ledgers, now: float) -> Decide | None:
        """Propose the view that an admission leads to, once. Returns the decision where this member is alone in it."""
        if self._admission is None or self.fenced:
            return None
        return self._propose(view, ledgers, now, self._electorate(view, self._detector.missing(view, now)))

    def force(self, view: View, ledgers: Ledgers, now: float) -> Decide | None:
        """Propose a view that any reporting members decide. Returns the decision where this member is alone in it."""
        self._forced = True
        return self._propose(view, ledgers, now, self._electorate(view, self._detector.missing(view, now)))

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
        if proposal.asked is not None or (self.consensus and message.view.mark != proposal.view.mark):
            return None
        proposal.reports[member] = message
        return self._conclude(proposal, now)

    def accepted(self, member: NodeId, message: BallotAccepted) -> Decide | None:
        """Count an acceptance; return the decision once a majority has accepted."""
        proposal = self._proposal
        if proposal is None or message.ballot != proposal.ballot or message.before != proposal.view.mark:
            return None
        if member not in proposal.members:
            return None
        proposal.accepted.add(member)
        return self._chosen(proposal)

    # --- the acceptor ---

    def proposed(self, member: NodeId, message: Propose, view: View, ledgers: Ledgers, now: float) -> bool:
        """Promise, fence and report. Returns whether the ballot counts."""
        if message.ballot <= self.promised or self._own not in message.members:
            return False
        self._promise(message.ballot, now)
        missing = tuple(sorted(self._detector.missing(view, now)))
        self._out.send(member, BallotReport(message.ballot, view, missing, ledgers(), self._accepted))
        return True

    def asked(self, member: NodeId, message: Accept, view: View, now: float) -> bool:
        """Accept what a ballot asks for, unless a greater one was promised. Returns whether it counts."""
        later = message.view.epoch > view.epoch and message.view.group == view.group
        if message.ballot < self.promised or message.before != view.mark or not later:
            return False
        self._promise(message.ballot, now)
        self._accepted = message
        self._out.send(member, BallotAccepted(message.ballot, message.before))
        return True

    def accepts(self, message: Decide) -> bool:
        """Tell whether a decision binds this member, under CONTINUE."""
        return self.fenced and message.ballot == self.promised and self._own in message.view.ids

    def has_accepted(self, view: View) -> bool:
        """Tell whether `view` is what this member accepted: then any of its members may say that it was chosen."""
        return self._accepted is not None and self._accepted.view.mark == view.mark

    # --- members that leave, and their votes ---

    def proxy(self, session: bytes, view: View | None, epoch: int) -> Proxy:
        """Return what leaves this member's votes to another; it casts none from now on."""
        voters = ((self._own, session), *sorted(self._left.items()))
        return Proxy(view.mark if view is not None else NOWHERE, epoch, voters, self.promised.round, self._accepted)

    def inherit(self, message: Proxy, view: View) -> None:
        """Cast the votes of those who left them to this member, bound by what they are bound by."""
        if message.mark == view.mark:
            self.promised = max(self.promised, Ballot(message.round + 1, NodeId("")))  # above all of that round
            accepted = message.accepted
            if accepted is not None and (self._accepted is None or accepted.ballot > self._accepted.ballot):
                self._accepted = accepted
        elif message.epoch >= view.epoch:
            return
        self._left |= {member: session for member, session in message.voters if view.sessions.get(member) == session}

    # --- within ---

    def _promise(self, ballot: Ballot, now: float) -> None:
        self.promised = ballot
        self.fenced = True
        self._proposal = self._admission = None
        self._needed_since = now

    def _quorum(self, view: View) -> int:
        """Return how many members of `view` it takes to choose the next one."""
        return len(view.members) // 2 + 1 if self.consensus else 1

    def _electorate(self, view: View, missing: frozenset[NodeId]) -> frozenset[NodeId]:
        return frozenset(m for m in view.members if m == self._own or (m not in missing and m in self._detector.linked))

    def _propose(self, view: View, ledgers: Ledgers, now: float, members: frozenset[NodeId]) -> Decide | None:
        ballot = self.promised.above(self._own)
        self.promised = ballot
        self.fenced = True
        proposal = self._proposal = Proposal(ballot, view, members, self.votes, now)
        missing = tuple(sorted(self._detector.missing(view, now)))
        proposal.reports[self._own] = BallotReport(ballot, view, missing, ledgers(), self._accepted)
        for member in sorted(members - {self._own}):
            self._out.send(member, Propose(ballot, view.epoch, tuple(sorted(members)), view.mark))
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
        if not self.consensus:
            return self._announce(self._draw_up(proposal, newest))
        return self._ask(proposal, now)

    def _draw_up(self, proposal: Proposal, newest: View) -> Decide:
        """Return the next view, of members that can work together, and what became of the operations."""
        reports, admission = proposal.reports, self._admission
        members = compatible(self._own, {member: report.missing for member, report in reports.items()})
        roster = self._roster(members, reports)
        epoch = max(report.view.epoch for report in reports.values()) + 1
        rulings = rule({member: report.ledgers for member, report in reports.items()})
        if admission is not None:
            epoch = max(epoch, admission.after.epoch)
            roster += [line for line in admission.after.roster if line.id not in proposal.view.ids]
            others = (ruling for ruling in rulings if ruling.op != admission.op)
            rulings = (*others, Ruling(admission.op, Stage.COMMITTED))
        after = View.of(newest.group, epoch, self._rng.randbytes(MARK_BYTES), roster)
        return Decide(proposal.ballot, after, rulings, proposal.view.mark)

    def _ask(self, proposal: Proposal, now: float) -> Decide | None:
        """Ask for what may have been chosen before, else for a view of those who reported."""
        if proposal.ballot < self.promised:
            return None  # outbid
        before = [report.accepted for report in proposal.reports.values() if report.accepted is not None]
        drawn: Accept | Decide = max(before, key=lambda one: one.ballot, default=None) or self._draw_up(
            proposal, proposal.view
        )
        accept = Accept(proposal.ballot, proposal.view.mark, drawn.view, drawn.rulings)
        if self._forced:
            return self._announce(Decide(accept.ballot, accept.view, accept.rulings, accept.before))
        self._accepted = proposal.asked = accept
        proposal.accepted |= proposal.votes
        proposal.since = now
        for member in sorted(proposal.members - {self._own}):
            self._out.send(member, accept)
        return self._chosen(proposal)

    def _chosen(self, proposal: Proposal) -> Decide | None:
        asked = proposal.asked
        if asked is None or len(proposal.accepted) < self._quorum(proposal.view):
            return None
        return self._announce(Decide(asked.ballot, asked.view, asked.rulings, asked.before))

    def _announce(self, decision: Decide) -> Decide:
        for member in decision.view.members:
            if member != self._own:
                self._out.send(member, decision)
        return decision

    def _roster(self, members: Iterable[NodeId], reports: dict[NodeId, BallotReport]) -> list[Member]:
        """Return each one's own line, from its own view."""
        lines = {member: {line.id: line for line in reports[member].view.roster} for member in members}
        return [lines[member][member] for member in members if member in lines[member]]


def compatible(own: NodeId, missing: dict[NodeId, tuple[NodeId, ...]]) -> list[NodeId]:
    """Return members that do not miss each other, this one among them: again and again, drop the one in most pairs."""
    members = set(missing)
    pairs = {frozenset((one, other)) for one, lost in missing.items() for other in lost if other in members} - {
        frozenset((member,)) for member in members
    }
    while pairs:
        worst = max(members - {own}, key=lambda member: (sum(member in pair for pair in pairs), member))
        members.discard(worst)
        pairs = {pair for pair in pairs if worst not in pair}
    return sorted(members)
