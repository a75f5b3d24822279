"""Groups whose links fail or go one way only, between processes in network namespaces. Needs root on Linux."""

from contextlib import ExitStack

import pytest

from tests.collectives_group import PATIENCE_S, commit, let_in, members_in
from tests.collectives_member import digest, state_at
from tests.namespaces import behind, cut_off, why_impossible, wired
from tests.waiting import wait_until

OBSTACLE = why_impossible()
pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)


def test_the_halves_of_a_group_go_apart_and_the_state_of_the_larger_holds_when_they_meet():
    with ExitStack() as stack:
        spaces = stack.enter_context(wired(*"abcde"))
        members = stack.enter_context(members_in(spaces))
        larger, smaller = members[:3], members[3:]
        assert commit(members, "together") == (1, digest(state_at(1)))
        with cut_off(*spaces[3:]):
            # Both go on; the smaller one gets further, and yet it is the other's state that will hold.
            for number in range(4):
                found = commit(smaller, f"smaller {number}", "smaller")
            assert found == (5, digest(state_at(5, "smaller")))
            revision, _ = commit(larger, "apart", "larger")
        wait_until(lambda: not any(member.ask("members") for member in smaller), PATIENCE_S, "the smaller half to go")
        let_in(*members)
        after = commit(members, "again", "larger")
        assert after == (revision + 1, digest(state_at(revision + 1, "larger")))
        assert len({member.ask("members") for member in members}) == 1


def test_an_edge_that_only_one_end_can_dial_carries_what_others_do():
    with ExitStack() as stack:
        spaces = stack.enter_context(wired(*"abc"))
        spaces[1].drop_inbound()
        members = stack.enter_context(members_in(spaces))
        assert not spaces[2].can_connect(*_where(members[1])), "the firewall is not in the way"
        for step in range(2):
            commit(members, step)


@pytest.mark.slow
def test_a_member_behind_nat_works_with_all_others():
    with ExitStack() as stack:
        first, router, third = stack.enter_context(wired(*"arc"))
        home = stack.enter_context(behind(router))
        members = stack.enter_context(members_in([first, home, third]))
        for step in range(2):
            commit(members, step)


def _where(member):
    host, port = member.address.removeprefix("tcp://").split(":")
    return host, int(port)
