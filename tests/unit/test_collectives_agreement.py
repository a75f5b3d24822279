"""The agreement core, scenario by scenario, and against events and messages in any order."""

import gc
import tracemalloc
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectives.agreement import messages
from collectives.agreement.agreement import Agreement
from collectives.agreement.events import (
    ADMIT,
    Begin,
    Event,
    Finished,
    GiveUp,
    Heard,
    Leave,
    Linked,
    OutOfGroup,
    Perform,
    Performed,
    Send,
    Tick,
    Unlinked,
)
from collectives.agreement.failure_detector import FailureDetector
from collectives.agreement.message_codec import decode, encode
from collectives.agreement.messages import MAX_OPEN, Stage
from collectives.agreement.view_change import compatible
from collectives.agreement.views import ADMIT_TAG, RENDEZVOUS_TAG, Ballot, Member, OpId, View, outranks
from collectives.types import LAN, WAN
from tests.agreements import IDS, Group

ALL = (0, 1, 2)


def group_of_three() -> Group:
    group = Group(3)
    assert group.views() == [(3, ALL)]
    return group


# --- operations ---


def test_everybody_is_handed_all_shares_and_commits_with_the_same_contributors() -> None:
    group = group_of_three()
    for number in ALL:
        group.call(number, share=b"%d" % number)
    group.run(1.0)
    starts = [action for number in ALL for action in group.actions[number] if isinstance(action, Perform)]
    assert [start.shares for start in starts] == [{IDS[0]: b"0", IDS[1]: b"1", IDS[2]: b"2"}] * 3
    assert group.verdicts() == {0: ["commit"], 1: ["commit"], 2: ["commit"]}
    contributors = {ended.contributors for number in ALL for ended in group.finished[number] if ended.op.tag == 0}
    assert contributors == {IDS[:3]}


def test_one_that_fails_aborts_it_for_all_and_the_next_one_commits() -> None:
    group = group_of_three()
    group.obedient = False
    for number in ALL:
        group.call(number)
    group.run(0.2)
    (start,) = [action for action in group.actions[1] if isinstance(action, Perform)]
    group.feed(0, Performed(start.op))
    group.feed(1, Performed(start.op, ok=False, reason="the ring broke"))
    group.run(0.2)
    assert group.verdicts() == {0: ["abort"], 1: ["abort"], 2: ["abort"]}
    group.obedient = True
    for number in ALL:
        group.call(number)
    group.run(0.5)
    assert group.verdicts() == {number: ["abort", "commit"] for number in ALL}


@pytest.mark.parametrize("odd", ALL)
def test_an_odd_call_costs_its_member_its_place_and_the_others_one_call(odd: int) -> None:
    group = group_of_three()
    others = tuple(number for number in ALL if number != odd)
    for number in ALL:
        group.call(number, count=7 if number == odd else 3)
    group.run(0.5)
    assert group.verdicts() == {number: ["mismatch" if number == odd else "abort"] for number in ALL}
    (ended,) = [ended for ended in group.finished[odd] if ended.op.tag == 0]
    assert ended.mismatch is not None
    assert (ended.mismatch.field, ended.mismatch.theirs, ended.mismatch.ours) == ("count", 3, 7)
    for number in others:
        assert f"member {IDS[odd]}: it gave count = 7" in group.finished[number][-1].reason
    group.run(1.0)
    assert group.cores[odd].view is None
    for number in others:
        group.call(number)
    group.run(0.5)
    assert {group.verdicts()[number][-1] for number in others} == {"commit"}


def test_where_no_half_agrees_a_mismatch_names_the_member_and_the_field_to_everybody() -> None:
    group = Group(2)
    group.call(0, count=3), group.call(1, count=7)
    group.run(0.5)
    for number in (0, 1):
        (ended,) = [ended for ended in group.finished[number] if ended.op.tag == 0]
        assert ended.verdict.value == "mismatch"
        assert ended.mismatch is not None
        assert ended.mismatch.member == IDS[1 - number]
        assert (ended.mismatch.field, ended.mismatch.ours) == ("count", 7 if number else 3)
    assert all(core.view is not None for core in group.cores.values())


# --- processes that stand still ---


