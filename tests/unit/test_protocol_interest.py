"""What a node takes: topics, shards, and a demand."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.config import Instant
from protocol.gossip.subscriptions import (
    ADJUST_S,
    FIRST_S,
    MIN_BURST,
    MIN_SHARD_PEERS,
    RESERVE,
    RESHUFFLE_S,
    Appetite,
    Filter,
    Rate,
    hint,
    same_shard,
    shard,
)
from protocol.identity import id_of_bytes
from protocol.wire.messages import MAX_TOPICS, NO_TOPIC, Interest

UNIX = 1_700_000_000.0
ME, FAR = id_of_bytes(b"m" * 20), id_of_bytes(b"f" * 20)
hints = st.binary(min_size=4, max_size=4)


def at(seconds: float) -> Instant:
    return Instant(seconds, UNIX + seconds)


def feed(appetite: Appetite, rate: float, start: float, seconds: float, peers: int = 12) -> list[float]:
    """Offer `rate` items a second; return when the interest changed."""
    changes = []
    for second in range(int(start), int(start + seconds)):
        for _ in range(int(rate)):
            appetite.offered(at(second))
        if appetite.adjust(peers, at(second)):
            changes.append(float(second))
    return changes


@given(hints, hints, st.integers(0, 15), st.floats(0, 2e9))
def test_shards_nest(one, other, bits, unix) -> None:
    if same_shard(one, other, bits + 1, unix):
        assert same_shard(one, other, bits, unix)
    assert same_shard(one, one, 16, unix)
    assert same_shard(one, other, bits, unix) == same_shard(other, one, bits, unix)


def test_two_bits_keep_a_quarter_of_the_signers_and_another_quarter_in_the_next_hour() -> None:
    own = hint(ME)
    signers = [n.to_bytes(4, "big") for n in range(4000)]
    now = [s for s in signers if same_shard(s, own, 2, UNIX)]
    later = [s for s in signers if same_shard(s, own, 2, UNIX + RESHUFFLE_S)]
    assert 0.2 < len(now) / len(signers) < 0.3
    assert 0.2 < len(set(now) & set(later)) / len(now) < 0.3
    assert len({shard(s, UNIX) for s in signers}) > 3000


def test_a_filter_covers_its_topics_and_what_the_holder_signed_itself() -> None:
    own, near, far = hint(ME), b"near", b"far!"
    near = next(n for n in (i.to_bytes(4, "big") for i in range(99)) if same_shard(n, own, 1, UNIX))
    far = next(n for n in (i.to_bytes(4, "big") for i in range(99)) if not same_shard(n, own, 1, UNIX))
    wants = Filter.of(ME, Interest((b"t" * 8,), bits=1))
    assert wants.covers(b"t" * 8, near, b"hold", UNIX)
    assert not wants.covers(b"u" * 8, near, b"hold", UNIX)
    assert wants.covers(NO_TOPIC, near, b"hold", UNIX)
    assert not wants.covers(b"t" * 8, far, b"hold", UNIX)
    assert wants.covers(b"t" * 8, far, far, UNIX)
    assert Filter(own).covers(b"u" * 8, far, b"hold", UNIX)
    assert wants.interest([FAR, ME]) == Interest((b"t" * 8,), bits=1, direct=(FAR, ME))


def test_a_rate_settles_at_what_it_is_fed_and_falls_when_that_ends() -> None:
    rate = Rate(0.0)
    for tenth in range(6000):
        rate.add(tenth / 10)
    assert rate.value(600) == pytest.approx(10, rel=0.02)
    assert rate.value(660) == pytest.approx(10 / math.e, rel=0.02)


def test_a_rate_is_known_within_seconds_and_a_burst_at_the_start_is_none() -> None:
    rate = Rate(0.0)
    for _ in range(10):
        rate.add(0.0)
    assert rate.value(0.0) <= 10 / FIRST_S * 1.05
    for tenth in range(1, 101):
        rate.add(tenth / 10)
    assert rate.value(10) == pytest.approx(11, rel=0.05)


def test_demand_is_kept_on_average_with_a_burst() -> None:
    appetite = Appetite(ME, at(0))
    assert appetite.level(at(0)) == math.inf
    appetite.subscribe(None, 10.0, at(0))
    taken = 0
    for second in range(100):
        level = int(appetite.level(at(second)))
        appetite.spend(level)
        taken += level
    assert taken == MIN_BURST + 99 * 10
    appetite.refund(7)
    assert int(appetite.level(at(99))) == 7
    appetite.subscribe(None, 5.0, at(99))  # saying it again fills nothing up
    assert int(appetite.level(at(99))) == 7 and int(appetite.level(at(100))) == 12
    appetite.subscribe(None, math.inf, at(100))
    assert appetite.level(at(100)) == math.inf


def test_what_comes_unasked_takes_what_pulls_leave_over() -> None:
    appetite = Appetite(ME, at(0))
    assert all(appetite.take_push(at(0)) for _ in range(1000))
    appetite.subscribe(None, 10.0, at(0))
    burst = MIN_BURST
    assert sum(appetite.take_push(at(0)) for _ in range(1000)) == math.floor(burst * (1 - RESERVE))
    assert appetite.level(at(0)) >= RESERVE * burst
    appetite.spend(int(appetite.level(at(0))))
    assert not appetite.take_push(at(0.8)) and appetite.take_push(at(1))
    appetite.subscribe(None, 0.0, at(60))
    assert appetite.level(at(1000)) == 0 and not appetite.take_push(at(1000))


def test_pushes_are_declined_above_the_demand_and_welcome_again_below_half_of_it() -> None:
    appetite = Appetite(ME, at(0))
    assert appetite.subscribe(None, 10.0, at(0)) is True
    assert appetite.filter.announce_only is False
    assert len(feed(appetite, 15, 0, 240)) == 1
    assert appetite.filter.announce_only is True
    assert feed(appetite, 7, 240, 300) == []
    assert len(feed(appetite, 3, 540, 300)) == 1
    assert appetite.filter.announce_only is False


def test_shards_follow_the_supply_slowly_and_no_further_than_the_links_allow() -> None:
    appetite = Appetite(ME, at(0))
    appetite.subscribe(None, 10.0, at(0))
    changes = feed(appetite, 100, 0, 600)
    assert appetite.filter.bits == 2  # 12 peers: a third bit would leave one and a half
    assert 12 >> 2 >= MIN_SHARD_PEERS > 12 >> 3
    bit_changes = changes[1:]  # the first declined pushes
    assert all(later - one >= ADJUST_S for one, later in pairwise(bit_changes))
    feed(appetite, 40, 600, 600)
    assert appetite.filter.bits == 2  # between `LITTLE` and `MUCH` of the demand nothing changes
    feed(appetite, 2, 1200, 600)
    assert appetite.filter.bits == 0


def test_bits_are_given_up_when_the_links_are() -> None:
    appetite = Appetite(ME, at(0))
    appetite.subscribe(None, 10.0, at(0))
    feed(appetite, 100, 0, 600)
    feed(appetite, 100, 600, 600, peers=3)
    assert appetite.filter.bits == 0


def test_peers_are_told_of_news_only() -> None:
    appetite = Appetite(ME, at(0))
    assert appetite.subscribe(None, 10.0, at(0)) is True
    assert appetite.subscribe(None, 11.0, at(1)) is False
    assert appetite.subscribe(frozenset([b"t" * 8]), 11.0, at(2)) is True
    many = frozenset(bytes([n]) * 8 for n in range(MAX_TOPICS + 1))
    assert appetite.subscribe(many, 11.0, at(3)) is True
    assert appetite.filter.topics is None
