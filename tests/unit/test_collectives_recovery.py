"""The rule on operations whose view broke up: every state that can be reached, and every two sides that can form.

A small model of the protocol (one operation, no view change) is explored whole: each member sends
OperationDone or not, the coordinator sends Commit to each or not, each acknowledges or not, the coordinator
publishes or not. In each state any set of members may leave the view and report.
"""

from collections.abc import Iterator
from itertools import chain, combinations, product

import pytest

from collectives.agreement.messages import Ledger, Stage
from collectives.agreement.recovery import alone, outcome, rule
from collectives.agreement.views import OpId
from protocol.identity import NodeId, id_of_bytes

MEMBERS = tuple(id_of_bytes(bytes([number]) * 20) for number in range(1, 5))
OP = OpId(b"the mark", 1, 0, 0)
DECISIVE = {Stage.COMMITTED, Stage.ABORTED}


def states(members: tuple[NodeId, ...]) -> Iterator[dict[NodeId, Stage]]:
    """Return every state in which the members of a view can be, all of them, by the protocol's rules."""
    coordinator, *others = members
    early = (Stage.CALLED, Stage.STARTED, Stage.DONE)
    for stages in product((*early, Stage.ABORTED), repeat=len(members)):  # before Commit; any may have given up,
        yield dict(zip(members, stages, strict=True))  # or have been told that somebody did
    for held in product((Stage.DONE, Stage.COMMITTED), repeat=len(others)):  # Commit is on its way
        state = dict(zip(others, held, strict=True))
        yield {coordinator: Stage.HOLDS, **state}
        if all(stage is Stage.COMMITTED for stage in held):
            yield {coordinator: Stage.COMMITTED, **state}


def sides(members: tuple[NodeId, ...]) -> Iterator[tuple[NodeId, ...]]:
    yield from chain.from_iterable(combinations(members, size) for size in range(1, len(members) + 1))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_two_sides_decide_differently(size: int) -> None:
    members = MEMBERS[:size]
    for state in states(members):
        known = DECISIVE.intersection(state.values())
        for side in sides(members):
            verdict = outcome(members, {member: state[member] for member in side})
            if verdict in DECISIVE:
                known.add(verdict)
        assert len(known) <= 1, state


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_side_that_left_early_does_not_contradict_what_came_later(size: int) -> None:
    """Those who reported stay as they are while the others go on; then these break up too."""
    members = MEMBERS[:size]
    for early in states(members):
        for side in sides(members):
            first = outcome(members, {member: early[member] for member in side})
            if first not in DECISIVE:
                continue
            for late in states(members):
                frozen = all(late[member] is early[member] for member in side)
                if not frozen or any(late[member] < early[member] for member in members):
                    continue
                for other in sides(members):
                    second = outcome(members, {member: late[member] for member in other})
                    assert second not in DECISIVE or second is first, (early, side, late, other)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_rule_decides_where_it_can(size: int) -> None:
    """In doubt only where somebody who is not there, or the coordinator, may know better."""
    members = MEMBERS[:size]
    coordinator = members[0]
    for state in states(members):
        for side in sides(members):
            known = {member: state[member] for member in side}
            if outcome(members, known) is Stage.DONE:
                assert set(known.values()) <= {Stage.DONE, Stage.HOLDS}
                assert known.get(coordinator) is not Stage.DONE
                assert set(members[1:]) - set(side)


def test_survivors_of_a_dead_coordinator_are_never_in_doubt() -> None:
    for size in (2, 3, 4):
        for state in states(MEMBERS[:size]):
            others = {member: state[member] for member in MEMBERS[1:size]}
            assert outcome(MEMBERS[:size], others) is not Stage.DONE


def test_one_that_holds_a_commit_needs_nobody() -> None:
    assert alone(MEMBERS, MEMBERS[1], Stage.COMMITTED) is Stage.COMMITTED
    assert alone(MEMBERS, MEMBERS[1], Stage.DONE) is Stage.DONE
    assert alone(MEMBERS, MEMBERS[0], Stage.HOLDS) is Stage.DONE
    assert alone(MEMBERS, MEMBERS[0], Stage.DONE) is Stage.ABORTED


def ledger(*entries: tuple[OpId, Stage], whole: bool = True) -> Ledger:
    return Ledger(OP.mark, MEMBERS, entries, whole)


def test_what_a_whole_ledger_does_not_name_was_not_done() -> None:
    reports = {MEMBERS[1]: [ledger((OP, Stage.DONE))], MEMBERS[2]: [ledger()]}
    assert [ruling.stage for ruling in rule(reports)] == [Stage.ABORTED]


def test_what_a_ledger_forgot_counts_for_nothing() -> None:
    reports = {MEMBERS[1]: [ledger((OP, Stage.DONE))], MEMBERS[2]: [ledger(whole=False)]}
    assert [ruling.stage for ruling in rule(reports)] == [Stage.DONE]


def test_members_that_do_not_know_the_view_count_for_nothing() -> None:
    reports = {MEMBERS[1]: [ledger((OP, Stage.DONE))], MEMBERS[2]: [], MEMBERS[3]: []}
    assert [ruling.stage for ruling in rule(reports)] == [Stage.DONE]


def test_operations_that_all_saw_end_need_no_ruling() -> None:
    assert rule({MEMBERS[0]: [ledger((OP, Stage.COMMITTED))], MEMBERS[1]: [ledger((OP, Stage.COMMITTED))]}) == ()


def test_what_nobody_saw_start_carries_over() -> None:
    reports = {MEMBERS[1]: [ledger((OP, Stage.CALLED))], MEMBERS[2]: [ledger()]}
    assert [ruling.stage for ruling in rule(reports)] == [Stage.CALLED]
