"""The address book: what it keeps when it is full, and whom it offers for dialling."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.config import Instant
from protocol.credentials.records import RENEWAL_BITS, Address, Endpoint, PeerRecord, Service, make_record
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.limits.networks import Scope
from protocol.membership.address_book import BUSY_S, Book, shuffled

SWARM = b"a swarm of tests"
UNIX = 1_700_000_000.0
PEOPLE = [Identity(bytes([n]) * 32) for n in range(24)]


def at(seconds: float) -> Instant:
    return Instant(seconds, UNIX + seconds)


def record(
    number: int, start: int = 1, *, renewals: int = 0, dialable: bool = True, life: float = 3600, host: str = ""
) -> PeerRecord:
    endpoints = (Endpoint(host or f"n{number}", start),) if dialable else ()
    incarnation = (start << RENEWAL_BITS) + renewals
    return make_record(PEOPLE[number], SWARM, endpoints, incarnation, "", int((UNIX + life) * 1000))


def ids(*numbers: int) -> set[str]:
    return {PEOPLE[number].node_id for number in numbers}


def kept(book: Book) -> set[str]:
    return {record.node_id for record in book.records()}


def dialable(book: Book) -> set[bytes]:
    return {contact.key for contact in book.contacts_due(at(0), random.Random(1))}


def fail(book: Book, number: int) -> None:
    contact = book.contact(PEOPLE[number].node_id)
    assert contact is not None
    contact.failed(at(0), random.Random(1))


def told_by_two(book: Book, *numbers: int, first: str = "a") -> None:
    for number in numbers:
        assert not book.hear(record(number), first)
        assert book.hear(record(number), "another")


@given(
    st.lists(st.tuples(st.integers(0, 23), st.integers(0, 23), st.integers(1, 3), st.booleans()), max_size=60),
    st.integers(1, 10),
    st.sets(st.integers(0, 23), max_size=5),
)
def test_a_trimmed_book_holds_its_capacity_and_every_live_node(history, capacity: int, live: set[int]) -> None:
    book = Book((), Limits(max_known_peers=capacity))
    for number, teller, start, dialable in history:
        if number == teller:
            book.add(record(number, start, dialable=dialable))
        else:
            book.hear(record(number, start, dialable=dialable), PEOPLE[teller].node_id)
    before = kept(book)
    book.trim(ids(*live), random.Random(1))
    assert len(book) <= max(capacity, len(before & ids(*live)))
    assert before & ids(*live) <= kept(book)


def test_those_who_say_where_and_did_not_fail_can_be_dialled() -> None:
    book = Book((), Limits(max_known_peers=20))
    for number in range(4):
        book.add(record(number, dialable=number > 0))
    book.hear(record(5), "a")
    assert book.dialable == 3
    fail(book, 1)
    assert book.dialable == 2


def test_who_was_told_of_once_is_dialled_and_passed_on_to_nobody_until_another_network_tells_of_it() -> None:
    book = Book((), Limits(max_known_peers=20))
    for teller in ("a", "a"):
        assert not book.hear(record(0), teller)
    assert len(book) == 0 and book.good_records() == [] and dialable(book) == {PEOPLE[0].curve_key}
    assert book.candidates("a") == [record(0)] and book.candidates("b") == []
    assert book.hear(record(0), "b")
    assert kept(book) == ids(0) and not book.has_candidates and dialable(book) == {PEOPLE[0].curve_key}


def test_a_candidate_that_we_met_is_in_the_book() -> None:
    book = Book((), Limits(max_known_peers=20))
    book.hear(record(0), "a")
    book.add(record(0))
    assert kept(book) == ids(0) and not book.has_candidates


def test_a_digest_tells_of_the_very_records_that_it_lists() -> None:
    book = Book((), Limits(max_known_peers=20))
    for number in range(3):
        book.hear(record(number), "a")
    listed = dict([record(0).summary, (record(1).summary[0], record(1, start=2).summary[1])])
    assert book.vouch(listed, "a") == []
    assert book.vouch(listed, "b") == [record(0)]
    assert kept(book) == ids(0)


def test_the_loudest_source_loses_first_and_what_we_met_ourselves_last() -> None:
    book = Book((), Limits(max_known_peers=6, max_prefix_records=6))
    book.add(record(0))  # met
    told_by_two(book, 1, 2, first="quiet")
    told_by_two(book, *range(3, 20), first="loud")
    book.trim((), random.Random(1))
    assert ids(0, 1, 2) <= kept(book) and len(book) == 6


def test_one_teller_cannot_push_out_the_candidates_of_another() -> None:
    book = Book((), Limits(max_known_peers=12))
    for number in range(2):
        book.hear(record(number), "quiet")
    for number in range(2, 24):
        book.hear(record(number), "loud")
    book.trim((), random.Random(1))
    assert len(book.candidates("quiet")) == 2 and len(book.candidates("loud")) == 4


def test_candidates_are_thinned_by_an_eighth_when_there_are_too_many_and_not_at_every_message() -> None:
    book = Book((), Limits(max_known_peers=32))
    counts = []
    for number in range(24):
        book.hear(record(number), "a")
        book.trim((), random.Random(number))
        counts.append(len(book.candidates("a")))
    assert counts == [*range(1, 17), 14, 15, 16, 14, 15, 16, 14, 15]


def test_whom_we_failed_to_reach_goes_before_the_loud() -> None:
    book = Book((), Limits(max_known_peers=3))
    told_by_two(book, 0, 1, 2)
    book.add(record(3))
    fail(book, 3)
    book.trim((), random.Random(1))
    assert kept(book) == ids(0, 1, 2)


def test_one_network_has_a_bounded_number_of_places_and_the_living_and_the_others_keep_theirs() -> None:
    book = Book((), Limits(max_known_peers=24, max_prefix_records=4))
    book.add(record(23), host="93.184.216.34")
    for number in range(20):
        book.add(record(number), host=f"93.184.217.{number}")  # whatever they say about where they are
    book.trim(ids(0, 1, 2, 3, 4), random.Random(1))
    assert kept(book) == ids(0, 1, 2, 3, 4, 23)
    book.trim((), random.Random(1))
    assert len(book) == 6  # a crowd is thinned when it grows
    book.add(record(21), host="93.184.217.99")
    book.trim((), random.Random(1))
    assert len(kept(book) - ids(23)) == 4 and ids(23) <= kept(book)


@pytest.mark.parametrize("own", [(), ("93.185.{}.1",), ("10.0.0.1",)])
def test_callers_of_many_networks_fill_no_more_places_with_endpoints_of_one_than_it_has(own: tuple[str, ...]) -> None:
    book = Book((), Limits(max_known_peers=24, max_prefix_records=4))
    for number in range(20):
        hosts = [host.format(number) for host in (*own, "198.41.0.{}")]
        book.add(at_hosts(number, *hosts), f"93.184.{number}.1")
        book.trim((), random.Random(1))
    assert len(book) == 4


@pytest.mark.parametrize("is_met", [True, False])
def test_who_is_seen_elsewhere_takes_no_place_from_who_is_where_it_says(is_met: bool) -> None:
    book = Book((), Limits(max_known_peers=24, max_prefix_records=4))
    for number in range(3):
        if is_met:
            book.add(at_hosts(number, f"198.41.0.{number}"), f"198.41.0.{number}")
        else:
            book.hear(at_hosts(number, f"198.41.0.{number}"), "a")
            book.hear(at_hosts(number, f"198.41.0.{number}"), "b")
    for number in range(3, 23):
        book.add(at_hosts(number, "198.41.0.99"), f"93.184.{number}.1")
        book.trim((), random.Random(number))
    assert ids(0, 1, 2) <= kept(book)


@pytest.mark.parametrize("own", [(), ("93.185.{}.1",), ("10.0.0.1",)])
def test_who_was_only_told_of_has_its_place_where_it_says_that_it_is(own: tuple[str, ...]) -> None:
    book = Book((), Limits(max_known_peers=24, max_prefix_records=3))
    for number in range(10):
        moving = at_hosts(number, *(host.format(number) for host in (*own, "n{}.pool.example")))
        book.hear(moving, "a")
        book.hear(moving, "b")
    book.trim((), random.Random(1))
    assert len(book) == 3
    for number in range(10, 20):
        told_by_two(book, number)
    for number in range(10, 20):
        book.hear(record(number, start=2, host="n.pool.example"), "a")  # they all move there
    book.trim((), random.Random(1))
    assert len(book) == 3


def test_a_laboratory_is_not_bounded_by_its_addresses() -> None:
    book = Book((), Limits(max_known_peers=24, max_prefix_records=1))
    for number, host in enumerate(["127.0.0.1"] * 4 + ["10.0.0.1"] * 4 + ["fd00::1"] * 4):
        book.add(record(number), host=host)
    book.trim((), random.Random(1))
    assert len(book) == 12


def test_whom_we_failed_to_reach_is_dialled_last_and_not_spoken_of_until_it_is_met() -> None:
    book = Book((), Limits(max_known_peers=9))
    told_by_two(book, *range(8))
    for number in range(4):
        fail(book, number)
    keys = [contact.key for contact in book.contacts_due(at(60), random.Random(1))]
    assert len(keys) == 8 and set(keys[4:]) == {PEOPLE[number].curve_key for number in range(4)}
    assert {record.node_id for record in book.good_records()} == ids(4, 5, 6, 7)
    contact = book.contact(PEOPLE[0].node_id)
    assert contact is not None
    contact.met()
    assert {record.node_id for record in book.good_records()} == ids(0, 4, 5, 6, 7)


def test_every_order_is_as_likely() -> None:
    rng = random.Random(1)
    orders = Counter("".join(shuffled("abcd", rng)) for _ in range(24_000))
    assert len(orders) == 24 and all(850 < count < 1150 for count in orders.values())  # 1000 each, deviation 31


def test_whom_to_dial_is_drawn_at_random() -> None:
    book = Book((), Limits(max_known_peers=20))
    for number in range(16):
        book.hear(record(number), "a")
    firsts = {next(book.contacts_due(at(0), random.Random(seed))).key for seed in range(40)}
    assert len(firsts) > 8


def test_a_busy_contact_rests_without_counting_as_a_failure() -> None:
    book = Book((), Limits(max_known_peers=9))
    book.add(record(0))
    contact = book.contact(PEOPLE[0].node_id)
    assert contact is not None
    contact.busy(at(0), random.Random(1))
    assert not list(book.contacts_due(at(1), random.Random(1))) and book.good_records()
    assert list(book.contacts_due(at(BUSY_S), random.Random(1))) == [contact]


def test_a_newer_record_at_another_address_is_dialled_there() -> None:
    book = Book((Address(Endpoint("seed", 1), bytes(32)),), Limits(max_known_peers=9))
    book.add(record(0))
    old = book.contact(PEOPLE[0].node_id)
    assert old is not None
    old.failed(at(0), random.Random(1))
    assert book.hear(record(0, start=2), "a") and not book.hear(record(0, start=1), "a")
    contact = book.contact(PEOPLE[0].node_id)
    assert contact is not None and contact.address.endpoint == Endpoint("n0", 2) and contact.failures == 0
    assert [seed.address.endpoint.host for seed in book.seeds_due(at(0))] == ["seed"]


def test_expired_records_are_forgotten() -> None:
    book = Book((), Limits(max_known_peers=9))
    book.add(record(0, life=10))
    book.add(record(1, life=100))
    book.expire(at(50), random.Random(1))
    assert kept(book) == ids(1)


def at_hosts(number: int, *hosts: str, services: tuple[Service, ...] = ()) -> PeerRecord:
    endpoints = tuple(Endpoint(host, 4001) for host in hosts)
    expiry_ms = int((UNIX + 3600) * 1000)
    return make_record(PEOPLE[number], SWARM, endpoints, 1 << RENEWAL_BITS, "", expiry_ms, b"", services)


def targets(book: Book) -> list[str]:
    """Where each contact may be dialled, in turn."""
    due = list(book.contacts_due(at(0), random.Random(1)))
    return sorted(address.endpoint.host for contact in due for address in contact.addresses)


@pytest.mark.parametrize(
    ("host", "seen_from", "hosts"),
    [
        ("198.41.0.9", Scope.PUBLIC, ["198.41.0.4"]),
        ("10.0.0.9", Scope.PRIVATE, ["10.0.0.1", "198.41.0.4"]),
        ("127.0.0.9", Scope.LOOPBACK, ["10.0.0.1", "127.0.0.1", "198.41.0.4"]),
    ],
)
def test_private_endpoints_count_only_from_whom_they_mean_something_to(
    host: str, seen_from: Scope, hosts: list[str]
) -> None:
    everywhere = "127.0.0.1", "10.0.0.1", "198.41.0.4"
    met, told = Book((), Limits(max_known_peers=20)), Book((), Limits(max_known_peers=20))
    met.add(at_hosts(0, *everywhere), host)
    told.hear(at_hosts(0, *everywhere), "a", scope=seen_from)
    assert targets(met) == targets(told) == hosts


def test_a_neighbours_word_makes_the_private_endpoints_of_a_known_node_count() -> None:
    book = Book((), Limits(max_known_peers=20))
    book.hear(at_hosts(0, "10.0.0.1"), "a", scope=Scope.PUBLIC)
    assert targets(book) == []
    book.hear(at_hosts(0, "10.0.0.1"), "b", scope=Scope.PRIVATE)
    assert targets(book) == ["10.0.0.1"]


def test_what_a_name_may_mean_follows_whoever_told_of_it() -> None:
    for scope in Scope:
        book = Book((), Limits(max_known_peers=20))
        book.hear(at_hosts(0, "box.example"), "a", scope=scope)
        (contact,) = book.contacts_due(at(0), random.Random(1))
        assert contact.scope is scope


def test_what_is_saved_can_be_dialled_and_is_dialled_again() -> None:
    book = Book((), Limits(max_known_peers=20))
    book.add(at_hosts(0, "10.0.0.1"), "10.0.0.1")
    book.add(at_hosts(1, "10.0.0.2"), "198.41.0.4")
    book.add(at_hosts(2, "10.0.0.3", "198.41.0.5"), "198.41.0.5")
    again = Book((), Limits(max_known_peers=20))
    for saved in book.dialable_records():
        again.add(saved)
    assert targets(again) == ["10.0.0.1", "198.41.0.5"]


def test_a_service_in_our_own_network_is_no_strangers_to_offer() -> None:
    book = Book((), Limits(max_known_peers=20))
    near, far = Service("weights", Endpoint("192.168.0.1", 5)), Service("state", Endpoint("198.41.0.4", 5))
    book.add(at_hosts(0, "198.41.0.4", services=(near, far)), "198.41.0.4")
    assert book.services() == [(PEOPLE[0].node_id, far)]


@pytest.mark.parametrize(
    "host", ["127.1", "0x7f000001", "2130706433", "192.168.257", "localhost", "localhost.localdomain", "a.example"]
)
def test_a_service_at_a_name_is_not_dialled_as_what_the_name_means_nobody_judges(host: str) -> None:
    """`127.1` counted as public, and the averaging mesh would have dialled 127.0.0.1."""
    book = Book((), Limits(max_known_peers=20))
    for scope in (Scope.PUBLIC, Scope.PRIVATE, Scope.LOOPBACK):
        book.hear(at_hosts(0, "198.41.0.4", services=(Service("weights", Endpoint(host, 5)),)), scope.name, scope)
    assert len(book) == 1 and book.services() == []