def test_one_that_says_nothing_is_not_missing_for_a_minute_while_its_connection_lives() -> None:
    here, there = IDS[:2]
    view = View.of(b"group", 1, b"the view", [Member(name, "", bytes(8)) for name in (here, there)])
    detector = FailureDetector(here, WAN)
    detector.enter(view, 0.0)
    detector.link(there, "", 0.0)
    assert not detector.missing(view, 10.0) and detector.missing(view, 61.0) == {there}
    detector.unlink(there, view, 10.0)  # the kernel ended the connection, or the process has ended
    assert detector.missing(view, 11.0) == {there}
    lan = FailureDetector(here, LAN)
    lan.enter(view, 0.0)
    lan.link(there, "", 0.0)
    assert lan.missing(view, 2.0) == {there}


# --- owners that hang ---


def hang(group: Group, *hung: int, calls: int, deadline: float = 5.0) -> None:
    """Let all but the hung ones call again and again."""
    for _ in range(calls):
        for number in group.cores:
            if number not in hung and group.cores[number].view is not None:
                group.call(number, deadline=deadline)
        group.run(deadline + 1.0)


@pytest.mark.parametrize("hung", ALL)
def test_who_is_late_by_three_time_outs_of_the_others_is_left_out_and_told_and_comes_back_when_it_asks(
    hung: int,
) -> None:
    group = group_of_three()
    others = tuple(number for number in ALL if number != hung)
    hang(group, hung, calls=4)
    assert {tuple(group.verdicts()[number]) for number in others} == {("deadline",) * 3 + ("commit",)}
    assert group.cores[hung].view is None
    group.run(30.0)
    assert not any(group.cores[number].pending for number in others)  # while its owner hangs it does not ask
    assert group.cores[hung].view is None
    group.call(hung)
    ended = group.finished[hung][-1]
    assert ended.verdict.value == "evicted"
    assert "left this member out: the others waited 15 s for its calls, the last one reduce" in ended.reason
    group.feed(hung, Begin(ADMIT_TAG, ADMIT, 10.0))
    group.run(2.0)
    group.admit()
    assert [members for _, members in group.views()] == [ALL]


@pytest.mark.parametrize("hung", ALL)
def test_who_is_later_than_all_that_wait_allow_is_left_out_within_the_time_of_their_call(hung: int) -> None:
    group = group_of_three()
    others = tuple(number for number in ALL if number != hung)
    lags = dict(zip(others, (10.0, LAN.hang), strict=True))
    for number, lag in lags.items():
        group.feed(number, Begin(0, "reduce", 30.0, (("count", 1),), b"", lag))
    group.run(LAN.hang - 0.5)
    assert [members for _, members in group.views()] == [ALL]
    group.run(2.5)
    assert {tuple(group.verdicts()[number]) for number in others} == {("commit",)}
    group.call(hung)
    assert (
        "left this member out: the others waited 15 s for its calls, the last one reduce"
        in group.finished[hung][-1].reason
    )


def test_the_time_that_others_wait_is_that_of_all_their_calls_and_begins_anew_when_it_makes_one() -> None:
    group = group_of_three()
    for _ in range(3):
        for number in (0, 1):
            group.feed(number, Begin(0, "reduce", 8.0, (("count", 1),), b"", LAN.hang))
        group.run(8.5)
    assert [group.verdicts()[number] for number in (0, 1)] == [["deadline", "commit", "commit"]] * 2
    group = group_of_three()
    for _ in range(3):
        for number in (0, 1):
            group.feed(number, Begin(0, "reduce", 30.0, (("count", 1),), b"", LAN.hang))
        group.run(10.0)
        group.call(2)
        group.run(0.5)
    assert [group.verdicts()[number] for number in ALL] == [["commit"] * 3] * 3


def test_the_time_in_which_all_were_stopped_is_nobodys_lateness() -> None:
    group = group_of_three()
    for number in (0, 1):
        group.feed(number, Begin(0, "reduce", 300.0, (("count", 1),), b"", LAN.hang))
    group.run(1.0)
    group.stopped.update(ALL)
    group.run(10 * LAN.hang)
    group.stopped.clear()
    for number in ALL:
        group._tick(number, group.cores[number])
    group.run(1.0)
    group.call(2)
    group.run(0.5)
    assert group.views() == [(3, ALL)]
    assert [group.verdicts()[number] for number in ALL] == [["commit"]] * 3


