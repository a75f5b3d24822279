"""What the members of a group agree on, as one state machine without I/O: who they are, and what became of each call.

`Agreement` routes what is heard to its parts, in whose opening comments the rules stand:

    operations    the calls of this member's owner, up to their verdict
    coordinator   if this member is the first of its view: gathers everybody's calls, and decides
    presence      who is missing
    view_change   how the survivors agree on the next view, and what became of what was under way (`recovery`)
    admission     how newcomers get in

A message about an operation counts only in the view that it names, and only between that view's
coordinator and its members. One from a view that this member has yet to enter waits here until it
does. Sides of a split group that meet show each other their views (Sight); the one that does not
outrank the other goes out of the group as a whole, and its nodes apply to be let in again. So does
a member that was left out while it was stopped. Where nobody is found in any view for long, a
node that was once in the group goes on alone.

Peers are known by their keys and are members because members let them in: this guards against
crashes, pauses, loss, and messages that are nonsense, not against a member that lies.
"""

from collections import Counter, deque
from collections.abc import Iterable
from random import Random

from collectives import messages
from collectives.admission import Admission
from collectives.agreement_events import (
    Action,
    Begin,
    Done,
    Event,
    Greet,
    Heard,
    Install,
    Leave,
    Linked,
    OutOfGroup,
    Tick,
    Unlinked,
    Verdict,
)
from collectives.coordinator import Coordinator
from collectives.messages import OperationMessage, Stage
from collectives.operations import Operations
from collectives.outbox import Outbox
from collectives.presence import Presence
from collectives.recovery import alone
from collectives.timing import LAN, Timing
from collectives.types import Partition
from collectives.view_change import ViewChange
from collectives.views import ADMIT_TAG, MARK_BYTES, NOWHERE, SESSION_BYTES, Member, OpId, View, outranks
from protocol.identity import NodeId

MAX_HELD = 256  # messages from views yet to come
MAX_CONTACTS = 256  # nodes that were in a view with this one, or whom a seed spoke of


