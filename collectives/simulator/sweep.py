"""Many schedules, on several processes."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from collectives.simulator.schedule import Schedule, Violated
from collectives.simulator.trial import GroupTrial

CHUNK = 50  # schedules that a process takes at a time: half a second


@dataclass(frozen=True)
class ScheduleOutcome:
    """How a schedule went; `violation` is "" if all that must hold does."""

    seed: int
    members: int
    committed: int
    aborted: int
    doubtful: int
    violation: str
    struck: tuple[str, ...]

    def __str__(self) -> str:
        """Say what failed, and how to see it again."""
        again = f"python -m collectives.simulator --schedules 1 --seed {self.seed} --members {self.members}"
        return f"seed {self.seed}: {self.violation}\n    {'; '.join(self.struck)}\n    again: {again}"


def outcome(seed: int, members: int) -> ScheduleOutcome:
    """Run the schedule of a seed to its end."""
    trial = GroupTrial(Schedule.draw(seed, members))
    violation = ""
    try:
        trial.run()
    except Violated as error:
        violation = str(error)
    history = trial.history
    struck = tuple(trial.struck)
    return ScheduleOutcome(seed, members, history.committed, history.aborted, history.doubtful, violation, struck)


def sweep(seeds: range, members: int, processes: int = 1) -> Iterator[ScheduleOutcome]:
    """Run many, in the order of their seeds."""
    run = partial(outcome, members=members)
    if processes == 1:
        yield from map(run, seeds)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run, seeds, chunksize=CHUNK)
