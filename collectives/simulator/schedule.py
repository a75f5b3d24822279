"""The schedule of a simulated group: a program for each member's owner, and a list of faults.

A member's program calls operations, carries them out, and checks what it is told about them.

A fault strikes at the n-th message of some kind, or at a time. One tied to a message strikes while that
message is on its way, so that over many seeds each happens in every state of the protocol: between any
two steps, at the coordinator and elsewhere.
"""

from dataclasses import dataclass, field
from enum import Enum
from random import Random

from collectives.agreement import messages
from collectives.agreement.events import ADMIT, Begin, CallVerdict, Finished, Install, OutOfGroup, Perform, Performed
from collectives.agreement.views import ADMIT_TAG, RENDEZVOUS_TAG, OpId, View
from collectives.errors import Aborted
from collectives.steps import Attempt, Claim, Phase, Steps
from collectives.types import LAN
from protocol.identity import NodeId

TAGS = (0, 1)  # two operations may be under way at once
SYNC_TAG, END_TAG = 2, 3  # of those that take steps
REFUSAL = 0.03  # the chance that a member cannot carry out an operation
ODD = 0.02  # the chance that a member calls with another argument than the others


class Program(Enum):
    """How a member that makes one call at a time goes on: it admits and reduces in turn, but for FREE."""

    FREE = "free"  # to admit if anybody waits, or now and then, else to reduce
    LOOP = "loop"  # from the beginning after each failure
    AGAIN = "again"  # what was called off is called again
    NEXT = "next"  # what was called off is left, and the next is called
    STEPS = "steps"  # none of these: all take steps of two reductions, as `Communicator.run` does

    def admits_next(self, finished: Finished) -> bool:
        """Tell whether an admission comes after a call that ended so."""
        admitted, committed = finished.op.tag == ADMIT_TAG, finished.verdict is CallVerdict.COMMIT
        match self:
            case Program.LOOP:
                return not (admitted and committed)
            case Program.AGAIN:
                return admitted != committed
            case _:
                return not admitted


# Not STEPS: in a group that takes steps, all take them.
LOOPS = (Program.LOOP, Program.AGAIN, Program.NEXT)


class Violated(AssertionError):  # noqa: N818  # reads as what it is
    """Something happened that must never happen."""


def expect(holds: bool, what: str) -> None:
    """Raise `Violated` unless `holds`."""
    if not holds:
        raise Violated(what)


@dataclass
class VerdictHistory:
    """The verdicts that all members were told about each operation."""

    verdicts: dict[OpId, dict[NodeId, CallVerdict]] = field(default_factory=dict)
    contributors: dict[OpId, tuple[NodeId, ...]] = field(default_factory=dict)
    shares: dict[OpId, dict[NodeId, bytes]] = field(default_factory=dict)
    committed: int = 0
    aborted: int = 0
    doubtful: int = 0

    def started(self, start: Perform) -> None:
        """Everybody is handed the same shares."""
        known = self.shares.setdefault(start.op, start.shares)
        expect(known == start.shares, f"{start.op} started with different shares")
        expect(tuple(start.shares) == start.view.members, f"{start.op} started without all members' shares")

    def finished(self, member: NodeId, finished: Finished) -> None:
        """Nobody commits what somebody calls off, and all who commit name the same contributors."""
        op, verdict = finished.op, finished.verdict
        others = self.verdicts.setdefault(op, {})
        others[member] = verdict
        safe = {CallVerdict.COMMIT, CallVerdict.DOUBT}
        if CallVerdict.COMMIT in others.values() and op.mark:
            expect(set(others.values()) <= safe, f"{op} ended in two ways: {others}")
            if verdict is CallVerdict.COMMIT:
                known = self.contributors.setdefault(op, finished.contributors)
                expect(known == finished.contributors, f"{op} has different contributors")
        if verdict is CallVerdict.ABORT and finished.reason.startswith("the group changed"):
            started = op in self.shares or op.tag == ADMIT_TAG or len(others) > 1
            expect(started, f"{op} had not started, and a view change lost it")
        self.committed += verdict is CallVerdict.COMMIT
        self.doubtful += verdict is CallVerdict.DOUBT
        self.aborted += verdict not in safe


