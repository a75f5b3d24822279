"""DistributedDataParallel on this machine while a worker is killed, another one hangs and a third one joins.

    python examples/ddp.py
    python examples/ddp.py --undisturbed --seed 1

Every worker is a process of its own, which this script starts: torchrun's agent would end all when one fails. A step is
`comm.run(step, state)`: where a worker is lost in the middle of it, the others take it again, in the same processes, as
a smaller world. A new worker is given the parameters and goes on with the next step. At the end all parameters are
compared bit by bit, and the loss on questions that nobody trained on is printed.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from collectives import Communicator, SharedState, torch_backend
from collectives.types import GroupTiming

WIDTH, BATCH = 16, 32
PATIENCE = GroupTiming(heartbeat=0.5, timeout=3.0)
CALL_S = 5.0  # that a rank is waited for in a step: it is many times as long as a step
STEP_S = 60.0  # for a step that counts: more than the 15 s that it takes to leave out who hangs
LIMIT_S = 300.0  # that the parent waits for anything


def make_teacher() -> nn.Module:
    """Return what is to be learnt: the same at all workers."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, 1)).requires_grad_(False)


def questions(seed: int, step: int, rank: int) -> torch.Tensor:
    """Return the batch of one rank in one step."""
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(10_000 * seed + 100 * step + rank))


def work(options: argparse.Namespace) -> None:
    """Be one worker: train until the group has taken all steps."""
    import torch._dynamo  # DDP imports it when it is first made, which takes seconds: do that before the first step

    torch.set_num_threads(1)
    seeds = [options.seed_address] if options.seed_address else []
    comm = Communicator.connect("ddp", seeds, secret=os.environ["DDP_SECRET"], timing=PATIENCE, timeout=LIMIT_S)
    print(json.dumps({"address": comm.address}), flush=True)
    teacher = make_teacher()
    torch.manual_seed(options.seed)
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, 1))
    momentum = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    shared = {name: parameter.data for name, parameter in model.named_parameters()}
    state = SharedState(shared | {f"momentum of {name}": tensor for name, tensor in momentum.items()})
    ranks: list[DistributedDataParallel] = []

    def step(comm: Communicator) -> None:
        if options.hang_at == state.revision:
            threading.Event().wait()  # for good
        with torch_backend.failures_are_called_off():
            if torch_backend.enter(comm, timeout=CALL_S):
                ranks[:] = [DistributedDataParallel(model)]
            model.zero_grad()
            rank = comm.members.index(comm.node_id)
            asked = questions(options.seed, state.revision, rank)
            nn.functional.mse_loss(ranks[0](asked), teacher(asked)).backward()

    if not options.late:
        comm.wait_for(options.workers, LIMIT_S)
    while state.revision < options.steps:
        if options.join_at == state.revision:
            comm.wait_for(options.workers - 1, LIMIT_S)  # so that the new one comes before all is over
        done = comm.run(step, state, timeout=STEP_S)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                momentum[name].mul_(0.9).add_(parameter.grad)
                parameter.sub_(0.05 * momentum[name])
        print(json.dumps({"step": done.number, "members": len(done.members), "attempts": done.attempts}), flush=True)
    asked = torch.randn(2000, WIDTH, generator=torch.Generator().manual_seed(1))
    loss = nn.functional.mse_loss(model(asked), teacher(asked)).item()
    digest = hashlib.sha256(
        b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    ).hexdigest()
    print(json.dumps({"loss": loss, "digest": digest}), flush=True)
    comm.barrier(LIMIT_S)  # nobody leaves before the others have their last step
    comm.leave()


class Worker:
    """A worker's process, and what it said."""

    def __init__(self, stack: ExitStack, options: argparse.Namespace, *arguments: str) -> None:
        command = [sys.executable, __file__, "--worker", "--steps", str(options.steps), "--seed", str(options.seed)]
        command += ["--workers", str(options.workers), *arguments]
        command += [] if options.undisturbed else ["--join-at", str(options.steps * 2 // 3)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)
        self.said: list[dict] = []
        self._lines = self._read()

    def _read(self) -> Iterator[dict]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(json.loads(line))
            yield self.said[-1]

    def until(self, key: str, least: int | None = None) -> dict:
        """Read on to what has this key, and at least this value."""
        for said in self._lines:
            if key in said and (least is None or said[key] >= least):
                return said
        raise SystemExit(f"a worker ended with status {self.process.wait()} before it told of its {key}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4, help="to begin with (default 4)")
    parser.add_argument("--steps", type=int, default=150, help="of training (default 150)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and questions (default 0)")
    parser.add_argument("--undisturbed", action="store_true", help="let nobody be killed, hang or join")
    for internal in ("--worker", "--late"):
        parser.add_argument(internal, action="store_true", help=argparse.SUPPRESS)
    for internal in ("--hang-at", "--join-at"):
        parser.add_argument(internal, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seed-address", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    os.environ.setdefault("DDP_SECRET", os.urandom(16).hex())
    began = time.monotonic()
    with ExitStack() as stack:
        first = Worker(stack, options)
        address = first.until("address")["address"]
        joining = ("--seed-address", address)
        others = [Worker(stack, options, *joining) for _ in range(options.workers - 2)]
        hangs = () if options.undisturbed else ("--hang-at", str(options.steps // 2))
        last = Worker(stack, options, *joining, *hangs)
        if options.undisturbed:
            others.append(last)
        else:
            first.until("step", options.steps // 5)
            others.pop().process.kill()
            first.until("step", options.steps // 2 + 1)
            others.append(Worker(stack, options, *joining, "--late"))
        ended = [worker.until("loss") for worker in (first, *others)]
    steps = [said for said in first.said if "step" in said]
    changes = [
        (step["step"], step["members"]) for before, step in pairwise(steps) if step["members"] != before["members"]
    ]
    print("; ".join(f"from step {step} on {members} members" for step, members in [(1, steps[0]["members"]), *changes]))
    print(f"steps taken again: {[step['step'] for step in steps if step['attempts'] > 1]}")
    if len({event["digest"] for event in ended}) != 1:
        raise SystemExit("the workers' parameters differ")
    print(
        f"all {len(ended)} have the same parameters; loss {ended[0]['loss']:.5f} after {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
