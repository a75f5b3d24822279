"""What nodes say that were not let in moves no member: no view, no ballot, no message that is held for later."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.agreement import messages
from collectives.agreement.dispatch import MAX_HELD_OF_STRANGER
from collectives.agreement.events import (
    Finished,
    Heard,
    Install,
    Linked,
    OutOfGroup,
    Perform,
    Performed,
    Send,
    Tick,
    Unlinked,
)
from collectives.agreement.messages import Stage
from collectives.agreement.views import ADMIT_TAG, NOWHERE, Ballot, Member, OpId, View
from collectives.agreement.witnesses import MAX_KNOWN, Witnesses
from collectives.types import LAN
from protocol.identity import id_of_bytes
from tests.agreements import IDS, STEP, Group

SIZE = 3
STRANGERS = IDS[5:12]


def view_of(*ids, epoch=1, mark=b"fakemark"):
    return View.of(b"group", epoch, mark, [Member(member, "", b"session!") for member in ids])


def show(group, view, *witnesses, to=range(SIZE)):
    """Let each witness link with each member and show it the view."""
    for number in to:
        for witness in witnesses:
            group.feed(number, Linked(witness, ""))
            group.feed(number, Heard(witness, messages.ViewNotice(view)))


@pytest.mark.parametrize("epoch", [1, 2**40])
def test_one_message_of_a_stranger_to_each_member_dissolves_no_group(epoch):
    group = Group(SIZE)
    before = group.views()
    show(group, view_of(*STRANGERS, epoch=epoch), STRANGERS[0])
    group.run(5.0)
    assert group.views() == before
    group.call(0), group.call(1), group.call(2)
    group.run(1.0)
    assert group.verdicts() == {0: ["commit"], 1: ["commit"], 2: ["commit"]}


@pytest.mark.parametrize(("witnesses", "gone"), [(1, False), (3, False), (4, True), (7, True)])
def test_more_than_half_of_a_larger_view_have_to_show_it(witnesses, gone):
    group = Group(SIZE)
    show(group, view_of(*STRANGERS), *STRANGERS[:witnesses], to=[0])
    assert (group.cores[0].view is None) is gone


def test_witnesses_that_show_different_views_or_are_gone_bear_nothing_out():
    group = Group(SIZE)
    for number, witness in enumerate(STRANGERS):
        show(group, view_of(*STRANGERS, mark=bytes([number]) * 8), witness, to=[0])
    assert group.cores[0].view is not None
    view = view_of(*STRANGERS)
    for witness in STRANGERS:
        show(group, view, witness, to=[0])
        group.feed(0, Unlinked(witness))
    assert group.cores[0].view is not None


def test_the_members_of_a_view_that_one_of_them_showed_are_dialled_to_bear_it_out():
    group = Group(SIZE)
    lines = [Member(member, str(number), b"session!") for number, member in enumerate(STRANGERS, 5)]
    group.clear()
    show(group, View.of(b"group", 1, b"fakemark", lines), STRANGERS[0], to=[0])
    group.run(2.0)
    dialled = {action.member for action in group.actions[0] if type(action).__name__ == "Dial"}
    assert set(STRANGERS[1:]) <= dialled


def test_a_node_that_was_in_no_view_with_anybody_goes_to_whoever_has_the_larger_one():
    group = Group(1)
    show(group, view_of(*STRANGERS[:2]), STRANGERS[0], to=[0])
    assert group.cores[0].view is None


def test_one_that_was_left_out_believes_those_it_was_with():
    group = Group(4)
    group.stop(3, silently=True)
    group.run(5.0)
    group.stopped.clear()
    group.run(0.0)
    lost = group.cores[3]
    assert len(lost.view.members) == 4
    later = group.cores[0].view
    lost.handle(Linked(IDS[0], "0"), group.network.now)
    told = lost.handle(Heard(IDS[0], messages.ViewNotice(later)), group.network.now)
    assert lost.view is None and any(isinstance(action, OutOfGroup) for action in told)


def test_a_stranger_cannot_welcome_a_node_that_hears_those_it_was_with():
    group = Group(SIZE)
    core, now = group.cores[2], group.network.now
    later = view_of(IDS[0], IDS[1], epoch=9)
    told = [a for m in IDS[:2] for a in core.handle(Heard(m, messages.ViewNotice(later)), now)]
    assert core.view is None
    told += core.handle(Linked(STRANGERS[0], ""), now)
    (session,) = {action.message.session for action in told if isinstance(action, Send)} - {b""}
    own = Member(IDS[2], "2", session)
    trap = View.of(b"group", 10, b"fakemark", [own, Member(STRANGERS[0], "", b"session!")])
    core.handle(Heard(STRANGERS[0], messages.Welcome(session, trap)), now)
    assert core.view is None
    core.handle(Heard(IDS[1], messages.Welcome(session, View.of(b"group", 10, b"truemark", [*later.roster, own]))), now)
    assert core.view is not None and core.view.mark == b"truemark"


def test_what_a_stranger_says_early_costs_no_member_what_it_said():
    group = Group(SIZE)
    core, now = group.cores[0], group.network.now
    view = group.cores[0].view
    after = View.of(view.group, view.epoch + 1, b"nextmark", view.roster)
    early = OpId(after.mark, after.epoch, 0, 0)
    for member in IDS[1:3]:
        core.handle(Heard(member, messages.Initiate(early, "reduce", (), b"")), now)
    for stranger in STRANGERS:
        core.handle(Linked(stranger, ""), now)
        for n in range(MAX_HELD_OF_STRANGER * 100):
            core.handle(Heard(stranger, messages.Ack(OpId(after.mark, 2**40, 0, n))), now)
    queues = core._dispatcher._held  # what is held has no other trace
    assert all(len(queues[stranger]) == MAX_HELD_OF_STRANGER for stranger in STRANGERS)
    assert [len(queues[member]) for member in IDS[1:3]] == [1, 1]
    core.handle(Unlinked(STRANGERS[0]), now)
    assert STRANGERS[0] not in queues


def test_no_start_or_commit_is_held_of_a_view_in_which_a_member_has_called_nothing():
    group = Group(SIZE)
    core, now = group.cores[1], group.network.now
    early = OpId(b"nextmark", core.view.epoch + 1, 0, 0)
    for message in (messages.OperationStart(early, (bytes(1 << 16),) * SIZE), messages.Commit(early)):
        core.handle(Heard(IDS[0], message), now)
    assert not core._dispatcher._held


def test_those_known_are_bounded_and_the_latest_view_is_kept():
    witnesses = Witnesses(IDS[0])
    for n in range(2 * MAX_KNOWN // 64):
        ids = [id_of_bytes((64 * n + i).to_bytes(20, "big")) for i in range(64)]
        witnesses.enter(view_of(*ids))
    assert len(witnesses.known) == MAX_KNOWN and set(ids) <= witnesses.known.keys()


def test_a_stranger_cannot_stop_a_member_with_a_ballot_of_its_own():
    group = Group(SIZE)
    core, now = group.cores[0], group.network.now
    core.handle(Linked(STRANGERS[0], ""), now)
    for epoch in (0, core.view.epoch, core.view.epoch + 1, 2**40):
        ballot = Ballot(2**40, STRANGERS[0])
        propose = messages.Propose(ballot, epoch, (*core.view.members, STRANGERS[0]))
        assert not any(isinstance(action, Send) for action in core.handle(Heard(STRANGERS[0], propose), now))
    assert not core.fenced


def test_a_stranger_cannot_decide_on_a_ballot_of_somebody_else():
    group = Group(SIZE)
    core, now, view = group.cores[0], group.network.now, group.cores[0].view
    ballot = Ballot(7, IDS[1])
    core.handle(Heard(IDS[1], messages.Propose(ballot, view.epoch, view.members)), now)
    assert core.fenced
    core.handle(Linked(STRANGERS[0], ""), now)
    trap = View.of(view.group, view.epoch + 1, b"fakemark", [view.roster[0], Member(STRANGERS[0], "", b"session!")])
    core.handle(Heard(STRANGERS[0], messages.Decide(ballot, trap, ())), now)
    assert core.view == view and core.fenced
    core.handle(Heard(IDS[1], messages.Decide(ballot, View.of(view.group, 4, b"truemark", view.roster), ())), now)
    assert core.view.mark == b"truemark"


def test_strangers_who_come_and_go_leave_nothing_behind_in_a_view_that_stays():
    group = Group(SIZE)
    core, now = group.cores[0], group.network.now
    for n in range(50):
        stranger = id_of_bytes(n.to_bytes(20, "big"))
        core.handle(Linked(stranger, ""), now)
        core.handle(Unlinked(stranger), now)
        core.handle(Heard(IDS[1], messages.Pending((Member(stranger, "99", b"session!"),))), now)
    core.handle(Tick(), now)
    remembered = core._dialled, core._out.spoken_to  # nothing else shows it
    assert len(remembered[0]) == 50
    group.run(5.0)
    assert len(core._dialled) <= SIZE and len(core._out.spoken_to) <= SIZE


# --- anything that one may say who knows all that members know ---


def spoken(view):
    """Messages of a stranger that has seen the members' view."""
    nodes = st.sampled_from((*view.members, *STRANGERS[:2]))
    marks = st.sampled_from((view.mark, b"fakemark", NOWHERE))
    small = st.integers(0, view.epoch + 2)
    sessions = st.sampled_from((*view.sessions.values(), b"session!"))
    some = st.lists(nodes, max_size=4, unique=True).map(tuple)
    lines = st.lists(st.builds(Member, nodes, st.just(""), sessions), min_size=1, max_size=5, unique_by=lambda x: x.id)
    views = st.builds(View.of, st.just(view.group), small, marks, lines)
    ops = st.builds(OpId, marks, small, st.sampled_from((0, 1, ADMIT_TAG)), st.integers(0, 3))
    ballots = st.builds(Ballot, st.integers(0, 2**40), nodes)
    entries = st.lists(st.tuples(ops, st.sampled_from(Stage)), max_size=2).map(tuple)
    ledgers = st.builds(messages.Ledger, marks, some.filter(bool), entries, st.booleans())
    return st.one_of(
        st.builds(messages.Beat, marks, small, small, some, some, st.booleans()),
        st.builds(messages.Apply, st.just(""), sessions, small),
        st.builds(messages.ViewNotice, views),
        st.builds(messages.Pending, lines.map(tuple)),
        st.builds(messages.Initiate, ops, st.sampled_from(("reduce", "admit")), st.just(()), st.just(b"")),
        st.builds(messages.OperationStart, ops, st.lists(st.just(b""), max_size=3).map(tuple)),
        st.builds(messages.OperationDone, ops, st.booleans(), st.booleans()),
        st.builds(messages.Commit, ops, st.none() | views),
        st.builds(messages.Ack, ops),
        st.builds(messages.Abort, ops, st.booleans(), st.just("")),
        st.builds(messages.Propose, ballots, small, some),
        st.builds(messages.BallotReport, ballots, views, some, st.lists(ledgers, max_size=2).map(tuple)),
        st.builds(
            messages.Decide,
            ballots,
            views,
            st.lists(st.builds(messages.Ruling, ops, st.sampled_from(Stage))).map(tuple),
        ),
        st.builds(messages.Welcome, sessions, views),
        st.just(messages.Goodbye()),
    )


