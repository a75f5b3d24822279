"""All members admit again and again, while others come: nobody may wait for a deadline on the way to one view.

Links take a while to be there, so newcomers are in one view before they reach each other.
"""

from random import Random

import pytest

from collectives.agreement.events import ADMIT, Action, Begin, Dial, Finished, Install
from collectives.agreement.views import ADMIT_TAG
from tests.agreements import IDS, Group

DEADLINE = 30.0
SLOWEST_DIAL = 0.4
SECONDS = 12.0  # from the founding until all are in: they come one by one


class Comers(Group):
    """`size` nodes, of which a random one founds the group and the others come within `spread` seconds."""

    def __init__(self, seed: int, size: int, spread: float) -> None:
        super().__init__(0)
        self.size = size
        self.rng = Random(seed)
        first, *others = self.rng.sample(range(size), size)
        self.boot(first)
        for number in others:
            self.network.at(self.network.now + self.rng.uniform(0.0, spread), self.boot, number)

    def act(self, number: int, action: Action) -> None:
        if isinstance(action, Dial):
            self.network.at(self.network.now + self.rng.uniform(0.0, SLOWEST_DIAL), super().act, number, action)
            return
        super().act(number, action)
        if isinstance(action, Install) or (isinstance(action, Finished) and action.op.tag == ADMIT_TAG):
            self.network.at(self.network.now + self.rng.uniform(0.0, 0.01), self.loop, number)

    def loop(self, number: int) -> None:
        view = self.cores[number].view
        if view is None or len(view.members) == self.size:
            return
        if self.begun[number] == len(self.finished[number]):
            self.feed(number, Begin(ADMIT_TAG, ADMIT, DEADLINE))


@pytest.mark.parametrize("spread", [0.05, 3.0])
@pytest.mark.parametrize("size", [3, 7, 9])
def test_members_that_do_nothing_but_admit_let_everybody_in(size: int, spread: float) -> None:
    for seed in range(6):
        group = Comers(seed, size, spread)
        group.run(SECONDS)
        assert [members for _, members in group.views()] == [tuple(range(size))], f"seed {seed}"
        assert {ended for all_of_one in group.verdicts(tag=ADMIT_TAG).values() for ended in all_of_one} == {"commit"}
        assert group.begun == {number: len(ended) for number, ended in group.finished.items()}, f"seed {seed}"


class OutOfReach(Group):
    """Node 3 can be linked with node 1 only."""

    def act(self, number: int, action: Action) -> None:
        if isinstance(action, Dial) and 3 in (number, int(action.address)) and 1 not in (number, int(action.address)):
            return
        super().act(number, action)


def test_an_applicant_whom_only_some_reach_is_not_pending_slows_no_admission_and_knows_who_is_out_of_its_reach() -> (
    None
):
    group = OutOfReach(3)
    group.boot(3)
    group.run(5.0)
    assert [core.pending for core in group.cores.values()] == [False] * 4
    assert group.cores[3].unreached == (IDS[0], IDS[2])
    group.clear()
    for number in (0, 1, 2):
        group.feed(number, Begin(ADMIT_TAG, ADMIT, DEADLINE))
    group.run(0.2)
    assert [group.verdicts(tag=ADMIT_TAG)[number] for number in (0, 1, 2)] == [["commit"]] * 3
    group.network.connect(3, 0), group.network.connect(3, 2)
    group.run(1.0)
    assert [core.pending for core in group.cores.values()] == [True] * 3 + [False]
    assert group.cores[3].unreached == ()
    group.admit()
    assert [members for _, members in group.views()] == [(0, 1, 2, 3)]
