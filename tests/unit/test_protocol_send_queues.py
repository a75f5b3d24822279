"""Send queues: their bounds in bytes, who goes first, fair shares in virtual time, and the upload limit."""

import math
import random
import tracemalloc
from collections import defaultdict, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.events import Link
from protocol.limits.limits import Limits
from protocol.limits.send_queues import FRAME_COST, MAX_RETRY_S, RETRY_S, SendQueues
from tests.steps import steps

LIMITS = Limits()

LINKS = [Link(bytes([number]) * 32, dialled=number % 2 == 0) for number in range(4)]
A, B, C, D = LINKS


class Lines(SendQueues):
    """Send queues, and the items that wait for each link."""

    def __init__(self, limits: Limits, now: float) -> None:
        super().__init__(limits, now)
        self.items: defaultdict[Link, deque[bytes]] = defaultdict(deque)
        self.make = lambda link: self.items[link].popleft() if self.items[link] else b""

    def offer(self, link: Link, frame: bytes) -> None:
        self.items[link].append(frame)
        self.fill(link)


def drain(queues: SendQueues, now: float, *blocked: Link) -> list[tuple[Link, bytes]]:
    """Let every socket take what it is given, but those of `blocked`."""
    sent = []
    while (turn := queues.next(now)) is not None:
        if turn[0] in blocked:
            queues.full(turn[0], now)
        else:
            queues.sent(turn[0], now)
            sent.append(turn)
    return sent


def test_an_item_becomes_a_frame_when_its_link_has_its_turn_and_stays_one_until_the_socket_takes_it() -> None:
    queues = Lines(Limits(), 0.0)
    for frame in (b"one", b"gone", b"two"):
        queues.offer(A, frame)
    assert queues.next(0.0) == (A, b"one")
    queues.full(A, 0.0)
    assert queues.next(0.0) is None and list(queues.items[A]) == [b"gone", b"two"]
    queues.items[A].remove(b"gone")
    assert drain(queues, 1.0) == [(A, b"one"), (A, b"two")]
    assert queues.is_open and queues.wait(1.0) == math.inf


