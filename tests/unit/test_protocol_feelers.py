"""Whom a node looks for that it has lost sight of, and how it notices another process with its own key."""

import random
from itertools import pairwise

import pytest

from protocol.config import Instant, Setup
from protocol.credentials.records import (
    RECORD_LIFE_S,
    Address,
    Endpoint,
    PeerRecord,
    make_record,
    saved_records,
)
from protocol.events import Link
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.membership.address_book import Book
from protocol.membership.dialing import FEELER_S, LAST_FEELER_S, Dialing
from protocol.membership.directory import RecordDirectory
from protocol.membership.links import Links
from protocol.simulator import SimulatedIdentity

LIMITS = Limits()

SWARM = b"a swarm of tests"
START = Instant(0.0, 1_700_000_000.0)


def record(number: int, *, dialable: bool = True) -> PeerRecord:
    endpoints = (Endpoint(f"n{number}.invalid", 1),) if dialable else ()
    return make_record(SimulatedIdentity(b"%32d" % number), SWARM, endpoints, 1, "", 1)


class Caller:
    """A node that has all the links that it wants, and calls whom it has lost sight of."""

    def __init__(self, *seeds: Address) -> None:
        identity = SimulatedIdentity(b"%32d" % 0)
        setup = Setup(identity, SWARM)
        self.rng = random.Random(1)
        self.book = Book(seeds, LIMITS)
        links = Links(identity.node_id, LIMITS)
        directory = RecordDirectory(setup, self.book, links, self.rng, START)
        self.links = links
        self.dialing = Dialing(setup, self.book, directory, links, lambda node, now: False, self.rng, START)

    def feel(self, seconds: float) -> list[tuple[float, Address]]:
        """Return whom it calls and when, asked twice a second as a node's tick does."""
        found = []
        for half_seconds in range(int(2 * seconds)):
            now = Instant(half_seconds / 2, START.unix)
            for dial in self.dialing.feel(now):
                found.append((now.steady, dial.address))
                self.links.closed(Link(dial.address.key, dialled=True))  # nobody there
        return found


def test_a_seed_is_tried_for_good_at_an_interval_that_grows_to_an_hour() -> None:
    seed = Address(Endpoint("seed.invalid", 1), bytes(32))
    calls = Caller(seed).feel(16 * LAST_FEELER_S)
    gaps = [after - before for (before, _), (after, _) in pairwise(calls)]
    assert {address for _, address in calls} == {seed}
    assert gaps[0] <= 3 * FEELER_S and all(LAST_FEELER_S / 2 <= gap <= 1.5 * LAST_FEELER_S for gap in gaps[-4:])


def test_nobody_whom_the_node_sees_is_called_and_nobody_who_cannot_be() -> None:
    caller = Caller()
    caller.book.load([record(1), record(2), record(3, dialable=False)], START, caller.rng)
    caller.book.add(record(1))
    assert {address.key for _, address in caller.feel(2 * LAST_FEELER_S)} == {record(2).curve_key}
    caller.book.add(record(2))
    assert caller.book.lapsed_records() == [] and caller.feel(4 * LAST_FEELER_S) == []


def test_those_who_lapsed_are_a_fair_sample_of_bounded_size_called_at_most_once_a_minute() -> None:
    caller = Caller()
    caller.book.load(map(record, range(1, 1001)), START, caller.rng)
    sample = caller.book.lapsed_records()
    early = sum(int(lapsed.endpoints[0].host[1:].partition(".")[0]) <= 100 for lapsed in sample)
    assert len(sample) == LIMITS.max_lapsed and 1 <= early <= 20
    assert 0.7 <= len(caller.feel(LAST_FEELER_S)) * FEELER_S / LAST_FEELER_S <= 1.3


def test_who_was_met_and_expires_is_remembered_and_who_was_only_told_of_is_not() -> None:
    book = Book((), LIMITS)
    book.add(record(1))
    for teller in ("a", "b"):
        book.hear(record(2), teller)
    book.expire(START, random.Random(1))
    assert len(book) == 0 and book.lapsed_records() == [record(1)]


def test_of_a_peers_file_the_swarms_records_count_those_that_expired_too() -> None:
    identity, now = Identity(bytes(32)), START.unix
    good, old = (
        make_record(identity, SWARM, (), 1, "", int((now + life) * 1000)).encoded for life in (RECORD_LIFE_S, -1.0)
    )
    forged = old[:40] + bytes([old[40] ^ 1]) + old[41:]
    other = make_record(identity, b"another swarm id", (), 1, "", 1).encoded
    saved = [good, old, forged, other, b"", old[:-1]]
    assert [each.encoded for each in saved_records(saved, SWARM)] == [good, old]


@pytest.mark.parametrize("gap", [2, 10_000])
def test_only_an_answer_to_our_own_new_start_is_taken_for_a_twin(gap: int) -> None:
    """Whatever old records of ourselves come back, in whatever order, none of them answers what we said since."""
    identity = SimulatedIdentity(b"%32d" % 1)
    directory = RecordDirectory(
        setup := Setup(identity, SWARM),
        Book((), Limits(max_known_peers=8)),
        Links(identity.node_id, setup.limits),
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
