"""Which algorithm, which slices, which tour: pure functions of measured links."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.agreement.messages import MAX_SHARE_BYTES
from collectives.reduce.topology import (
    EXACT_MEMBERS,
    HALF_LIFE_S,
    PROBE_BYTES,
    Estimates,
    LinkSpeed,
    capacities,
    choose,
    edge_seconds,
    goes_inline,
    matrix,
    tour,
)
from tests.collectives_ports import members

MIB = 1 << 20


def all_links(order, bandwidth=1e8, delay=1e-3):
    return {(a, b): LinkSpeed(bandwidth, delay) for a in order for b in order if a != b}


def edges(ring):
    return list(zip(ring, [*ring[1:], ring[0]], strict=True))


def test_small_values_travel_with_the_agreement():
    assert goes_inline(0, 256)
    assert goes_inline(1024, 8)
    assert not goes_inline(MAX_SHARE_BYTES, 2), "a share says more than the values"
    assert not goes_inline(16 << 10, 64), "the coordinator would send too much"


def test_unmeasured_links_are_taken_to_be_fast():
    order = members(4)
    assert choose(members(2), (), 64 * MIB, {}) == "direct"
    assert choose(order, (), 64 * MIB, {}) == "ring"
    assert choose(order, (), 64 * MIB, {}, is_exact=False) == "direct"
    assert choose(order, (), MIB, {}) == "direct"
    partial = all_links(order)
    del partial[order[0], order[1]]
    assert choose(order, (), MIB, partial) == "direct"


def test_a_ring_avoids_the_slow_links_and_direct_the_delays():
    order = members(4)
    fast = set(edges(order))
    links = {pair: LinkSpeed(1e9 if pair in fast else 1e6, 1e-3) for pair in all_links(order)}
    assert choose(order, order, 64 * MIB, links) == "ring"
    assert choose(order, order, 64 * MIB, links, is_exact=False) == "ring"
    far = all_links(order, bandwidth=1e9, delay=0.2)
    assert choose(order, order, 8 * MIB, far) == "direct"


def test_slices_follow_what_a_member_can_send_and_receive():
    order = members(3)
    links = all_links(order) | {(order[0], order[1]): LinkSpeed(1e7, 0.0), (order[0], order[2]): LinkSpeed(1e7, 0.0)}
    assert capacities(order, links) == [2e7, 1.1e8, 1.1e8]
    assert capacities(order, {}) == []


@pytest.mark.parametrize("count", [3, 5, EXACT_MEMBERS, EXACT_MEMBERS + 4])
def test_the_tour_finds_the_one_fast_circle(count):
    order = members(count)
    hidden = [order[0], *reversed(order[1:])]
    fast = set(edges(hidden))
    links = {pair: LinkSpeed(1e9 if pair in fast else 1e7, 1e-3) for pair in all_links(order)}
    assert tour(order, links) == tuple(hidden)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 10), data=st.data())
def test_a_tour_has_every_member_once_and_is_the_same_each_time(count, data):
    order = members(count)
    speeds = st.floats(1e5, 1e10)
    links = {pair: LinkSpeed(data.draw(speeds), 1e-3) for pair in all_links(order)}
    found = tour(order, links)
    assert found == tour(order, dict(reversed(links.items())))
    assert sorted(found) == sorted(order)
    assert found[0] == order[0]
    if count > 2:
        slowest = max(edge_seconds(links, a, b) for a, b in edges(found))
        given_order = max(edge_seconds(links, a, b) for a, b in edges(order))
        assert count > EXACT_MEMBERS or slowest <= given_order


def test_estimates_follow_traffic_by_size_and_age():
    estimates = Estimates()
    (peer,) = members(1)
    assert estimates.link(peer) is None
    estimates.carried(peer, 1000, 1.0, now=0.0)
    assert estimates.link(peer) is None, "a small payload measures wake-ups"
    estimates.carried(peer, PROBE_BYTES, 1.0, now=0.0)
    estimates.answered(peer, 0.1, now=0.0)
    assert estimates.link(peer) == LinkSpeed(PROBE_BYTES, 0.05)
    estimates.carried(peer, PROBE_BYTES, 0.5, now=0.0)
    assert estimates.link(peer).bandwidth == pytest.approx(1.5 * PROBE_BYTES)
    estimates.carried(peer, PROBE_BYTES, 0.1, now=20 * HALF_LIFE_S)
    assert estimates.link(peer).bandwidth == pytest.approx(10 * PROBE_BYTES, rel=1e-3)


def test_rows_make_the_matrix_and_nonsense_is_left_out():
    order = members(3)
    estimates = Estimates()
    estimates.carried(order[1], PROBE_BYTES, 0.5, now=0.0)
    rows = {order[0]: estimates.row(order), order[1]: b"\xff" * 48, order[2]: b"short", "stranger": bytes(48)}
    assert matrix(order, rows) == {(order[0], order[1]): LinkSpeed(2.0 * PROBE_BYTES, 0.0)}
