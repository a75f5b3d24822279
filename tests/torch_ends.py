"""Programs that end in different ways: `python -m tests.torch_ends PROGRAM` is one rank, as torchrun starts it.

`python -m tests.torch_ends PROGRAM RANKS TIMES [RESTARTS]` is torchrun for programs that start in a moment: it starts
them from a process that has torch. It prints how many of the runs ended without an error.

`python -m tests.torch_ends` does what `Starter` asks it for: programs without an agent, each rank an interpreter that
comes to its own end.
"""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import collectives.torch_backend  # noqa: F401
from tests.waiting import wait_until

TIMEOUT_S = 60


def in_order():
    """Do what every tutorial ends with."""
    _work()
    dist.barrier()
    dist.destroy_process_group()


def without_destroy():
    """End without a word."""
    _work()


def with_work_under_way():
    """End while works that nobody waits for are under way."""
    for _ in range(5):
        dist.all_reduce(torch.ones(100_000), async_op=True)
    dist.isend(torch.ones(4), (dist.get_rank() + 1) % dist.get_world_size())
    dist.recv(torch.ones(4), (dist.get_rank() - 1) % dist.get_world_size())
    dist.destroy_process_group()


def fails():
    """Fail at rank 1, while the others wait for it."""
    try:
        _work()
        if dist.get_rank() == 1:
            raise ValueError("rank 1 fails")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def fails_without_destroy():
    """Fail at rank 1 as a plain script does."""
    _work()
    if dist.get_rank() == 1:
        raise ValueError("rank 1 fails")
    dist.barrier()


def fails_before_others_call():
    """Fail at rank 1. The others make their next call when it has left the group."""
    _work()
    if dist.get_rank() == 1:
        raise ValueError("rank 1 fails")
    _call_without_1()


def exits_with_3():
    """Give up at rank 1, as a script does that prints an error. The others are busy until it is gone."""
    _exit_at_1(lambda: sys.exit(3))


def raises_a_status():
    """Do so with the error as the status."""
    _exit_at_1(lambda: sys.exit("there is no data"))


def exits_with_0():
    """Do so as if all was well."""
    _exit_at_1(sys.exit)


def ends_early():
    """Call one operation less at rank 1."""
    _work()
    if dist.get_rank() != 1:
        dist.barrier()
    dist.destroy_process_group()


def is_killed():
    """Kill rank 1 when nobody needs it any more, and rank 0 has ended."""
    _work()
    dist.barrier()
    if dist.get_rank() == 1:
        wait_until(lambda: _world().comm.data_plane.has_finished(_world().members[0]), TIMEOUT_S, "rank 0 to end")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.destroy_process_group()


def fails_at_its_start():
    """Fail at rank 1, the first time, before it meets the others: a data set is not there yet, say."""
    in_order()


def fails_after_its_start():
    """Fail at rank 1, the first time, when it has met the others."""
    _work()
    if _is_first_attempt() and dist.get_rank() == 1:
        raise ValueError("rank 1 fails")
    in_order()


PROGRAMS = {
    program.__name__: program
    for program in (
        in_order,
        without_destroy,
        with_work_under_way,
        fails,
        fails_without_destroy,
        fails_before_others_call,
        exits_with_3,
        raises_a_status,
        exits_with_0,
        ends_early,
        is_killed,
        fails_at_its_start,
        fails_after_its_start,
    )
}


def _work():
    x = torch.ones(4)
    dist.all_reduce(x)
    assert x[0] == dist.get_world_size()


def _world():
    return dist.distributed_c10d._get_default_group()


def _exit_at_1(leave):
    _work()
    if dist.get_rank() == 1:
        leave()
    _call_without_1()


def _call_without_1():
    wait_until(lambda: _world().members[1] not in _world().comm.members, TIMEOUT_S, "rank 1 to be gone")
    dist.barrier()


def _is_first_attempt():
    return os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"


def be_a_rank(program, store="env://"):
    """Be one rank, which the environment names."""
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=TIMEOUT_S)
    if program == "fails_at_its_start" and _is_first_attempt():
        master = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        if rank == 1:
            master.wait(["rank 0 starts"])
            raise ValueError("rank 1 fails")
        master.set("rank 0 starts", "")
    dist.init_process_group("gossamer", init_method=store, rank=rank, world_size=size, timeout=timeout)
    PROGRAMS[program]()


class Starter:
    """Runs programs at all ranks, forked from one process that has torch."""

    def __init__(self):
        command = [sys.executable, "-W", "ignore", "-m", "tests.torch_ends"]
        environment = os.environ | {"GOSSAMER_SECRET": "of this test"}  # else a line says so
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, program, size, folder):
        """Return how each rank ended, and what it said."""
        self._process.stdin.write(json.dumps([program, size, str(folder)]) + "\n")
        self._process.stdin.flush()
        statuses = json.loads(self._process.stdout.readline())
        return statuses, [(folder / f"said{rank}").read_text() for rank in range(size)]

    def stop(self):
        self._process.communicate(timeout=TIMEOUT_S)


def start_ranks(asked):
    """Run what a `Starter` asks for. Return in the processes of ranks: their program, and torch's store."""
    for line in asked:
        program, size, folder = json.loads(line)
        ranks = []
        for rank in range(size):
            if not (process := os.fork()):
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
                os.dup2(os.open(f"{folder}/said{rank}", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
                return program, f"file://{folder}/store"
            ranks.append(process)
        until, statuses = time.monotonic() + 2 * TIMEOUT_S, {}
        while len(statuses) < size:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended:
                statuses[ended] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                for process in set(ranks) - statuses.keys():
                    os.kill(process, signal.SIGABRT)
            else:
                time.sleep(0.01)
        print(json.dumps([statuses[process] for process in ranks]), flush=True)
    return None


def main(*arguments):
    """See above."""
    if not arguments:
        arguments = start_ranks(sys.stdin)
    if arguments is None:
        return
    program, *arguments = arguments
    if len(arguments) < 2:
        be_a_rank(program, *arguments)
        return
    good, (ranks, times, restarts) = 0, (*arguments, "0")[:3]
    for number in range(int(times)):
        config = LaunchConfig(
            1,
            1,
            int(ranks),
            max_restarts=int(restarts),
            run_id=str(number),
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            start_method="fork",
        )
        try:
            elastic_launch(config, be_a_rank)(program)
            good += 1
        except ChildFailedError as error:
            print(error, file=sys.stderr, flush=True)
    print(f"{good} of {times} ended without an error", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