@dataclass
class Owner:
    """Calls `TAGS` again and again, and ADMIT when somebody waits, while it is `busy`."""

    own: NodeId
    rng: Random
    history: VerdictHistory
    busy: bool = True
    careful: bool = False  # never odd, never unable
    prompt: bool = False  # no call may wait until its deadline from now on
    calls: int = 0
    outstanding: dict[int, Begin] = field(default_factory=dict)
    due: dict[int, float] = field(default_factory=dict)  # by when each outstanding call must have ended
    ends: dict[int, float] = field(default_factory=dict)  # the deadline of each call
    in_time: dict[int, float] = field(default_factory=dict)  # before when each must, of those begun while prompt
    started: dict[int, OpId] = field(default_factory=dict)
    view: View | None = None
    epoch: int = 0
    stay: int = 0  # how often it came into the group

    def begin(self, tag: int, deadline: float, now: float, share: bytes | None = None) -> Begin:
        """Call an operation."""
        self.calls += 1
        self.due[tag] = now + deadline + LAN.settling + LAN.heartbeat
        self.ends[tag] = now + deadline
        if self.prompt:
            self.in_time[tag] = now + deadline - LAN.heartbeat
        field_value = 1 + (not self.careful and self.rng.random() < ODD)
        share = b"%d" % self.calls if share is None else share
        kind = ADMIT if tag == ADMIT_TAG else "reduce"
        digest = () if tag == ADMIT_TAG else (("count", field_value),)
        begin = self.outstanding[tag] = Begin(tag, kind, deadline, digest, share)
        return begin

    def check(self, now: float) -> None:
        """Every call ends in time, whatever happens."""
        for tag in self.outstanding:
            expect(now <= self.due[tag], f"the call under tag {tag} at {self.own} did not end")
            late = now >= self.in_time.get(tag, float("inf"))
            expect(not late, f"the call under tag {tag} at {self.own} waited until its deadline")

    def start(self, start: Perform) -> Performed:
        """Carry an operation out; return what to say about it, later."""
        call = self.outstanding.get(start.op.tag)
        expect(call is not None and start.shares[self.own] == call.share, f"{start.op} is not what was called")
        expect(self.started.get(start.op.tag) != start.op, f"{start.op} started twice")
        expect(self.view is not None and start.op.mark == self.view.mark, f"{start.op} started in another view")
        self.started[start.op.tag] = start.op
        self.history.started(start)
        return Performed(start.op, self.careful or self.rng.random() > REFUSAL, "cannot")

    def finished(self, finished: Finished) -> None:
        """Take a verdict: there is exactly one for each call."""
        expect(finished.op.tag in self.outstanding, f"{finished.op} ended, and nobody waits for it")
        del self.outstanding[finished.op.tag]
        self.in_time.pop(finished.op.tag, None)
        self.history.finished(self.own, finished)
        if finished.verdict is CallVerdict.COMMIT and finished.op.tag != ADMIT_TAG:
            expect(self.started.get(finished.op.tag) == finished.op, f"{finished.op} committed and never started")

    def install(self, install: Install) -> None:
        """Go over to a view: epochs rise."""
        expect(install.view.epoch > self.epoch, f"epoch {install.view.epoch} after {self.epoch}")
        expect(self.own in install.view.ids, "installed a view without itself")
        self.stay += self.view is None
        self.view, self.epoch = install.view, install.view.epoch

    def outside(self, _: OutOfGroup) -> None:
        """Be out of the group."""
        expect(self.view is not None, "out of the group twice")
        self.view = None


