"""Averaging of weights under the runner "memory": a node's own code (`node.swarm.averaging`), in the lockstep's time.

An exchange begins when all members that are there have given their weights, as a real one's collective calls wait for
the slowest. It costs no time, and its result is there from the next of the lockstep's rounds on, `delay` rounds later
for an arm with a delay. So a node always trains for a round meanwhile, and takes the result up at the end of a round of
its own, as a real one does. A member that is away has left the group, and what it had given is lost. When it is back,
its first exchange gives it the group's weights and contributes nothing, if the group has gone on.

Bytes are those of the payload among owners: each member sends and receives 2 (n - 1) / n times the weights.

**Adam's moments** are a node's own, and an exchange leaves them as they are (`kept`). An arm may have them forgotten
when a result is taken up (`reset`), or averaged as weights are (`averaged`): then they travel, too, twice the weights.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from collectives.errors import BadArgument
from collectives.reduce.codecs import Feedback
from collectives.shared_state.selection import Share, choose
from collectives.shared_state.state import SharedState, share_of
from collectives.types import Codec, Op, ReduceResult, SyncResult, SyncStrategy
from node.config import WeightsConfig
from node.lab.plan import Moments
from node.policy.load import Policy
from node.swarm.averaging import AveragedWeights, AveragingMember, RoundResult
from protocol.identity import NodeId

FIRST, SECOND = "exp_avg", "exp_avg_sq"  # as torch.optim's Adam names them


class Meeting:
    """Where the members of one exchange meet for each of its calls, each on a thread of its own."""

    def __init__(self, members: Collection[int]) -> None:
        self.members = sorted(members)
        self._given: dict[int, Any] = {}
        self._met: Mapping[int, Any] = {}
        self._barrier = threading.Barrier(len(self.members), self._close)

    def meet(self, member: int, value: Any) -> Mapping[int, Any]:
        """Wait for all members; return what each gave, in their order."""
        self._given[member] = value
        self._barrier.wait()
        return self._met

    def break_off(self) -> None:
        """Let nobody wait for a member that failed."""
        self._barrier.abort()

    def _close(self) -> None:
        self._met, self._given = dict(sorted(self._given.items())), {}


@dataclass(slots=True)
class MemoryGroup:
    """One member's `OuterGroup`: it meets the others of the exchange in progress."""

    index: int
    meeting: Meeting | None = None

    def admit(self, timeout: float = 0) -> None:
        """Nobody waits to be let in: who is there is a member."""

    def sync_state(
        self, state: SharedState, strategy: SyncStrategy = SyncStrategy.ENFORCE_POPULAR, timeout: float = 0
    ) -> SyncResult:
        """Bring every member to the state that `collectives` chooses."""
        assert self.meeting is not None
        met = self.meeting.meet(self.index, (share_of(state, strategy), state))
        choice = choose({_name(member): Share.decode(share) for member, (share, _) in met.items()})
        replaced = [member for member in met if _name(member) not in choice.holders]
        source = met[next(member for member in met if _name(member) in choice.holders)][1]
        if self.index in replaced:
            for name, tensor in state.tensors.items():
                torch.as_tensor(tensor).copy_(torch.as_tensor(source.tensors[name]))
        self.meeting.meet(self.index, None)  # before this nobody changes what others copy
        state.revision = state.synced = choice.revision
        state.contents = None
        size = sum(tensor.nbytes for tensor in state.tensors.values())
        is_source = state is source
        sent, received = size * len(replaced) * is_source, size * (self.index in replaced)
        return SyncResult(choice.revision, sent, received, None, self._members(), 0.0, self.index in replaced)

    def all_reduce(  # as that of `Communicator`
        self,
        x: torch.Tensor,
        op: Op = Op.AVG,
        out: torch.Tensor | None = None,
        weight: float = 1.0,
        codec: Codec = Codec.NONE,
        tag: int = 0,
        timeout: float = 0,
        feedback: Feedback | None = None,
    ) -> ReduceResult:
        """Return the weighted mean, summed in the members' order."""
        assert self.meeting is not None and out is not None
        met = self.meeting.meet(self.index, (x, weight))
        total = sum(weight for _, weight in met.values())
        if total == 0:
            raise BadArgument("every member gave weight 0")
        out.zero_()
        for values, part in met.values():
            out.add_(values, alpha=part / total)
        self.meeting.meet(self.index, None)
        moved = round(2 * (len(met) - 1) / len(met) * x.nbytes)
        return ReduceResult(out, self._members(), 1, moved, moved, 0.0)

    def _members(self) -> tuple[NodeId, ...]:
        assert self.meeting is not None
        return tuple(map(_name, self.meeting.members))


def _name(member: int) -> NodeId:
    return NodeId(f"n{member}")


@dataclass(slots=True)
class Contribution:
    """What a member gives to an exchange: its weights, and where they travel its optimiser's moments."""

    weights: torch.Tensor
    moments: dict[str, torch.Tensor] | None = None


