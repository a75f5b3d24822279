"""What is noted of refusals and of peers' clocks: each thing once, and never more than the bucket gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.config import AwakeClock, Instant
from protocol.refusals import (
    CLOCK_OFF_S,
    LINES_BURST,
    LINES_PER_SECOND,
    MAX_WAITING,
    SAME_S,
    Case,
    PeerClocks,
    Refusal,
    Refusals,
)

UNIX = 1_700_000_000.0


def at(seconds: float) -> Instant:
    return Instant(seconds, UNIX + seconds)


def test_a_refusal_is_told_once_an_hour_by_whom_and_why() -> None:
    refusals = Refusals(at(0))
    for second in range(10):
        refusals.of("a node", "invite_used", at(second))
        refusals.by("tcp://192.0.2.7:4001", "invite_expired", at(second))
        refusals.offender("10.0.0.0/24", "forged", at(second))
    told = [
        Refusal(Case.NOT_ADMITTED, "a node", "invite_used"),
        Refusal(Case.BY_THEM, "tcp://192.0.2.7:4001", "invite_expired"),
        Refusal(Case.OFFENDER, "10.0.0.0/24", "forged"),
    ]
    assert refusals.take() == told and refusals.take() == []
    assert refusals.counts == {"invite_used": 10} and refusals.latest == "invite_expired"
    refusals.of("a node", "invite_used", at(SAME_S))
    assert refusals.take() == told[:1]


def test_whoever_brings_a_thousand_keys_gets_few_lines_and_the_rest_is_counted() -> None:
    refusals = Refusals(at(0))
    for number in range(1000):
        refusals.of(f"node {number}", "not_admitted", at(0))
    first = refusals.take()
    assert len(first) == LINES_BURST and refusals.counts["not_admitted"] == 1000
    refusals.of("one more", "not_admitted", at(1 / LINES_PER_SECOND))
    assert refusals.take() == [Refusal(Case.NOT_ADMITTED, "one more", "not_admitted", unsaid=990)]
    for second in range(10_000):
        refusals.of(f"later {second}", "not_admitted", at(100.0 * second))
    assert len(refusals.take()) == MAX_WAITING  # nobody took them


@pytest.mark.parametrize(
    ("ahead", "said"),
    [
        ((0.0, 10 * CLOCK_OFF_S), None),  # a swarm of three: another's is off
        ((0.0, 0.4, 10 * CLOCK_OFF_S), None),
        ((1200.0, 1200.0), (2, 1200.0)),
        ((1200.0, 1200.0, 0.0), None),  # two against two
        ((-400.0, -500.0, -600.0, 0.0), (3, -500.0)),
        ((1200.0, -1200.0, 1200.0), None),
        ((CLOCK_OFF_S - 1,) * 5, None),
    ],
)
def test_a_clock_differs_if_it_does_from_more_than_half_of_all_itself_among_them(
    ahead: tuple[float, ...], said: tuple[int, float] | None
) -> None:
    clocks = PeerClocks()
    for number, seconds in enumerate(ahead):
        clocks.said(f"network {number}", at(0).unix + seconds, at(0))
    assert clocks.difference(at(60)) == said


@given(st.lists(st.floats(0, 400), max_size=20))
def test_a_node_that_sleeps_or_is_blocked_does_not_take_its_clock_to_be_off(steps: list[float]) -> None:
    """A laptop that slept for five minutes, and a node that was blocked for three seconds a minute, said so."""
    unix, clocks = UNIX, PeerClocks()
    clock = AwakeClock(lambda: Instant(unix - UNIX, unix))
    for number, step in enumerate(steps):
        clocks.said(f"network {number % 5}", unix, clock())
        unix += step
        assert clocks.difference(clock()) is None
