"""Dispatches messages: each goes to the part it is for, if it counts.

A message about an operation counts only in the view that it names, and only between that view's
coordinator and its members. One from a view that this node has yet to enter is held until it does, if it can
have been sent before.

Sides of a split group that meet show each other their views (ViewNotice), which count if they are proven (see
`witnesses`). The side that is outranked goes out of the group as a whole, and its nodes apply to be let in again. So
does a member that was left out while it was stopped: members that show it a later view without it count as gone from
its own view, and the later view is larger than the rest of that.
"""

from collections import deque

from collectives.agreement import messages
from collectives.agreement.coordinator import Coordinator
from collectives.agreement.events import Drop
from collectives.agreement.member import MemberState
from collectives.agreement.messages import OperationMessage
from collectives.agreement.views import NOWHERE, View
from collectives.types import GroupTiming
from protocol.identity import NodeId

# Messages of one node that are held for views yet to come. A member may have as many calls open. A stranger, which was
# in no view with this node, makes few calls before it is in; its messages are held only until its link closes.
MAX_HELD, MAX_HELD_OF_STRANGER = 256, 8


class Dispatcher:
    """Takes a node's messages to the parts of its `MemberState`."""

    def __init__(self, state: MemberState, timing: GroupTiming, now: float) -> None:
        self.insider_heard = now  # when a node in a view was last heard
        self._state = state
        self._timing = timing
        self._shown: dict[NodeId, float] = {}  # when each was last shown the view
        self._held: dict[NodeId, deque[OperationMessage]] = {}

    def take(self, member: NodeId, message: messages.Message, now: float) -> None:
        """Take one message from the node at the other end of a link."""
        detector, view = self._state.detector, self._state.view
        if member in detector.linked or (view is not None and member in view.ids):
            detector.heard[member] = now
        if isinstance(message, messages.Apply) and member in detector.linked:
            detector.outside.add(member)
        else:
            detector.outside.discard(member)
        if isinstance(message, OperationMessage):
            self.operation(member, message, now)
        elif isinstance(message, messages.BallotMessage):
            self._ballot(member, message, now)
        else:
            self._word(member, message, now)

    def release(self, now: float) -> bool:
        """Take what was held for the view that holds now. Returns whether there was any."""
        view = self._state.view
        if view is None or not any(m.op.epoch <= view.epoch for queue in self._held.values() for m in queue):
            return False
        held, self._held = self._held, {}
        for member, messages_of_it in held.items():
            for message in messages_of_it:
                self.operation(member, message, now)
        return True

    def show(self, member: NodeId, now: float, pause: float = 0.0) -> None:
        """Let a node that is not in the view see it, unless it did within `pause`."""
        view = self._state.view
        if view is not None and now - self._shown.get(member, float("-inf")) >= pause:
            self._shown[member] = now
            self._state.out.send(member, messages.ViewNotice(view))

    def unlinked(self, member: NodeId) -> None:
        """Forget what a node was shown, and what one said that was in no view with this one."""
        self._shown.pop(member, None)
        self._state.witnesses.unlinked(member)
        if member not in self._state.witnesses.known:
            self._held.pop(member, None)

    # --- operations ---

    def operation(self, member: NodeId, message: OperationMessage, now: float) -> None:
        """Take a message about an operation, from this node's own coordinator perhaps."""
        state, op = self._state, message.op
        view = state.view
        if view is None or op.epoch > view.epoch:
            if isinstance(message, messages.OperationStart | messages.Commit):
                return  # nothing starts in a view in which this node has called nothing yet; and they may be long
            known = member == state.own or member in state.witnesses.known
            queue = self._held.setdefault(member, deque(maxlen=MAX_HELD if known else MAX_HELD_OF_STRANGER))
            queue.append(message)
        elif op.mark != view.mark:
            if member not in view.ids:
                self.show(member, now, self._timing.heartbeat)
        elif isinstance(message, messages.Evict) and member == view.coordinator:
            state.left_out(message.reason)  # also when it is fenced: it may leave whenever it likes
        elif state.change.fenced or member not in view.ids:
            return
        elif isinstance(message, messages.OperationStart | messages.Commit | messages.Abort):
            self._verdict(member, message, view, now)
        elif state.coordinator is not None:
            self._coordinate(member, message, state.coordinator, now)

    def _coordinate(self, member: NodeId, message: OperationMessage, coordinator: Coordinator, now: float) -> None:
        self.insider_heard = now
        match message:
            case messages.Initiate():
                self._state.detector.called[member] = now
                coordinator.initiate(member, message)
            case messages.OperationDone():
                coordinator.done(member, message)
            case messages.Ack():
                coordinator.ack(member, message)

    def _verdict(self, member: NodeId, message: OperationMessage, view: View, now: float) -> None:
        state = self._state
        if member != view.coordinator:
            return
        self.insider_heard = now
        match message:
            case messages.OperationStart():
                state.detector.called.update(dict.fromkeys(view.members, now))
                state.operations.start(message)
            case messages.Abort():
                state.operations.abort(message)
            case messages.Commit(op, after):
                if member != state.own:
                    state.out.send(member, messages.Ack(op))
                state.operations.commit(op)
                if after is not None and after.epoch > view.epoch and state.concerns(after):
                    state.enter(after, now)

    # --- ballots ---

    def _ballot(self, member: NodeId, message: messages.BallotMessage, now: float) -> None:
        state, view = self._state, self._state.view
        match message:
            case messages.Propose() if view is not None and message.ballot.proposer == member:
                self._proposed(member, message, view, now)
            case messages.BallotReport() if state.concerns(message.view, member):
                state.decided(state.change.reported(member, message, now), now)
            case messages.Decide() if message.ballot.proposer == member and state.concerns(message.view, member):
                if state.change.accepts(message):
                    state.decided(message, now)
            case _:
                pass  # it is of another ballot, or of somebody who has no say

    def _proposed(self, member: NodeId, message: messages.Propose, view: View, now: float) -> None:
        state = self._state
        stranger = member not in view.ids and message.epoch <= view.epoch
        if member not in state.witnesses.known:
            return
        if stranger or member in state.detector.gone:
            self.show(member, now)
        elif state.change.proposed(member, message, view, state.operations.ledgers, now):
            state.operations.closed = True
        else:
            state.out.send(member, state.beat(view, now))

    # --- what nodes say of themselves ---

    def _word(self, member: NodeId, message: messages.Message, now: float) -> None:
        state, view = self._state, self._state.view
        match message:
            case messages.Beat():
                self._beat(member, message, now)
            case messages.ViewNotice():
                self._notice(member, message.view, now)
            case messages.Welcome() if state.welcomed(member, message, now):
                self.insider_heard = now
            case messages.Apply() if view is not None:
                state.scores.applied(member, message, view, now)
            case messages.Pending() if view is not None and member in view.ids:
                state.scores.rumour(message, view, now)
            case messages.Goodbye():
                state.scores.forget(member)
                state.contacts.pop(member, None)
                if view is not None and member in view.ids:
                    state.detector.gone.add(member)
            case _:
                pass

    def _beat(self, member: NodeId, beat: messages.Beat, now: float) -> None:
        if beat.mark != NOWHERE:
            self.insider_heard = now
        state, view = self._state, self._state.view
        if view is None:
            return
        if member not in view.ids:
            self.show(member, now, self._timing.heartbeat)
            return
        state.detector.beat(member, beat, view, now)
        state.change.round_seen(beat.round)
        state.scores.reaches[member] = frozenset(beat.reaches)
        state.scores.says_pending[member] = beat.pending
        if state.coordinator is not None and not state.change.fenced:
            state.coordinator.advance()

    def _notice(self, member: NodeId, theirs: View, now: float) -> None:
        """Find out whether this node was left out, or met the other side of a split."""
        state, view = self._state, self._state.view
        if not state.concerns(theirs, member):
            state.out.do(Drop(member, "its view is that of another group"))
            return
        self.insider_heard = now
        if view is None:
            state.remember(theirs)
            return
        if theirs.mark == view.mark or state.own in theirs.ids:
            return
        if member not in view.ids and not state.witnesses.convinced(member, theirs):
            state.remember(theirs)  # so that its other members are dialled, and bear it out
            return
        gone = state.detector.gone
        if member in view.ids:
            if theirs.epoch < view.epoch and theirs.sessions[member] == view.sessions[member]:
                state.detector.astray.setdefault(member, now)
                return  # it has yet to enter this view, or was let in by two groups and has entered that of the other
            later = theirs.epoch >= view.epoch
            gone |= {m for m in theirs.ids & view.ids if later or theirs.sessions[m] != view.sessions[m]}
        if state.outranked(view, theirs):
            state.yield_to(theirs)
        else:
            self.show(member, now, self._timing.heartbeat)
