"""Runs training steps over a communicator's calls: what `Communicator.run` does; the rules are in `steps`."""

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from collectives.agreement.views import OpId
from collectives.errors import CALLED_OFF, BadArgument, DeadlineExceeded, InDoubt
from collectives.operations import EndOfStep, Rendezvous
from collectives.shared_state.state import SharedState
from collectives.steps import Attempt, Phase, Steps
from collectives.types import ReduceResult, StepResult, SyncResult, SyncStrategy
from protocol.identity import NodeId

C = TypeVar("C", bound="Stepping")
T = TypeVar("T")


class Stepping(Protocol):
    """What steps need of a `Communicator`."""

    @property
    def node_id(self) -> NodeId:
        """This member's id."""

    @property
    def stay(self) -> int:
        """How often this member came into the group."""

    @property
    def outside(self) -> bool:
        """Whether this member has to be let in."""

    def pending(self) -> bool:
        """Tell whether anybody waits to be let in, the same to all right after an operation."""

    def admit(self, timeout: float) -> None:
        """Let in those that wait."""

    def sync_state(self, state: SharedState, strategy: SyncStrategy, timeout: float) -> SyncResult:
        """Bring `state` to the one that holds."""


Meet = Callable[[Rendezvous | EndOfStep, float], ReduceResult]  # carries out an operation within a time (s)


# One call of the runner waits for the others at most this part of a step's time, and for one that hangs half of it.
PATIENCE = 1 / 5
LAG = 1 / 2  # of a call's time-out: how late others may be, unless that is less than `GroupTiming.hang`


class StepRunner(Generic[C]):
    """The steps of one communicator, one at a time."""

    def __init__(self, hang: float) -> None:
        """`hang` is that of `GroupTiming`, in seconds."""
        self._hang = hang
        self._lag = 0.0  # the most that the calls of the last attempt with any allowed, in seconds
        self._steps: Steps | None = None
        self.turn: OpId | None = None  # the last rendezvous: all members who take a step have the same one
        self.attempt: Attempt | None = None  # of the step that is being taken; calls that begin now belong to it
        self._patience = 0.0  # seconds, of one call of the runner's own
        self._one_at_a_time = threading.Lock()
        self._doubtful: StepResult[Any] | None = None  # what the last step gave, if whether it counts is unknown

    def lag(self, timeout: float, *, of_step: bool) -> float:
        """Return how many seconds late others may be for a call that begins now: see `Begin`.

        `of_step`: it is a call of the step's. For the runner's own calls others may be as late as for those.
        """
        if not self._one_at_a_time.locked():
            return 0.0
        lag = max(self._hang, timeout * LAG)
        if self.attempt is None or not of_step:
            return min(self._lag, lag) if self._lag else lag
        self._lag = max(self._lag, lag) if self.attempt.has_called else lag
        self.attempt.has_called = True
        return lag

    def run(
        self, comm: C, meet: Meet, step: Callable[[C], T], state: SharedState | None, timeout: float
    ) -> StepResult[T]:
        """Take a step; `meet` carries out the runner's own calls. See `Communicator.run`."""
        if not self._one_at_a_time.acquire(blocking=False):
            raise BadArgument("a step is under way: call run() from one thread at a time")
        try:
            if self._steps is None:
                self._steps = Steps(state.revision if state is not None else 0)
            self._patience = timeout * PATIENCE
            done = self._until_it_counts(comm, meet, self._steps, step, state, timeout)
        finally:
            self._one_at_a_time.release()
        if state is not None:
            state.revision = done.number
        return done

    def _until_it_counts(
        self, comm: C, meet: Meet, steps: Steps, step: Callable[[C], T], state: SharedState | None, timeout: float
    ) -> StepResult[T]:
        until = time.monotonic() + timeout
        attempts = 0
        while True:
            try:
                earlier = self._come_together(comm, meet, steps, state, until)
                if earlier is not None:
                    return earlier
                attempts += 1
                self.attempt = Attempt()
                value = step(comm)
                if time.monotonic() >= until:
                    raise DeadlineExceeded(f"the step came to its end after its time-out of {timeout:g} s: allow more")
                steps.stepped()
                return self._end(comm, meet, steps, value, attempts, until)
            except BaseException as error:
                steps.disturbed(admits=comm.outside or comm.pending())
                if not isinstance(error, CALLED_OFF) or time.monotonic() >= until:
                    raise
            finally:
                self.attempt = None

    def _come_together(
        self, comm: C, meet: Meet, steps: Steps, state: SharedState | None, until: float
    ) -> StepResult[Any] | None:
        """Do what comes before a step; return the last step if it turns out to count."""
        while steps.phase is not Phase.STEP:
            left = until - time.monotonic()
            if steps.phase is Phase.ADMIT:
                comm.admit(min(left, self._patience))
                steps.admitted()
            elif steps.phase is Phase.MEET:
                claim = steps.claim(comm.stay)
                rendezvous = Rendezvous(claim, state is not None)
                claims = meet(rendezvous, min(left, self._patience)).value
                self.turn = rendezvous.op
                earlier, self._doubtful = self._doubtful, None
                if steps.met(comm.node_id, claims) and earlier is not None:
                    return earlier
            else:
                if state is not None:
                    _bring_up_to_date(comm, state, steps, left)
                steps.synced()
        return None

    def _end(self, comm: C, meet: Meet, steps: Steps, value: T, attempts: int, until: float) -> StepResult[T]:
        """Call the step's end, and return what it gave if that counts."""
        end = EndOfStep(steps.done + 1)
        joined = steps.joined
        try:
            done = meet(end, min(until - time.monotonic(), self._patience))
        except InDoubt:
            if end.op is not None:
                steps.doubted(end.op)
                self._doubtful = StepResult(steps.done + 1, value, end.members, attempts, joined)
            raise
        steps.ended(done.value, comm.pending())
        return StepResult(steps.done, value, done.contributors, attempts, joined)


def _bring_up_to_date(comm: Stepping, state: SharedState, steps: Steps, timeout: float) -> None:
    """Give those who are behind the state of the others, who all have the right one."""
    state.revision = steps.done if steps.offers else 0
    state.synced = None
    strategy = SyncStrategy.ENFORCE_POPULAR if steps.offers else SyncStrategy.RECEIVE_ONLY
    comm.sync_state(state, strategy, timeout)