@dataclass
class Stepper:
    """One that takes steps: an END says whether somebody waits, as all operations of a communicator do."""

    owner: Owner
    steps: Steps = field(default_factory=Steps)
    counted: dict[int, bytes] = field(default_factory=dict)  # by number: the name under which a step counted here
    reduced: int = 0  # reductions of this step that committed
    calling: int | None = None  # under which tag
    attempt: Attempt = field(default_factory=Attempt)
    contributors: list[tuple[NodeId, ...]] = field(default_factory=list)  # to each call of this attempt

    def begin(self, deadline: float, now: float, *, pending: bool) -> Begin:
        """Make the next call."""
        phase = self.steps.phase
        reduction = TAGS[min(self.reduced, len(TAGS) - 1)]
        tags = {Phase.ADMIT: ADMIT_TAG, Phase.MEET: RENDEZVOUS_TAG, Phase.SYNC: SYNC_TAG, Phase.END: END_TAG}
        share = {Phase.MEET: self.steps.claim(self.owner.stay).encode(), Phase.END: b"%d" % pending}.get(phase)
        tag = self.calling = tags.get(phase, reduction)
        return self.owner.begin(tag, deadline, now, share)

    def start(self, start: Perform, done: Performed) -> Performed:
        """Return what to say of a call that is carried out: no, if it is of a step that began in another view."""
        if start.op.tag not in (*TAGS, END_TAG):
            return done
        try:
            self.attempt.carry_out_in(start.view.mark)
        except Aborted as error:
            return Performed(start.op, ok=False, reason=str(error))
        self.contributors.append(start.view.members)
        return done

    def finished(self, finished: Finished, *, pending: bool) -> None:
        """Go on from how it ended."""
        steps, op, self.calling = self.steps, finished.op, None
        shares = self.owner.history.shares.get(op, {})
        if finished.verdict is not CallVerdict.COMMIT:
            if op.tag == END_TAG and finished.verdict is CallVerdict.DOUBT and self.owner.started.get(op.tag) == op:
                steps.doubted(op)
                self._expect_one_view()
            steps.disturbed(admits=pending or self.owner.view is None)
            self._begin_step()
            return
        if op.tag == ADMIT_TAG:
            steps.admitted()
        elif op.tag == RENDEZVOUS_TAG:
            before = steps.done
            claims = {member: Claim.decode(share) for member, share in shares.items()}
            if steps.met(self.owner.own, claims):
                self._count(before + 1, claims[self.owner.own].doubt)
        elif op.tag == SYNC_TAG:
            steps.synced()
        elif op.tag == END_TAG:
            steps.ended(op, b"1" in shares.values())
            self._count(steps.done, steps.by)
            self._expect_one_view()
            self._begin_step()
        else:
            self.reduced += 1
            if self.reduced == len(TAGS):
                steps.stepped()

    def _begin_step(self) -> None:
        self.reduced, self.attempt, self.contributors = 0, Attempt(), []

    def _expect_one_view(self) -> None:
        """The contributors to each call of a step that counts, its END among them, are the same."""
        expect(len(self.contributors) == len(TAGS) + 1, f"a step of {len(self.contributors)} calls")
        expect(len(set(self.contributors)) == 1, f"a step with the contributors {self.contributors}")

    def _count(self, number: int, name: bytes) -> None:
        last = max(self.counted, default=0)
        expect(number > last or self.owner.stay > 1, f"step {number} counted after {last}")
        self.counted[number] = name


# --- what goes wrong ---