def test_what_we_say_ourselves_has_a_bounded_room() -> None:
    queues = SendQueues(Limits(), 0.0)
    assert [queues.put(A, bytes(LIMITS.control_bytes // 4 - FRAME_COST)) for _ in range(5)] == [True] * 4 + [False]


def test_small_frames_take_no_more_memory_than_large_ones() -> None:
    queues, count = SendQueues(Limits(), 0.0), 0
    tracemalloc.start()
    try:
        while queues.put(A, count.to_bytes(20)):
            count += 1
        assert tracemalloc.get_traced_memory()[0] < LIMITS.control_bytes
        assert count > 1000
    finally:
        tracemalloc.stop()


def test_links_that_read_nothing_however_many_silence_no_other() -> None:
    queues = SendQueues(Limits(), 0.0)
    silent = [Link(number.to_bytes(32, "big"), dialled=False) for number in range(1, 513)]
    for link in silent:
        kept = [queues.put(link, bytes(LIMITS.control_bytes // 4 - FRAME_COST)) for _ in range(5)]
        assert kept == [True] * 4 + [False]
    said = [b"hello" * 1000, *(b"heartbeat %d" % number for number in range(100))]
    assert all(queues.put(A, frame) for frame in said)
    assert drain(queues, 0.0, *silent) == [(A, frame) for frame in said]
    assert len(drain(queues, 1.0)) == 4 * len(silent) and queues.wait(1.0) == math.inf


def test_what_a_link_that_is_gone_was_to_be_told_takes_no_room() -> None:
    queues = SendQueues(Limits(), 0.0)
    assert queues.put(A, bytes(LIMITS.control_bytes - FRAME_COST))
    queues.drop(A)
    assert queues.put(A, bytes(LIMITS.control_bytes - FRAME_COST))


def test_no_item_holds_up_what_we_say_which_keeps_its_order() -> None:
    queues = Lines(Limits(), 0.0)
    queues.offer(A, b"item")
    assert queues.put(A, b"one") and queues.put(A, b"two")
    assert [frame for _, frame in drain(queues, 0.0)] == [b"one", b"two", b"item"]


def test_a_peer_that_does_not_read_holds_up_no_other_and_is_tried_less_and_less_often() -> None:
    queues = Lines(Limits(), 0.0)
    queues.put(A, b"for a")
    queues.offer(B, b"for b")
    assert drain(queues, 0.0, A) == [(B, b"for b")]
    now, tries = 0.0, 0
    while now < 10.0:
        wait = queues.wait(now)
        assert RETRY_S <= wait <= MAX_RETRY_S + 1e-9
        now += wait + 1e-9
        tries += 1
        assert drain(queues, now, A) == []
    assert tries < 2 * 10.0 / MAX_RETRY_S
    now += MAX_RETRY_S
    assert drain(queues, now) == [(A, b"for a")] and queues.wait(now) == math.inf


def test_a_frame_costs_much_the_same_however_many_links_wait() -> None:
    def cost(waiting: int) -> int:
        queues = Lines(Limits(), 0.0)
        for number in range(waiting):
            queues.offer(Link((1000 + number).to_bytes(32, "big"), dialled=True), b"item")
        assert drain(queues, 0.0, *queues._busy) == []

        def send() -> None:
            for _ in range(100):
                queues.put(A, b"ping")
                assert len(drain(queues, 0.0)) == 1
                queues.wait(0.0)

        return steps(send)

    assert cost(2048) < 1.2 * cost(16)


def upload(rate: float, seconds: float, sizes: dict[Link, int], demand: dict[Link, float]) -> dict[Link, int]:
    """Offer each link frames of one size, as many bytes a second as it demands; return the bytes that each got."""
    queues = Lines(Limits(upload_bytes_per_second=rate), 0.0)
    offered, got = dict.fromkeys(sizes, 0.0), dict.fromkeys(sizes, 0)
    now = 0.0
    while now < seconds:
        for link, size in sizes.items():
            while offered[link] + size <= demand[link] * now:
                offered[link] += size
                queues.offer(link, bytes(size))
        for link, frame in drain(queues, now):
            got[link] += len(frame)
        now += 0.01
    return got


def test_under_a_limit_the_greedy_share_alike_whatever_they_ask_for_and_the_modest_get_all_they_ask() -> None:
    rate, seconds = 1e6, 60.0
    sizes = {A: 200_000, B: 10_000, C: 100_000, D: 10_000}
    got = upload(rate, seconds, sizes, {A: 1e7, B: 1e7, C: 1e7, D: 5e4})
    assert got[D] >= 0.95 * 5e4 * seconds
    share = (rate - 5e4) / 3 * seconds
    assert all(abs(got[link] - share) < 0.03 * share for link in (A, B, C))
    assert sum(got.values()) <= rate * (seconds + LIMITS.upload_burst_s) + 200_000


def test_a_lone_peer_gets_the_whole_limit() -> None:
    got = upload(1e6, 30.0, {A: 100_000}, {A: 1e7})
    assert got[A] >= 0.98 * 30e6


def test_a_peer_that_was_silent_is_owed_nothing_for_it() -> None:
    rate = 1e6
    queues = Lines(Limits(upload_bytes_per_second=rate), 0.0)
    now = 0.0
    while now < 20.0:  # B alone
        queues.offer(B, bytes(10_000))
        drain(queues, now)
        now += 0.01
    got = {A: 0, B: 0}
    while now < 22.0:
        for link in got:
            queues.offer(link, bytes(10_000))
        for link, frame in drain(queues, now):
            got[link] += len(frame)
        now += 0.01
    assert abs(got[A] - got[B]) < 0.1 * rate


def test_a_limit_holds_back_items_and_not_what_we_say_but_counts_both() -> None:
    queues = Lines(Limits(upload_bytes_per_second=1000.0), 0.0)
    queues.offer(A, bytes(5000))
    assert len(drain(queues, 0.0)) == 1  # into debt
    queues.offer(A, b"item")
    queues.put(A, b"ping")
    assert [frame for _, frame in drain(queues, 0.1)] == [b"ping"]
    wait = queues.wait(0.1)
    assert 4.5 < wait < 5.0
    assert [frame for _, frame in drain(queues, 0.1 + wait + 0.001)] == [b"item"]


@given(st.integers(0, 2**32), st.sampled_from([0.0, 3000.0]))
def test_no_history_loses_a_frame_or_swaps_two(seed: int, rate: float) -> None:
    rng = random.Random(seed)
    queues = Lines(Limits(upload_bytes_per_second=rate), 0.0)
    said: dict[Link, list[bytes]] = {link: [] for link in LINKS}
    items: dict[Link, list[bytes]] = {link: [] for link in LINKS}
    now = 0.0
    for number in range(200):
        now += rng.choice([0.0, 0.001, 0.2])
        link = rng.choice(LINKS)
        action = rng.randrange(10)
        if action < 6:
            frame = b"%06d" % number * rng.randrange(1, 100)
            if rng.random() < 0.5:
                queues.offer(link, frame)
                items[link].append(frame)
            elif queues.put(link, frame):
                said[link].append(frame)
        elif action < 9:
            turn = queues.next(now)
            if turn is not None and rng.random() < 0.2:
                queues.full(turn[0], now)
            elif turn is not None:
                assert (said[turn[0]] or items[turn[0]]).pop(0) == turn[1]
                queues.sent(turn[0], now)
        else:
            queues.drop(link)
            queues.items[link].clear()
            said[link], items[link] = [], []
        assert queues.wait(now) < math.inf or not any((*said.values(), *items.values()))
    while (turn := queues.next(now := now + 1e4)) is not None:
        assert (said[turn[0]] or items[turn[0]]).pop(0) == turn[1]
        queues.sent(turn[0], now)
    assert not any((*said.values(), *items.values())) and queues.wait(now) == math.inf


def test_whoever_makes_us_talk_beyond_the_limit_does_not_hold_back_items_once_that_ends() -> None:
    queues = Lines(Limits(upload_bytes_per_second=1000.0), 0.0)
    for second in range(600):
        queues.put(A, bytes(1500))
        assert len(drain(queues, float(second))) == 1
    queues.offer(B, bytes(100))
    assert drain(queues, 599.0) == [] and queues.wait(599.0) < 2.0
    assert len(drain(queues, 601.0)) == 1


@pytest.mark.parametrize("rate", [0.0, 1e6])
def test_a_link_that_comes_and_goes_leaves_nothing_behind(rate: float) -> None:
    queues = SendQueues(Limits(upload_bytes_per_second=rate), 0.0)
    for number in range(5000):
        link = Link(number.to_bytes(32, "big"), dialled=False)
        queues.put(link, b"goodbye")
        drain(queues, 0.0)
    assert not queues._queues
