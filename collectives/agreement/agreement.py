"""Group membership and atomic commit as one state machine without I/O: who is in the group, what became of each call.

`Agreement.handle(event, now) -> actions` is what its driver sees. The theory of operation:

**Views** (`views`). A view is a fixed set of members, sorted by id, with an epoch and a random mark. A member is an
id and a session: a process that was started anew forgot what it promised, and is another member. The first
one coordinates. Nothing said in one view counts in another.

**Operations** (`participant`, `coordinator`): two-phase commit among all members of a view. A call is named by its tag
and by how many calls of that tag were made in its view before it. A call that has not started when the view ends is
called again in the next one.

    a call at a member     CALLED -> STARTED -> DONE -> COMMITTED, or ABORTED from any of the first three
    at the coordinator     CALLED -> STARTED -> DONE -> HOLDS (it sent Commit) -> COMMITTED

**Failures** (`failure_detector`): silence, closed links, and what the others say. They only ever cause a view change. A
live member that is taken for dead loses its place; nobody loses a result.

**View change** (`view_change`). A member that promises a ballot is fenced: it takes no further part in its view, and
reports what it knows. From the reports follows what became of the operations (`recovery`), by a rule that no two sides
of a split group can apply with different results, whatever they know.

    a member     outside -> inside -> fenced -> inside the next view, or outside
                 outside -Welcome-> inside      inside -Propose-> fenced
                 fenced -Decide-> inside        inside, fenced -a view that outranks its own-> outside

The member that decides a ballot enters at once: each side of a split group goes on, and when they meet the lesser goes
out of the group as a whole. If nobody is found in any view for long, a node that was once in the group goes on alone.

    a ballot     idle -> proposed (Propose, BallotReport) -> decided (Decide)

**Joining** (`join`, `member`). A node outside applies; an admission is an operation of all members, whose commit leads
to the view with the newcomers.

**Whose word counts** (`dispatch`, `witnesses`). Peers are known by their keys and are members because members let them
in. This guards against crashes, pauses, loss, malformed messages and nodes that were not let in. It does not guard
against a member that lies.

    message              from -> to                             answered by
    Beat                 member -> members                      a ViewNotice, if it is from another view
    Apply, Pending       outside -> members -> coordinator      Welcome
    Welcome              member -> newcomer                     Beat
    ViewNotice           member -> node in another view         ViewNotice, or going out
    Initiate             member -> coordinator                  OperationStart, once all have; Abort
    OperationStart       coordinator -> members                 OperationDone
    OperationDone        member -> coordinator                  Commit, once all have; Abort
    Commit               coordinator -> members                 Ack
    Evict                coordinator -> member left out         Goodbye, and Apply once its owner calls ADMIT
    Propose              proposer -> members                    BallotReport, or Beat with a greater round
    Decide               proposer -> members                    Beat
    Goodbye              member that leaves -> all
"""

from collections.abc import Iterable
from random import Random

from collectives.agreement.dispatch import Dispatcher
from collectives.agreement.events import (
    Action,
    Begin,
    CallVerdict,
    Dial,
    Event,
    GiveUp,
    Heard,
    Leave,
    Linked,
    Performed,
    Tick,
    Unlinked,
)
from collectives.agreement.failure_detector import FailureDetector
from collectives.agreement.fields import SESSION_BYTES
from collectives.agreement.member import MemberState
from collectives.agreement.messages import Beat, OperationMessage
from collectives.agreement.outbox import Outbox
from collectives.agreement.views import Member, View
from collectives.types import LAN, GroupTiming
from protocol.identity import NodeId


