"""Several processes that train one node together: the ranks of a `torch.distributed` group (data parallel, FSDP2).

Number 0 is the node. It alone has the folder, the loop, the engine and the network. The others follow: they run the
same trainer on their parts of each round. Number 0 tells them, in this order,

    start    the configuration, the checkpoint that training goes on from, and whether all generate
    pass     how logits and prompts are computed (`node.training.head`, `node.training.shared_prefix`)
    begin    that training begins
    round    its micro-batches, equally many for each rank; or that there is no further round
    log      whether to stop and to save after a round that it has logged
    step     that it is done with this optimiser step: logged, and its checkpoint begun

and may tell them at any time that there is nothing more to do. What it says goes over the CPU by gloo, without a limit
in time: a round may take hours. Gradients go as accelerate has it, by NCCL among GPUs. Every rank has the same number
of these exchanges, or all would wait.

The weights are whole on every rank (data parallel) or each rank has a part of each (FSDP2). With parts, number 0 also
keeps a whole copy, for the engine, evaluations, peers and checkpoints: `gather` brings it up to date, `scatter` the
parts. So a checkpoint is the same file whatever trained it.

Nothing here is for peers: the group trusts its members, listens on this machine, and its ports are open to this
machine's users, as `torch.distributed` has it.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from accelerate import PartialState
from safetensors.torch import load, save
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerControl

from node.errors import UserError
from node.processes.machine import free_memory
from node.processes.worker_process import WorkerProcess
from node.training.batch import Batch

NO_LIMIT = timedelta(days=365)
_NO_FURTHER_ROUND = b"."
_DISMISSED = b""


class Dismissed(Exception):  # noqa: N818  # it is no failure
    """Number 0 has nothing more for a rank that follows."""


class Ranks:
    """This process's place among those that train one node: it is `number` of `count`, 0 of 1 where there are no more.

    All ranks call the same methods in the same order. Where another rank has died they raise `RuntimeError`.

    Args:
        number: of this process; 0 is the node.
        count: of all.
        sharded: each has a part of the weights (FSDP2).
        group: what number 0 says goes over it.

    Attributes:
        others: the processes that number 0 has started, from number 1 on; none where a launcher has.
    """

    def __init__(
        self,
        number: int = 0,
        count: int = 1,
        sharded: bool = False,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        self.number = number
        self.count = count
        self.sharded = sharded
        self._group = group
        self.others: Sequence[WorkerProcess] = ()

    @classmethod
    def join(cls) -> "Ranks":
        """Meet the others that the launcher's variables name (RANK, WORLD_SIZE, MASTER_ADDR, ...), if they name any."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        state = PartialState(cpu=on_cpu())
        group = torch.distributed.new_group(backend="gloo", timeout=NO_LIMIT)
        return cls(state.process_index, state.num_processes, is_sharded(), group)

    def share(self, said: bytes = b"") -> bytes:
        """Return on every rank what number 0 says; the others leave `said` empty.

        Raises:
            Dismissed: number 0 has dismissed the others.
        """
        if self.count == 1:
            return said
        size = torch.tensor(len(said))
        torch.distributed.broadcast(size, 0, group=self._group)
        if not size:
            raise Dismissed
        data = torch.frombuffer(bytearray(said), dtype=torch.uint8) if said else torch.empty(int(size)).byte()
        torch.distributed.broadcast(data, 0, group=self._group)
        return data.numpy().tobytes()

    def dismiss(self) -> None:
        """Tell the others that there is nothing more to do; number 0 calls it, last of all."""
        if self.count > 1:
            torch.distributed.broadcast(torch.tensor(len(_DISMISSED)), 0, group=self._group)

    def tell(self, what: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return what number 0 tells, JSON's values by name; see `share`."""
        return json.loads(self.share(b"" if what is None else json.dumps(what).encode()))

    def hand_out(self, rounds: Iterator[Sequence[Batch]]) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each round that number 0 has; the others' `rounds` are not looked at.

        When number 0 asks for its first round, all ranks are ready to generate.
        """
        self.wait()
        if self.number == 0:
            for batches in rounds:
                if self.count > 1:
                    self.share(_packed(batches))
                yield list(batches[0 :: self.count])
            if self.count > 1:
                self.share(_NO_FURTHER_ROUND)
            return
        while (message := self.share()) != _NO_FURTHER_ROUND:
            yield _unpacked(message)[self.number :: self.count]
            free_memory()  # for the engine on this rank's GPU, which generates next

    def agree_on(self, control: TrainerControl) -> None:
        """Do after this round as number 0 does: stop or not, save or not."""
        if self.count > 1:
            mine = {"stop": control.should_training_stop, "save": control.should_save}
            found = self.tell(mine if self.number == 0 else None)
            control.should_training_stop, control.should_save = found["stop"], found["save"]

    def wait(self) -> None:
        """Wait until number 0 is here too, however long it takes."""
        if self.count > 1:
            self.share(b"." if self.number == 0 else b"")

    def total(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Return the sums over all ranks."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(sums)
        return sums.tolist()

    def gather(self, trained: Iterable[torch.Tensor], whole: Iterable[torch.Tensor]) -> None:
        """Bring number 0's whole copies of the weights up to date."""
        with torch.no_grad():
            for part, copy in zip(trained, whole, strict=True):
                found = _whole(part)
                if self.number == 0:
                    copy.copy_(found)

    def scatter(self, trained: Iterable[torch.Tensor], whole: Iterable[torch.Tensor]) -> None:
        """Give every rank number 0's weights."""
        with torch.no_grad():
            for mine, copy in zip(trained, whole, strict=True):
                if isinstance(mine, DTensor):
                    source = copy if self.number == 0 else torch.empty(mine.shape, device=mine.device)
                    mine.copy_(_part_of(source.to(mine.dtype), mine))
                else:
                    torch.distributed.broadcast(mine, 0)


def is_sharded() -> bool:
    """Tell whether each rank is to have a part of the weights.

    Raises:
        UserError: by FSDP of version 1.
    """
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if wanted and os.environ.get("FSDP_VERSION") != "2":
        raise UserError("accelerate's settings ask for FSDP of version 1: set fsdp_version: 2 in their fsdp_config")
    return wanted


def on_cpu() -> bool:
    """Tell whether the ranks train on the CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") or not torch.cuda.is_available()


def is_broken(error: RuntimeError) -> bool:
    """Tell whether `error` says that another rank is gone."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank has of a tensor: all of it, where it is not shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_state(optimizer: Any) -> dict[str, Any]:
    """Return the state of an optimiser of parts as that of whole weights, on the CPU. All ranks take part."""
    state = optimizer.state_dict()
    moments = {at: {name: _whole(value).cpu() for name, value in of.items()} for at, of in state["state"].items()}
    return state | {"state": moments}


def sharded_state(state: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """Return the state of an optimiser of whole weights as one of this rank's parts. All ranks take part."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {
        at: {name: _part_of(value, weights[at]) if value.dim() else value for name, value in of.items()}
        for at, of in state["state"].items()
    }
    return {**state, "state": moments}


def _whole(part: torch.Tensor) -> torch.Tensor:
    return part.full_tensor() if isinstance(part, DTensor) else part


def _part_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def _packed(batches: Sequence[Batch]) -> bytes:
    return save({f"{at}/{name}": tensor for at, batch in enumerate(batches) for name, tensor in batch.items()})


def _unpacked(message: bytes) -> list[Batch]:
    batches: dict[int, Batch] = {}
    for key, tensor in load(message).items():
        at, name = key.split("/")
        batches.setdefault(int(at), {})[name] = tensor
    return [batches[at] for at in sorted(batches)]
