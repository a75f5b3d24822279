"""A rank that trains: inner phases by themselves, or with an outer step of async DiLoCo after each.

    {"model": {"width", "layers", "batch", "inner_steps", "rank"}} -> {"mib": of the parameters}
    {"phases": {"mode", "count", "at", "rank"}} -> {"ends": [unix time], "cpu": s, "rounds": [s], "outer": hash}

The other commands are those of `allreduce_rank`. `phases` begins at the unix time `at`. In mode "none"
nothing is said to anybody; "async" is the group of that name. Of a round that is still under way in the
background after the last phase the end is waited for, so the next call finds the link idle.
"""

import hashlib
import time
from typing import Any

import torch

from benchmarks.allreduce_rank import Rank
from benchmarks.rank_commands import serve
from collectives import DiLoCo
from collectives.outer_optimizer import OuterStep

PATIENCE_S = 60.0


class Trainer(Rank):
    """See the module."""

    def model(self, width: int, layers: int, batch: int, inner_steps: int, rank: int) -> dict[str, Any]:
        """Make a network for each mode."""
        self._inner_steps = inner_steps
        torch.manual_seed(rank)  # of the data: each rank has its own
        self._batch = torch.randn(batch, width)
        self._trained = {mode: _network(width, layers) for mode in ("none", "async")}
        self._diloco = DiLoCo(
            self._groups["async"],
            *self._trained["async"],
            inner_steps=inner_steps,
            mode="async",
            timeout=PATIENCE_S,
            patience=PATIENCE_S,
        )
        count = sum(parameter.numel() for parameter in self._trained["none"][0].parameters())
        return {"mib": count * 4 / 2**20}

    def phases(self, mode: str, count: int, at: float, rank: int) -> dict[str, Any]:
        """Train `count` inner phases."""
        time.sleep(max(0.0, at - time.time()))
        network, optimizer = self._trained[mode]
        diloco = self._diloco if mode == "async" else None
        cpu = time.process_time()
        ends: list[float] = []
        rounds: list[OuterStep | None] = []
        for _ in range(count):
            for _ in range(self._inner_steps):
                optimizer.zero_grad()
                (network(self._batch) - self._batch).square().mean().backward()
                optimizer.step()
                if diloco is not None:
                    rounds.append(diloco.step())
            ends.append(time.time())
        if diloco is None:
            return {"ends": ends, "cpu": time.process_time() - cpu, "rounds": [], "outer": ""}
        rounds.append(diloco.finish())
        cpu = time.process_time() - cpu
        outer = hashlib.sha256(diloco.outer.numpy().tobytes()).hexdigest()
        seconds = [step.seconds for step in rounds if step is not None]
        return {"ends": ends, "cpu": cpu, "rounds": seconds, "outer": outer}


def _network(width: int, layers: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (torch.nn.Linear(width, width), torch.nn.Tanh())]
    network = torch.nn.Sequential(*parts)
    return network, torch.optim.AdamW(network.parameters(), lr=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)  # as torchrun does: ranks share the processors
    serve(Trainer())
