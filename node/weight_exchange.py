"""Averaging weights with peers of the same architecture, in the background of a node.

Once in `weights.every` rounds the trainer's thread leaves a copy of the weights for this module's
thread, which takes part in one round of the group (`collectives.outer`) and leaves the result.
The trainer never waits: it takes a result up at the end of a round in which there is one, and
skips an exchange while the one before is not over. What the node has learnt meanwhile stays:

    weights = result + (weights now - weights in the copy)

and counts in the next exchange, whose pseudo-gradient is measured from `result`.

What the modes are and who is in a group is in `weights.py`.
"""

import math
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from collectives import Codec, CollectiveError
from collectives.errors import BadArgument, Mismatch
from collectives.outer import AT_ONCE, ONE_LATE, Group, Outer, OuterRounds, OuterStep, flat_copy, trained, write_back
from node.config import WeightsConfig
from node.errors import UserError
from node.policy.load import Policy
from protocol.files import write_atomically

STATE_FILE = "weights.safetensors"  # in a checkpoint
CALL_TIMEOUT = 60.0  # seconds for one collective call; a round that times out is simply begun again
FIRST_RETRY, LAST_RETRY = 1.0, 30.0  # seconds between attempts to reach the group, doubling
CLOSE_TIMEOUT = 10.0  # seconds

log = structlog.get_logger()


class Member(Group, Protocol):
    """A membership in a group: a `Communicator`."""

    @property
    def address(self) -> str:
        """Where others dial this member."""

    def meet(self, addresses: Iterable[str]) -> None:
        """Dial others of the group that are not members yet, without waiting."""

    def leave(self) -> None:
        """Leave the group; calls under way end with an error."""


Connect = Callable[[], Member]


@dataclass(frozen=True, slots=True)
class _Result:
    """What a round of the group left, and the weights since which learning does not yet count in it."""

    since: torch.Tensor
    outer: torch.Tensor
    momentum: torch.Tensor
    step: OuterStep


class WeightExchange:
    """One node's part in its group. All methods are for the trainer's thread, and none waits for the network.

    Args:
        config: the `weights` table; its mode is not "off".
        policy: whose trained parameters are exchanged, in place.
        connect: reaches the group, or raises `CollectiveError`; called on the exchange's own thread.
        address: the file to write the member's address to.
        find: tells where else members of the group may be; asked before each exchange.
    """

    def __init__(
        self,
        config: WeightsConfig,
        policy: Policy,
        connect: Connect,
        address: Path,
        find: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self._config = config
        self._parameters = trained(policy.model)
        self._connect = connect
        self._address = address
        self._find = find
        self._base = flat_copy(self._parameters)
        self._momentum = torch.zeros_like(self._base)
        self._revision = 0
        self._jobs: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()  # weights; None: leave
        self._results: queue.SimpleQueue[_Result] = queue.SimpleQueue()
        self._busy = False
        self._stopping = threading.Event()
        self._member: Member | None = None
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)

    def begin(self) -> None:
        """Reach the group, and be given its weights if it has trained already."""
        self._busy = True
        self._jobs.put(flat_copy(self._parameters))
        self._thread.start()

    def close(self) -> None:
        """Leave the group; an exchange that is under way is given up."""
        self._stopping.set()
        self._jobs.put(None)
        if self._member is not None:  # else it may be waiting to be let in, and nobody would notice its end
            self._member.leave()
            self._thread.join(CLOSE_TIMEOUT)

    def after_round(self, number: int) -> dict[str, object]:
        """Take up a result if there is one to take up, begin an exchange if it is time; return what to log."""
        due = number % self._config.every == 0
        row: dict[str, object] = {}
        if due or self._config.mode != "async-diloco":
            row = self._take_up()
        if due and not self._busy and self._thread.is_alive():
            self._busy = True
            self._jobs.put(flat_copy(self._parameters))
        return row

    def _take_up(self) -> dict[str, object]:
        try:
            result = self._results.get_nowait()
        except queue.Empty:
            return {}
        self._busy = False
        learnt = flat_copy(self._parameters) - result.since
        write_back(result.outer + learnt, self._parameters)
        self._base, self._momentum, self._revision = result.outer, result.momentum, result.step.revision
        return {
            "weights/revision": result.step.revision,
            "weights/members": len(result.step.contributors),
            "weights/joined": result.step.joined,
            "weights/seconds": result.step.seconds,
            "weights/bytes_sent": result.step.bytes_sent,
            "weights/bytes_received": result.step.bytes_received,
        }

    # --- checkpoints ---

    def write(self, folder: Path) -> None:
        """Add this node's state to a checkpoint. What is under way is not part of it: the group decides it."""
        state = {"outer": self._base, "momentum": self._momentum, "revision": torch.tensor(self._revision)}
        save_file(state, folder / STATE_FILE)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint, before `start`; one without this state is as good as a first start.

        Raises:
            UserError: the file is of another model or damaged.
        """
        path = folder / STATE_FILE
        if not path.exists():
            return
        try:
            state = load_file(path)
            if state["outer"].shape != self._base.shape:
                raise ValueError("it is of another model")
            self._base, self._momentum, self._revision = state["outer"], state["momentum"], int(state["revision"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"cannot read {path}: {error}; delete it to have the group's weights instead") from error

    # --- the exchange's own thread ---

    def _run(self) -> None:
        try:
            self._member = self._reach()
            if self._member is not None:
                self._exchange(self._member)
        except CollectiveError as error:
            if not self._stopping.is_set():
                log.error("weights are no longer exchanged", reason=str(error))  # noqa: TRY400  # the text says it all
        except Exception:
            log.exception("weights are no longer exchanged")  # a defect here must not end the node
        finally:
            if self._member is not None:
                self._member.leave()

    def _reach(self) -> Member | None:
        delay = FIRST_RETRY
        while not self._stopping.is_set():
            try:
                return self._connect()
            except (BadArgument, Mismatch):
                raise
            except CollectiveError as error:
                log.info("group of weights not reached", reason=str(error), again_in_s=delay)
            self._stopping.wait(delay)
            delay = min(2 * delay, LAST_RETRY)
        return None

    def _exchange(self, member: Member) -> None:
        write_atomically(self._address, f"{member.address}\n".encode())
        rounds = OuterRounds(member, self._base, outer_of(self._config), self._stopping)
        rounds.load_state_dict({"outer": self._base, "momentum": self._momentum, "revision": self._revision})
        joining = True  # the first round is to be brought up to date: it contributes nothing
        while (given := self._jobs.get()) is not None and not self._stopping.is_set():
            member.meet(self._find())
            start = rounds.outer.clone()
            step = rounds.run(None if joining else start - given)
            log.info("weights exchanged", revision=step.revision, members=len(step.contributors), seconds=step.seconds)
            # What was learnt since `start` counts the next time, unless the group's state replaced it.
            since = start if joining and not step.joined else given
            joining = False
            self._results.put(_Result(since, rounds.outer.clone(), rounds.momentum.clone(), step))


def outer_of(config: WeightsConfig) -> Outer:
    """Return how the group of this mode steps."""
    if config.mode == "average":
        lr, momentum = 1.0, 0.0
    else:
        lr, momentum = AT_ONCE if config.mode == "diloco" else ONE_LATE
        lr = lr if config.outer_lr is None else config.outer_lr
        momentum = momentum if config.momentum is None else config.momentum
    return Outer(lr, momentum, Codec(config.codec), timeout=CALL_TIMEOUT, patience=math.inf)
