"""The coordinator's part in the operations of its view.

    every member's Initiate -> OperationStart to all -> every member's OperationDone -> Commit to the others
        -> every other's Ack -> Commit to itself

Until Commit is sent, any OperationDone that says no is an Abort to all who called, and to those who call
later: the n-th operation of a tag has one verdict, whenever a member comes to it.

An admission waits for the operations under way, and those that everybody has called by then wait for it. Not everybody
has to call it. Suppose that nothing is under way and nothing can start: some members call for an admission, and every
other one waits in a call that not all have made. Then those that wait take part in the admission unasked (see
participant), and go on waiting in the view that it leads to. So members that admit and members already in the next
operation never wait for each other. An admission that is called off is over for all.

Nobody is waited for for ever. While at least half of the members wait in calls, the time of each one that waits in none
runs, from its last call on. Each call says how late others may be (`Initiate.lag_ms`): a member that is later than all
that wait say is left out. A member whose arguments differ from those that more than half gave is left out at
once: the others are told to call again, and it is told of its mismatch. So is one whose values the coordinator's own
owner could not use.

At a rendezvous members that have lost each other begin anew. It needs the calls of all. A member that waits in it makes
no other call, so each call that lacks this member is called off at once: so all come. When the rendezvous commits, all
that had not started is called off, and the next operation of every tag has the same number at all, however many calls
each has made before.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from collectives.agreement.messages import (
    MAX_OPEN,
    Abort,
    Ack,
    Commit,
    Digest,
    Initiate,
    Mismatched,
    OperationDone,
    OperationStart,
)
from collectives.agreement.outbox import Outbox
from collectives.agreement.views import ADMIT_TAG, RENDEZVOUS_TAG, OpId, View, first_after
from collectives.types import GroupTiming
from protocol.identity import NodeId

SET_APART = (ADMIT_TAG, RENDEZVOUS_TAG)  # nothing starts beside them, and all are told when they are called off
MAX_AHEAD = 4  # operations of a tag by which a message may have overtaken others


@dataclass
class Transaction:
    """The messages for one operation, from its first call to its verdict."""

    calls: dict[NodeId, Initiate] = field(default_factory=dict)
    done: set[NodeId] = field(default_factory=set)
    acks: set[NodeId] = field(default_factory=set)
    started: bool = False
    committed: Commit | None = None


class Coordinator:
    """Collects what the members of `view` say about its operations."""

    def __init__(
        self,
        own: NodeId,
        view: View,
        outbox: Outbox,
        timing: GroupTiming,
        *,
        admit: Callable[[], View | None],
        holds: Callable[[OpId], None],
        evict: Callable[[NodeId, OpId, str], None],
    ) -> None:
        """Begin with no transaction.

        `admit()` returns the view with the newcomers, or None; `holds(op)` is told before Commit is sent.
        `evict(member, op, reason)` leaves a member out.
        """
        self._own = own
        self._view = view
        self._out = outbox
        self._timing = timing
        self._admit = admit
        self._holds = holds
        self._evict = evict
        self._awaited: dict[NodeId, float] = {}  # seconds that others have waited since each one's last call
        self._absent: frozenset[NodeId] = frozenset()  # whom others waited for at `_looked`
        self._looked = 0.0
        self._transactions: dict[OpId, Transaction] = {}
        self._settled: dict[int, int] = {}  # by tag: operations before this one have a verdict
        self._last_abort: dict[int, tuple[int, Abort]] = {}  # by tag: from this one on all settled are aborted
        self._floor = 0  # callers' operations below this number were called off by the last rendezvous

    def initiate(self, member: NodeId, message: Initiate) -> None:
        """`member` called it."""
        op = message.op
        self._awaited.pop(member, None)
        settled = self._due(op.tag)
        if op.n < settled and op not in self._transactions:
            since, abort = self._last_abort.get(op.tag, (settled, None))
            if op.tag not in SET_APART and op.n < self._floor:
                self._out.send(member, _anew(op))
            elif abort is not None and op.n >= since:
                self._out.send(
                    member, Abort(op, abort.late, abort.reason, self._seen_by(abort, member, message.digest))
                )
            return
        transaction = self._transactions.get(op) or self._open(member, op)
        if transaction is not None:
            transaction.calls.setdefault(member, message)
            self.advance()

    def done(self, member: NodeId, message: OperationDone) -> None:
        """`member` has carried it out, or calls it off."""
        op = message.op
        transaction = self._transactions.get(op)
        if transaction is None:
            if message.ok or op.n != self._due(op.tag) or self._open(member, op) is None:
                return
            transaction = self._transactions[op]
        if transaction.committed is not None:
            return
        if not message.ok:
            absent = [name for name in self._view.members if name not in transaction.calls]
            waiting = f"; not called by {', '.join(absent[:4])}" if absent and message.late else ""
            self._abort(op, Abort(op, message.late, f"{message.reason} at {member}{waiting}"))
        elif transaction.started:
            transaction.done.add(member)
            if len(transaction.done) == len(self._view.members):
                self._commit(op, transaction)
        self.advance()

    def ack(self, member: NodeId, message: Ack) -> None:
        """`member` has published it."""
        transaction = self._transactions.get(message.op)
        if transaction is not None and transaction.committed is not None:
            transaction.acks.add(member)
            self._finish(message.op, transaction)
            self.advance()

    def tick(self, now: float) -> None:
        """Time passed: leave out who is too late, and `advance`."""
        self._leave_out_late(now)
        self.advance()

    def advance(self) -> None:
        """Start what everybody called and nothing holds up; call off what waits for members at the rendezvous."""
        self._send_to_rendezvous()
        waiting = {op: transaction for op, transaction in self._transactions.items() if not transaction.started}
        admissions = {op: transaction for op, transaction in waiting.items() if op.tag == ADMIT_TAG}
        under_way = [op for op, transaction in self._transactions.items() if transaction.started]
        full = [op for op, transaction in waiting.items() if len(transaction.calls) == len(self._view.members)]
        if any(op.tag in SET_APART for op in under_way):
            return
        if admissions:
            called = [op for op in full if op.tag == ADMIT_TAG]
            due = called or ([] if full else self._wanted_by_all(waiting))
            if due and not under_way:
                for op in due:
                    self._start(op, admissions[op])
                return
            if called:
                return
        for op in full:
            if op.tag != RENDEZVOUS_TAG or not (under_way or len(full) > 1):
                self._start(op, waiting[op])

    def _send_to_rendezvous(self) -> None:
        """Call off the calls that lack a member that waits in a rendezvous."""
        there = {
            member
            for op, transaction in self._transactions.items()
            if op.tag == RENDEZVOUS_TAG and transaction.committed is None
            for member in transaction.calls
        }
        lacking = [
            op
            for op, transaction in self._transactions.items()
            if op.tag not in SET_APART and not transaction.started and not there <= transaction.calls.keys()
        ]
        for op in lacking:
            self._abort(op, _anew(op))

    def _wanted_by_all(self, waiting: Mapping[OpId, Transaction]) -> list[OpId]:
        """Return the admissions that some ask for while all the others wait in calls that cannot start."""
        others = [transaction.calls.keys() for op, transaction in waiting.items() if op.tag != ADMIT_TAG]
        return [
            op
            for op, transaction in waiting.items()
            if op.tag == ADMIT_TAG and self._view.ids == transaction.calls.keys() | frozenset().union(*others)
        ]

    # --- within ---

    def blame(self, member: NodeId, op: OpId, reason: str) -> None:
        """This member's own owner could not use what `member` sent: leave it out."""
        if member in self._view.ids and member != self._own:
            self._evict(member, op, reason)

    def _leave_out_late(self, now: float) -> None:
        """Leave out members that make no call for longer than those who wait for them allow, this one included."""
        elapsed, self._looked = min(now - self._looked, self._timing.heartbeat), now
        calls = [call for transaction in self._transactions.values() for call in transaction.calls.items()]
        waiting = {member for member, _ in calls}
        waits = 2 * len(waiting) >= len(self._view.members)
        before, absent = self._absent, sorted(self._view.ids - waiting) if waits else []
        self._absent = frozenset(absent)
        for member in absent:
            self._awaited[member] = self._awaited.get(member, 0.0) + elapsed * (member in before)
            lag = max(call.lag_ms for _, call in calls) / 1000
            if self._awaited[member] >= lag:
                self._awaited[member] = 0.0  # the view without it is on its way
                last = calls[-1][1]
                reason = f"the others waited {lag:g} s for its calls, the last one {last.kind}, and it made none"
                self._evict(member, last.op, reason)

    def _open(self, member: NodeId, op: OpId) -> Transaction | None:
        """Open a transaction, unless `member` has too many open or is too far ahead."""
        settled = self._due(op.tag)
        mine = (
            sum(member in transaction.calls for transaction in self._transactions.values()) if self._transactions else 0
        )
        if op.n >= settled + MAX_AHEAD or mine >= 2 * MAX_OPEN:
            return None
        return self._transactions.setdefault(op, Transaction())

    def _start(self, op: OpId, transaction: Transaction) -> None:
        calls = {member: transaction.calls[member] for member in self._view.members if member in transaction.calls}
        mismatch = odd_one_out(calls)
        if mismatch is not None:
            self._refuse(op, mismatch, odd_ones(calls))
            return
        transaction.started = True
        shares = tuple(calls[member].share if member in calls else b"" for member in self._view.members)
        for member in self._view.members:
            self._out.send(member, OperationStart(op, shares))

    def _refuse(self, op: OpId, found: Mismatched, odd: list[NodeId]) -> None:
        """Call off what the members called with different arguments, and leave out the odd ones."""
        if not odd:
            self._abort(op, Abort(op, reason="the members' arguments differ", mismatch=found))
            return
        reason = f"it gave {found.field} = {found.theirs!r}, and the others {found.ours!r}"
        self._abort(op, Abort(op, reason=f"member {found.member}: {reason}", mismatch=found), odd)
        for member in odd:
            self._evict(member, op, reason)

    def _commit(self, op: OpId, transaction: Transaction) -> None:
        after = self._admit() if op.tag == ADMIT_TAG else None
        transaction.committed = Commit(op, after)
        self._settled[op.tag] = max(self._due(op.tag), op.n + 1)
        self._last_abort.pop(op.tag, None)
        if op.tag == RENDEZVOUS_TAG:
            self._begin_anew(op)
        self._holds(op)
        for member in self._view.members:
            if member != self._own:
                self._out.send(member, transaction.committed)
        self._out.send(self._own, Ack(op))

    def _begin_anew(self, op: OpId) -> None:
        """All of the callers' operations that have not started are off; later ones have greater numbers."""
        for other, transaction in list(self._transactions.items()):
            if other.tag not in SET_APART and not transaction.started:
                self._abort(other, _anew(other))
        self._floor = first_after(op.n)
        self._settled = {tag: n for tag, n in self._settled.items() if tag in SET_APART}
        self._last_abort = {tag: last for tag, last in self._last_abort.items() if tag in SET_APART}

    def _due(self, tag: int) -> int:
        """Return the number of the tag's first operation that has no verdict yet."""
        return self._settled.get(tag, 0 if tag in SET_APART else self._floor)

    def _finish(self, op: OpId, transaction: Transaction) -> None:
        if transaction.committed is not None and len(transaction.acks) == len(self._view.members):
            del self._transactions[op]
            self._out.send(self._own, transaction.committed)

    def _abort(self, op: OpId, abort: Abort, odd: Collection[NodeId] | None = None) -> None:
        """End it for all. With `odd` only these are told of the mismatch, and the others that it is called off."""
        transaction = self._transactions.pop(op)
        since, _ = self._last_abort.get(op.tag, (op.n, abort))
        self._last_abort[op.tag] = (min(since, op.n), abort)
        self._settled[op.tag] = max(self._due(op.tag), op.n + 1)
        for member, call in transaction.calls.items():
            seen = self._seen_by(abort, member, call.digest) if odd is None or member in odd else None
            self._out.send(member, Abort(op, abort.late, abort.reason, seen))
        if op.tag in SET_APART:
            for member in sorted(self._view.ids - transaction.calls.keys()):
                self._out.send(member, abort)

    def _seen_by(self, abort: Abort, member: NodeId, digest: Digest) -> Mismatched | None:
        """Return the mismatch as `member`, which gave `digest`, is told of it."""
        mismatch = abort.mismatch
        if mismatch is None:
            return None
        own = dict(digest).get(mismatch.field, mismatch.ours)
        if member != mismatch.member:
            return Mismatched(mismatch.member, mismatch.field, mismatch.theirs, own)
        another = next(name for name in self._view.members if name != member)
        return Mismatched(another, mismatch.field, mismatch.ours, mismatch.theirs)


def _anew(op: OpId) -> Abort:
    return Abort(op, reason="the members meet to begin anew")


def odd_ones(calls: Mapping[NodeId, Initiate]) -> list[NodeId]:
    """Return the members whose arguments are not those that more than half gave; nobody if no half agrees."""
    wholes = {member: (call.kind, call.digest) for member, call in calls.items()}
    common, count = Counter(wholes.values()).most_common(1)[0]
    return [member for member, whole in wholes.items() if whole != common] if 2 * count > len(calls) else []


def odd_one_out(calls: dict[NodeId, Initiate]) -> Mismatched | None:
    """Return the first member that differs from what most called, with the first field in which it does."""
    wholes = {member: (("kind", call.kind), *call.digest) for member, call in calls.items()}
    common = Counter(wholes.values()).most_common(1)[0][0]
    for member, whole in wholes.items():
        if whole == common:
            continue
        theirs, ours = dict(whole), dict(common)
        for name in {**ours, **theirs}:
            if theirs.get(name) != ours.get(name):
                return Mismatched(member, name, theirs.get(name, "nothing"), ours.get(name, "nothing"))
    return None
