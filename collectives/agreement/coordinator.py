"""The coordinator's part in the operations of its view.

    every member's Initiate -> Start to all -> every member's Done -> Commit to the others
        -> every other's Ack -> Commit to itself

Until Commit is sent, any Done that says no is an Abort to all who called, and to those who call
later: the n-th operation of a tag has one verdict, whenever a member comes to it. Admission waits
for the operations under way, and those which everybody has called by then wait for it.

Where some members ask for an admission, and all the others wait in operations that some of those
have not called, neither can start. Members that make the same calls in the same order never come
to that, those that do so on several threads pass through it; so after some patience with nothing
under way all these operations are aborted. They are then over for those, too, who have not called
them: each one's next call of a tag is the next operation of it, so that all can meet there.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from collectives.agreement.messages import MAX_OPEN, Abort, Ack, Commit, Digest, Done, Initiate, Mismatched, Start
from collectives.agreement.outbox import Outbox
from collectives.agreement.views import ADMIT_TAG, OpId, View
from protocol.identity import NodeId

MAX_AHEAD = 4  # operations of a tag that a message which overtook others may be ahead


@dataclass
class Gathering:
    """What came in for one operation."""

    calls: dict[NodeId, Initiate] = field(default_factory=dict)
    done: set[NodeId] = field(default_factory=set)
    acks: set[NodeId] = field(default_factory=set)
    started: bool = False
    committed: Commit | None = None
    full_since: float | None = None  # everybody has called since


class Coordinator:
    """Gathers what the members of `view` say about its operations."""

    def __init__(
        self,
        own: NodeId,
        view: View,
        outbox: Outbox,
        *,
        ready: Callable[[float], bool],
        admit: Callable[[], View | None],
        holds: Callable[[OpId], None],
        patience: float,
    ) -> None:
        """Begin with nothing gathered.

        `ready(since)` tells whether the newcomers can be let in, given since when everybody asks
        for it; `admit()` returns the view with them, or None; `holds(op)` is told before Commit is sent.
        Calls that wait for each other may do so for `patience` (s).
        """
        self._own = own
        self._view = view
        self._out = outbox
        self._ready = ready
        self._admit = admit
        self._holds = holds
        self._patience = patience
        self._tangled_since: float | None = None
        self._gatherings: dict[OpId, Gathering] = {}
        self._settled: dict[int, int] = {}  # by tag: operations before this one have a verdict
        self._last_abort: dict[int, tuple[int, Abort]] = {}  # by tag: from this one on all settled are aborted

    def initiate(self, member: NodeId, message: Initiate, now: float) -> None:
        """`member` called it."""
        op = message.op
        settled = self._settled.get(op.tag, 0)
        if op.n < settled:
            since, abort = self._last_abort.get(op.tag, (settled, None))
            if abort is not None and op.n >= since:
                self._out.send(
                    member, Abort(op, abort.late, abort.reason, self._seen_by(abort, member, message.digest))
                )
            return
        gathering = self._gatherings.get(op) or self._gather(member, op)
        if gathering is not None:
            gathering.calls.setdefault(member, message)
            self.advance(now)

    def done(self, member: NodeId, message: Done, now: float) -> None:
        """`member` has carried it out, or calls it off."""
        op = message.op
        gathering = self._gatherings.get(op)
        if gathering is None:
            if message.ok or op.n != self._settled.get(op.tag, 0) or self._gather(member, op) is None:
                return
            gathering = self._gatherings[op]
        if gathering.committed is not None:
            return
        if not message.ok:
            absent = [name for name in self._view.members if name not in gathering.calls]
            waiting = f"; not called by {', '.join(absent[:4])}" if absent and message.late else ""
            self._abort(op, Abort(op, message.late, f"{message.reason} at {member}{waiting}"))
        elif gathering.started:
            gathering.done.add(member)
            if len(gathering.done) == len(self._view.members):
                self._commit(op, gathering)
        self.advance(now)

    def ack(self, member: NodeId, message: Ack, now: float) -> None:
        """`member` has published it."""
        gathering = self._gatherings.get(message.op)
        if gathering is not None and gathering.committed is not None:
            gathering.acks.add(member)
            self._finish(message.op, gathering)
            self.advance(now)

    def advance(self, now: float) -> None:
        """Start what everybody called and nothing holds up; call off what can start no more."""
        self._untangle(now)
        ready = []
        for op, gathering in self._gatherings.items():
            if not gathering.started and len(gathering.calls) == len(self._view.members):
                gathering.full_since = now if gathering.full_since is None else gathering.full_since
                ready.append((op, gathering))
        admissions = [(op, gathering) for op, gathering in ready if op.tag == ADMIT_TAG]
        if any(gathering.started for gathering in self._gatherings.values()) and (
            admissions or any(op.tag == ADMIT_TAG and g.started for op, g in self._gatherings.items())
        ):
            return
        if admissions:
            ready = [(op, gathering) for op, gathering in admissions if self._ready(gathering.full_since or now)]
        for op, gathering in ready:
            self._start(op, gathering)

    # --- within ---

    def _gather(self, member: NodeId, op: OpId) -> Gathering | None:
        """Open a gathering, unless `member` has too many open or is too far ahead."""
        settled = self._settled.get(op.tag, 0)
        mine = sum(member in gathering.calls for gathering in self._gatherings.values()) if self._gatherings else 0
        if op.n >= settled + MAX_AHEAD or mine >= 2 * MAX_OPEN:
            return None
        return self._gatherings.setdefault(op, Gathering())

    def _untangle(self, now: float) -> None:
        tangle = tangled(self._view.ids, self._gatherings)
        if not tangle or self._tangled_since is None:
            self._tangled_since = now if tangle else None
        elif now - self._tangled_since >= self._patience:
            for op, reason in tangle.items():
                abort = Abort(op, reason=reason)
                uninvolved = self._view.ids - self._gatherings[op].calls.keys()
                self._abort(op, abort)
                for member in sorted(uninvolved):
                    self._out.send(member, abort)

    def _start(self, op: OpId, gathering: Gathering) -> None:
        mismatch = odd_one_out({member: gathering.calls[member] for member in self._view.members})
        if mismatch is not None:
            self._abort(op, Abort(op, reason="the members' arguments differ", mismatch=mismatch))
            return
        gathering.started = True
        shares = tuple(gathering.calls[member].share for member in self._view.members)
        for member in self._view.members:
            self._out.send(member, Start(op, shares))

    def _commit(self, op: OpId, gathering: Gathering) -> None:
        gathering.committed = Commit(op, self._admit() if op.tag == ADMIT_TAG else None)
        self._settled[op.tag] = max(self._settled.get(op.tag, 0), op.n + 1)
        self._last_abort.pop(op.tag, None)
        self._holds(op)
        for member in self._view.members:
            if member != self._own:
                self._out.send(member, gathering.committed)
        self._out.send(self._own, Ack(op))

    def _finish(self, op: OpId, gathering: Gathering) -> None:
        if gathering.committed is not None and len(gathering.acks) == len(self._view.members):
            del self._gatherings[op]
            self._out.send(self._own, gathering.committed)

    def _abort(self, op: OpId, abort: Abort) -> None:
        gathering = self._gatherings.pop(op)
        since, _ = self._last_abort.get(op.tag, (op.n, abort))
        self._last_abort[op.tag] = (min(since, op.n), abort)
        self._settled[op.tag] = max(self._settled.get(op.tag, 0), op.n + 1)
        for member, call in gathering.calls.items():
            seen = self._seen_by(abort, member, call.digest)
            self._out.send(member, Abort(op, abort.late, abort.reason, seen))

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


def tangled(members: frozenset[NodeId], gatherings: Mapping[OpId, Gathering]) -> dict[OpId, str]:
    """Return the operations that keep each other from starting for ever, an admission among them, and why."""
    admissions = {op: gathering.calls.keys() for op, gathering in gatherings.items() if op.tag == ADMIT_TAG}
    if not admissions or any(gathering.started for gathering in gatherings.values()):
        return {}
    admitting = frozenset().union(*admissions.values())
    others = members - admitting
    stuck = {
        op: gathering.calls.keys()
        for op, gathering in gatherings.items()
        if op.tag != ADMIT_TAG and others & gathering.calls.keys() and admitting - gathering.calls.keys()
    }
    if not admitting or not others or not others <= frozenset().union(*stuck.values()):
        return {}
    reason = f"{min(admitting)} waits in admit() and {min(others)} in another call: all must make the same calls"
    return dict.fromkeys((*admissions, *stuck), reason)


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
