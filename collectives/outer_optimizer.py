"""The outer step of DiLoCo (arXiv 2311.08105), and the rounds in which a group takes it together.

    gradient  = start - parameters after the inner steps     (of each member: its pseudo-gradient)
    g         = weighted mean of the members' gradients
    momentum  = mu * momentum + g
    outer     = outer - lr * (g + mu * momentum)             (Nesterov, as torch.optim.SGD has it)

One round is: let newcomers in, synchronise, reduce, step. A member's first round begins with the
synchronisation, which is where those are who let it in. A round is done again from its beginning
whenever the group calls one of these off, so all members are back at the same place whatever
happened; the synchronisation brings everybody to the same outer state (late joiners, those that
come back, one that missed a step). A gradient that was begun before its member's state was replaced
counts for nothing, in that round and in any later one: its inner steps began somewhere else.

A mean that is not finite, or leads to parameters that are not, is not taken: some member's values are no numbers.
All have the same bits of it, so all leave it out: the round ends without a step.

The step itself uses additions and multiplications that are each rounded once, on the CPU, so
equal means give equal bits on any machine.
"""

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from collectives.errors import CALLED_OFF, BadArgument
from collectives.reduce.codecs import Feedback
from collectives.shared_state.state import SharedState
from collectives.types import Codec, Op, ReduceResult, SyncResult, SyncStrategy
from protocol.identity import NodeId

# (learning rate, momentum) of the outer step. Where the mean gradient counts at once, the paper's.
# One step late, on a quadratic whose inner phase goes a part k of the way, those diverge from k = 0.4 on
# (the greatest eigenvalue of the recurrence is 1.05 at k = 0.5, 1.28 at k = 1); these have 0.88 or less
# for k from 0.2 to 1, and 0.96 at k = 0.05.
_AT_ONCE = 0.7, 0.9
_ONE_LATE = 0.4, 0.5
RETRY_DELAY = 0.1  # seconds before a round that was called off is begun again


class OuterGroup(Protocol):
    """A round's needs of a `Communicator`."""

    def admit(self, timeout: float = ...) -> Any:
        """Let newcomers in; a member that was left out waits to be let in again."""

    def sync_state(self, state: SharedState, strategy: SyncStrategy = ..., timeout: float = ...) -> SyncResult:
        """Bring every member to the state that holds."""

    def all_reduce(  # as that of `Communicator`
        self,
        x: torch.Tensor,
        op: Op = ...,
        out: torch.Tensor | None = ...,
        weight: float = ...,
        codec: Codec = ...,
        tag: int = ...,
        timeout: float = ...,
        feedback: Feedback | None = ...,
    ) -> ReduceResult:
        """Reduce `x` among the members."""


@dataclass(frozen=True, slots=True)
class Outer:
    """How the outer step is taken and reduced; every member of a group must have the same."""

    lr: float = 0.7
    momentum: float = 0.9
    codec: Codec = Codec.NONE
    error_feedback: bool = False
    timeout: float = 30.0  # seconds for each collective call: more than the members' rounds lie apart
    patience: float = 600.0  # seconds for a round, however often it is called off
    tag: int = 0

    @classmethod
    def usual(cls, lr: float | None, momentum: float | None, *, late: bool, **others: Any) -> "Outer":
        """Return settings with the usual step where it is None; `late`: the mean counts one phase late."""
        usual_lr, usual_momentum = _ONE_LATE if late else _AT_ONCE
        return cls(usual_lr if lr is None else lr, usual_momentum if momentum is None else momentum, **others)

    def momentum_of(self, outer: torch.Tensor) -> torch.Tensor:
        """Return the momentum of a group that has yet to step; empty where steps have none."""
        return torch.zeros_like(outer) if self.momentum else outer.new_empty(0)

    def __post_init__(self) -> None:
        if not (self.lr > 0 and 0 <= self.momentum < 1 and self.timeout > 0 and self.patience > 0):
            raise BadArgument(f"{self}: lr, timeout and patience must be positive, momentum in [0, 1)")


@dataclass(frozen=True, slots=True)
class OuterStep:
    """The result of one round. `joined`: this member's gradient began before its state was replaced, and did not count.

    `contributors` are the members of the round, of whatever weight.
    """

    revision: int
    contributors: tuple[NodeId, ...]
    joined: bool
    attempts: int
    bytes_sent: int
    bytes_received: int
    seconds: float
    finite: bool = True  # False: the mean was not, and no step was taken


def nesterov(outer: torch.Tensor, momentum: torch.Tensor, gradient: torch.Tensor, lr: float, mu: float) -> None:
    """Take an outer step: `outer` and `momentum` (1-D, on the CPU, of one type) are changed in place.

    With `mu` 0 the momentum is neither read nor written, and may be empty.
    """
    if mu == 0:
        outer.sub_(gradient.mul(lr))
        return
    momentum.mul_(mu).add_(gradient)
    outer.sub_(momentum.mul(mu).add_(gradient).mul_(lr))


