"""Under `partition="majority"`: killed members strand the others until a person forces a view, leaving ones do not."""

from tests.collectives_group import PATIENCE_S, commit, members_in, mix
from tests.waiting import wait_until


def test_who_lost_the_majority_for_good_waits_until_a_person_forces_a_view():
    with members_in([None] * 4, partition="majority") as members:
        commit(members, "together")
        rest, lost = members[:2], members[2:]
        for member in lost:
            member.end()
        wait_until(lambda: all(member.ask("stranded") for member in rest), PATIENCE_S, "them to find so few")
        verdicts = {answer[:2] for of_one in mix(rest, "stranded", timeout=0.5) for answer in of_one}
        assert ("NotEnoughPeers", True) in verdicts  # to the one whose call ends first, and then the other's time is up
        assert verdicts <= {("NotEnoughPeers", True), ("DeadlineExceeded", True)}
        assert {len(member.ask("members")) for member in rest} == {4}

        rest[1].ask("force_view")
        commit(rest, "forced")
        assert not any(member.ask("stranded") for member in rest)
        rest[0].tell("force_view")  # with a majority it is refused
        assert rest[0].hear()[:2] == ("error", "BadArgument")


def test_members_that_leave_one_after_the_other_leave_each_time_a_group_that_goes_on():
    with members_in([None] * 3, partition="majority") as members:
        for left in (3, 2, 1):
            commit(members[:left], f"{left} of them")
            members[left - 1].ask("leave")
