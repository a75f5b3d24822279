"""A rank that has our collectives and torch's gloo."""

import copy
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import collectives.mesh.addresses
import collectives.torch_backend
from benchmarks.rank_commands import PERIOD, serve
from collectives import Codec, Communicator, Op
from collectives.mesh.addresses import Address
from protocol.identity import Identity

PATTERN = (torch.arange(PERIOD << 13) % PERIOD).float()
TIMEOUT_S = 60.0
POLL_S = 0.02
WIDTHS = (1024, 2048, 2048, 1800)  # of the layers of a model of 10 million weights
ROWS = 32  # of a rank's batch
TOLERANCE = {"none": 0.0, "int8": 0.02}  # of the greatest sum: two roundings to 1/127 of it, each half a step


class Rank:
    """See `rank_commands`."""

    def __init__(self) -> None:
        self._groups: dict[str, Communicator] = {}
        self._values = self._buffer = torch.empty(0)
        self._ranks = 1
        self._models: dict[str, nn.Module] = {}
        self._batch = torch.empty(0)

    def found(
        self, name: str, seeds: list[str], listen: str, advertised: str, protection: str, streams: int, local: bool
    ) -> dict[str, Any]:
        """Found a group, or join one. `advertised` is a proxy in front of `listen`; `local`: also on a Unix socket."""
        with ExitStack() as stack:
            if advertised:
                stack.enter_context(patch("collectives.mesh.mesh.listen", _advertising(advertised)))
            if not local:
                stack.enter_context(patch("collectives.mesh.mesh.listen_locally", lambda _: None))
            group = Communicator.connect(
                group=name,
                seeds=seeds,
                listen=listen,
                protection=protection,
                streams=streams,
                timeout=TIMEOUT_S,
                secret=os.environ["GOSSAMER_SECRET"],
                identity=self.identity(listen),
            )
        self._groups[name] = group
        return {"address": group.address}

    def identity(self, listen: str) -> Identity | None:
        """Return the key of a member that listens there; None: a new one."""
        return None

    def let_in(self, name: str) -> dict[str, Any]:
        """Wait until somebody wants to be let in, and do that."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self._groups[name].pending():
            if time.monotonic() > deadline:
                raise TimeoutError("nobody came")
            time.sleep(POLL_S)
        self._groups[name].admit(timeout=TIMEOUT_S)
        return {}

    def torch_groups(self, store: str, ranks: int, rank: int) -> dict[str, Any]:
        """Join torch's default process group, ours, and one of gloo beside it."""
        torch.distributed.init_process_group("gossamer", init_method=f"file://{store}", rank=rank, world_size=ranks)
        self._gloo = torch.distributed.new_group(backend="gloo")
        return {}

    def models(self, rank: int) -> dict[str, Any]:
        """Make a model, and the same under DistributedDataParallel by each process group."""
        torch.manual_seed(0)
        layers = [layer for sizes in pairwise(WIDTHS) for layer in (nn.Linear(*sizes), nn.ReLU())]
        model = nn.Sequential(*layers)
        groups = {"gossamer-torch": None, "gloo": self._gloo}
        self._models = {"alone": copy.deepcopy(model)} | {
            impl: DistributedDataParallel(copy.deepcopy(model), process_group=group) for impl, group in groups.items()
        }
        self._batch = torch.randn(ROWS, WIDTHS[0], generator=torch.Generator().manual_seed(rank))
        return {}

    def step(self, impl: str, at: float, rank: int) -> dict[str, Any]:
        """Make the gradients of one batch, summed over the ranks where `impl` has a process group."""
        time.sleep(max(0.0, at - time.time()))
        before = time.process_time()
        self._models[impl].zero_grad()
        self._models[impl](self._batch).square().mean().backward()
        end, cpu = time.time(), time.process_time() - before
        gradients = [weight.grad for weight in self._models[impl].parameters() if weight.grad is not None]
        norm = nn.utils.get_total_norm(gradients).item()
        return {"end": end, "cpu": cpu, "norm": norm, "rank": rank}

    def prepare(self, mib: float, ranks: int, rank: int) -> dict[str, Any]:
        """Make the values."""
        self._ranks = ranks
        self._values = torch.empty(int(mib * (1 << 18)))
        for part in _parts(self._values):
            torch.mul(PATTERN[: len(part)], rank + 1, out=part)
        self._buffer = torch.empty_like(self._values)
        return {}

    def refill(self, rank: int) -> dict[str, Any]:
        """Put this rank's values in the buffer."""
        self._buffer.copy_(self._values)
        return {}

    def reduce(self, impl: str, codec: str) -> None:
        """Sum up, in place."""
        if impl == "gloo":
            torch.distributed.all_reduce(self._buffer, group=self._gloo)
        elif impl == "gossamer-torch":
            torch.distributed.all_reduce(self._buffer)
        else:
            self._groups[impl].all_reduce(self._buffer, op=Op.SUM, codec=Codec(codec), timeout=TIMEOUT_S)

    def is_right(self, codec: str) -> bool:
        """Compare with the sum that is known beforehand."""
        factor = self._ranks * (self._ranks + 1) / 2
        parts = _parts(self._buffer)  # eight ranks of 256 MiB have no memory for all at once
        error = max(float((part - PATTERN[: len(part)] * factor).abs_().max()) for part in parts)
        return error <= TOLERANCE[codec] * factor * PERIOD


def _parts(vector: torch.Tensor) -> list[torch.Tensor]:
    return [vector[at : at + len(PATTERN)] for at in range(0, len(vector), len(PATTERN))]


def _advertising(front: str) -> Callable[[Address], tuple[socket.socket, Address]]:
    """Return a `listen` that lets others dial a proxy: there is no such option, nobody else needs one."""
    return lambda address: (collectives.mesh.addresses.listen(address)[0], Address.parse(front))


if __name__ == "__main__":
    torch.set_num_threads(1)  # as torchrun does: ranks share the processors
    serve(Rank())