class TrainedParameters:
    """The parameters of a module that are trained, or the given tensors, as one vector.

    Raises:
        BadArgument: there is none, or one that is no floating-point tensor.
    """

    def __init__(self, parameters: torch.nn.Module | Iterable[torch.Tensor]) -> None:
        given = parameters.parameters() if isinstance(parameters, torch.nn.Module) else parameters
        self.tensors = [
            tensor for tensor in given if not isinstance(parameters, torch.nn.Module) or tensor.requires_grad
        ]
        if not self.tensors or not all(tensor.is_floating_point() for tensor in self.tensors):
            raise BadArgument("DiLoCo wants at least one parameter, and floating-point tensors only")

    def flat_copy(self) -> torch.Tensor:
        """Return them one after the other, on the CPU: float64 where one of them is, else float32."""
        dtype = torch.float64 if any(tensor.dtype is torch.float64 for tensor in self.tensors) else torch.float32
        return torch.cat([tensor.detach().reshape(-1).to("cpu", dtype) for tensor in self.tensors])

    def write_back(self, flat: torch.Tensor) -> None:
        """Copy what `flat_copy` would give into them, each rounded to its own type."""
        at = 0
        with torch.no_grad():
            for tensor in self.tensors:
                tensor.copy_(flat[at : at + tensor.numel()].view(tensor.shape))
                at += tensor.numel()


class OuterRounds:
    """The outer parameters, which a group holds in common, and the rounds that advance them.

    Args:
        group: a `Communicator`, or what behaves like one.
        outer: the outer parameters to begin with, 1-D on the CPU; the members' may differ, and are made equal.
        settings: how to step.
        stopped: once set, a round that is called off is not tried again.
    """

    def __init__(
        self, group: OuterGroup, outer: torch.Tensor, settings: Outer, stopped: threading.Event | None = None
    ) -> None:
        self._group = group
        self._settings = settings
        self._stopped = stopped or threading.Event()
        self._fresh = True  # let in by a round of the others, which goes on with its synchronisation
        self._feedback = Feedback() if settings.error_feedback else None
        self.replacements = 0  # how often the group's state has replaced this member's
        self.outer = outer.clone()
        self.momentum = settings.momentum_of(outer)
        self.state = SharedState({"outer": self.outer} | ({"momentum": self.momentum} if settings.momentum else {}))

    @property
    def revision(self) -> int:
        """Outer steps that the group has taken."""
        return self.state.revision

    def run(self, gradient: torch.Tensor | None, weight: float = 1.0, begun_at: int | None = None) -> OuterStep:
        """Take part in one round.

        Args:
            gradient: this member's pseudo-gradient, like the outer parameters; None contributes nothing.
            weight: this member's part of the mean: its inner steps or tokens, say.
            begun_at: the `replacements` when the gradient's inner steps began; None: those of now. The gradient does
                not count if there are more by then.

        Raises:
            Aborted, DeadlineExceeded, Evicted, InDoubt, NotEnoughPeers: the last reason why the round was called
                off, when `patience` is at its end. The outer parameters are those of the last round that
                counted, or of a group that this member fell in with.
            Mismatch: another member has other parameters or settings.
        """
        began = time.monotonic()
        begun_at = self.replacements if begun_at is None else begun_at
        progress = _Progress(0.0 if gradient is None else weight, begun_at)
        gradient = torch.zeros_like(self.outer) if gradient is None else gradient
        while True:
            progress.attempts += 1
            try:
                contributors = self._attempt(gradient, progress)
            except CALLED_OFF:
                if time.monotonic() - began > self._settings.patience or self._stopped.wait(RETRY_DELAY):
                    raise
                continue
            return OuterStep(
                self.revision,
                contributors,
                progress.joined,
                progress.attempts,
                progress.bytes_sent,
                progress.bytes_received,
                time.monotonic() - began,
                progress.finite,
            )

    def _attempt(self, gradient: torch.Tensor, progress: "_Progress") -> tuple[NodeId, ...]:
        settings = self._settings
        if not self._fresh:
            self._group.admit(timeout=settings.timeout)
        self._fresh = False
        synced = self._group.sync_state(self.state, SyncStrategy.ENFORCE_POPULAR, timeout=settings.timeout)
        progress.add(synced)
        self.replacements += synced.replaced
        if self.replacements != progress.begun_at:
            progress.joined, progress.weight = True, 0.0
        try:
            mean = self._group.all_reduce(
                gradient,
                Op.AVG,
                out=torch.empty_like(gradient),
                weight=progress.weight,
                codec=settings.codec,
                tag=settings.tag,
                timeout=settings.timeout,
                feedback=self._feedback,
            )
        except BadArgument:
            if progress.weight:
                raise
            return synced.contributors  # all have just joined: there is nothing to step with, and all know it
        progress.add(mean)
        outer, momentum = self.outer.clone(), self.momentum.clone()
        nesterov(outer, momentum, mean.value, settings.lr, settings.momentum)
        progress.finite = bool(outer.isfinite().all() and momentum.isfinite().all())
        if progress.finite:
            self.outer.copy_(outer)
            self.momentum.copy_(momentum)
            self.state.revision += 1
        return mean.contributors

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything that a later run needs to go on."""
        return {
            "outer": self.outer.clone(),
            "momentum": self.momentum.clone(),
            "revision": self.state.revision,
            "residual": self._feedback.residual if self._feedback else None,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; raises `BadArgument` when it is of other parameters."""
        if saved["outer"].shape != self.outer.shape:
            raise BadArgument(
                f"the saved state has {saved['outer'].numel()} parameters, this model {self.outer.numel()}: "
                "load one of the same model"
            )
        self.outer.copy_(saved["outer"])
        self.momentum.copy_(saved["momentum"])
        self.state.revision = saved["revision"]
        self.state.synced = None  # a member that comes back has no say in which history goes on
        if self._feedback:
            self._feedback.residual = saved["residual"]


@dataclass(slots=True)
class _Progress:
    """Of one round, over its attempts."""

    weight: float
    begun_at: int  # see `OuterRounds.run`
    joined: bool = False
    attempts: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    finite: bool = True

    def add(self, traffic: ReduceResult | SyncResult) -> None:
        self.bytes_sent += traffic.bytes_sent
        self.bytes_received += traffic.bytes_received
