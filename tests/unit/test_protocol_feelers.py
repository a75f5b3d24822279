"""Whom a node looks for that it has lost sight of, and how it notices another process with its own key."""

import random
from itertools import pairwise

import pytest

from protocol.config import Instant, Limits, Setup
from protocol.credentials.records import (
    RECORD_LIFE_S,
    Address,
    Endpoint,
    PeerRecord,
    expired_records,
    make_record,
    usable_records,
)
from protocol.identity import Identity
from protocol.limits.networks import Scope
from protocol.membership.address_book import Acquaintance, Book
from protocol.membership.dialing import FEELER_INTERVAL_S, LAST_S, Feelers
from protocol.membership.directory import RecordDirectory
from protocol.membership.links import Links
from protocol.simulator import SimulatedIdentity

LIMITS = Limits()

SWARM = b"a swarm of tests"
START = Instant(0.0, 1_700_000_000.0)


def record(number: int, *, dialable: bool = True) -> PeerRecord:
    endpoints = (Endpoint(f"n{number}.invalid", 1),) if dialable else ()
    return make_record(SimulatedIdentity(b"%32d" % number), SWARM, endpoints, 1, "", 1)


def met(number: int, *, dialable: bool = True) -> Acquaintance:
    return Acquaintance(record(number, dialable=dialable), Scope.PUBLIC)


def feel(feelers: Feelers, seconds: float, known: frozenset[bytes] = frozenset()) -> list[tuple[float, Address]]:
    """Return whom it calls and when, asked twice a second as a node's tick does."""
    found = []
    for half_seconds in range(int(2 * seconds)):
        now = Instant(half_seconds / 2, START.unix)
        contact = feelers.next(lambda: set(known), now)
        if contact is not None:
            found.append((now.steady, contact.address))
    return found


def test_a_seed_is_tried_for_good_at_an_interval_that_grows_to_an_hour() -> None:
    seed = Address(Endpoint("seed.invalid", 1), bytes(32))
    calls = feel(Feelers((seed,), LIMITS, random.Random(1)), 8 * LAST_S)
    gaps = [after - before for (before, _), (after, _) in pairwise(calls)]
    assert {address for _, address in calls} == {seed}
    assert gaps[0] <= 2.5 * FEELER_INTERVAL_S and LAST_S / 2 <= gaps[-1] <= LAST_S + 1.5 * FEELER_INTERVAL_S


def test_nobody_whom_the_node_sees_is_called_and_nobody_who_cannot_be() -> None:
    feelers = Feelers((), LIMITS, random.Random(1))
    feelers.lapse([met(1), met(2), met(3, dialable=False)])
    calls = feel(feelers, 2 * LAST_S, frozenset({record(1).curve_key}))
    assert {address.key for _, address in calls} == {record(2).curve_key}
    feelers.met(record(2).node_id)
    assert feelers.records == [record(1)]


def test_those_who_lapsed_are_a_fair_sample_of_bounded_size_called_at_most_once_a_minute() -> None:
    feelers = Feelers((), LIMITS, random.Random(1))
    feelers.lapse(met(number) for number in range(100))
    feelers.lapse(met(number) for number in range(100, 1000))
    early = sum(int(lapsed.endpoints[0].host[1:].partition(".")[0]) < 100 for lapsed in feelers.records)
    assert len(feelers.records) == LIMITS.max_lapsed and 1 <= early <= 20
    assert len(feel(feelers, LAST_S)) <= 1.3 * LAST_S / FEELER_INTERVAL_S


def test_a_peers_file_tells_records_that_hold_from_those_that_held_once() -> None:
    identity, now = Identity(bytes(32)), START.unix
    good, old = (
        make_record(identity, SWARM, (), 1, "", int((now + life) * 1000)).encoded for life in (RECORD_LIFE_S, -1.0)
    )
    forged = old[:40] + bytes([old[40] ^ 1]) + old[41:]
    other = make_record(identity, b"another swarm id", (), 1, "", 1).encoded
    saved = [good, old, forged, other, b"", old[:-1]]
    assert [each.encoded for each in usable_records(saved, SWARM, now)] == [good]
    assert [each.encoded for each in expired_records(saved, SWARM, now)] == [old]


@pytest.mark.parametrize("gap", [2, 10_000])
def test_only_an_answer_to_our_own_new_start_is_taken_for_a_twin(gap: int) -> None:
    """Whatever old records of ourselves come back, in whatever order, none of them answers what we said since."""
    identity = SimulatedIdentity(b"%32d" % 1)
    directory = RecordDirectory(
        setup := Setup(identity, SWARM),
        Book((), Limits(max_known_peers=8)),
        Links(identity.node_id, setup.limits, 1.0, START.steady),
        random.Random(1),
        START,
    )
    start = directory.record.started
    expiry = int((START.unix + RECORD_LIFE_S) * 1000)
    for number in range(1, 4):
        old = make_record(identity, SWARM, (), (start + number * (gap + 1)) << 16 | 3, "", expiry)
        directory.outbid(old, START)
        assert directory.record.replaces(old) and directory.twin is None
        directory.outbid(old, START)  # told again
        assert directory.twin is None
    answer = make_record(identity, SWARM, (), (directory.record.started + 1) << 16, "", expiry)
    directory.outbid(answer, START)
    assert directory.twin == answer and directory.record.replaces(answer)
