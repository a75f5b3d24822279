"""All-reduce between processes on this machine: ours against torch.distributed's gloo, in the same run.

    gossamer bench allreduce --ranks 2,4 --mib 4,64

The same processes hold a `Communicator` and a gloo group and use them in turns, so that a busy
machine is busy for both. Each sums one float32 vector, and checks the sum. A run's time is that of
the slowest rank; rows hold the median of the runs, the first of each kind left out.
"""

import multiprocessing
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from collectives import Communicator, Op

Row = dict[str, Any]
WAIT_S = 60.0  # for another process to answer
GROUP = "benchmark"
POLL_S = 0.02


class Rank:
    """One process, and the way to it."""

    def __init__(self, number: int, ranks: int, gloo_port: int, *, encrypt: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, number, ranks, gloo_port, encrypt), daemon=True)
        self._process.start()

    def tell(self, *command: Any) -> None:
        """Send a command."""
        self.pipe.send(command)

    def answer(self) -> Any:
        """Wait for what came of it.

        Raises:
            RuntimeError: nothing came.
        """
        if not self.pipe.poll(WAIT_S):
            raise RuntimeError(f"a rank did not answer within {WAIT_S:g} s")
        return self.pipe.recv()

    def ask(self, *command: Any) -> Any:
        """Send a command and wait."""
        self.tell(*command)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()
        self.pipe.close()


def run(*, ranks: Sequence[int], mib: Sequence[int], runs: int = 7, encrypt: bool = False) -> Iterator[Row]:
    """Yield a row for each side, number of ranks and size, and last the ratios of their medians."""
    ratio = {}
    for count in ranks:
        with ExitStack() as stack:
            members = _group(stack, count, encrypt)
            for size in mib:
                seconds: dict[str, list[float]] = {"gossamer": [], "gloo": []}
                for turn in range(runs + 1):
                    for side, times in seconds.items():
                        for member in members:
                            member.tell(side, size << 20)
                        slowest = max(member.answer() for member in members)
                        if turn:
                            times.append(slowest)
                common = {"bench": "allreduce", "ranks": count, "mib": size, "encrypt": encrypt}
                for side, times in seconds.items():
                    yield {**common, "impl": side, "median_s": statistics.median(times), "runs": len(times)}
                ours, theirs = (statistics.median(seconds[side]) for side in ("gossamer", "gloo"))
                ratio[f"ranks={count} mib={size}"] = ours / theirs
    yield {"bench": "allreduce", "ratio": {"gloo": ratio}}


def _group(stack: ExitStack, count: int, encrypt: bool) -> list[Rank]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    members = [Rank(number, count, port, encrypt=encrypt) for number in range(count)]
    for member in members:
        stack.callback(member.close)
    address = members[0].ask("connect", [])
    for number, member in enumerate(members[1:], 1):
        inside = members[:number]
        member.tell("connect", [address])
        if number > 1:
            while not all([one.ask("pending") for one in inside]):  # noqa: C419  # each has to be asked
                time.sleep(POLL_S)
            for one in inside:
                one.tell("admit")
            for one in inside:
                one.answer()
        member.answer()
    return members


def _serve(pipe: Connection, number: int, ranks: int, gloo_port: int, encrypt: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{gloo_port}", rank=number, world_size=ranks)
    comm: Communicator | None = None
    while True:
        command, *arguments = pipe.recv()
        if command == "connect":
            comm = Communicator.connect(
                group=GROUP, seeds=arguments[0], listen="tcp://127.0.0.1:0", encrypt=encrypt, timeout=WAIT_S
            )
            pipe.send(comm.address)
        elif comm is None:
            raise RuntimeError("connect first")
        elif command == "pending":
            pipe.send(comm.pending())
        elif command == "admit":
            comm.admit(timeout=WAIT_S)
            pipe.send(None)
        else:
            pipe.send(_sum(comm if command == "gossamer" else None, number, ranks, arguments[0]))


def _sum(comm: Communicator | None, number: int, ranks: int, size: int) -> float:
    vector = torch.full((size // 4,), float(number + 1))
    dist.barrier()
    began = time.perf_counter()
    if comm is not None:
        comm.all_reduce(vector, op=Op.SUM, timeout=WAIT_S)
    else:
        dist.all_reduce(vector)
    seconds = time.perf_counter() - began
    if not bool((vector == ranks * (ranks + 1) / 2).all()):
        raise RuntimeError("the sum is wrong")
    return seconds