ONE_AT_A_TIME = 0.2  # the part of schedules whose members make one call at a time
FAULT_SECONDS = 6.0  # faults happen within this time after the group has formed
KINDS = ("crash", "power", "restart", "pause", "cut", "split", "oneway", "isolate", "join", "leave")
# Faults of owners and half-open networks: an owner hangs for good while its core lives on, takes seconds to carry
# operations out, is interrupted in its calls; and somebody asks to be let in whom only some can reach.
LIVENESS_KINDS = ("hang", "slow", "interrupt", "half")
LIVENESS = 0.25  # the part of schedules that have these faults besides
DEAD_PATHS = 0.03  # the part in which the path of tensors between two members silently dies, up to three times
MOMENTS = (
    messages.Initiate,
    messages.OperationStart,
    messages.OperationDone,
    messages.Commit,
    messages.Ack,
    messages.Abort,
    messages.Propose,
    messages.BallotReport,
    messages.Decide,
    messages.Welcome,
    messages.Apply,
    messages.ViewNotice,
)
RARE = (messages.Propose, messages.BallotReport, messages.Decide, messages.Welcome, messages.Apply, messages.ViewNotice)


@dataclass(frozen=True)
class Fault:
    """`kind` strikes the sender or the receiver of the n-th message of a type, or somebody at a time (s)."""

    kind: str
    moment: type[messages.Message] | None
    n: int
    at_sender: bool
    when: float
    lasts: float


@dataclass(frozen=True)
class Schedule:
    """A trial's conditions, all drawn from its seed."""

    seed: int
    members: int
    disorder: float
    encoded: bool  # messages go through their bytes
    dialling: float  # how long it may take until a link is there (s)
    programs: tuple[Program, ...]  # if members make one call at a time: each runs one of these
    faults: tuple[Fault, ...]

    @classmethod
    def draw(cls, seed: int, members: int) -> "Schedule":
        """Return the schedule of a seed, for a group of up to `members`."""
        rng = Random(f"schedule {seed}")
        faults = tuple(cls._fault(rng) for _ in range(rng.choice((1, 1, 2, 2, 3, 4))))
        at_first = rng.randint(2, max(2, members))
        rng.choice(range(4))  # nothing needs it any more; so each seed keeps the schedule that it always had
        liveness = cls._liveness(Random(f"liveness {seed}"))
        return cls(
            seed,
            at_first,
            rng.choice((0.0, 0.0, 0.0, 0.05, 0.3)),
            rng.random() < 0.05,
            Random(f"dialling {seed}").choice((0.0, 0.0, 0.4)),
            cls._programs(Random(f"programs {seed}")),
            (*faults, *liveness, *cls._dead_paths(seed)),
        )

    @staticmethod
    def _liveness(rng: Random) -> tuple[Fault, ...]:
        """Return none for most seeds; else up to three faults of owners, of which one hangs at most."""
        kinds = rng.sample(LIVENESS_KINDS, rng.randint(1, 3)) if rng.random() < LIVENESS else []
        return tuple(
            Fault(kind, None, 0, True, rng.uniform(0.0, FAULT_SECONDS), rng.choice((1.0, 2.0, 4.0))) for kind in kinds
        )

    @staticmethod
    def _dead_paths(seed: int) -> tuple[Fault, ...]:
        """Return none for most seeds; else up to three paths that die."""
        rng = Random(f"dead paths {seed}")
        count = rng.randint(1, 3) if rng.random() < DEAD_PATHS else 0
        return tuple(Fault("dead path", None, 0, True, rng.uniform(0.0, FAULT_SECONDS), 0.0) for _ in range(count))

    @staticmethod
    def _programs(rng: Random) -> tuple[Program, ...]:
        """Return none for most seeds; else one that all members run, or a mixture."""
        single = tuple((program,) for program in Program)
        return rng.choice((*single, LOOPS, LOOPS)) if rng.random() < ONE_AT_A_TIME else ()

    @staticmethod
    def _fault(rng: Random) -> Fault:
        moment = rng.choice((*MOMENTS, None))
        return Fault(
            kind=rng.choice(KINDS),
            moment=moment,
            n=rng.randint(1, 6 if moment in RARE else 40),
            at_sender=rng.random() < 0.5,
            when=rng.uniform(0.0, FAULT_SECONDS),
            lasts=rng.choice((0.2, 1.0, 2.0, 4.0)),
        )