@dataclass(slots=True)
class Averaging:
    """The members of a run's group that are there, and what they have given to the next exchange."""

    delay: int
    moments: Moments = "kept"
    present: set[int] = field(default_factory=set)
    given: dict[int, Contribution] = field(default_factory=dict)
    members: dict[int, "LockstepWeights"] = field(default_factory=dict)

    def give(self, index: int, given: Contribution, now: int) -> None:
        """Note what a member gives, and hold the exchange if it is the last."""
        self.given[index] = given
        self._settle(now)

    def leave(self, index: int, now: int) -> None:
        """Go on without a member."""
        self.present.discard(index)
        self.given.pop(index, None)
        self._settle(now)

    def _settle(self, now: int) -> None:
        if self.present and self.present <= self.given.keys():
            given, self.given = self.given, {}
            self._exchange(given, now)

    def _exchange(self, given: Mapping[int, Contribution], now: int) -> None:
        """Have each member take part on a thread of its own, as in a node, and leave it the result."""
        meeting, errors = Meeting(given), []
        moments = _mean_moments([each.moments for each in given.values() if each.moments is not None])

        def take_part(index: int) -> None:
            try:
                self.members[index].take_part(meeting, given[index], moments, now + self.delay)
            except BaseException as error:  # noqa: BLE001  # raised below
                errors.append(error)
                meeting.break_off()

        threads = [threading.Thread(target=take_part, args=(index,)) for index in given]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


class LockstepWeights(AveragedWeights):
    """A node's weights in a run's group.

    Args:
        index: the node's.
        group: of the run.
        config: as for `AveragedWeights`.
        policy: likewise.
        now: the lockstep's round that the node is in.
    """

    def __init__(
        self, index: int, group: Averaging, config: WeightsConfig, policy: Policy, now: Callable[[], int]
    ) -> None:
        super().__init__(config, policy)
        self._index = index
        self._group = group
        self._now = now
        self._place = MemoryGroup(index)
        self._member: AveragingMember = self.member(self._place)
        self._waiting: tuple[int, RoundResult, Contribution, dict[str, torch.Tensor]] | None = None
        self._adam = AdamMoments(policy.model.parameters())
        group.members[index] = self

    def begin(self) -> None:
        """Join the group, if this node is there from the start; else do so when it is `back`."""
        if self._index in self._group.present:
            super().begin()

    def leave(self) -> None:
        """Leave the group; an exchange that is not over counts for nothing here."""
        self._waiting = None
        self._group.leave(self._index, self._now())

    @contextmanager
    def while_there(self) -> Iterator["LockstepWeights"]:
        """Leave the group at the end of the block."""
        try:
            yield self
        finally:
            self.leave()

    def back(self) -> None:
        """Join, or come back: the group's weights are taken up, where it has gone on."""
        self._group.present.add(self._index)
        super().begin()

    def take_part(self, meeting: Meeting, given: Contribution, moments: dict[str, torch.Tensor], ready: int) -> None:
        """Do this member's part of an exchange; its result can be taken up after the lockstep's round `ready`."""
        self._place.meeting = meeting
        result = self._member.exchange(given.weights)
        size = sum(moment.nbytes for moment in moments.values())
        more = round(2 * (len(meeting.members) - 1) / len(meeting.members) * size)
        sent, received = result.step.bytes_sent + more, result.step.bytes_received + more
        step = replace(result.step, bytes_sent=sent, bytes_received=received)
        self._waiting = (ready, replace(result, step=step), given, moments)

    def _give(self, weights: torch.Tensor) -> bool:
        moments = self._adam.read() if self._group.moments == "averaged" else None
        self._group.give(self._index, Contribution(weights, moments), self._now())
        return True

    def _result(self) -> RoundResult | None:
        if self._waiting is None or self._now() <= self._waiting[0]:
            return None
        (_, result, given, moments), self._waiting = self._waiting, None
        if self._group.moments == "reset":
            self._adam.forget()
        elif moments:
            self._adam.take_up(moments, given.moments)
        return result


class AdamMoments:
    """The moments of the optimiser that trains these parameters, once it has made a step."""

    def __init__(self, parameters: Iterator[torch.Tensor]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]

    @property
    def _states(self) -> list[dict[str, torch.Tensor]]:
        optimizer = _OPTIMIZERS.get(id(self._parameters[0]))
        return [optimizer.state[parameter] for parameter in self._parameters] if optimizer is not None else []

    def read(self) -> dict[str, torch.Tensor] | None:
        """Return both moments, each as one vector; None before the first step."""
        states = self._states
        if not all(states) or not states:
            return None
        return {name: torch.cat([state[name].reshape(-1) for state in states]) for name in (FIRST, SECOND)}

    def forget(self) -> None:
        """Begin them anew."""
        for state in self._states:
            state.clear()

    def take_up(self, mean: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor] | None) -> None:
        """Set them to the group's mean, and keep what came since `given`."""
        now = self.read()
        if now is None:
            return
        for name, flat in mean.items():
            wanted = flat + (now[name] - given[name]) if given is not None else flat.clone()
            wanted = wanted.clamp_(min=0) if name == SECOND else wanted
            at = 0
            for state in self._states:
                state[name].copy_(wanted[at : at + state[name].numel()].view_as(state[name]))
                at += state[name].numel()


_OPTIMIZERS: dict[int, torch.optim.Optimizer] = {}  # by the id of the first parameter


@contextmanager
def optimizers_known() -> Iterator[None]:
    """Note each optimiser of this process that makes a step, as torch's hook tells of it."""

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        _OPTIMIZERS[id(optimizer.param_groups[0]["params"][0])] = optimizer

    handle = register_optimizer_step_post_hook(note)
    try:
        yield
    finally:
        handle.remove()
        _OPTIMIZERS.clear()


def _mean_moments(given: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the means of members' moments; none where no member has any."""
    if not given:
        return {}
    return {name: torch.stack([moments[name] for moments in given]).mean(0) for name in (FIRST, SECOND)}