class Agreement:
    """One node's part. Without `seeds` it founds the group; else it asks to be let in."""

    def __init__(
        self,
        own: NodeId,
        address: str,
        group: bytes,
        rng: Random,
        now: float,
        *,
        seeds: Iterable[str] = (),
        timing: Timing = LAN,
        partition: Partition = Partition.CONTINUE,
    ) -> None:
        self.own = own
        self.refused: Counter[str] = Counter()  # what was heard and dropped, by reason
        self._address = address
        self._group = group
        self._rng = rng
        self._seeds = tuple(seeds)
        self._timing = timing
        self._partition = partition
        self._session = rng.randbytes(SESSION_BYTES)
        self._out = Outbox(own)
        self._presence = Presence(own, timing, last=now)
        self._operations = Operations(own, timing, self._out)
        self._change = ViewChange(own, timing, partition, rng, self._out, self._presence)
        self._admission = Admission(own, timing, rng, self._out, self._presence)
        self._coordinator: Coordinator | None = None
        self._contacts: dict[NodeId, str] = {}
        self._greeted: dict[NodeId | None, float] = {}  # when each may be dialled again
        self._sighted: dict[NodeId, float] = {}  # when each was last shown the view
        self._held: deque[tuple[NodeId, OperationMessage]] = deque(maxlen=MAX_HELD)
        self._mood: object = None
        self._epoch = 0  # the greatest that this node was in
        self._insider_heard = now
        self._left = False
        if not self._seeds:
            self._found(now)

    # --- the owner's questions ---

    @property
    def view(self) -> View | None:
        """The view that holds, or None outside."""
        return self._operations.view

    @property
    def fenced(self) -> bool:
        """Whether the next view is being agreed on."""
        return self._change.fenced

    @property
    def pending(self) -> bool:
        """Whether somebody waits to be let in, as of the last event."""
        return self.view is not None and (self._admission.elsewhere or bool(self._admission.waiting(self._out.now)))

    # --- events ---

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event and return what to do about it. Raises ValueError for a `Begin` that is not allowed."""
        if self._left:
            return []
        self._out.now = now
        self._presence.wake(now)
        match event:
            case Heard(member, message):
                self._heard(member, message, now)
            case Tick():
                self._tick(now)
            case Begin():
                self._begin(event, now)
            case Done():
                self._operations.done(event)
            case Linked(member, address):
                self._linked(member, address, now)
            case Unlinked(member):
                self._presence.unlink(member, self.view, now)
                self._sighted.pop(member, None)
            case Leave():
                self._leave()
        self._settle(now)
        return self._out.take()

    def _settle(self, now: float) -> None:
        """Handle what this member said to itself, and tell the others at once when there is news of who is here."""
        while self._out.inward:
            self._route(self.own, self._out.inward.popleft(), now)
        view = self.view
        if view is None:
            return
        mood = self._beat(view, now)
        if mood != self._mood:
            self._mood = mood
            for member in view.members:
                if member != self.own:
                    self._out.send(member, mood)

    def _begin(self, event: Begin, now: float) -> None:
        self._operations.begin(event, now)
        if self.view is None:
            self._operations.dismiss("this node is not in the group: admit() waits until it is let in")

    def _linked(self, member: NodeId, address: str, now: float) -> None:
        self._presence.link(member, address, now)
        if self.view is None:
            self._apply(member)
        elif member in self.view.ids:
            self._out.send(member, self._beat(self.view, now))
        else:
            self._show(member, self.view, now)

    def _leave(self) -> None:
        for member in self._presence.linked:
            self._out.send(member, messages.Goodbye())
        self._operations.leave(self._alone(), Verdict.EVICTED, "this member left")
        self._operations.dismiss("this member left", admissions=True)
        self._coordinator = None
        self._left = True

    # --- time ---

    def _tick(self, now: float) -> None:
        stuck = Verdict.EVICTED if self.view is None else Verdict.DEADLINE
        self._operations.tick(now, Verdict.MINORITY if self._change.minority else stuck)
        self._admission.tick(now)
        view = self.view
        if view is None:
            self._tick_outside(now)
            return
        decision = self._change.tick(view, self._operations.ledgers, now)
        self._operations.closed = self._change.fenced
        if decision is not None:
            self._decided(decision, now)
            return
        if self._coordinator is not None and not self._change.fenced:
            self._coordinator.advance(now)
            self._admit_by_itself(view, now)
        quiet = now - self._timing.heartbeat
        for member in view.members:
            if member != self.own and self._out.spoken_to.get(member, 0.0) <= quiet:
                self._out.send(member, self._beat(view, now))
        wanted = view.addresses | {name: line.address for name, (line, _) in self._admission.rumoured.items()}
        self._greet(wanted, 2 * self._timing.heartbeat, now)
        self._greet(self._contacts, 2 * self._timing.timeout, now)
        for member in self._presence.linked.keys() - view.ids - self._admission.applicants.keys():
            if now - self._sighted.get(member, 0.0) >= self._timing.timeout:
                self._show(member, view, now)

    def _tick_outside(self, now: float) -> None:
        for member in self._presence.linked:
            if self._out.spoken_to.get(member, 0.0) <= now - self._timing.heartbeat:
                self._apply(member)
        self._greet(self._contacts, 2 * self._timing.heartbeat, now)
        if now >= self._greeted.get(None, 0.0):
            self._greeted[None] = now + self._timing.timeout
            for seed in self._seeds if not self._presence.linked else ():
                self._out.do(Greet(None, seed))
        abandoned = now - self._insider_heard > 4 * self._timing.timeout
        if abandoned and self._epoch and self._partition is Partition.CONTINUE:
            self._found(now)

    def _greet(self, wanted: dict[NodeId, str], interval: float, now: float) -> None:
        """Dial whoever there is no link with; of two, the one with the lesser id dials first."""
        for member, address in wanted.items():
            if member == self.own or member in self._presence.linked or not address:
                continue
            due = self._greeted.get(member)
            if due is None and self.own > member:
                self._greeted[member] = now + 2 * self._timing.heartbeat
            elif due is None or now >= due:
                self._greeted[member] = now + interval
                self._out.do(Greet(member, address))

    # --- messages ---

    def _heard(self, member: NodeId, message: messages.Message, now: float) -> None:
        if member in self._presence.linked or (self.view is not None and member in self.view.ids):
            self._presence.heard[member] = now
        if isinstance(message, OperationMessage):
            self._route(member, message, now)
        elif isinstance(message, messages.Propose | messages.Report | messages.Decide):
            self._ballot(member, message, now)
        else:
            self._met(member, message, now)

    def _met(self, member: NodeId, message: messages.Message, now: float) -> None:
        """Take what nodes say of themselves, and newcomers of what they want."""
        view = self.view
        match message:
            case messages.Beat():
                self._beaten(member, message, now)
            case messages.Sight():
                self._sight(member, message.view, now)
            case messages.Welcome():
                if view is None and message.session == self._session and self._mine(message.view):
                    self._insider_heard = now
                    self._operations.admitted(message.view)
                    self._enter(message.view, now)
            case messages.Apply() if view is not None:
                self._admission.applied(member, message, view, now)
            case messages.Pending() if view is not None and member in view.ids:
                self._admission.rumour(message, view, now)
            case messages.Goodbye():
                self._presence.gone.add(member)
                self._admission.forget(member)
                self._contacts.pop(member, None)
            case _:
                self._refuse("stranger")

    def _ballot(
        self, member: NodeId, message: messages.Propose | messages.Report | messages.Decide, now: float
    ) -> None:
        """Take what concerns the next view."""
        match message:
            case messages.Propose():
                self._proposed(member, message, now)
            case messages.Report() if self._mine(message.view, member):
                self._decided(self._change.reported(member, message, now), now)
            case messages.Decide() if self._mine(message.view, member) and self._change.accepts(message):
                self._decided(message, now)
            case _:
                self._refuse("other ballot")

    def _route(self, member: NodeId, message: OperationMessage, now: float) -> None:
        """Hand a message about an operation to the part it is for, if it counts in the view that holds."""
        view, op = self.view, message.op
        if view is None or op.epoch > view.epoch:
            self._held.append((member, message))
            return
        if op.mark != view.mark:
            self._refuse("other view")
            if member not in view.ids:
                self._show(member, view, now)
            return
        if self._change.fenced or member not in view.ids:
            self._refuse("fenced" if self._change.fenced else "stranger")
            return
        self._insider_heard = now
        coordinator = self._coordinator
        match message:
            case messages.Initiate() if coordinator is not None:
                coordinator.initiate(member, message, now)
            case messages.Done() if coordinator is not None:
                coordinator.done(member, message, now)
            case messages.Ack() if coordinator is not None:
                coordinator.ack(member, message, now)
            case messages.Start() if member == view.coordinator:
                self._operations.start(message)
            case messages.Abort() if member == view.coordinator:
                self._operations.abort(message)
            case messages.Commit() if member == view.coordinator:
                self._committed(message, view, now)
            case _:
                self._refuse("not the coordinator")

    def _committed(self, message: messages.Commit, view: View, now: float) -> None:
        if view.coordinator != self.own:
            self._out.send(view.coordinator, messages.Ack(message.op))
        self._operations.commit(message.op)
        after = message.view
        if after is not None and message.op.tag == ADMIT_TAG and self._mine(after) and after.epoch > view.epoch:
            self._enter(after, now)

    def _beaten(self, member: NodeId, beat: messages.Beat, now: float) -> None:
        if beat.mark != NOWHERE:
            self._insider_heard = now
        view = self.view
        if view is None:
            return
        if member not in view.ids:
            if beat.mark != NOWHERE and now - self._sighted.get(member, float("-inf")) >= self._timing.heartbeat:
                self._show(member, view, now)
            return
        self._presence.beat(member, beat, view, now)
        self._change.round_seen(beat.round)
        self._admission.reaches[member] = frozenset(beat.reaches)
        if member == view.coordinator:
            self._admission.elsewhere = beat.pending
        if self._coordinator is not None and not self._change.fenced:
            self._coordinator.advance(now)
        if beat.mark != view.mark and beat.epoch < view.epoch:
            self._show(member, view, now)

    def _proposed(self, member: NodeId, message: messages.Propose, now: float) -> None:
        view = self.view
        if view is None or message.ballot.proposer != member:
            return
        if (member not in view.ids and message.epoch <= view.epoch) or member in self._presence.gone:
            self._show(member, view, now)
        elif self._change.proposed(member, message, view, self._operations.ledgers, now):
            self._operations.closed = True
        else:
            self._out.send(member, self._beat(view, now))

    def _sight(self, member: NodeId, theirs: View, now: float) -> None:
        """Somebody shows a view: this node finds out whether it was left out, or met the other side of a split."""
        if theirs.group != self._group or member not in theirs.ids:
            self._refuse("other group")
            return
        self._insider_heard = now
        view = self.view
        if view is None:
            self._remember(theirs)
            return
        if theirs.mark == view.mark or self.own in theirs.ids:
            return
        if member in view.ids:
            if theirs.epoch < view.epoch and theirs.sessions[member] == view.sessions[member]:
                return  # it has yet to enter this view
            self._presence.gone |= {
                other
                for other in theirs.ids & view.ids
                if theirs.epoch >= view.epoch or theirs.sessions[other] != view.sessions[other]
            }
        if outranks(theirs.ids, view.ids - self._presence.gone):
            self._yield(view, theirs, now)
        elif now - self._sighted.get(member, float("-inf")) >= self._timing.heartbeat:
            self._show(member, view, now)

    # --- views ---

    def _found(self, now: float) -> None:
        roster = (Member(self.own, self._address, self._session),)
        view = View.of(self._group, self._epoch + 1, self._rng.randbytes(MARK_BYTES), roster)
        self._operations.admitted(view)
        self._enter(view, now)

    def _decided(self, decision: messages.Decide | None, now: float) -> None:
        if decision is not None:
            self._enter(decision.view, now, {ruling.op: ruling.stage for ruling in decision.rulings})

    def _enter(self, view: View, now: float, rulings: dict[OpId, Stage] | None = None) -> None:
        before = self.view
        if before is not None:
            lost = ", ".join(sorted(before.ids - view.ids)[:4])
            reason = f"the group changed: {lost} failed" if lost else "the group changed"
            self._operations.leave(rulings or {}, Verdict.ABORT, reason)
            self._remember(before)
        self._epoch = view.epoch
        self._presence.enter(view, now)
        self._change.enter()
        self._admission.enter(view)
        self._contacts = {name: at for name, at in self._contacts.items() if name not in view.ids}
        self._greeted = {}
        self._out.do(Install(view))
        self._coordinator = None
        if view.coordinator == self.own:
            self._coordinator = Coordinator(
                self.own,
                view,
                self._out,
                ready=lambda since: self._admission.ready(view, since, self._out.now),
                admit=lambda: self._admission.view_with(view, self._out.now),
                holds=self._operations.holds,
            )
        for member in view.ids - before.ids if before is not None else ():
            self._out.send(member, messages.Welcome(view.sessions[member], view))
        self._operations.enter(view)
        held = [(member, message) for member, message in self._held if message.op.epoch >= view.epoch]
        self._held.clear()
        for member, message in held:
            self._route(member, message, now)

    def _yield(self, view: View, theirs: View, now: float) -> None:
        """Leave one's own side for the one that outranks it."""
        reason = "the others went on without this member"
        self._operations.leave(self._alone(), Verdict.EVICTED, reason)
        self._operations.dismiss(reason)
        self._coordinator = None
        self._change.enter()
        self._presence.gone.clear()
        self._session = self._rng.randbytes(SESSION_BYTES)
        self._remember(view)
        self._remember(theirs)
        self._insider_heard = now
        self._out.do(OutOfGroup(reason))
        for member in self._presence.linked:
            self._apply(member)

    def _alone(self) -> dict[OpId, Stage]:
        """Rule on the open calls from what this member knows by itself."""
        view = self.view
        if view is None:
            return {}
        calls = self._operations.open.values()
        return {call.op: alone(view.members, self.own, call.stage) for call in calls}

    def _admit_by_itself(self, view: View, now: float) -> None:
        if view.members == (self.own,) and view.epoch == 1 and not self._operations.open:
            after = self._admission.view_with(view, now)
            if after is not None:
                self._enter(after, now)

    # --- within ---

    def _beat(self, view: View, now: float) -> messages.Beat:
        reaches = tuple(sorted(self._admission.waiting(now)))
        missing = tuple(sorted(self._presence.missing(view, now)))
        pending = self._coordinator is not None and bool(reaches)
        return messages.Beat(view.mark, view.epoch, self._change.promised.round, missing, reaches, pending)

    def _apply(self, member: NodeId) -> None:
        self._out.send(member, messages.Apply(self._address, self._session, self._epoch))

    def _show(self, member: NodeId, view: View, now: float) -> None:
        self._sighted[member] = now
        self._out.send(member, messages.Sight(view))

    def _remember(self, view: View) -> None:
        for member, address in view.addresses.items():
            if member != self.own and (member in self._contacts or len(self._contacts) < MAX_CONTACTS):
                self._contacts[member] = address

    def _mine(self, view: View, member: NodeId | None = None) -> bool:
        """Tell whether a view is one of this group, with `member` (by default this node) in it."""
        return view.group == self._group and (member or self.own) in view.ids

    def _refuse(self, reason: str) -> None:
        self.refused[reason] += 1
