"""Where a node stands: in which view, with which parts at work, and how it goes from one to the next.

outside --Welcome--> in a view --Commit of an admission, or a decision on a ballot--> the next view
   ^                     |
   +---- outranked ------+       a founder, and a node that finds nobody for long, begin alone
"""

from random import Random

from collectives.agreement import messages
from collectives.agreement.coordinator import Coordinator
from collectives.agreement.events import CallVerdict, Install, OutOfGroup
from collectives.agreement.failure_detector import FailureDetector
from collectives.agreement.fields import MARK_BYTES, SESSION_BYTES
from collectives.agreement.join import Applicants
from collectives.agreement.messages import Ruling
from collectives.agreement.outbox import Outbox
from collectives.agreement.participant import Operations
from collectives.agreement.recovery import alone
from collectives.agreement.view_change import ViewChange
from collectives.agreement.views import ADMIT_TAG, Member, OpId, View, outranks
from collectives.agreement.witnesses import Witnesses
from collectives.types import GroupTiming
from protocol.identity import NodeId

MAX_CONTACTS = 256  # nodes that were in a view with this one, or that a seed named


class MemberState:
    """A node's view and the parts that work in it."""

    def __init__(
        self,
        own: Member,
        group: bytes,
        rng: Random,
        out: Outbox,
        detector: FailureDetector,
        timing: GroupTiming,
    ) -> None:
        self.own = own.id
        self.out = out
        self.detector = detector
        self.operations = Operations(timing, out)
        self.change = ViewChange(own.id, timing, rng, out, detector)
        self.scores = Applicants(own.id, timing, rng, out, detector)
        self.witnesses = Witnesses(own.id)
        self.coordinator: Coordinator | None = None
        self.contacts: dict[NodeId, str] = {}  # addresses of nodes that are in no view with this one
        self.epoch = 0  # the greatest that this node was in
        self.why_out = "this node is not in the group"
        self.resting = False  # the others left it out: it asks to be let in while its owner does
        self._line = own
        self._group = group
        self._rng = rng

    @property
    def view(self) -> View | None:
        """The view that holds, or None outside."""
        return self.operations.view

    def concerns(self, view: View, member: NodeId | None = None) -> bool:
        """Tell whether a view is one of this group, with `member` (by default this node) in it."""
        return view.group == self._group and (member or self.own) in view.ids

    def named_in(self, view: View) -> bool:
        """Tell whether a view is one of this group with this node, and this run of it, as a member."""
        return self.concerns(view) and view.sessions[self.own] == self._line.session

    def outranked(self, view: View, theirs: View) -> bool:
        """Tell whether the side with the view `theirs` goes on, rather than that with this node's."""
        return outranks(theirs.ids, view.ids - self.detector.gone)

    # --- in ---

    def found(self, now: float) -> None:
        """Begin alone."""
        view = View.of(self._group, self.epoch + 1, self._rng.randbytes(MARK_BYTES), [self._line])
        self.operations.admitted(view)
        self.enter(view, now)

    def welcomed(self, member: NodeId, message: messages.Welcome, now: float) -> bool:
        """Come in, if this is the answer to what this node asked. Returns whether it is.

        Anybody in that view may welcome it. But as long as members that this node was in a view with speak from one,
        only they may. (Those that are outside do not count: they may wait for this node to come in.)
        """
        # Members answer one that asks once a timeout (`Applicants.applied`).
        heard, since = self.detector.heard, now - 2 * self.detector.timing.timeout
        inside = self.witnesses.known.keys() - self.detector.outside
        if not self.witnesses.knows(member) and any(heard.get(name, since) > since for name in inside):
            return False
        mine = self.view is None and message.session == self._line.session and self.concerns(message.view)
        if mine:
            self.operations.admitted(message.view)
            self.enter(message.view, now)
        return mine

    def decided(self, decision: messages.Decide | None, now: float) -> None:
        """Go on as a ballot decided, if it did. The view may lack this node, if others drew it up."""
        if decision is not None and self.named_in(decision.view):
            self.enter(decision.view, now, decision.rulings)
        elif decision is not None:
            self.yield_to(decision.view)

    def enter(self, view: View, now: float, rulings: tuple[Ruling, ...] = ()) -> None:
        """Go over to `view`; what had started in the one before ends as ruled, the rest is called again in this one."""
        before = self.view
        if before is not None:
            lost = ", ".join(sorted(before.ids - view.ids)[:4])
            reason = f"the group changed: {lost} failed" if lost else "the group changed"
            self.operations.leave({ruling.op: ruling.stage for ruling in rulings}, CallVerdict.ABORT, reason)
            self.remember(before)
        self.epoch = view.epoch
        self.resting = False
        self.witnesses.enter(view)
        self.detector.enter(view, now)
        self.change.enter()
        self.scores.enter(view)
        self.contacts = {name: address for name, address in self.contacts.items() if name not in view.ids}
        self.out.do(Install(view))
        self.coordinator = self._coordinate(view) if view.coordinator == self.own else None
        for member in sorted(view.ids - before.ids) if before is not None else ():
            self.out.send(member, messages.Welcome(view.sessions[member], view))
        self.operations.enter(view)

    def _coordinate(self, view: View) -> Coordinator:
        return Coordinator(
            self.own,
            view,
            self.out,
            self.detector.timing,
            admit=lambda: self.scores.view_with(view, self.out.now),
            holds=self.operations.holds,
            evict=self._evict,
        )

    def _evict(self, member: NodeId, op: OpId, reason: str) -> None:
        """Tell a member to go."""
        self.out.send(member, messages.Evict(op, reason))
        if member != self.own:
            self.detector.gone.add(member)

    # --- out ---

    def yield_to(self, theirs: View) -> None:
        """Go out of the group, because the side with `theirs` goes on; ask it to be let in."""
        self._go_out("the others went on without this member", theirs)

    def left_out(self, reason: str) -> None:
        """Go out of the group, as its coordinator says, and leave the others alone until the owner calls ADMIT."""
        self.resting = True
        self._say_goodbye()
        self._go_out(f"the others left this member out: {reason}")

    def _go_out(self, reason: str, theirs: View | None = None) -> None:
        view, self.why_out = self.view, reason
        self._end(CallVerdict.EVICTED, reason)
        self._line = self._line._replace(session=self._rng.randbytes(SESSION_BYTES))
        for known in (view, theirs):
            if known is not None:
                self.remember(known)
        self.out.do(OutOfGroup(reason))
        for member in self.detector.linked:
            self.apply(member)

    def depart(self) -> None:
        """Leave for good."""
        self._say_goodbye()
        self._end(CallVerdict.CLOSED, "this member left")

    def _say_goodbye(self) -> None:
        for member in self.detector.linked:
            self.out.send(member, messages.Goodbye())

    def _end(self, verdict: CallVerdict, reason: str) -> None:
        view = self.view
        if view is not None:
            calls = self.operations.open.values()
            rulings = {call.op: alone(view.members, self.own, call.stage) for call in calls}
            self.operations.leave(rulings, verdict, reason)
        self.operations.dismiss(verdict, reason)
        self.coordinator = None
        self.change.enter()
        self.detector.gone.clear()

    # --- what others are told ---

    def beat(self, view: View, now: float) -> messages.Beat:
        """Return what this member says of itself."""
        reaches = tuple(sorted(self.scores.waiting(now)))
        missing = tuple(sorted(self.detector.missing(view, now)))
        pending = self.coordinator is not None and bool(self.scores.admissible(view, now))
        return messages.Beat(view.mark, view.epoch, self.change.promised.round, missing, reaches, pending)

    def apply(self, member: NodeId) -> None:
        """Ask to be let in."""
        if self.resting and ADMIT_TAG not in self.operations.open:
            return
        self.out.send(member, messages.Apply(self._line.address, self._line.session, self.epoch))

    def remember(self, view: View) -> None:
        """Keep where the members of a view are dialled."""
        for member, address in view.addresses.items():
            if member != self.own and (member in self.contacts or len(self.contacts) < MAX_CONTACTS):
                self.contacts[member] = address
