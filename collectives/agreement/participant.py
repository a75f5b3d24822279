"""The calls of this member's owner, from Begin to their verdict, in the view that holds.

- A call is told to the coordinator when it is made, and again when a link with the coordinator comes up:
  newcomers are in one view before they reach each other, and what is said without a link is lost.
- A call may be ended as aborted at any time before its OperationDone is sent: without that nobody commits.
- After that it waits for Commit or Abort, or for what a view change makes of it. When neither comes long after its
  deadline, it ends in doubt; what is heard of it later is kept for others who ask, and never published here.
- An operation that was called off before this member called it is over here as well: the next call of its tag is a
  later operation. Nobody committed it, for this member has not sent OperationDone for it and never will.
- A member that is told to start an admission which it has not called takes part in it unasked, if it waits
  in a call that has not started: the rules are the same, but nobody is told how it ended. If its owner
  calls for an admission meanwhile, that is the one.
- A rendezvous that commits gives the next operation of every tag a number that all members know (see coordinator).
- What became of an operation is remembered until its tag's next start, which proves that everybody saw it end. Of
  operations that never started, only the last is remembered: nobody else can have got far with it either.
- Once `closed`, none of the view's messages count, and none are sent.
"""

from collections import deque
from dataclasses import dataclass

from collectives.agreement import messages
from collectives.agreement.events import ADMIT, Begin, CallVerdict, Finished, Perform, Performed
from collectives.agreement.fields import MAX_TEXT_BYTES
from collectives.agreement.messages import (
    MAX_ENTRIES,
    MAX_FIELDS,
    MAX_LEDGERS,
    MAX_OPEN,
    MAX_SHARE_BYTES,
    Abort,
    Ledger,
    Stage,
)
from collectives.agreement.outbox import Outbox
from collectives.agreement.recovery import stage_of
from collectives.agreement.views import ADMIT_TAG, RENDEZVOUS_TAG, OpId, View, first_after
from collectives.errors import BadArgument
from collectives.types import GroupTiming
from protocol.identity import NodeId


@dataclass
class OpenCall:
    """A call that has not ended."""

    op: OpId
    begin: Begin
    deadline: float  # on the steady clock
    stage: Stage = Stage.CALLED
    overdue: bool = False  # the coordinator was told that time is up
    asked: bool = True  # by the owner, who is told how it ends


