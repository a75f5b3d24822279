"""The address book: what it keeps when it is full, whom it offers for dialling, and what rumours change."""

import random

from hypothesis import given
from hypothesis import strategies as st

from protocol.config import Instant
from protocol.credentials.records import REFUTATION_BITS, Address, Endpoint, PeerRecord, make_record
from protocol.identity import Identity
from protocol.membership.address_book import BUSY_S, Book

SWARM = b"a swarm of tests"
UNIX = 1_700_000_000.0
PEOPLE = [Identity(bytes([n]) * 32) for n in range(24)]


def at(seconds: float) -> Instant:
    return Instant(seconds, UNIX + seconds)


def record(
    number: int, start: int = 1, *, refutations: int = 0, dialable: bool = True, life: float = 3600
) -> PeerRecord:
    endpoints = (Endpoint(f"n{number}", start),) if dialable else ()
    incarnation = (start << REFUTATION_BITS) + refutations
    return make_record(PEOPLE[number], SWARM, endpoints, incarnation, "", int((UNIX + life) * 1000))


def ids(*numbers: int) -> set[str]:
    return {PEOPLE[number].node_id for number in numbers}


def kept(book: Book) -> set[str]:
    return {one.node_id for one in book.records()}


@given(
    st.lists(st.tuples(st.integers(0, 23), st.integers(0, 23), st.integers(1, 3), st.booleans()), max_size=60),
    st.integers(1, 10),
    st.sets(st.integers(0, 23), max_size=5),
)
def test_a_trimmed_book_holds_its_capacity_and_every_live_node(history, capacity: int, live: set[int]) -> None:
    book = Book((), capacity)
    for number, teller, start, dialable in history:
        book.add(record(number, start, dialable=dialable), PEOPLE[teller].node_id)
    before = kept(book)
    book.trim(ids(*live), random.Random(1))
    assert len(book) <= max(capacity, len(before & ids(*live)))
    assert before & ids(*live) <= kept(book)


def test_the_loudest_source_loses_first_and_what_we_met_ourselves_last() -> None:
    book = Book((), 6)
    book.add(record(0))  # met
    for number in (1, 2):
        book.add(record(number), PEOPLE[20].node_id)
    for number in range(3, 20):
        book.add(record(number), PEOPLE[21].node_id)
    book.trim((), random.Random(1))
    assert ids(0, 1, 2) <= kept(book) and len(book) == 6


def test_the_dead_and_the_unreachable_go_before_the_loud() -> None:
    book = Book((), 3)
    for number in range(3):
        book.add(record(number), PEOPLE[20].node_id)
    book.add(record(3))
    book.add(record(4))
    assert book.bury(PEOPLE[3].node_id, 1 << REFUTATION_BITS)
    contact = book.contact(PEOPLE[4].node_id)
    assert contact is not None
    contact.failed(at(0), random.Random(1))
    book.trim((), random.Random(1))
    assert kept(book) == ids(0, 1, 2)


def test_a_rumour_holds_for_the_incarnation_it_names_and_until_we_meet_the_node() -> None:
    book = Book((), 9)
    node = PEOPLE[0].node_id
    book.add(record(0, refutations=2), PEOPLE[1].node_id)
    assert not book.bury(node, 1 << REFUTATION_BITS)  # it has refuted that one
    assert book.bury(node, (1 << REFUTATION_BITS) + 2) and book.is_dead(node)
    assert not book.bury(node, (1 << REFUTATION_BITS) + 2)  # no news
    book.add(record(0, refutations=2))
    assert not book.is_dead(node)
    book.bury(node, (1 << REFUTATION_BITS) + 2)
    book.add(record(0, refutations=3), PEOPLE[1].node_id)
    assert not book.is_dead(node)


def test_the_dead_are_dialled_last_and_not_spoken_of() -> None:
    book = Book((), 9)
    for number in range(8):
        book.add(record(number), PEOPLE[20].node_id)
    for number in range(4):
        book.bury(PEOPLE[number].node_id, 1 << REFUTATION_BITS)
    keys = [contact.key for contact in book.contacts_due(at(0), random.Random(1))]
    assert set(keys[4:]) == {PEOPLE[number].curve_key for number in range(4)}
    assert {one.node_id for one in book.good_records()} == ids(4, 5, 6, 7)


def test_whom_to_dial_is_drawn_at_random() -> None:
    book = Book((), 20)
    for number in range(16):
        book.add(record(number), PEOPLE[20].node_id)
    firsts = {book.contacts_due(at(0), random.Random(seed))[0].key for seed in range(40)}
    assert len(firsts) > 8


def test_a_busy_contact_rests_without_counting_as_a_failure() -> None:
    book = Book((), 9)
    book.add(record(0))
    contact = book.contact(PEOPLE[0].node_id)
    assert contact is not None
    contact.busy(at(0), random.Random(1))
    assert not book.contacts_due(at(1), random.Random(1)) and book.good_records()
    assert book.contacts_due(at(BUSY_S), random.Random(1)) == [contact]


def test_a_newer_record_at_another_address_is_dialled_there() -> None:
    book = Book((Address(Endpoint("seed", 1), bytes(32)),), 9)
    book.add(record(0))
    old = book.contact(PEOPLE[0].node_id)
    assert old is not None
    old.failed(at(0), random.Random(1))
    assert book.add(record(0, start=2)) and not book.add(record(0, start=1))
    contact = book.contact(PEOPLE[0].node_id)
    assert contact is not None and contact.address.endpoint == Endpoint("n0", 2) and contact.failures == 0
    assert [seed.address.endpoint.host for seed in book.seeds_due(at(0))] == ["seed"]


def test_expired_records_are_forgotten() -> None:
    book = Book((), 9)
    book.add(record(0, life=10))
    book.add(record(1, life=100))
    book.expire(at(50))
    assert kept(book) == ids(1)