class Agreement:
    """One node's part. Without `seeds` it founds the group; else it asks to be let in."""

    def __init__(  # what a member is takes this many words, and most have a default
        self,
        own: NodeId,
        address: str,
        group: bytes,
        rng: Random,
        now: float,
        *,
        seeds: Iterable[str] = (),
        timing: GroupTiming = LAN,
    ) -> None:
        """Begin at `now` (s, on the steady clock).

        `address` is where others dial this node, "" if they cannot; `group` is at most 64 bytes;
        `seeds` are addresses, as `Dial` hands them out. Links are made only with nodes that may join.
        """
        self.own = own
        self._seeds = tuple(seeds)
        self._timing = timing
        self._out = Outbox(own)
        self._detector = FailureDetector(own, timing, last=now)
        line = Member(own, address, rng.randbytes(SESSION_BYTES))
        self._state = MemberState(line, group, rng, self._out, self._detector, timing)
        self._dispatcher = Dispatcher(self._state, timing, now)
        self._dialled: dict[NodeId | None, float] = {}  # when each may be dialled again
        self._told: Beat | None = None  # what the others were last told of this node
        self._left = False
        if not self._seeds:
            self._state.found(now)

    # --- the owner's questions ---

    @property
    def view(self) -> View | None:
        """The view that holds, or None outside."""
        return self._state.view

    @property
    def fenced(self) -> bool:
        """Whether the next view is being agreed on."""
        return self._state.change.fenced

    @property
    def pending(self) -> bool:
        """Whether somebody can be let in, as of the last event: it asks, and every member reaches it."""
        view, admission = self.view, self._state.scores
        if view is None or self._state.coordinator is None:
            return view is not None and admission.says_pending.get(view.coordinator, False)
        return bool(admission.admissible(view, self._out.now))

    @property
    def unreached(self) -> tuple[NodeId, ...]:
        """Outside: the members of the group, as far as it is known, that there is no link with."""
        return (
            () if self.view is not None else tuple(sorted(self._state.contacts.keys() - self._detector.linked.keys()))
        )

    def last_signs(self) -> dict[NodeId, tuple[float | None, float | None]]:
        """Return when each other member's last known call was made, and when it was last heard."""
        detector, others = self._detector, self.view.members if self.view is not None else ()
        return {name: (detector.called.get(name), detector.heard.get(name)) for name in others if name != self.own}

    # --- events ---

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event and return what to do about it. Raises BadArgument for a call that is not allowed."""
        if self._left:
            return []
        self._out.now = now
        self._detector.wake(now)
        match event:
            case Heard(member, message):
                self._dispatcher.take(member, message, now)
            case Tick():
                self._tick(now)
            case Begin():
                self._begin(event, now)
            case Performed(op, _, reason, blames):
                self._state.operations.done(event)
                if (
                    blames
                    and self._state.coordinator is not None
                    and self.view is not None
                    and op.mark == self.view.mark
                ):
                    self._state.coordinator.blame(NodeId(blames), op, reason)
            case GiveUp(tag):
                self._state.operations.give_up(tag)
            case Linked(member, address):
                self._linked(member, address, now)
            case Unlinked(member):
                self._detector.unlink(member, self.view, now)
                self._dispatcher.unlinked(member)
                self._out.spoken_to.pop(member, None)
            case Leave():
                self._state.depart()
                self._left = True
        self._settle(event, now)
        return self._out.take()

    def _settle(self, event: Event, now: float) -> None:
        """Handle this member's messages to itself, and send the others a Beat at once if it has changed."""
        while self._out.inward or self._dispatcher.release(now):
            if self._out.inward:
                self._dispatcher.operation(self.own, self._out.inward.popleft(), now)
        view = self.view
        if view is None:
            return
        has_told = self._told is not None and self._told.mark == view.mark
        if has_told and isinstance(event, Heard) and isinstance(event.message, OperationMessage):
            return  # no such message changes the Beat
        if not has_told:
            self._dialled.clear()
            self._out.forget(self._detector.linked.keys() | view.ids)
        beat = self._state.beat(view, now)
        if beat != self._told:
            self._told = beat
            for member in view.members:
                if member != self.own:
                    self._out.send(member, beat)

    def _begin(self, event: Begin, now: float) -> None:
        operations = self._state.operations
        operations.begin(event, now)
        if self.view is None:
            operations.dismiss(CallVerdict.EVICTED, self._state.why_out)

    def _linked(self, member: NodeId, address: str, now: float) -> None:
        self._detector.link(member, address, now)
        if self.view is None:
            self._state.apply(member)
        elif member in self.view.ids:
            self._out.send(member, self._state.beat(self.view, now))
            self._state.operations.linked(member)
        else:
            self._dispatcher.show(member, now)

    # --- time ---

    def _tick(self, now: float) -> None:
        state, view = self._state, self.view
        state.operations.tick(now, CallVerdict.EVICTED if view is None else CallVerdict.DEADLINE)
        state.scores.tick(now)
        if view is None:
            self._tick_outside(now)
            return
        decision = state.change.tick(view, state.operations.ledgers, now)
        state.operations.closed = state.change.fenced
        if decision is not None:
            state.decided(decision, now)
            return
        if state.coordinator is not None and not state.change.fenced:
            state.coordinator.tick(now)
            self._admit_by_itself(view, now)
        for member in view.members:
            if member != self.own and self._quiet_to(member, now):
                self._out.send(member, state.beat(view, now))
        rumoured = {name: line.address for name, (line, _) in state.scores.rumoured.items()}
        self._dial(view.addresses | rumoured, 2 * self._timing.heartbeat, now)
        self._dial(state.contacts, 2 * self._timing.timeout, now)
        wanted = view.addresses | rumoured | state.contacts
        self._dialled = {member: due for member, due in self._dialled.items() if member in wanted}
        for member in sorted(self._detector.linked.keys() - view.ids - state.scores.applicants.keys()):
            self._dispatcher.show(member, now, self._timing.timeout)

    def _tick_outside(self, now: float) -> None:
        state = self._state
        for member in self._detector.linked:
            if self._quiet_to(member, now):
                state.apply(member)
        self._dial(state.contacts, 2 * self._timing.heartbeat, now)
        if now >= self._dialled.get(None, 0.0):
            self._dialled[None] = now + self._timing.timeout
            for seed in self._seeds if not self._detector.linked else ():
                self._out.do(Dial(None, seed))
        abandoned = now - self._dispatcher.insider_heard > 4 * self._timing.timeout
        if abandoned and state.epoch and not state.resting:
            state.found(now)

    def _quiet_to(self, member: NodeId, now: float) -> bool:
        return now - self._out.spoken_to.get(member, float("-inf")) >= self._timing.heartbeat

    def _dial(self, wanted: dict[NodeId, str], interval: float, now: float) -> None:
        """Dial the nodes without a link; of two, the one with the lesser id dials first."""
        for member, address in wanted.items():
            if member == self.own or member in self._detector.linked or not address:
                continue
            due = self._dialled.get(member)
            if due is None and self.own > member:
                self._dialled[member] = now + 2 * self._timing.heartbeat
            elif due is None or now >= due:
                self._dialled[member] = now + interval
                self._out.do(Dial(member, address))

    def _admit_by_itself(self, view: View, now: float) -> None:
        if view.members == (self.own,) and view.epoch == 1 and not self._state.operations.open:
            after = self._state.scores.view_with(view, now)
            if after is not None:
                self._state.enter(after, now)
