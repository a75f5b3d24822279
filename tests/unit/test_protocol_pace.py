"""The window of a line: what is answered quickly widens it, what is answered late halves it, and it has bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.gossip.pace import (
    DOWNLINK_QUICK_S,
    LATE_S,
    LEAST_BYTES,
    MOST_BYTES,
    UPLINK_QUICK_S,
    Lines,
    LineWindow,
)
from protocol.wire.envelope import CHUNK_BYTES


def answer(pace: LineWindow, took: float, now: float) -> None:
    pace.answered(CHUNK_BYTES, took, now)
    pace.under_way -= CHUNK_BYTES


@pytest.mark.parametrize(
    ("quick_s", "bounds"),
    [
        (DOWNLINK_QUICK_S, ((8.0, 2, 2), (1.0, 2, 6), (0.1, 15, 42), (0.01, 150, 402))),
        (UPLINK_QUICK_S, ((8.0, 2, 2), (1.0, 3, 8), (0.1, 35, 80), (0.01, 350, 520))),
    ],
)
def test_a_line_that_carries_a_chunk_a_second_has_a_few_under_way_and_a_fast_one_as_many_as_it_carries(
    quick_s: float, bounds: tuple[tuple[float, int, int], ...]
) -> None:
    for chunk_s, least, most in bounds:
        pace, waiting, now = LineWindow(LEAST_BYTES, quick_s), [], 0.0
        while now < 120.0:
            while not pace.is_full:
                waiting.append(now)
                pace.under_way += CHUNK_BYTES
            now += chunk_s  # the line is busy all the time
            answer(pace, now - waiting.pop(0), now)
        assert least <= pace.window / CHUNK_BYTES <= most, chunk_s


def test_a_line_that_turned_slow_has_half_as_much_under_way_once_in_a_while() -> None:
    pace = LineWindow(16 * CHUNK_BYTES, UPLINK_QUICK_S)
    pace.under_way = 16 * CHUNK_BYTES
    for second in (20.0, 21.0, 22.0):
        answer(pace, LATE_S + 1, second)
    assert pace.window == 8 * CHUNK_BYTES
    for second in (40.0, 60.0, 80.0, 100.0):
        answer(pace, LATE_S + 1, second)
    assert pace.window == LEAST_BYTES


def test_a_window_that_is_not_used_does_not_grow() -> None:
    pace = LineWindow(LEAST_BYTES, UPLINK_QUICK_S)
    for second in range(100):
        pace.under_way += 1000
        pace.answered(1000, UPLINK_QUICK_S, second)
        pace.under_way -= 1000
    assert pace.window == LEAST_BYTES


@given(st.lists(st.tuples(st.integers(0, MOST_BYTES), st.floats(0, 100), st.floats(0, 1e6)), max_size=50))
def test_no_answers_take_the_window_beyond_its_bounds(answers: list[tuple[int, float, float]]) -> None:
    pace = LineWindow(LEAST_BYTES, UPLINK_QUICK_S)
    for size, took, now in answers:
        pace.under_way = pace.window
        pace.answered(size, took, now)
        assert LEAST_BYTES <= pace.window <= MOST_BYTES


def test_peers_in_our_own_network_have_a_line_of_their_own() -> None:
    lines = Lines(LEAST_BYTES, UPLINK_QUICK_S)
    assert lines.to("192.168.0.7") is lines.to("10.0.0.1") is not lines.to("198.41.0.0/24")
