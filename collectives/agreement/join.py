"""Letting newcomers in.

A node outside sends Apply to every member it has a link with, each heartbeat. Members answer with their
view, so that it can link with all, and tell the coordinator, which tells all, so that either end dials.
Only an applicant that every member reaches can be let in, and is *pending*; any other waits, and slows nobody. When
every member has called ADMIT, the commit of that operation carries the view with those whom everybody reaches (they
need not reach each other yet: see participant), and everybody who enters that view welcomes them. A newcomer whose
welcome is lost goes on applying with the same session, and any member that hears it welcomes it again. One that was
started anew, or was out of the group meanwhile, applies with another session, and is not mistaken for the member that
it was.

A founder that is still alone admits applicants by itself, while it has no call outstanding.
"""

from dataclasses import dataclass, field
from random import Random

from collectives.agreement.failure_detector import FailureDetector
from collectives.agreement.fields import MARK_BYTES, MAX_MEMBERS
from collectives.agreement.messages import MAX_PENDING, Apply, Pending, ViewNotice, Welcome
from collectives.agreement.outbox import Outbox
from collectives.agreement.views import Member, View
from collectives.types import GroupTiming
from protocol.identity import NodeId


@dataclass
class Applicant:
    """One that asks to be let in, as it was last heard."""

    line: Member
    epoch: int
    heard: float
    answered: float  # when it was last shown the view


@dataclass
class Applicants:
    """The applicants outside, as one member of the view knows them."""

    own: NodeId
    timing: GroupTiming
    rng: Random
    outbox: Outbox
    detector: FailureDetector
    applicants: dict[NodeId, Applicant] = field(default_factory=dict)  # heard from here
    rumoured: dict[NodeId, tuple[Member, float]] = field(default_factory=dict)  # heard of, and when
    reaches: dict[NodeId, frozenset[NodeId]] = field(default_factory=dict)  # whom each other member hears
    says_pending: dict[NodeId, bool] = field(default_factory=dict)  # whether each other member's beat says so

    def enter(self, view: View) -> None:
        """A view was installed."""
        self.applicants = {name: applicant for name, applicant in self.applicants.items() if name not in view.ids}
        self.rumoured = {name: rumour for name, rumour in self.rumoured.items() if name not in view.ids}
        # A member's word holds until it says otherwise: it may have entered, and said so, before this one.
        self.reaches = {name: those for name, those in self.reaches.items() if name in view.ids}
        self.says_pending = {name: says for name, says in self.says_pending.items() if name in view.ids}

    def forget(self, member: NodeId) -> None:
        """It left."""
        self.applicants.pop(member, None)
        self.rumoured.pop(member, None)

    def applied(self, member: NodeId, message: Apply, view: View, now: float) -> None:
        """`member` asks to be let in."""
        if member in view.ids:
            if view.sessions[member] == message.session:
                self.outbox.send(member, Welcome(message.session, view))
            else:
                self.detector.gone.add(member)
            return
        known = self.applicants.get(member)
        if known is None and len(self.applicants) >= MAX_PENDING:
            return
        line = Member(member, message.address, message.session)
        answered = known.answered if known is not None else float("-inf")
        news = known is None or known.line != line
        if news or now - answered >= self.timing.timeout:
            answered = now
            self.outbox.send(member, ViewNotice(view))
            self._tell(view, line)
        self.applicants[member] = Applicant(line, message.epoch, now, answered)

    def rumour(self, message: Pending, view: View, now: float) -> None:
        """A member names the applicants."""
        for line in message.newcomers:
            if line.id in view.ids or line.id == self.own:
                continue
            known = self.rumoured.get(line.id)
            if known is None and len(self.rumoured) >= MAX_PENDING:
                continue
            news = known is None or now - known[1] >= self.timing.timeout / 2
            self.rumoured[line.id] = (line, now)
            if news and view.coordinator == self.own:
                self._tell(view, line)

    def waiting(self, now: float) -> dict[NodeId, Applicant]:
        """Return the applicants that are linked here and still ask."""
        fresh = 2 * self.timing.timeout
        return {
            name: applicant
            for name, applicant in self.applicants.items()
            if now - applicant.heard < fresh and name in self.detector.linked
        }

    def tick(self, now: float) -> None:
        """Forget applicants that no longer ask."""
        fresh = 2 * self.timing.timeout
        self.applicants = {
            name: applicant for name, applicant in self.applicants.items() if now - applicant.heard < fresh
        }
        self.rumoured = {name: rumour for name, rumour in self.rumoured.items() if now - rumour[1] < fresh}

    def admissible(self, view: View, now: float) -> list[Applicant]:
        """Return the applicants that every member reaches, as far as this one knows."""
        return [
            applicant
            for name, applicant in sorted(self.waiting(now).items())
            if all(name in self.reaches.get(member, frozenset()) for member in view.members if member != self.own)
        ]

    def view_with(self, view: View, now: float) -> View | None:
        """Return the view with all applicants that every member reaches, None if there is none."""
        chosen = self.admissible(view, now)[: MAX_MEMBERS - len(view.members)]
        if not chosen:
            return None
        epoch = max(view.epoch, *(applicant.epoch for applicant in chosen)) + 1
        roster = (*view.roster, *(applicant.line for applicant in chosen))
        return View.of(view.group, epoch, self.rng.randbytes(MARK_BYTES), roster)

    def _tell(self, view: View, line: Member) -> None:
        others = [view.coordinator] if view.coordinator != self.own else list(view.members)
        for member in others:
            if member != self.own:
                self.outbox.send(member, Pending((line,)))