def test_who_is_late_is_waited_for_as_long_as_any_call_says_also_one_of_another_tag() -> None:
    group = group_of_three()
    group.feed(0, Begin(0, "reduce", 60.0, (("count", 1),), b"", 1.0))
    group.call(1, tag=7, deadline=60.0)
    group.run(50.0)
    assert group.views() == [(3, ALL)]
    group.call(2), group.call(1)
    group.call(0, tag=7), group.call(2, tag=7)
    group.run(0.5)
    assert group.verdicts() == group.verdicts(tag=7) == {number: ["commit"] for number in ALL}


def test_who_is_late_but_calls_is_not_left_out() -> None:
    group = group_of_three()
    for _ in range(4):
        hang(group, 2, calls=2)
        group.call(2, deadline=0.5)
        group.run(1.0)
    assert group.views() == [(3, ALL)]


def test_who_waits_in_another_call_is_not_left_out_and_neither_is_anybody_for_calls_that_hardly_wait() -> None:
    group = group_of_three()
    group.call(2, tag=5, deadline=300.0)
    hang(group, 2, calls=5)
    assert group.views() == [(3, ALL)]
    group = group_of_three()
    hang(group, 2, calls=10, deadline=LAN.timeout / 2)
    assert group.views() == [(3, ALL)]


def test_one_that_calls_alone_leaves_nobody_out_and_the_time_of_calls_beside_each_other_counts_once() -> None:
    group = group_of_three()
    hang(group, 1, 2, calls=5)
    assert group.views() == [(3, ALL)]
    group = group_of_three()
    for tag in range(6):
        group.call(0, tag=tag), group.call(1, tag=tag)
    group.run(8.0)
    assert group.views() == [(3, ALL)]


@pytest.mark.parametrize("started", [False, True])
def test_a_call_that_its_owner_gives_up_ends_at_once_and_its_tag_is_free(started: bool) -> None:
    group = group_of_three()
    group.obedient = False
    for number in ALL if started else (0,):
        group.call(number)
    group.run(0.3)
    group.feed(0, GiveUp(0))
    assert group.verdicts()[0] == ["abort"]
    group.obedient = True
    group.run(0.3)
    for number in ALL if started else (1, 2, 1, 2, 0):  # the others' first call is the one that was given up
        group.call(number)
        group.run(0.1)
    group.run(0.5)
    assert group.verdicts() == {number: ["abort", "commit"] for number in ALL}


def test_a_call_that_some_never_make_ends_at_its_deadline_for_all_who_made_it_and_later_for_the_rest() -> None:
    group = group_of_three()
    group.call(0, deadline=5.0)
    group.call(1, deadline=1.0)
    group.run(2.0)
    assert group.verdicts() == {0: ["deadline"], 1: ["deadline"], 2: []}
    assert IDS[2] in group.finished[0][-1].reason
    group.call(2, deadline=5.0)
    group.run(0.5)
    assert group.verdicts()[2] == ["deadline"]
    for number in ALL:
        group.call(number)
    group.run(0.5)
    assert group.verdicts() == {number: ["deadline", "commit"] for number in ALL}


def test_tags_do_not_disturb_one_another() -> None:
    group = group_of_three()
    for number in ALL:
        group.call(number, tag=1 + number % 2)
        group.call(number, tag=7)
    group.run(0.5)
    assert group.verdicts(tag=7) == {number: ["commit"] for number in ALL}
    assert group.verdicts(tag=1) == {number: [] for number in ALL}


def test_what_the_owner_may_not_call_is_refused() -> None:
    core = Agreement(IDS[0], "", b"group", Random(1), 0.0)
    with pytest.raises(ValueError, match="share"):
        core.handle(Begin(0, "x", 1.0, share=bytes(65537)), 0.0)
    with pytest.raises(ValueError, match="digest"):
        core.handle(Begin(0, "x", 1.0, (("field", "v" * 300),)), 0.0)
    with pytest.raises(ValueError, match="go together"):
        core.handle(Begin(0, ADMIT, 1.0), 0.0)


def test_a_tag_has_one_call_outstanding_and_a_member_a_bounded_number() -> None:
    group = group_of_three()
    group.call(0)
    with pytest.raises(ValueError, match="tag 0 is outstanding"):
        group.call(0)
    for tag in range(1, MAX_OPEN):
        group.call(0, tag=tag)
    with pytest.raises(ValueError, match="are outstanding"):
        group.call(0, tag=MAX_OPEN)


