"""Under `partition="majority"` there is one primary view an epoch, however partitions roll: by hand, then by seeds.

The first three schedules each made two sides commit in one epoch when a majority of the reporters decided alone.
A failing seed is run again with `python -m collectives.simulator --partition majority --schedules 1 --seed SEED`.
"""

import os

import pytest

from collectives.agreement import messages
from collectives.agreement.events import ADMIT, Action, Begin, Install, Send
from collectives.agreement.views import ADMIT_TAG, View
from collectives.simulator.sweep import sweep
from collectives.types import Partition
from tests.agreements import IDS, Group


class Split(Group):
    """A group under MAJORITY whose network is cut into sides; `primaries` are the views that anybody entered."""

    def __init__(self, size: int) -> None:
        self.primaries: dict[int, set[View]] = {}
        super().__init__(size, Partition.MAJORITY)

    def act(self, number: int, action: Action) -> None:
        super().act(number, action)
        if isinstance(action, Install):
            self.primaries.setdefault(action.view.epoch, set()).add(action.view)

    def part(self, *sides: tuple[int, ...]) -> None:
        """Let nothing through but within each side."""
        self.network.heal()
        side_of = {number: side for side in sides for number in side}
        for one, side in side_of.items():
            for other in side_of.keys() - set(side):
                self.network.block(one, other)
                if one < other:
                    self.network.cut(one, other)

    def one_side_commits(self) -> bool:
        """Let all call an operation; tell whether any commit it, after checking that they are in one view."""
        self.clear()
        for number in self.cores:
            self.call(number, deadline=5.0)
        self.run(6.0)
        ended = [one for told in self.finished.values() for one in told if one.op.tag == 0]
        committed = {one.op.mark for one in ended if one.verdict.value == "commit"}
        assert len(committed) <= 1
        self.check()
        return bool(committed)

    def check(self) -> None:
        for epoch, views in self.primaries.items():
            sides = [tuple(map(IDS.index, view.members)) for view in views]
            assert len(views) == 1, f"epoch {epoch} has the primaries {sides}"

    def heal_and_check(self) -> None:
        """All are in one view again, and all take part in an operation that commits."""
        self.network.heal()
        self.run(10.0)
        self.admit()
        ((_, members),) = self.views()
        assert members == tuple(self.cores)
        assert self.one_side_commits()
        assert self.verdicts() == {number: ["commit"] for number in self.cores}


def test_partitions_that_roll_leave_one_side_that_commits() -> None:
    group = Split(5)
    group.part((0, 1, 2), (3, 4))
    group.run(5.0)
    group.part((0,), (1, 2), (3, 4))
    group.run(5.0)
    group.part((0, 3, 4), (1, 2))  # most of the first view, which is not the last, and most of the last
    group.run(10.0)
    assert group.one_side_commits()
    group.heal_and_check()


class AdmissionCutOff(Split):
    """Once `armed`, what the coordinator says of the next view reaches member 1 only, and then the sides part."""

    armed = False

    def act(self, number: int, action: Action) -> None:
        if self.armed and number == 0 and isinstance(action, Send):
            said = action.message
            leads_on = (isinstance(said, messages.Commit) and said.view is not None) or isinstance(
                said, messages.Decide | messages.Welcome
            )
            if leads_on and action.member != IDS[1]:
                self.network.cut(number, IDS.index(action.member))
                return
            if leads_on:
                self.network.at(self.network.now + 0.03, self.part, (0, 2), (1, 3, 4, 5, 6))
        super().act(number, action)


def test_a_partition_during_an_admission_leaves_one_side_that_commits() -> None:
    group = AdmissionCutOff(3)
    for number in (3, 4, 5, 6):
        group.boot(number)
    group.run(3.0)
    group.armed = True
    for number in (0, 1, 2):
        group.feed(number, Begin(ADMIT_TAG, ADMIT, 10.0))
    group.run(10.0)
    group.armed = False
    group.one_side_commits()
    group.heal_and_check()


class DecisionCutOff(Split):
    """Twice nobody but its proposer hears of a decision: then the sides are others."""

    stage = 0
    first, second = -1, -1  # the proposers

    def act(self, number: int, action: Action) -> None:
        if isinstance(action, Send) and isinstance(action.message, messages.Decide):
            if self.stage == 1 and number in (0, self.first):
                self.first = number
                self.network.cut(number, IDS.index(action.member))
                self.network.at(self.network.now, self.go, 2)
                return
            if self.stage == 2 and number != self.first:
                self.second = number
                self.network.cut(number, IDS.index(action.member))
                self.network.at(self.network.now, self.go, 3)
                return
        super().act(number, action)

    def go(self, stage: int) -> None:
        if self.stage >= stage:
            return
        self.stage = stage
        if stage == 2:
            self.part((0,), (1, 2, 3, 4))
        else:
            other = 1 if self.second == 2 else 2
            rest = tuple(sorted({1, 2, 3, 4} - {other}))
            self.part((0, other), rest)


def test_decisions_that_only_their_proposers_hear_of_leave_one_side_that_commits() -> None:
    group = DecisionCutOff(5)
    group.stage = 1
    group.part((0, 1, 2), (3, 4))
    group.run(30.0)
    assert group.stage == 3
    group.one_side_commits()
    group.heal_and_check()


# --- by seeds ---


def run(seeds: range, members: int, processes: int = 1) -> None:
    outcomes = list(sweep(seeds, members, processes, Partition.MAJORITY))
    failed = [str(outcome) for outcome in outcomes if outcome.violation]
    if failed:
        pytest.fail(f"{len(failed)} schedules failed\n" + "\n".join(failed), pytrace=False)
    assert sum(outcome.committed for outcome in outcomes) > 20 * len(outcomes)


def test_one_outside_that_hears_another_outside_comes_in_when_a_stranger_says_so() -> None:
    run(range(2_000_298, 2_000_299), members=6)  # each of the two waited for the other for ever


def test_fifteen_schedules_of_rolling_partitions() -> None:
    run(range(1, 16), members=6)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_and_fifty_schedules_of_rolling_partitions() -> None:
    run(range(1_000, 1_150), members=6, processes=os.cpu_count() or 1)
