"""`python -m collectives.simulator`: the agreement core through any number of schedules, on several processes.

Exit status 1: something that must hold does not; the command that runs that schedule again is printed.
"""

import argparse
import sys
import time

from collectives.simulator.sweep import sweep


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m collectives.simulator",
        description="Put groups of simulated members through crashes, pauses, loss and partitions, and check them.",
        epilog="example: python -m collectives.simulator --schedules 20000 --seed 1 --members 5 --processes 2",
    )
    parser.add_argument("--schedules", type=int, default=2000, help="how many (default 2000)")
    parser.add_argument("--seed", type=int, default=1, help="of the first schedule; each later one adds 1 (default 1)")
    parser.add_argument("--members", type=int, default=4, help="at most so many at first, and at least 2 (default 4)")
    parser.add_argument("--processes", type=int, default=1, help="how many run schedules (default 1)")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    failed = committed = aborted = doubtful = 0
    seeds = range(options.seed, options.seed + options.schedules)
    for outcome in sweep(seeds, options.members, options.processes):
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


if __name__ == "__main__":
    sys.exit(main())
