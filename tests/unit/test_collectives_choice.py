"""Inline, direct or ring; which slices, which tour: pure functions of what the members measured and timed."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.agreement.messages import MAX_SHARE_BYTES
from collectives.reduce.topology import (
    EXACT_MEMBERS,
    FASTEST,
    GAIN,
    MEASURE_AFTER,
    RING_MEMBERS,
    TRIED,
    PlanPhase,
    SumPlan,
    capacities,
    goes_inline,
    links_of,
    tour,
)
from tests.collectives_ports import members

MIB = 1 << 20
ENOUGH = MEASURE_AFTER * 5


def all_links(order, bandwidth=1e8):
    return {(a, b): bandwidth for a in order for b in order if a != b}


def edges(ring):
    return list(zip(ring, [*ring[1:], ring[0]], strict=True))


def tried(order, ring_s, direct_s):
    """The plan after `TRIED` steps of 8 MiB by each way, which took so many seconds each."""
    plan = SumPlan().after(order, ENOUGH, 1.0).measured(order, all_links(order))
    for phase, taken in ((PlanPhase.RING, ring_s), (PlanPhase.DIRECT, direct_s)):
        for seconds in taken:
            assert (plan.phase, plan.by_ring) == (phase, phase is PlanPhase.RING)
            plan = plan.after(order, 8 * MIB, seconds)
    assert plan.phase is PlanPhase.COUNT
    return plan


def test_small_values_travel_with_the_agreement():
    assert goes_inline(0, 256)
    assert goes_inline(1024, 8)
    assert not goes_inline(MAX_SHARE_BYTES, 2), "a share says more than the values"
    assert not goes_inline(16 << 10, 64), "the coordinator would send too much"


def test_lines_are_measured_once_enough_was_summed():
    order = members(5)
    plan = SumPlan()
    for _ in range(5 * 8 - 1):
        plan = plan.after(order, 8 * MIB, 1.0)
        assert plan.phase is PlanPhase.COUNT
    assert plan.after(order, 0, 0.0) == plan, "a step without large sums says nothing"
    assert plan.after(order, 8 * MIB, 1.0).phase is PlanPhase.MEASURE


@pytest.mark.parametrize("count", [1, 2, RING_MEMBERS + 1])
def test_lines_of_too_few_and_of_too_many_are_not_measured(count):
    assert SumPlan().after(members(count), 2**60, 1.0).phase is PlanPhase.COUNT


@pytest.mark.parametrize(
    ("ring_s", "direct_s", "by_ring"),
    [
        ([1.0] * 3, [1.6] * 3, True),
        ([1.0] * 3, [1.4] * 3, False),
        ([1.0, 50.0, 1.0], [1.6] * 3, True),  # one step that something disturbed
        ([2.0] * 3, [1.0] * 3, False),
    ],
)
def test_the_ring_is_kept_if_it_saves_a_third_of_the_time(ring_s, direct_s, by_ring):
    order = members(5)
    plan = tried(order, ring_s, direct_s)
    assert plan.by_ring is by_ring
    assert plan.tour and plan.capacity, "slices follow the lines either way"
    assert plan.after(order, ENOUGH, 1.0).phase is PlanPhase.MEASURE, "lines change: they are measured again"


def test_a_plan_begins_anew_when_a_member_is_lost():
    order = members(5)
    plan = tried(order, [1.0] * TRIED, [1.0 / GAIN + 1] * TRIED)
    assert plan.suits(order) and plan.suits(order[::-1]) and not plan.suits(order[1:])
    assert plan.after(order[1:], 8 * MIB, 1.0) == SumPlan()


def test_a_line_that_nobody_knows_leaves_the_way_as_it_is():
    order = members(4)
    links = all_links(order)
    del links[order[0], order[1]]
    due = SumPlan().after(order, ENOUGH, 1.0)
    assert due.measured(order, links) == SumPlan()
    assert tour(order, links) == ()


def test_plans_of_one_way_have_one_mark():
    order = members(4)
    plan = tried(order, [1.0] * TRIED, [9.0] * TRIED)
    marks = {one.mark for one in (SumPlan(), plan, replace(plan, by_ring=False), replace(plan, tour=plan.tour[::-1]))}
    assert len(marks) == 4 and {len(mark) for mark in marks} == {8}
    assert plan.mark == plan.after(order, MIB, 1.0).mark


def test_slices_follow_what_a_member_can_send_and_receive():
    order = members(3)
    links = all_links(order) | {(order[0], order[1]): 1e7, (order[0], order[2]): 1e7}
    assert capacities(order, links) == (2e7, 1.1e8, 1.1e8)


@pytest.mark.parametrize("count", [3, 5, EXACT_MEMBERS, EXACT_MEMBERS + 4])
def test_the_tour_finds_the_one_fast_circle(count):
    order = members(count)
    hidden = [order[0], *reversed(order[1:])]
    fast = set(edges(hidden))
    links = {pair: 1e9 if pair in fast else 1e7 for pair in all_links(order)}
    assert tour(order, links) == tuple(hidden)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 10), data=st.data())
def test_a_tour_has_every_member_once_and_is_the_same_each_time(count, data):
    order = members(count)
    links = {pair: data.draw(st.floats(1e5, 1e10)) for pair in all_links(order)}
    found = tour(order, links)
    assert found == tour(order, dict(reversed(links.items())))
    assert sorted(found) == sorted(order)
    assert found[0] == order[0]
    if 2 < count <= EXACT_MEMBERS:
        assert min(links[edge] for edge in edges(found)) >= min(links[edge] for edge in edges(order))


def test_rows_make_the_links_and_nonsense_is_left_out():
    order = members(3)
    rows = [[0.0, 5.0, float("nan")], [float("inf"), 7.0, -1.0], [2 * FASTEST, 0.5, 3.0]]
    assert links_of(order, rows) == {(order[0], order[1]): 5.0}
