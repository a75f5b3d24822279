"""`python -m collectives.simulator`: the agreement core through any number of schedules, on several processes.

Exit status 1: something that must hold does not; the command that runs that schedule again is printed.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from collectives.simulator.schedule import Schedule, Violated
from collectives.simulator.trial import Trial
from collectives.types import Partition

CHUNK = 50  # schedules that a process takes at a time: half a second


@dataclass(frozen=True)
class Outcome:
    """How a schedule went; `violation` is "" if all that must hold does."""

    seed: int
    members: int
    committed: int
    aborted: int
    doubtful: int
    violation: str
    struck: tuple[str, ...]
    partition: Partition | None = None  # what all schedules were made to have

    def __str__(self) -> str:
        """Say what failed, and how to see it again."""
        again = f"python -m collectives.simulator --schedules 1 --seed {self.seed} --members {self.members}"
        again += f" --partition {self.partition.value}" if self.partition else ""
        return f"seed {self.seed}: {self.violation}\n    {'; '.join(self.struck)}\n    again: {again}"


def outcome(seed: int, members: int, partition: Partition | None = None) -> Outcome:
    """Run the schedule of a seed to its end."""
    trial = Trial(Schedule.draw(seed, members, partition))
    violation = ""
    try:
        trial.run()
    except Violated as error:
        violation = str(error)
    told = trial.history
    struck = tuple(trial.struck)
    return Outcome(seed, members, told.committed, told.aborted, told.doubtful, violation, struck, partition)


def sweep(seeds: range, members: int, processes: int = 1, partition: Partition | None = None) -> Iterator[Outcome]:
    """Run many, in the order of their seeds."""
    run = partial(outcome, members=members, partition=partition)
    if processes == 1:
        yield from map(run, seeds)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run, seeds, chunksize=CHUNK)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m collectives.simulator",
        description="Put groups of simulated members through crashes, pauses, loss and partitions, and check them.",
        epilog="example: python -m collectives.simulator --schedules 20000 --seed 1 --members 5 --processes 2",
    )
    parser.add_argument("--schedules", type=int, default=2000, help="how many (default 2000)")
    parser.add_argument("--seed", type=int, default=1, help="of the first; each next has the next one (default 1)")
    parser.add_argument("--members", type=int, default=4, help="at most so many at first, and at least 2 (default 4)")
    parser.add_argument(
        "--partition",
        choices=[mode.value for mode in Partition],
        help="that all groups have this mode; those of majority have rolling partitions besides (default: as drawn)",
    )
    parser.add_argument("--processes", type=int, default=1, help="how many run schedules (default 1)")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    failed = committed = aborted = doubtful = 0
    seeds = range(options.seed, options.seed + options.schedules)
    partition = Partition(options.partition) if options.partition else None
    for outcome in sweep(seeds, options.members, options.processes, partition):
        committed += outcome.committed
        aborted += outcome.aborted
        doubtful += outcome.doubtful
        if outcome.violation:
            failed += 1
            print(outcome, flush=True)
    print(f"{options.schedules} schedules from seed {options.seed}, 2 to {options.members} members at first")
    print(f"calls: {committed} committed, {aborted} called off, {doubtful} in doubt")
    print(f"{failed} schedules failed")
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":  # under its own name, by which other processes find what they are to run
    from collectives.simulator import __main__ as sweeps  # noqa: PLW0406  # as said

    sys.exit(sweeps.main())
