"""DiLoCo: many inner steps apart, then one outer step together (arXiv 2311.08105).

    diloco = DiLoCo(comm, model, optimizer, inner_steps=100)
    diloco.join()                       # be given the group's parameters, if it has begun
    for batch in data:
        loss(model, batch).backward()
        optimizer.step(); optimizer.zero_grad()
        diloco.step()                   # each hundredth call is an outer step

Two modes. After inner phase t, which began at s(t), member i has the pseudo-gradient d_i(t):

    sync    outer(t+1) = step(outer(t), mean of d(t));  all go on from s(t+1) = outer(t+1)
    async   the mean of d(t) is taken in the background during phase t+1, and counts one phase late:
            outer(t) = step(outer(t-1), mean of d(t-1)); all go on from s(t+1) = outer(t)
            Phase 1 has nothing to wait for: phase 2 goes on from where it ended, s(2) = its parameters.

The asynchronous form is that of PCCL (arXiv 2505.14065): a round costs nothing while it is shorter
than a phase. Only parameters are averaged; buffers and the inner optimiser's state stay each member's.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from typing import Any, Literal

import torch

from collectives.errors import BadArgument
from collectives.outer_optimizer import Outer, OuterGroup, OuterRounds, OuterStep, TrainedParameters
from collectives.types import Codec

Mode = Literal["sync", "async"]


class DiLoCo:
    """Trains one model with a group that communicates once in `inner_steps` steps.

    Args:
        group: a `Communicator`; what else uses it must not call `admit` or `sync_state` meanwhile.
        parameters: a module, of which those that require a gradient are trained, or tensors.
        optimizer: the inner optimiser, any of `torch.optim`; its state is part of `state_dict`.
        inner_steps: H, the inner steps between two outer ones.
        outer_lr, momentum: of the outer Nesterov step. By default the paper's 0.7 and 0.9 in "sync" mode;
            0.4 and 0.5 in "async", where those of the paper are not stable (see `outer_optimizer`).
        mode: "sync" or "async", the same at all members.
        codec: how pseudo-gradients travel.
        error_feedback: add what a lossy codec lost of one pseudo-gradient to the next.
        weight: this member's part of the mean.
        timeout: seconds for each collective call; longer than members' phases lie apart.
        patience: seconds for an outer step, however often the group has to begin it again.
        tag: of the reductions.

    Raises:
        BadArgument: a value makes no sense.
    """

    def __init__(  # noqa: PLR0913  # the options of the algorithm, each with its default
        self,
        group: OuterGroup,
        parameters: torch.nn.Module | Iterable[torch.Tensor],
        optimizer: torch.optim.Optimizer | None = None,
        *,
        inner_steps: int = 100,
        outer_lr: float | None = None,
        momentum: float | None = None,
        mode: Mode = "sync",
        codec: Codec = Codec.NONE,
        error_feedback: bool = False,
        weight: float = 1.0,
        timeout: float = 30.0,
        patience: float = 600.0,
        tag: int = 0,
    ) -> None:
        if inner_steps < 1 or mode not in ("sync", "async"):
            raise BadArgument(f"inner_steps = {inner_steps}, mode = {mode!r}: give at least 1, and 'sync' or 'async'")
        self._parameters = TrainedParameters(parameters)
        self._optimizer = optimizer
        self._inner_steps = inner_steps
        self._mode = mode
        self._weight = weight
        settings = Outer.usual(
            outer_lr,
            momentum,
            late=mode == "async",
            codec=codec,
            error_feedback=error_feedback,
            timeout=timeout,
            patience=patience,
            tag=tag,
        )
        self._start = self._parameters.flat_copy()
        self._rounds = OuterRounds(group, self._start, settings)
        self._begun_at = 0  # replacements of the outer parameters when the inner steps since `_start` began
        self._inner = 0
        self._background: Future[OuterStep] | None = None

    @property
    def revision(self) -> int:
        """Outer steps that the group has taken, as far as this member has seen them."""
        return self._rounds.revision

    @property
    def outer(self) -> torch.Tensor:
        """A copy of the outer parameters, 1-D: between calls in "sync" mode the same bits at every member."""
        self._settle()
        return self._rounds.outer.clone()

    def join(self) -> OuterStep:
        """Take part in one round without a contribution, and take over the group's parameters.

        For a member that comes late: it waits for the others' next outer step. One that does not call
        this is brought up to date at its own first outer step, for which its inner steps then do not count.

        Raises:
            CollectiveError: as `step`.
        """
        self._settle()
        step = self._rounds.run(None)
        self._go_on_from(self._rounds.outer)
        self._inner = 0
        return step

    def step(self) -> OuterStep | None:
        """Count an inner step; after each `inner_steps`-th, take the outer one and return what it did.

        In "async" mode that is the one of the phase before, and the first time there is none.

        Raises:
            Aborted, DeadlineExceeded, Evicted, InDoubt, NotEnoughPeers: for as long as `patience` no round
                could be completed. The parameters are as the inner steps left them; calling `step`
                again goes on with the next phase.
            Mismatch: another member has other parameters or settings.
        """
        self._inner += 1
        if self._inner < self._inner_steps:
            return None
        self._inner = 0
        local = self._parameters.flat_copy()
        gradient, begun_at = self._start - local, self._begun_at
        if self._mode == "sync":
            step = self._rounds.run(gradient, self._weight, begun_at)
            self._go_on_from(self._rounds.outer)
            return step
        before = self._collect()
        if before is None:
            self._start = local
        else:
            self._go_on_from(self._rounds.outer)
        self._background = _in_background(lambda: self._rounds.run(gradient, self._weight, begun_at))
        return before

    def finish(self) -> OuterStep | None:
        """Wait for the round in the background, if there is one, and take over its parameters."""
        step = self._collect()
        if step is not None:
            self._go_on_from(self._rounds.outer)
            self._inner = 0
        return step

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on from here: also the parameters, and the inner optimiser's state.

        Waits for a round in the background. One whose result has not been taken over yet is part of it.
        """
        self._settle()
        background = self._background
        return {
            "rounds": self._rounds.state_dict(),
            "start": self._start.clone(),
            "local": self._parameters.flat_copy(),
            "inner": self._inner,
            "stale": self._begun_at != self._rounds.replacements,
            "uncollected": background.result() if background and background.exception() is None else None,
            "optimizer": self._optimizer.state_dict() if self._optimizer else None,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; the group's state replaces it where that has gone on.

        Raises:
            BadArgument: it is of another model.
        """
        self._settle()
        self._rounds.load_state_dict(saved["rounds"])
        self._start = saved["start"].clone()
        self._parameters.write_back(saved["local"])
        self._inner = saved["inner"]
        self._begun_at = self._rounds.replacements - saved.get("stale", False)
        self._background = None
        if saved["uncollected"]:
            self._background = Future()
            self._background.set_result(saved["uncollected"])
        if self._optimizer and saved["optimizer"]:
            self._optimizer.load_state_dict(saved["optimizer"])

    def _go_on_from(self, outer: torch.Tensor) -> None:
        self._start, self._begun_at = outer.clone(), self._rounds.replacements
        self._parameters.write_back(outer)

    def _settle(self) -> None:
        if self._background is not None:
            wait([self._background])

    def _collect(self) -> OuterStep | None:
        background, self._background = self._background, None
        return background.result() if background is not None else None


def _in_background(round_: Callable[[], OuterStep]) -> "Future[OuterStep]":
    """Run a round on a thread that does not keep the process alive."""
    future: Future[OuterStep] = Future()

    def run() -> None:
        try:
            future.set_result(round_())
        except Exception as error:  # noqa: BLE001  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="outer round", daemon=True).start()
    return future