@given(data=st.data(), number=st.integers(0, SIZE - 1), fenced=st.booleans())
@settings(max_examples=25, deadline=None)
def test_nothing_that_two_strangers_say_changes_a_members_view_its_calls_or_its_ballot(data, number, fenced):
    group = Group(SIZE)
    core, view, now = group.cores[number], group.cores[number].view, group.network.now
    group.call(number)
    if fenced:  # it has promised a ballot, and waits for the decision on it
        other = IDS[(number + 1) % SIZE]
        core.handle(Heard(other, messages.Propose(Ballot(7, other), view.epoch, view.members)), now)
        assert core.fenced
    for stranger in STRANGERS[:2]:
        core.handle(Linked(stranger, ""), now)
    for message in data.draw(st.lists(spoken(view), min_size=1, max_size=12)):
        for stranger in STRANGERS[:2]:
            told = core.handle(Heard(stranger, message), now)
            assert not [a for a in told if isinstance(a, Install | OutOfGroup | Finished | Perform)]
    assert core.view == view and core.fenced is fenced
    if not fenced:  # what the others say still counts
        for other in range(SIZE):
            if other != number:
                group.call(other)
        for _ in range(3):
            group.run(STEP)
        group.feed(number, Tick())
        group.run(LAN.heartbeat)
        assert group.verdicts()[number] == ["commit"]


def test_values_that_the_coordinator_cannot_use_cost_their_sender_its_place():
    group = Group(SIZE)
    group.obedient = False
    for number in range(SIZE):
        group.call(number)
    group.run(0.3)
    (start,) = [action for action in group.actions[0] if isinstance(action, Perform)]
    for number, blames in ((1, IDS[2]), (0, IDS[2])):
        group.feed(number, Performed(start.op, ok=False, reason="a share that is none", blames=blames))
        assert (IDS[2] in group.cores[0]._detector.gone) is (number == 0)  # another member's word is only its word
    group.run(2.0)
    assert group.cores[2].view is None
    assert [members for _, members in group.views()][1:] == [(0, 1)]
