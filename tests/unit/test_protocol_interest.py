"""What a node takes: topics, and a demand."""

import math

from protocol.config import Instant
from protocol.gossip.subscriptions import MIN_BURST, NO_BOUND, Appetite
from protocol.wire.messages import MAX_TOPICS, NO_TOPIC, Interest

UNIX = 1_700_000_000.0


def at(seconds: float) -> Instant:
    return Instant(seconds, UNIX + seconds)


def feed(appetite: Appetite, rate: float, start: float, seconds: float) -> list[float]:
    """Let `rate` items a second come, as far as there is room for them; return when the interest changed."""
    changes = []
    for second in range(int(start), int(start + seconds)):
        for _ in range(min(int(rate), int(appetite.level(at(second))))):
            appetite.took(at(second))
        if appetite.adjust(at(second)):
            changes.append(float(second))
    return changes


def test_an_interest_covers_its_topics_and_what_has_none() -> None:
    wants = Interest(frozenset([b"t" * 8]), is_sated=True)
    assert wants.covers(b"t" * 8) and wants.covers(NO_TOPIC) and not wants.covers(b"u" * 8)
    assert Interest(None).covers(b"u" * 8)


def test_demand_is_kept_on_average_with_a_burst() -> None:
    appetite = Appetite(at(0))
    assert appetite.level(at(0)) == NO_BOUND
    appetite.subscribe(None, 10.0, at(0))
    taken = 0
    for second in range(100):
        level = int(appetite.level(at(second)))
        taken += level
        for _ in range(level):
            appetite.took(at(second))
    assert taken == MIN_BURST + 99 * 10
    assert int(appetite.level(at(99.7))) == 7
    appetite.subscribe(None, 5.0, at(99.7))  # saying it again fills nothing up
    assert int(appetite.level(at(99.7))) == 7 and int(appetite.level(at(100.7))) == 12
    appetite.subscribe(None, math.inf, at(101))
    assert appetite.level(at(101)) == NO_BOUND


def test_a_node_that_wants_nothing_is_sated_for_good() -> None:
    appetite = Appetite(at(0))
    assert not appetite.interest.is_sated
    appetite.subscribe(None, 0.0, at(60))
    assert appetite.level(at(1000)) == 0 and not appetite.adjust(at(1000)) and appetite.interest.is_sated


def test_a_node_is_sated_while_more_comes_than_its_demand() -> None:
    appetite = Appetite(at(0))
    appetite.subscribe(None, 10.0, at(0))
    assert appetite.interest.is_sated is False
    assert len(feed(appetite, 15, 0, 240)) == 1
    assert appetite.interest.is_sated is True
    assert feed(appetite, 10, 240, 300) == []
    assert len(feed(appetite, 7, 540, 300)) == 1
    assert appetite.interest.is_sated is False


def test_peers_are_told_of_news_only() -> None:
    appetite = Appetite(at(0))
    assert appetite.subscribe(None, 10.0, at(0)) is False
    assert appetite.subscribe(None, 11.0, at(1)) is False
    assert appetite.subscribe(frozenset([b"t" * 8]), 11.0, at(2)) is True
    many = frozenset(bytes([n]) * 8 for n in range(MAX_TOPICS + 1))
    assert appetite.subscribe(many, 11.0, at(3)) is True
    assert appetite.interest.topics is None