class Operations:
    """All calls of one member; `view` is None while it is outside of the group."""

    def __init__(self, timing: GroupTiming, outbox: Outbox) -> None:
        self._timing = timing
        self._out = outbox
        self.view: View | None = None
        self.closed = True
        self.open: dict[int, OpenCall] = {}
        self._ended: dict[int, dict[OpId, Stage]] = {}  # by tag: at most one that had started, and the last
        self._next: dict[int, int] = {}
        self._floor = 0  # the least number of the owner's operations since the last rendezvous
        self._whole = True
        self._past: deque[Ledger] = deque(maxlen=MAX_LEDGERS - 1)

    # --- the owner ---

    def begin(self, event: Begin, now: float) -> None:
        """Take a call; raises BadArgument for one that the interface forbids."""
        if (event.kind == ADMIT) != (event.tag == ADMIT_TAG):
            raise BadArgument(f"kind {ADMIT!r} and the tag {ADMIT_TAG} go together")
        unasked = self.open.get(ADMIT_TAG)
        if event.kind == ADMIT and unasked is not None and not unasked.asked:
            unasked.begin, unasked.deadline, unasked.asked = event, now + event.deadline, True
            return
        if event.tag in self.open:
            raise BadArgument(f"an operation with tag {event.tag} is outstanding: wait for it, or use another tag")
        if len(self.open) >= MAX_OPEN:
            raise BadArgument(f"{MAX_OPEN} operations are outstanding: wait for some")
        if len(event.share) > MAX_SHARE_BYTES:
            raise BadArgument(f"a share has at most {MAX_SHARE_BYTES} bytes, this one {len(event.share)}")
        if len(event.digest) > MAX_FIELDS or any(
            len(str(part).encode()) > MAX_TEXT_BYTES for pair in event.digest for part in pair
        ):
            raise BadArgument(f"a digest has at most {MAX_FIELDS} fields, each of at most {MAX_TEXT_BYTES} bytes")
        call = OpenCall(self._name(event.tag), event, now + event.deadline)
        self.open[event.tag] = call
        self._initiate(call)

    def done(self, event: Performed) -> None:
        """Take the owner's word on an operation that it was told to start."""
        call = self.open.get(event.op.tag)
        if call is None or call.op != event.op or call.stage is not Stage.STARTED:
            return
        if not event.ok:
            self._give_up(call, CallVerdict.ABORT, event.reason)
        elif not self.closed:
            call.stage = Stage.DONE
            self._tell(messages.OperationDone(call.op, ok=True))

    def give_up(self, tag: int) -> None:
        """End a call whose owner waits for it no more, unless it was carried out: then its verdict ends it."""
        call = self.open.get(tag)
        if call is not None and call.asked and call.stage < Stage.DONE:
            self._give_up(call, CallVerdict.ABORT, "its caller was interrupted")

    def tick(self, now: float, stuck: CallVerdict) -> None:
        """End what is late; `stuck` is why a call that could not start was not."""
        for call in [call for call in self.open.values() if now >= call.deadline]:
            if call.stage < Stage.DONE:
                verdict = stuck if call.stage is Stage.CALLED else CallVerdict.DEADLINE
                self._give_up(call, verdict, "its deadline passed", late=True)
            elif now >= call.deadline + self._timing.settling:
                self._end(call, call.stage, CallVerdict.DOUBT, "its deadline passed, and nobody says what became of it")
            elif not call.overdue:
                call.overdue = True
                self._tell(messages.OperationDone(call.op, ok=False, late=True, reason="its deadline passed"))

    # --- the coordinator ---

    def linked(self, member: NodeId) -> None:
        """A link with `member` came up."""
        if self.view is not None and member == self.view.coordinator:
            for call in self.open.values():
                if call.stage is Stage.CALLED:
                    self._initiate(call)

    def start(self, message: messages.OperationStart) -> None:
        """Everybody called it."""
        if self.view is None:
            return
        call = self._of(message.op) or self._unasked(message.op)
        if call is None:
            self._tell(messages.OperationDone(message.op, ok=False, reason="its caller gave up"))
        elif call.stage is Stage.CALLED and len(message.shares) == len(self.view.members):
            call.stage = Stage.STARTED
            self._ended.pop(call.op.tag, None)
            if call.begin.kind == ADMIT:
                self.done(Performed(call.op))
                return
            shares = dict(zip(self.view.members, message.shares, strict=True))
            self._out.do(Perform(call.op, call.begin.kind, self.view, shares))

    def _unasked(self, op: OpId) -> OpenCall | None:
        """Take part in an admission that others called, if this member waits in a call."""
        waiting = [call for call in self.open.values() if call.stage is Stage.CALLED]
        if op.tag != ADMIT_TAG or op.tag in self.open or not waiting or op.n < self._next.get(op.tag, 0):
            return None
        self._next[op.tag] = op.n + 1
        deadline = max(call.deadline for call in waiting)
        call = self.open[op.tag] = OpenCall(op, Begin(op.tag, ADMIT, 0.0), deadline, asked=False)
        return call

    def commit(self, op: OpId) -> None:
        """Everybody carried it out."""
        if op.tag == RENDEZVOUS_TAG and op.n < self._next.get(op.tag, 0):  # one that this member called
            self._floor = max(self._floor, first_after(op.n))
            self._next = {tag: n for tag, n in self._next.items() if tag >= RENDEZVOUS_TAG or n > self._floor}
        call = self._of(op)
        if call is not None:
            self._end(call, Stage.COMMITTED, CallVerdict.COMMIT)
            return
        ended = self._ended.get(op.tag, {})
        if ended.get(op, Stage.ABORTED) < Stage.COMMITTED:  # it ended in doubt
            ended[op] = Stage.COMMITTED

    def abort(self, message: Abort) -> None:
        """It is called off."""
        op, call = message.op, self._of(message.op)
        if call is None:  # it ended here, or was not called: then the next call is a later one
            self._next[op.tag] = max(self._next.get(op.tag, 0), op.n + 1)
        else:
            verdict = CallVerdict.DEADLINE if message.late else CallVerdict.ABORT
            if message.mismatch is not None:
                verdict = CallVerdict.MISMATCH
            self._end(call, Stage.ABORTED, verdict, message.reason, message.mismatch)

    def holds(self, op: OpId) -> None:
        """Note that this member, the coordinator, sent Commit."""
        call = self._of(op)
        if call is not None:
            call.stage = Stage.HOLDS

    # --- views ---

    def ledgers(self) -> tuple[Ledger, ...]:
        """Return what is known of the operations of this view and the last few."""
        return (*self._past, *([self._ledger(self.view)] if self.view is not None else []))

    def leave(self, rulings: dict[OpId, Stage], otherwise: CallVerdict, reason: str) -> None:
        """End this view: what started ends as ruled, what did not stays open. `otherwise` stands for ABORT."""
        if self.view is None:
            return
        for call in list(self.open.values()):
            stage = stage_of(rulings, call.op, call.stage)
            if stage is Stage.COMMITTED:
                self._end(call, stage, CallVerdict.COMMIT)
            elif stage is Stage.ABORTED:
                self._end(call, stage, otherwise, reason)
            elif stage is not Stage.CALLED:
                self._end(call, call.stage, CallVerdict.DOUBT, f"{reason}, and nobody here knows what became of it")
        self._past.append(self._ledger(self.view))
        self.view, self.closed = None, True
        self._ended, self._next, self._floor, self._whole = {}, {}, 0, True
        for call in self.open.values():
            call.op = self._name(call.op.tag)

    def enter(self, view: View) -> None:
        """Go on in `view` with the calls that are open."""
        self.view, self.closed = view, False
        for call in self.open.values():
            call.op = self._name(call.begin.tag)
            self._initiate(call)

    def dismiss(self, verdict: CallVerdict, reason: str) -> None:
        """End the calls that are left when this member is outside; one to be let in ends only if it left for good."""
        for call in [call for call in self.open.values() if verdict is CallVerdict.CLOSED or call.begin.kind != ADMIT]:
            self._end(call, Stage.ABORTED, verdict, reason)

    def admitted(self, view: View) -> None:
        """End the call of one that waited outside to be let in, and now is in `view`."""
        call = self.open.pop(ADMIT_TAG, None)
        if call is not None:
            self._out.do(Finished(call.op, CallVerdict.COMMIT, view.members))

    # --- within ---

    def _name(self, tag: int) -> OpId:
        if self.view is None:
            return OpId(b"", 0, tag, 0)
        n = max(self._next.get(tag, 0), self._floor if tag < RENDEZVOUS_TAG else 0)
        self._next[tag] = n + 1  # kept until the next rendezvous or view: 100 bytes a tag
        return OpId(self.view.mark, self.view.epoch, tag, n)

    def _of(self, op: OpId) -> OpenCall | None:
        call = self.open.get(op.tag)
        return call if call is not None and call.op == op else None

    def _initiate(self, call: OpenCall) -> None:
        begin = call.begin
        lag = begin.lag or max(self._timing.hang, self._timing.misses * begin.deadline)
        lag_ms = min(round(1000 * lag), messages.MAX_LAG_MS)
        self._tell(messages.Initiate(call.op, begin.kind, begin.digest, begin.share, lag_ms))

    def _tell(self, message: messages.Message) -> None:
        if self.view is not None and not self.closed:
            self._out.send(self.view.coordinator, message)

    def _give_up(self, call: OpenCall, verdict: CallVerdict, reason: str, *, late: bool = False) -> None:
        self._tell(messages.OperationDone(call.op, ok=False, late=late, reason=reason))
        self._end(call, Stage.ABORTED, verdict, reason)

    def _end(
        self,
        call: OpenCall,
        stage: Stage,
        verdict: CallVerdict,
        reason: str = "",
        mismatch: messages.Mismatched | None = None,
    ) -> None:
        del self.open[call.op.tag]
        if self.view is not None:
            before = self._ended.pop(call.op.tag, {})
            kept = {op: known for op, known in before.items() if known is not Stage.ABORTED}
            self._ended[call.op.tag] = {**kept, call.op: stage}
            if len(self._ended) > (MAX_ENTRIES - MAX_OPEN) // 2:
                self._ended.pop(next(iter(self._ended)))
                self._whole = False
        contributors = self.view.members if self.view is not None and verdict is CallVerdict.COMMIT else ()
        if call.asked:
            self._out.do(Finished(call.op, verdict, contributors, reason, mismatch))

    def _ledger(self, view: View) -> Ledger:
        entries = [entry for ended in self._ended.values() for entry in ended.items()]
        entries += [(call.op, call.stage) for call in self.open.values() if call.op.mark == view.mark]
        return Ledger(view.mark, view.members, tuple(entries), self._whole)
