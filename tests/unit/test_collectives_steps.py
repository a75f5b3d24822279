"""Which step is next, as each member computes it from what all say at a rendezvous."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectives.agreement.views import OpId
from collectives.errors import Aborted, CollectiveError
from collectives.steps import NO_STEP, Attempt, Claim, Phase, StepPlace, Steps, locate, name_of
from protocol.identity import id_of_bytes

A, B, C = (id_of_bytes(bytes([number]) * 20) for number in (1, 2, 3))


def end_of(number: int, mark: bytes = b"the view") -> OpId:
    return OpId(mark, 7, 5, number)


def meet(members: dict, *others: tuple) -> dict:
    """Let members (by id) meet, with claims of others; return whether each learned that its doubtful step counts."""
    claims = {name: steps.claim(1) for name, steps in members.items()} | dict(others)
    return {name: steps.met(name, claims) for name, steps in members.items()}


def after(*names: str, steps: int) -> dict:
    """Members that met, and took so many steps."""
    members = {name: Steps() for name in names}
    meet(members)
    for number in range(steps):
        for member in members.values():
            member.ended(end_of(number), pending=False)
    return members


def test_members_that_begin_together_bring_their_states_together_first() -> None:
    members = {A: Steps(), B: Steps()}
    meet(members)
    assert [(member.phase, member.done, member.offers) for member in members.values()] == [(Phase.SYNC, 0, True)] * 2
    alone = {A: Steps()}
    meet(alone)
    assert alone[A].phase is Phase.STEP


def test_a_run_that_is_taken_up_again_goes_on_from_the_one_that_is_furthest() -> None:
    members = {A: Steps(40), B: Steps(0)}
    meet(members)
    assert [(member.done, member.offers, member.joined) for member in members.values()] == [
        (40, True, False),
        (40, False, True),
    ]


def test_one_in_doubt_learns_that_its_step_counts_from_one_that_knows() -> None:
    members = after(A, B, C, steps=4)
    members[A].ended(end_of(4), pending=False)
    for name in (B, C):
        members[name].doubted(end_of(4))
        members[name].disturbed(admits=False)
        assert members[name].phase is Phase.MEET
    assert meet(members) == {A: False, B: True, C: True}
    assert {(member.done, member.by, member.phase) for member in members.values()} == {
        (5, name_of(end_of(4)), Phase.STEP)
    }


def test_a_step_that_nobody_knows_to_count_is_taken_again_by_all() -> None:
    members = after(A, B, C, steps=4)
    del members[A]  # it knew, and died
    for member in members.values():
        member.doubted(end_of(4))
    assert meet(members) == {B: False, C: False}
    assert {(member.done, member.phase) for member in members.values()} == {(4, Phase.STEP)}
    assert meet(members, (A, Claim(False, 5, name_of(end_of(4)), NO_STEP))) == {B: False, C: False}
    assert {(member.done, member.phase, member.offers) for member in members.values()} == {(4, Phase.SYNC, True)}


def test_who_was_out_of_the_group_goes_on_where_the_others_are_even_if_it_took_more_steps() -> None:
    stayed, back = after(A, B, steps=4), after(C, steps=9)
    claims = {name: steps.claim(1) for name, steps in stayed.items()} | {C: back[C].claim(2)}
    for name, steps in (stayed | back).items():
        steps.met(name, claims)
        assert (steps.done, steps.phase, steps.offers, steps.joined) == (4, Phase.SYNC, name != C, name == C)


def test_a_newcomer_offers_nothing_to_a_group_that_has_not_taken_a_step() -> None:
    founder, newcomer = Steps(), Steps(3)
    meet({A: founder})
    meet({A: founder, B: newcomer})
    assert (founder.offers, newcomer.offers, newcomer.done, newcomer.phase) == (True, False, 0, Phase.SYNC)


def test_whoever_waits_is_let_in_between_steps() -> None:
    (one,) = after(A, steps=1).values()
    one.stepped()
    one.ended(end_of(1), pending=True)
    assert one.phase is Phase.ADMIT
    one.admitted()
    assert one.phase is Phase.MEET
    one.disturbed(admits=True)
    assert one.phase is Phase.ADMIT
    one.disturbed(admits=True)  # whom nobody can let in does not keep the others from their steps
    assert one.phase is Phase.MEET


def test_all_calls_of_an_attempt_are_carried_out_in_one_view() -> None:
    attempt = Attempt()
    attempt.carry_out_in(b"a view")
    attempt.carry_out_in(b"a view")
    for mark in (b"another", b"a view"):  # it cannot count any more
        with pytest.raises(Aborted, match="taken again"):
            attempt.carry_out_in(mark)


NAMES = st.sampled_from([NO_STEP, *(name_of(end_of(number)) for number in range(3))])
CLAIMS = st.builds(Claim, st.booleans(), st.integers(0, 2**64 - 1), NAMES, NAMES)


@given(CLAIMS)
def test_claims_survive_their_bytes(claim: Claim) -> None:
    assert Claim.decode(claim.encode()) == claim


@given(st.binary(max_size=80))
def test_bytes_that_are_no_claim_are_refused(data: bytes) -> None:
    try:
        assert Claim.decode(data).encode()[1:] == data[1:]
    except CollectiveError as error:
        assert "run one version" in str(error)


@given(st.dictionaries(st.sampled_from([A, B, C]), CLAIMS, min_size=1))
def test_whatever_is_said_the_group_is_where_one_of_its_members_is(claims: dict) -> None:
    group, places = locate(claims)
    assert group in places.values() and places.keys() == claims.keys()
    assert all(isinstance(place, StepPlace) for place in places.values())


@pytest.mark.parametrize("stays", [(1, 1), (1, 2)])
def test_a_member_stayed_if_it_came_in_no_more_often_than_when_it_last_met(stays: tuple) -> None:
    steps = Steps()
    assert not steps.claim(stays[0]).stayed
    steps.met(A, {A: steps.claim(stays[0])})
    assert steps.claim(stays[1]).stayed is (stays[0] == stays[1])
