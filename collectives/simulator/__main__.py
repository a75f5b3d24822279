"""`python -m collectives.simulator`: the agreement core through any number of schedules.

Exit status 1: something that must hold does not; the schedule's seed is printed.
"""

import argparse
import sys
import time

from collectives.simulator.owner import Violated
from collectives.simulator.schedule import Schedule
from collectives.simulator.trial import Trial


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m collectives.simulator",
        description="Put groups of simulated members through crashes, pauses, loss and partitions, and check them.",
        epilog="example: python -m collectives.simulator --schedules 20000 --seed 1 --members 5",
    )
    parser.add_argument("--schedules", type=int, default=2000, help="how many (default 2000)")
    parser.add_argument("--seed", type=int, default=1, help="of the first; each next has the next one (default 1)")
    parser.add_argument("--members", type=int, default=4, help="at most so many at first, and at least 2 (default 4)")
    options = parser.parse_args(arguments)
    failed = committed = aborted = doubtful = 0
    for seed in range(options.seed, options.seed + options.schedules):
        trial = Trial(Schedule.draw(seed, options.members))
        try:
            trial.run()
        except Violated as violation:
            failed += 1
            print(f"seed {seed}: {violation}", flush=True)
            print("    " + "; ".join(trial.struck), flush=True)
        committed += trial.history.committed
        aborted += trial.history.aborted
        doubtful += trial.history.doubtful
    print(f"{options.schedules} schedules from seed {options.seed}, 2 to {options.members} members at first")
    print(f"calls: {committed} committed, {aborted} called off, {doubtful} in doubt")
    print(f"{time.process_time():.1f} s of CPU", file=sys.stderr)
    if failed:
        print(f"{failed} failed; one again: python -m collectives.simulator --schedules 1 --seed SEED")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
