"""The agreement core under crashes, pauses, loss, reordering, duplication and partitions, seed by seed.

Each trial checks throughout: never two verdicts for one operation, the same contributors and shares
everywhere, rising epochs, one end for each call and in time, nothing lost that had not started; and
at the end: one view of all who live, newcomers let in, and an operation of all that commits. A
failing seed is run again with `python -m collectives.simulator --schedules 1 --seed SEED`.
"""

import pytest

from collectives.simulator.owner import Violated
from collectives.simulator.schedule import KINDS, MOMENTS, Schedule
from collectives.simulator.trial import Trial

BATCHES = 8  # so that a failure shows early, and workers could share them


def run(seeds: range, members: int) -> list[Trial]:
    trials = []
    for seed in seeds:
        trial = Trial(Schedule.draw(seed, members))
        try:
            trial.run()
        except Violated as violation:
            pytest.fail(f"seed {seed}, members {members}: {violation}; {'; '.join(trial.struck)}")
        trials.append(trial)
    return trials


@pytest.mark.parametrize("batch", range(BATCHES))
def test_two_thousand_schedules(batch: int) -> None:
    size = 2000 // BATCHES
    trials = run(range(batch * size, (batch + 1) * size), members=4)
    assert sum(trial.history.committed for trial in trials) > 20 * size
    assert sum(trial.history.aborted for trial in trials) > size
    assert sum(trial.history.doubtful for trial in trials) > 0


@pytest.mark.parametrize(
    ("seed", "members"),
    [
        (142, 4),  # an operation that one member had published was forgotten after two more calls of its tag
        (403557, 4),  # one left behind by a majority, whose view had lost another member, never went out for it
        (3008603, 4),  # two views that shared a member, neither of which could go on without it, ignored each other
        (3354, 4),  # the same; their ballots outbid each other at the same pace for ever
        (502968, 7),  # members of a later view were started anew: asked again and again, they never reported
    ],
)
def test_schedules_that_once_failed(seed: int, members: int) -> None:
    run(range(seed, seed + 1), members)


def test_the_schedules_strike_everywhere() -> None:
    schedules = [Schedule.draw(seed, 4) for seed in range(2000)]
    struck = {(fault.kind, fault.moment) for schedule in schedules for fault in schedule.faults}
    assert struck == {(kind, moment) for kind in KINDS for moment in (*MOMENTS, None)}
    assert any(schedule.disorder for schedule in schedules)
    assert any(schedule.encoded for schedule in schedules)


def test_a_seed_is_always_the_same_trial() -> None:
    one, other = run(range(7, 8), members=4) + run(range(7, 8), members=4)
    assert one.struck == other.struck
    assert one.history.verdicts == other.history.verdicts