def test_a_tag_that_is_used_once_costs_little_and_nothing_after_the_next_rendezvous(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("collectives.agreement.participant.MAX_ENTRIES", MAX_OPEN + 100)  # fewer to fill
    core, now = Agreement(IDS[0], "", b"group", Random(1), 0.0), 0.0

    def call(tag: int) -> list[str]:
        told = core.handle(Begin(tag, "reduce", 5.0), now)
        started = [action.op for action in told if isinstance(action, Perform)]
        ended = [action for op in started for action in core.handle(Performed(op), now)]
        return [action.verdict.value for action in ended if isinstance(action, Finished)]

    def held() -> int:
        gc.collect()
        own = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/collectives/*")])
        return sum(trace.size for trace in own.traces)  # of the process's other threads nothing

    tracemalloc.start()
    try:
        for tag in range(100):
            assert call(tag) == ["commit"]
        before = held()
        for tag in range(100, 500):
            call(tag)
        assert held() - before < 200 * 400
        call(RENDEZVOUS_TAG)
        assert held() - before < 50 * 400, "400 tags would have cost 134 bytes each"
    finally:
        tracemalloc.stop()


# --- failures ---


@pytest.mark.parametrize("victim", ALL)
@pytest.mark.parametrize("silently", [False, True])
def test_the_next_operation_commits_within_five_seconds_of_a_death(victim: int, silently: bool) -> None:
    group = group_of_three()
    rest = [number for number in ALL if number != victim]
    group.stop(victim, silently=silently)
    for number in rest:
        group.call(number)
    group.run(5.0)
    assert group.views() == [(4, tuple(rest))]
    assert {number: group.verdicts()[number] for number in rest} == {number: ["commit"] for number in rest}


@pytest.mark.parametrize("victim", ALL)
def test_an_operation_under_way_is_aborted_when_a_member_dies(victim: int) -> None:
    group = group_of_three()
    group.obedient = False
    for number in ALL:
        group.call(number)
    group.run(0.2)
    group.stop(victim)
    group.run(3.0)
    assert all(group.verdicts()[number] == ["abort"] for number in ALL if number != victim)


def test_a_stopped_member_learns_that_it_is_out_and_is_let_in_again() -> None:
    group = group_of_three()
    group.stopped.add(2)
    group.run(4.0)
    assert group.views() == [(4, (0, 1))]
    group.stopped.discard(2)
    group._tick(2, group.cores[2])
    group.run(2.0)
    assert any(isinstance(action, OutOfGroup) for action in group.actions[2])
    assert group.cores[0].pending
    group.admit()
    assert group.views() == [(5, ALL)]


def test_halves_go_on_apart_and_the_lesser_one_comes_back_to_the_other() -> None:
    group = Group(4)
    for one, other in ((0, 2), (0, 3), (1, 2), (1, 3)):
        group.network.block(one, other)
        group.network.block(other, one)
    group.run(5.0)
    assert group.views() == [(4, (0, 1)), (4, (2, 3))]
    group.network.heal()
    group.run(5.0)
    group.admit()
    assert group.views() == [(5, (0, 1, 2, 3))]


def test_two_that_miss_each_other_are_not_in_one_view() -> None:
    group = group_of_three()
    group.network.block(1, 2)
    group.network.block(2, 1)
    group.network.cut(1, 2)
    group.run(6.0)
    assert group.cores[0].view is not None
    assert len(group.cores[0].view.members) == 2


def test_who_is_missed_most_is_dropped() -> None:
    one, two, three, four = IDS[:4]
    assert compatible(one, {one: (), two: (four,), three: (four,), four: (three,)}) == [one, two, three]
    assert compatible(one, {one: (), two: (three,), three: ()}) == [one, two]
    assert compatible(two, {two: (), three: (two,)}) == [two]


def test_of_two_sides_the_larger_goes_on_else_that_with_the_least_id() -> None:
    assert outranks(IDS[1:3], IDS[:1])
    assert outranks(IDS[:2], IDS[2:4])
    assert not outranks(IDS[2:4], IDS[:2])


# --- coming and going ---


def test_a_lone_founder_lets_the_first_in_by_itself() -> None:
    assert Group(2).views() == [(2, (0, 1))]


def test_what_a_member_called_before_it_reached_its_coordinator_is_not_lost() -> None:
    group = Group(0)
    group.network.block(0, 1)
    group.network.block(1, 0)
    for number in (2, 0, 1):  # the founder lets two in that have yet to reach each other, and one of them coordinates
        group.boot(number)
    group.run(0.5)
    assert group.views() == [(2, ALL)]
    for number in ALL:
        group.call(number)
    group.run(0.2)
    assert not any(group.verdicts().values())
    group.network.heal()
    group.run(1.5)
    assert group.views() == [(2, ALL)]
    assert group.verdicts() == {number: ["commit"] for number in ALL}


def test_newcomers_wait_until_all_members_admit() -> None:
    group = group_of_three()
    group.boot(3)
    group.boot(4)
    group.run(3.0)
    assert group.views() == [(0, ()), (3, ALL)]
    assert all(group.cores[number].pending for number in ALL)
    group.admit()
    assert group.views() == [(4, (0, 1, 2, 3, 4))]
    assert not any(group.cores[number].pending for number in range(5))


def test_an_admission_with_nobody_waiting_changes_nothing() -> None:
    group = group_of_three()
    group.admit()
    assert group.views() == [(3, ALL)]
    assert group.verdicts(tag=ADMIT_TAG)[1][-1] == "commit"


def test_a_newcomer_that_died_is_not_let_in() -> None:
    group = group_of_three()
    group.boot(3)
    group.run(1.0)
    group.stop(3)
    group.admit()
    assert [view[1] for view in group.views()] == [ALL]


def test_an_admission_waits_for_what_is_under_way() -> None:
    group = group_of_three()
    group.obedient = False
    for number in ALL:
        group.call(number)
    group.boot(3)
    group.run(1.0)
    group.admit()
    assert group.views() == [(0, ()), (3, ALL)]
    for number in ALL:
        (start,) = [action for action in group.actions[number] if isinstance(action, Perform)]
        group.feed(number, Performed(start.op))
    group.run(1.0)
    assert group.views() == [(4, (0, 1, 2, 3))]
    assert group.verdicts()[0] == ["commit"]


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("admitting", [(0,), (1,), (0, 1), (1, 2)])
def test_those_who_wait_in_another_call_take_part_in_an_admission_and_go_on_waiting(admitting, waits) -> None:
    group = group_of_three()
    group.clear()
    if waits:
        group.boot(3)
        group.run(1.0)
    everybody = (*ALL, 3) if waits else ALL
    for number in ALL:
        if number in admitting:
            group.feed(number, Begin(ADMIT_TAG, ADMIT, 30.0))
        else:
            group.call(number, deadline=30.0)
    group.run(1.0)
    assert group.verdicts(tag=ADMIT_TAG) == {number: ["commit"] * (number in admitting) for number in everybody}
    assert group.views() == [(3 + waits, everybody)]
    assert not any(group.verdicts().values())
    for number in (*admitting, *everybody[3:]):
        group.call(number)
    group.run(1.0)
    assert group.verdicts() == {number: ["commit"] for number in everybody}


def test_an_admission_that_is_called_off_is_over_for_all() -> None:
    group = group_of_three()
    group.clear()
    group.feed(0, Begin(ADMIT_TAG, ADMIT, 1.0))
    group.run(2.0)  # its time is up, and nobody else has called it
    for number in ALL:
        group.feed(number, Begin(ADMIT_TAG, ADMIT, 5.0))
    group.run(1.0)
    assert group.verdicts(tag=ADMIT_TAG) == {0: ["deadline", "commit"], 1: ["commit"], 2: ["commit"]}


def test_one_that_admits_while_it_takes_part_in_an_admission_unasked_is_told_how_that_ended() -> None:
    group = group_of_three()
    group.clear()
    first, *others = ALL
    group.feed(first, Begin(ADMIT_TAG, ADMIT, 30.0))
    for number in others:
        group.call(number, deadline=30.0)
    while not any(
        isinstance(action, Send) and isinstance(action.message, messages.OperationDone) for action in group.actions[2]
    ):
        group.run(0.001)
    group.feed(2, Begin(ADMIT_TAG, ADMIT, 30.0))
    group.run(1.0)
    assert group.verdicts(tag=ADMIT_TAG) == {0: ["commit"], 1: [], 2: ["commit"]}


def test_an_admission_waits_for_those_who_may_yet_call_it() -> None:
    group = group_of_three()
    group.clear()
    group.feed(0, Begin(ADMIT_TAG, ADMIT, 30.0))
    group.call(1, deadline=30.0)
    group.run(5.0)  # the third may call either
    assert not any(group.verdicts(tag=tag)[number] for tag in (0, ADMIT_TAG) for number in ALL)
    group.call(0, deadline=30.0)
    group.call(2, deadline=30.0)
    group.run(1.0)
    assert group.verdicts() == {number: ["commit"] for number in ALL}
    assert not any(group.verdicts(tag=ADMIT_TAG).values())  # what all have called goes first
    for number in (1, 2):
        group.feed(number, Begin(ADMIT_TAG, ADMIT, 30.0))
    group.run(1.0)
    assert [group.verdicts(tag=ADMIT_TAG)[number] for number in ALL] == [["commit"]] * 3


def test_one_that_leaves_is_not_waited_for() -> None:
    group = group_of_three()
    group.call(1)
    group.feed(0, Leave())
    group.stopped.add(0)
    group.call(2)
    group.run(0.5)
    assert group.views() == [(4, (1, 2))]
    assert group.verdicts()[1] == ["commit"]


def meet(group: Group, number: int, deadline: float = 5.0) -> None:
    group.feed(number, Begin(RENDEZVOUS_TAG, "rendezvous", deadline, share=b"%d" % number))


def test_a_rendezvous_draws_all_to_it_and_makes_their_next_calls_one_operation() -> None:
    group = group_of_three()
    for _ in range(3):  # two are three calls ahead of the third, and were told so
        for number in (0, 1):
            group.call(number, deadline=0.5)
        group.run(1.0)
    group.call(2, deadline=30.0)
    group.call(1, deadline=30.0, tag=1)
    group.run(0.5)
    group.clear()
    meet(group, 0)
    group.run(0.2)
    group.call(2, deadline=30.0, tag=2)  # one that does not come is sent there as often as it calls
    group.run(0.2)
    assert group.verdicts(tag=1)[1] == group.verdicts(tag=2)[2] == ["abort"]
    meet(group, 1)
    meet(group, 2)
    group.run(0.5)
    assert group.verdicts(tag=RENDEZVOUS_TAG) == {number: ["commit"] for number in ALL}
    (shares,) = {tuple(act.shares.values()) for act in group.actions[1] if isinstance(act, Perform)}
    assert shares == (b"0", b"1", b"2")
    group.clear()
    for number in ALL:
        group.call(number)
    group.run(0.5)
    assert group.verdicts() == {number: ["commit"] for number in ALL}


def test_a_rendezvous_waits_for_what_is_under_way() -> None:
    group = group_of_three()
    group.obedient = False
    for number in ALL:
        group.call(number)
    group.run(0.2)
    for number in ALL:
        meet(group, number)
    group.run(0.2)
    assert group.verdicts(tag=RENDEZVOUS_TAG) == {number: [] for number in ALL}
    group.obedient = True
    for number in ALL:
        (op,) = [action.op for action in group.actions[number] if isinstance(action, Perform)]
        group.feed(number, Performed(op))
    group.run(0.5)
    assert group.verdicts() == group.verdicts(tag=RENDEZVOUS_TAG) == {number: ["commit"] for number in ALL}


def test_who_waits_at_a_rendezvous_takes_part_in_an_admission() -> None:
    group = group_of_three()
    group.boot(3)
    group.run(1.0)
    meet(group, 0, 20.0)
    group.call(2, deadline=20.0)
    group.feed(1, Begin(ADMIT_TAG, ADMIT, 20.0))
    group.run(0.1)
    assert group.verdicts()[2] == ["abort"]
    meet(group, 2, 20.0)
    group.run(3.0)
    assert group.views() == [(4, (0, 1, 2, 3))]
    for number in (1, 3):
        meet(group, number, 20.0)
    group.run(0.5)
    assert group.verdicts(tag=RENDEZVOUS_TAG) == {number: ["commit"] for number in range(4)}


def test_outside_every_call_but_admission_ends_at_once() -> None:
    group = group_of_three()
    group.boot(3)
    group.call(3)
    assert group.verdicts()[3] == ["evicted"]
    group.feed(3, Begin(ADMIT_TAG, ADMIT, 30.0))
    group.run(2.0)
    assert group.verdicts(tag=ADMIT_TAG)[3] == []
    group.admit()
    assert group.verdicts(tag=ADMIT_TAG)[3] == ["commit"]


# --- anything at all ---

MARKS = (b"the mark", b"another!", bytes(8))
small = st.integers(0, 3)
nodes = st.sampled_from(IDS[:4])
marks = st.sampled_from(MARKS)
some = st.lists(nodes, max_size=4).map(tuple)
rosters = st.lists(
    st.builds(Member, nodes, st.just("1"), marks), min_size=1, max_size=3, unique_by=lambda line: line.id
)
views = st.builds(View.of, st.just(b"group"), small, marks, rosters)
ops = st.builds(OpId, marks, small, st.sampled_from((0, 1, ADMIT_TAG)), small)
ballots = st.builds(Ballot, small, nodes)
entries = st.lists(st.tuples(ops, st.sampled_from(Stage)), max_size=2).map(tuple)
ledgers = st.builds(messages.Ledger, marks, st.lists(nodes, min_size=1, max_size=3).map(tuple), entries, st.booleans())
rulings = st.builds(messages.Ruling, ops, st.sampled_from(Stage))
any_message = st.one_of(
    st.builds(messages.Beat, marks, small, small, some, some, st.booleans()),
    st.builds(messages.Apply, st.just("1"), marks, small),
    st.builds(messages.ViewNotice, views),
    st.builds(messages.Pending, rosters.map(tuple)),
    st.builds(messages.Initiate, ops, st.sampled_from(("reduce", ADMIT)), st.just(()), st.just(b"")),
    st.builds(messages.OperationStart, ops, st.lists(st.just(b""), max_size=3).map(tuple)),
    st.builds(messages.OperationDone, ops, st.booleans(), st.booleans()),
    st.builds(messages.Commit, ops, st.none() | views),
    st.builds(messages.Ack, ops),
    st.builds(messages.Abort, ops, st.booleans(), st.just("")),
    st.builds(messages.Propose, ballots, small, some),
    st.builds(messages.BallotReport, ballots, views, some, st.lists(ledgers, max_size=2).map(tuple)),
    st.builds(messages.Decide, ballots, views, st.lists(rulings, max_size=2).map(tuple)),
    st.builds(messages.Welcome, marks, views),
    st.just(messages.Goodbye()),
)
any_event = st.one_of(
    st.builds(Heard, nodes, any_message),
    st.builds(Linked, nodes, st.just("1")),
    st.builds(Unlinked, nodes),
    st.builds(Performed, ops, st.booleans()),
    st.just(Tick()),
)


def in_view(event: Event, view: View | None) -> Event:
    """Let what is about operations of "the mark" be about those of the view that holds, or it would never count."""
    about = messages.OperationMessage | messages.BallotMessage
    if view is None or not isinstance(event, Heard) or not isinstance(event.message, about):
        return event
    return Heard(event.member, decode(encode(event.message).replace(b"the mark", view.mark)))


@given(
    st.lists(st.tuples(any_event, st.sampled_from((0.0, 0.1, 2.0))), max_size=40),
    st.booleans(),
    st.booleans(),
)
def test_no_events_in_any_order_raise(events: list[tuple[Event, float]], formed: bool, fresh: bool) -> None:
    group = Group(2)
    seeds = ["0"] if fresh else []
    core = group.cores[1] if formed else Agreement(IDS[1], "1", b"group", Random(1), 0.0, seeds=seeds)
    now = group.network.now
    for tag in (0, 1):
        core.handle(Begin(tag, "reduce", 1.0), now)
    core.handle(Begin(ADMIT_TAG, ADMIT, 1.0), now)
    for event, lapse in events:
        now += lapse
        for action in core.handle(in_view(event, core.view), now):
            if isinstance(action, Send):
                assert decode(encode(action.message)) == action.message
    for _ in range(40):  # every call ends
        now += LAN.heartbeat
        core.handle(Tick(), now)
    core.handle(Leave(), now)
    assert core.handle(Tick(), now) == []
