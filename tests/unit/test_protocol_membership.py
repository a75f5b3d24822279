"""The membership machine, driven by hand: what it asks for after each event."""

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.config import Gate, Instant, Setup
from protocol.credentials.records import (
    RENEWAL_BITS,
    Address,
    Endpoint,
    PeerRecord,
    Service,
    make_record,
    open_record,
)
from protocol.errors import PeerError, RecordError
from protocol.events import (
    Accepted,
    Closed,
    Dial,
    HangUp,
    Link,
    Message,
    Moved,
    Neighbour,
    Opened,
    PeerDown,
    PeerUp,
    Send,
    Tick,
    TurnedAway,
)
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.limits.timing import LAN
from protocol.membership.address_book import LAST_RETRY_S, Book
from protocol.membership.dialing import DRAWN, SHED_S
from protocol.membership.directory import HURRY
from protocol.membership.links import DIAL_TIMEOUT_S, GRACE_S, distance
from protocol.membership.membership import TICK_S, Membership
from protocol.refusals import Case
from protocol.wire.envelope import Kind
from protocol.wire.messages import Digest, Goodbye, Hello, Peers, Ping, Pong

LIMITS = Limits()

SWARM = b"a swarm of tests"
UNIX = 1_700_000_000.0
# In the order of their node ids, as the rules about pairs look at that order.
LOW, ME, HIGH, *OTHERS = sorted((Identity(bytes([n]) * 32) for n in range(30)), key=lambda i: i.node_id)


class Rule(Gate):
    """A gate of one function."""

    def __init__(self, admits) -> None:
        self.admits = admits


def at(seconds: float) -> Instant:
    return Instant(seconds, UNIX + seconds)


def record(
    identity: Identity, start: int = 1, *, renewals: int = 0, dialable: bool = True, swarm: bytes = SWARM
) -> PeerRecord:
    endpoints = (Endpoint(identity.node_id, 1000 + start),) if dialable else ()
    incarnation = (start << RENEWAL_BITS) + renewals
    return make_record(identity, swarm, endpoints, incarnation, "test", int((UNIX + 3600) * 1000))


def at_host(identity: Identity, host: str) -> PeerRecord:
    expiry_ms = int((UNIX + 3600) * 1000)
    return make_record(identity, SWARM, (Endpoint(host, 1000),), 1 << RENEWAL_BITS, "test", expiry_ms)


def address(identity: Identity) -> Address:
    return record(identity).addresses[0]


def machine(*seeds: Identity, limits: Limits | None = None, chance: int = 1) -> Membership:
    limits = limits or Limits()
    book = Book(tuple(map(address, seeds)), limits)
    setup = Setup(ME, SWARM, (Endpoint("me", 1),), limits, agent="me")
    return Membership(setup, book, random.Random(chance), at(0))


def hello(identity: Identity, *, dialled: bool, start: int = 1, dialable: bool = True, needy: bool = False) -> Message:
    link = Link(identity.curve_key, dialled)
    body = Hello(record(identity, start, dialable=dialable).encoded, needy).encode()
    return Message(link, identity.node_id, Kind.HELLO, body)


def peers(sender: Identity, *records: PeerRecord) -> Message:
    body = Peers(tuple(record.encoded for record in records)).encode()
    return Message(Link(sender.curve_key, False), sender.node_id, Kind.PEERS, body)


def peers_before_hello(sender: Identity, *records: PeerRecord) -> Message:
    return replace(peers(sender, *records), link=Link(sender.curve_key, True))


def told(actions, kind: Kind) -> list[Link]:
    return [action.to for action in actions if isinstance(action, Send) and action.message.kind == kind]


def join(core: Membership, identity: Identity, now: float = 0.0) -> None:
    assert PeerUp(identity.node_id) in core.handle(hello(identity, dialled=False), at(now))


def test_a_seed_is_dialled_greeted_and_live_after_its_answer() -> None:
    core = machine(HIGH)
    link = Link(HIGH.curve_key, True)
    assert Dial(address(HIGH)) in core.handle(Tick(), at(0))
    assert told(core.handle(Opened(link), at(1)), Kind.HELLO) == [link]
    actions = core.handle(hello(HIGH, dialled=True), at(2))
    assert PeerUp(HIGH.node_id) in actions and told(actions, Kind.PEERS) == [link]
    assert told(actions, Kind.HELLO) == []  # rule 2: else two nodes would greet each other for ever
    assert core.peers == [HIGH.node_id] and core.link_of(HIGH.node_id) == link


def test_a_node_that_says_it_can_be_dialled_no_more_while_it_is_dialled_disturbs_nothing() -> None:
    """Each tick failed until the dial was over, as the newest record named no address to count it by."""
    core, link = machine(), Link(HIGH.curve_key, True)
    core.book.add(record(HIGH), "")
    assert [type(action) for action in core.handle(Tick(), at(0))] == [Dial]
    core.book.add(record(HIGH, renewals=1, dialable=False), "")
    core.handle(Tick(), at(1))
    core.handle(Opened(link), at(1))
    assert PeerUp(HIGH.node_id) in core.handle(hello(HIGH, dialled=True), at(2))


@pytest.mark.parametrize("end", [Closed(Link(HIGH.curve_key, True)), Tick()])
def test_a_node_that_moved_while_its_old_address_was_dialled_is_dialled_at_once_at_the_new_one(
    end: Closed | Tick,
) -> None:
    """It counted as one that failed, so nobody was told of it."""
    core, now = machine(), at(DIAL_TIMEOUT_S + 1)
    core.book.add(record(HIGH), "")
    assert [type(action) for action in core.handle(Tick(), at(0))] == [Dial]
    moved = record(HIGH, 2)
    core.book.add(moved, "")
    dials = [action for action in [*core.handle(end, now), *core.handle(Tick(), now)] if isinstance(action, Dial)]
    assert [dial.address for dial in dials] == [*moved.addresses] and core.book.good_records() == [moved]


def test_a_neighbour_that_does_not_answer_at_one_of_its_addresses_is_dialled_at_the_next() -> None:
    core, key = machine(HIGH), OTHERS[1].curve_key
    told = tuple(Address(Endpoint(host, 4001), key) for host in ("192.168.7.9", "192.168.0.9"))
    dials = [action for action in core.handle(Neighbour(told), at(0)) if isinstance(action, Dial)]
    assert told[0] in [dial.address for dial in dials]
    core.handle(Closed(Link(key, True)), at(1))
    dials = [action for action in core.handle(Tick(), at(2)) if isinstance(action, Dial)]
    assert told[1] in [dial.address for dial in dials]


def test_neighbours_are_dialled_four_at_a_time_and_are_in_the_book_once_they_are_admitted() -> None:
    core = machine(HIGH)
    calls = [Address(Endpoint(f"192.168.0.{number}", 4001), OTHERS[number].curve_key) for number in range(1, 10)]
    dials = [action for call in calls for action in core.handle(Neighbour((call,)), at(0)) if isinstance(action, Dial)]
    near = [action.address for action in dials if action.address != address(HIGH)]
    assert near == calls[:4] and len(core.book) == 0
    link = Link(OTHERS[1].curve_key, True)
    core.handle(Opened(link, "192.168.0.1"), at(1))
    assert PeerUp(OTHERS[1].node_id) in core.handle(hello(OTHERS[1], dialled=True), at(1))
    assert OTHERS[1].node_id in core.book
    core.handle(Closed(Link(OTHERS[2].curve_key, True)), at(1))  # nobody there: the next
    assert [action.address for action in core.handle(Tick(), at(1)) if isinstance(action, Dial)] == calls[4:5]


def test_a_hello_from_somebody_who_dialled_is_answered() -> None:
    core = machine()
    actions = core.handle(hello(HIGH, dialled=False, dialable=False), at(0))
    assert told(actions, Kind.HELLO) == [Link(HIGH.curve_key, False)]
    assert PeerUp(HIGH.node_id) in actions
    assert core.handle(Tick(), at(1)) == []  # cannot be dialled, and need not be


@pytest.mark.parametrize(
    ("signer", "subject"),
    [(HIGH, LOW), (LOW, LOW), (LOW, HIGH)],
    ids=["another's record", "another's key", "another's signature"],
)
def test_a_record_that_is_not_the_links_own_gets_no_answer(signer: Identity, subject: Identity) -> None:
    core = machine()
    body = Hello(record(subject).encoded).encode()
    with pytest.raises(RecordError) as caught:
        core.handle(Message(Link(HIGH.curve_key, False), signer.node_id, Kind.HELLO, body), at(0))
    assert caught.value.reason == "impostor"
    assert core.peers == []


@pytest.mark.parametrize("first_dialled", [True, False])
@pytest.mark.parametrize(("other", "keep_dialled"), [(HIGH, True), (LOW, False)])
def test_of_two_links_the_one_dialled_by_the_smaller_id_is_kept(
    other: Identity, keep_dialled: bool, first_dialled: bool
) -> None:
    core = machine(other)
    core.handle(Tick(), at(0))
    core.handle(Opened(Link(other.curve_key, True)), at(0))
    core.handle(hello(other, dialled=first_dialled), at(0))
    assert PeerDown(other.node_id) not in core.handle(hello(other, dialled=not first_dialled), at(0))
    assert core.link_of(other.node_id) == Link(other.curve_key, keep_dialled)
    early = core.handle(Tick(), at(GRACE_S - 0.1))
    late = core.handle(Tick(), at(GRACE_S))
    spare = Link(other.curve_key, not keep_dialled)
    assert HangUp(spare) not in early and HangUp(spare) in late
    assert core.peers == [other.node_id]


def test_a_peer_that_greets_again_and_again_over_its_spare_link_is_not_answered_each_time() -> None:
    core = machine(HIGH)
    core.handle(Tick(), at(0))
    core.handle(Opened(Link(HIGH.curve_key, True)), at(0))
    core.handle(hello(HIGH, dialled=True), at(0))
    assert told(core.handle(hello(HIGH, dialled=False), at(0)), Kind.HELLO)
    with pytest.raises(PeerError, match="too_many_hellos"):
        core.handle(hello(HIGH, dialled=False), at(0.1))


def test_a_restarted_peer_goes_down_and_up_with_its_new_record() -> None:
    core = machine()
    join(core, HIGH)
    actions = core.handle(hello(HIGH, dialled=False, start=2), at(1))
    assert actions.index(PeerDown(HIGH.node_id)) < actions.index(PeerUp(HIGH.node_id))
    assert HangUp(Link(HIGH.curve_key, False)) not in actions
    known = core.book.get(HIGH.node_id)
    assert known is not None and known.endpoints[0].port == 1002
    core.handle(peers(HIGH, record(HIGH, 1)), at(2))
    assert core.book.get(HIGH.node_id) == known  # an old record that still makes the rounds


def test_failures_are_tried_again_after_growing_pauses() -> None:
    core = machine(HIGH)
    link = Link(HIGH.curve_key, True)
    dialled_at = []
    now = 0.0
    while now < 600:
        if any(isinstance(action, Dial) for action in core.handle(Tick(), at(now))):
            dialled_at.append(now)
            core.handle(Closed(link), at(now))
        now += TICK_S
    pauses = [after - before for before, after in itertools.pairwise(dialled_at)]
    assert pauses[0] <= 1.0 and max(pauses) <= LAST_RETRY_S + TICK_S
    assert 10 <= len(dialled_at) <= 25


def test_a_link_that_never_answers_is_given_up() -> None:
    core = machine(HIGH)
    link = Link(HIGH.curve_key, True)
    core.handle(Tick(), at(0))
    core.handle(Opened(link), at(0))
    seen = []
    for step in range(int(DIAL_TIMEOUT_S / TICK_S) + 1):
        seen += core.handle(Tick(), at(step * TICK_S))
    assert HangUp(link) in seen
    assert told(seen, Kind.HELLO)  # and was greeted again meanwhile
    assert core.peers == []


def run(core: Membership, start: float, end: float) -> list:
    actions = []
    now = start
    while now <= end:
        actions += core.handle(Tick(), at(now))
        now += TICK_S
    return actions


def test_a_silent_peer_is_pinged_suspected_and_dropped_in_time() -> None:
    core = machine()
    join(core, HIGH)
    link = Link(HIGH.curve_key, False)
    assert not told(run(core, 0, LAN.probe_interval - 1), Kind.PING)
    assert told(run(core, LAN.probe_interval - 1, LAN.probe_interval + 0.5), Kind.PING) == [link]
    actions = run(core, LAN.probe_interval + 0.5, LAN.death_bound - 2)
    assert core.detector.suspects == [HIGH.node_id] and PeerDown(HIGH.node_id) not in actions
    assert PeerDown(HIGH.node_id) in run(core, LAN.death_bound - 2, LAN.death_bound + 2 * TICK_S)
    assert core.peers == [] and core.deaths == 1


def test_a_suspect_that_says_anything_is_cleared() -> None:
    core = machine()
    join(core, HIGH)
    run(core, 0, LAN.death_bound - 5)
    core.heard(HIGH.node_id, at(LAN.death_bound - 5))
    assert core.detector.suspects == []
    assert PeerDown(HIGH.node_id) not in run(core, LAN.death_bound - 5, 2 * LAN.death_bound - 10)


def test_nobody_is_blamed_for_the_time_we_were_not_run() -> None:
    core = machine()
    join(core, HIGH)
    run(core, 0, 1)
    assert PeerDown(HIGH.node_id) not in core.handle(Tick(), at(3600))
    assert PeerDown(HIGH.node_id) in run(core, 3600, 3600 + LAN.death_bound + 1)


def test_an_endpoint_that_is_our_own_is_not_dialled_but_the_next_one_of_its_record_is() -> None:
    core = machine()
    join(core, LOW)
    endpoints = (Endpoint("me", 1), Endpoint("elsewhere", 1))
    twin = make_record(HIGH, SWARM, endpoints, 1 << RENEWAL_BITS, "test", int((UNIX + 3600) * 1000))
    actions = core.handle(peers(LOW, twin), at(0)) + run(core, TICK_S, 5)
    assert [action.address.endpoint.host for action in actions if isinstance(action, Dial)] == ["elsewhere"]


def bodies(actions, kind: Kind) -> list[bytes]:
    return [action.message.encode() for action in actions if isinstance(action, Send) and action.message.kind == kind]


def by_distance(*identities: Identity) -> list[Identity]:
    """Sort nodes by how far they are from the machine under test, the nearest first."""
    return sorted(identities, key=lambda identity: distance("me", identity.node_id, UNIX))


def test_without_room_a_caller_is_sent_on_and_a_near_one_that_lacks_links_displaces_one_that_is_farther() -> None:
    core = machine(limits=Limits(max_peers=3))
    near, middle, old, farther, far = by_distance(*OTHERS[:3], LOW, HIGH)
    join(core, old)
    join(core, farther)
    refused = core.handle(hello(near, dialled=False), at(0))
    link = Link(near.curve_key, False)
    assert told(refused, Kind.PEERS) == told(refused, Kind.GOODBYE) == [link] and not told(refused, Kind.HELLO)
    known = Peers.decode(bodies(refused, Kind.PEERS)[0]).records
    assert {record(old).encoded, record(farther).encoded} <= set(known)
    for _ in range(3):  # says that it lacks links, again and again
        assert PeerUp(far.node_id) not in core.handle(hello(far, dialled=False, needy=True), at(1))
    taken = core.handle(hello(middle, dialled=False, needy=True), at(1))
    assert PeerUp(middle.node_id) in taken and PeerDown(farther.node_id) in taken
    assert core.peers == [old.node_id, middle.node_id]
    again = core.handle(hello(near, dialled=False, needy=True), at(1))
    assert PeerUp(near.node_id) in again and PeerDown(middle.node_id) in again  # the older half is safe: `old` stays


def test_however_many_near_ones_call_the_older_half_of_the_callers_stays() -> None:
    core = machine(limits=Limits(max_peers=12))
    callers = by_distance(*OTHERS)[::-1]
    for identity in callers[:8]:  # the farthest, from afar
        join(core, identity)
    for number, identity in enumerate(callers[8:]):
        core.handle(hello(identity, dialled=False, needy=True), at(1 + number))
    assert core.peers[:4] == [identity.node_id for identity in callers[:4]] and len(core.peers) == 8
    assert not {identity.node_id for identity in callers[4:8]} & set(core.peers)


def test_of_those_who_are_seen_at_one_private_address_no_key_is_nearer_than_another() -> None:
    core = machine(limits=Limits(max_peers=3))

    def call(identity: Identity) -> list:
        core.handle(Accepted(Link(identity.curve_key, False), "192.168.0.1"), at(0))  # as a gateway may show all
        return core.handle(hello(identity, dialled=False, needy=True), at(1))

    first = [identity.node_id for identity in OTHERS[:2] if call(identity)]
    assert core.peers == first
    for identity in OTHERS[2:]:
        assert told(call(identity), Kind.GOODBYE) == [Link(identity.curve_key, False)]
    assert core.peers == first


def call_from(core: Membership, identity: Identity, host: str, *, needy: bool = False) -> list:
    core.handle(Accepted(Link(identity.curve_key, False), host), at(0))
    return core.handle(hello(identity, dialled=False, dialable=False, needy=needy), at(0))


def test_nodes_that_nobody_can_dial_have_places_of_their_own_and_take_none_of_the_others() -> None:
    core = machine(limits=Limits(max_peers=3, max_callers=4))
    for identity in OTHERS[:4]:  # of one home, as long as nobody else wants the places
        assert PeerUp(identity.node_id) in call_from(core, identity, "9.9.9.9")
    join(core, LOW)
    join(core, HIGH)
    assert len(core.peers) == 6


def test_where_home_places_are_taken_the_network_with_most_gives_one_and_who_has_a_peer_gives_to_who_has_none() -> None:
    core = machine(limits=Limits(max_callers=4))
    for identity in OTHERS[:3]:
        call_from(core, identity, "9.9.9.9", needy=True)
    call_from(core, OTHERS[3], "8.8.8.8")
    taken = call_from(core, OTHERS[4], "7.7.7.7", needy=True)
    assert PeerDown(OTHERS[2].node_id) in taken and PeerUp(OTHERS[4].node_id) in taken
    assert told(call_from(core, OTHERS[5], "9.9.9.9"), Kind.GOODBYE) == [Link(OTHERS[5].curve_key, False)]
    taken = call_from(core, OTHERS[6], "6.6.6.6", needy=True)
    assert PeerDown(OTHERS[1].node_id) in taken and PeerUp(OTHERS[6].node_id) in taken
    taken = call_from(core, OTHERS[7], "5.5.5.5", needy=True)
    assert PeerDown(OTHERS[3].node_id) in taken and PeerUp(OTHERS[7].node_id) in taken  # it had a peer when it called
    assert PeerUp(LOW.node_id) not in call_from(core, LOW, "4.4.4.4", needy=True)
    assert len(core.peers) == 4


def test_a_node_that_lacks_links_of_its_own_choice_says_so() -> None:
    core = machine(*OTHERS[:4], limits=Limits(max_peers=6))  # of which two are its own choice
    for identity in OTHERS[4:7]:
        join(core, identity)
    dialled = [action.address.key for action in core.handle(Tick(), at(0)) if isinstance(action, Dial)]
    said = []
    for key in dialled:
        link = Link(key, True)
        said += [Hello.decode(body).needy for body in bodies(core.handle(Opened(link), at(0)), Kind.HELLO)]
        (identity,) = (other for other in OTHERS if other.curve_key == key)
        core.handle(hello(identity, dialled=True), at(0))
    assert said == [True, True, False]


@pytest.mark.parametrize("chance", range(8))
def test_of_those_that_are_drawn_the_nearest_is_dialled_first(chance: int) -> None:
    core = machine(limits=Limits(max_peers=1), chance=chance)
    for identity in OTHERS[:DRAWN]:
        core.book.add(record(identity))
    (dial,) = core.handle(Tick(), at(0))
    assert isinstance(dial, Dial) and dial.address == address(by_distance(*OTHERS[:DRAWN])[0])


@pytest.mark.parametrize("endpoints", [(), (Endpoint("192.168.1.2", 1),)], ids=["no endpoint", "a private one"])
def test_nodes_that_do_not_know_their_public_network_do_not_all_look_for_room_with_the_same_others(
    endpoints: tuple[Endpoint, ...],
) -> None:
    found = set()
    for identity in OTHERS[DRAWN : DRAWN + 12]:
        book = Book((), LIMITS)
        for other in OTHERS[:DRAWN]:
            book.add(record(other))
        setup = Setup(identity, SWARM, endpoints, Limits(max_peers=1))
        core = Membership(setup, book, random.Random(1), at(0))
        found |= {action.address for action in core.handle(Tick(), at(0)) if isinstance(action, Dial)}
    assert len(found) > DRAWN // 2


def test_every_other_of_those_that_are_dialled_is_random() -> None:
    """Else whoever invents nodes that are near would be dialled only."""
    found = set()
    for chance in range(20):
        core = machine(limits=Limits(max_peers=3), chance=chance)
        for identity in OTHERS[:16]:
            core.book.add(record(identity))
        dials = [action.address for action in core.handle(Tick(), at(0)) if isinstance(action, Dial)]
        assert dials[0] == address(by_distance(*OTHERS[:16])[0]) and len(dials) == 2
        found.add(dials[1])
    assert len(found) > 8


def test_a_node_that_nobody_can_dial_takes_eight_places_of_others_and_no_more() -> None:
    core = Membership(Setup(ME, SWARM), Book((), LIMITS), random.Random(1), at(0))
    by_key = {identity.curve_key: identity for identity in OTHERS[:16]}
    for identity in by_key.values():
        core.book.add(record(identity))
    dialled = [action.address.key for action in core.handle(Tick(), at(0)) if isinstance(action, Dial)]
    for key in dialled:
        core.handle(Opened(Link(key, True)), at(0))
        core.handle(hello(by_key[key], dialled=True), at(0))
    assert len(core.peers) == 8
    assert not [action for action in run(core, TICK_S, 3) if isinstance(action, Dial)]


def test_who_finds_no_room_is_told_of_a_few_others_and_who_comes_in_of_all() -> None:
    core = machine(limits=Limits(max_peers=3))
    for identity in OTHERS[:20]:
        core.book.add(record(identity))
    told_when_in, refused = core.handle(hello(LOW, dialled=False), at(0)), []
    join(core, HIGH)
    for number in range(40):
        refused += bodies(core.handle(hello(OTHERS[20], dialled=False), at(number)), Kind.PEERS)
    (all_of_them,) = (set(Peers.decode(body).records) for body in bodies(told_when_in, Kind.PEERS))
    assert {record(identity).encoded for identity in OTHERS[:20]} <= all_of_them
    assert all(len(Peers.decode(body).records) <= LIMITS.max_referrals for body in refused)
    met = set().union(*(Peers.decode(body).records for body in refused))
    assert {record(identity).encoded for identity in OTHERS[:20]} <= met  # others each time


def test_links_that_we_chose_are_never_displaced() -> None:
    core = machine(HIGH, limits=Limits(max_peers=3))
    core.handle(Tick(), at(0))
    core.handle(Opened(Link(HIGH.curve_key, True)), at(0))
    core.handle(hello(HIGH, dialled=True), at(0))
    for number, identity in enumerate(OTHERS[:20]):
        core.handle(hello(identity, dialled=False, needy=True), at(2.0 * number))
    assert HIGH.node_id in core.peers and len(core.peers) == 3


def test_a_goodbye_frees_the_link_is_no_failure_and_its_records_are_tried() -> None:
    core = machine(HIGH)
    link = Link(HIGH.curve_key, True)
    core.handle(Tick(), at(0))
    core.handle(Opened(link), at(0))
    body = Peers((record(OTHERS[0]).encoded,)).encode()
    actions = core.handle(Message(link, HIGH.node_id, Kind.PEERS, body), at(0))
    actions += core.handle(Message(link, HIGH.node_id, Kind.GOODBYE, Goodbye("full").encode()), at(0))
    assert HangUp(link) in actions and core.refusals.latest == ""
    dialled = actions + run(core, 0, 1)
    assert OTHERS[0].curve_key in {action.address.key for action in dialled if isinstance(action, Dial)}


def test_a_peer_that_greets_again_and_again_is_not_told_everything_each_time() -> None:
    core = machine()
    join(core, HIGH)
    with pytest.raises(PeerError, match="too_many_hellos"):
        core.handle(hello(HIGH, dialled=False), at(0.1))
    assert PeerUp(HIGH.node_id) in core.handle(hello(HIGH, dialled=False), at(2))
    with pytest.raises(PeerError, match="too_many_hellos"):  # whatever start of its process it claims
        core.handle(hello(HIGH, dialled=False, start=2), at(2.1))
    assert PeerUp(HIGH.node_id) in core.handle(hello(HIGH, dialled=False, start=2), at(4))


def test_a_refusal_for_other_reasons_is_remembered_for_the_person() -> None:
    core = machine(HIGH)
    link = Link(HIGH.curve_key, True)
    core.handle(Tick(), at(0))
    core.handle(Opened(link), at(0))
    core.handle(Message(link, HIGH.node_id, Kind.GOODBYE, Goodbye("not_admitted").encode()), at(0))
    assert core.refusals.latest == "not_admitted"


def test_who_is_not_admitted_is_told_why_and_never_becomes_a_peer() -> None:
    setup = Setup(ME, SWARM, gate=Rule(lambda record, now: "" if record.node_id == HIGH.node_id else "not_admitted"))
    core = Membership(setup, Book((), Limits(max_known_peers=16)), random.Random(1), at(0))
    actions = core.handle(hello(LOW, dialled=False), at(0))
    assert Goodbye.decode(bodies(actions, Kind.GOODBYE)[0]).reason == "not_admitted" and core.peers == []
    join(core, HIGH)
    core.handle(peers(HIGH, record(LOW)), at(0))
    assert LOW.node_id not in core.book
    assert HangUp(Link(LOW.curve_key, False)) in run(core, 0, GRACE_S + TICK_S)


def test_who_is_admitted_no_more_is_told_why_and_parted_from() -> None:
    setup = Setup(ME, SWARM, gate=Rule(lambda record, now: "" if now.steady < 100 else "invite_expired"))
    core = Membership(setup, Book((), Limits(max_known_peers=10)), random.Random(1), at(0))
    join(core, LOW)
    actions = core.handle(Tick(), at(100))
    assert PeerDown(LOW.node_id) in actions
    assert [Goodbye.decode(body).reason for body in bodies(actions, Kind.GOODBYE)] == ["invite_expired"]
    assert core.refusals.counts == {"invite_expired": 1}


@pytest.mark.parametrize("dialled", [False, True])
def test_a_live_peer_that_greets_again_with_a_record_that_is_not_admitted_is_parted_from(dialled: bool) -> None:
    rule = Rule(lambda record, now: "not_admitted" if record.started > 1 else "")
    core = Membership(
        Setup(ME, SWARM, gate=rule), Book((address(LOW),), Limits(max_known_peers=16)), random.Random(1), at(0)
    )
    link = Link(LOW.curve_key, dialled)
    if dialled:
        core.handle(Tick(), at(0))
        core.handle(Opened(link), at(0))
    core.handle(hello(LOW, dialled=dialled), at(0))
    assert core.peers == [LOW.node_id]
    again = core.handle(hello(LOW, dialled=dialled, start=2), at(5))
    assert told(again, Kind.GOODBYE) == [link] and PeerDown(LOW.node_id) in again
    assert core.peers == [] and core.link_of(LOW.node_id) is None
    assert HangUp(link) not in again and core.links.is_parting(link)  # it is closed when the goodbye has arrived


def test_now_and_then_a_chosen_link_is_replaced_by_another() -> None:
    core = machine(*OTHERS[:6], limits=Limits(max_peers=8))
    strangers = OTHERS[6:]  # more than it may be linked with
    for identity in strangers:
        core.book.add(record(identity))
    for identity in OTHERS[:6]:
        core.handle(Tick(), at(0))
        core.handle(Opened(Link(identity.curve_key, True)), at(0))
        core.handle(hello(identity, dialled=True), at(0))
    now, actions = 0.0, []
    while now < 2 * LAN.rotate_interval:
        now += TICK_S
        for node in core.peers:
            core.heard(node, at(now))
        actions += core.handle(Tick(), at(now))
    assert "rotated" in {Goodbye.decode(body).reason for body in bodies(actions, Kind.GOODBYE)}
    assert {action.address.key for action in actions if isinstance(action, Dial)} & {i.curve_key for i in strangers}


def test_of_a_swarm_that_outgrows_its_links_chosen_ones_end_one_after_the_other() -> None:
    """Sixteen links while everybody fits, and in a larger swarm twelve."""
    core = machine(*OTHERS[:8])
    for identity in OTHERS[8:16]:
        join(core, identity)
    core.handle(Tick(), at(0))
    for identity in OTHERS[:8]:
        core.handle(Opened(Link(identity.curve_key, True)), at(0))
        core.handle(hello(identity, dialled=True), at(0))
    assert len(core.peers) == 16
    for identity in OTHERS[16:]:
        core.book.add(record(identity))
    links, now = [], 0.0
    while now < LAN.rotate_interval + 5 * SHED_S:
        now += TICK_S
        for node in core.peers:
            core.heard(node, at(now))
        core.handle(Tick(), at(now))
        links.append(len(core.peers))
    assert links == sorted(links, reverse=True) and {12, 13, 14, 15, 16} <= set(links) <= set(range(11, 17))
    assert links.count(14) * TICK_S > SHED_S / 2  # each finds room elsewhere before the next has to
    assert {identity.node_id for identity in OTHERS[8:16]} <= set(core.peers)  # the callers stay


def test_callers_that_came_to_a_small_swarm_do_not_keep_a_grown_one_from_choosing_its_links() -> None:
    """A node that shed only links of its own choice dialled others at once, which made it shed again, without end."""
    core = machine()
    for identity in OTHERS[:11]:
        join(core, identity)
    for identity in OTHERS[11:]:
        core.book.add(record(identity))
    dialled, now = list[Dial](), 0.0
    while now < LAN.rotate_interval + 10 * SHED_S:
        now += TICK_S
        for node in core.peers:
            core.heard(node, at(now))
        dials = [action for action in core.handle(Tick(), at(now)) if isinstance(action, Dial)]
        for dial in dials:
            identity = next(other for other in OTHERS if other.curve_key == dial.address.key)
            core.handle(Opened(Link(identity.curve_key, True)), at(now))
            core.handle(hello(identity, dialled=True), at(now))
        dialled += dials
    chosen = [peer.link.dialled for peer in core.links.peers.values()]
    assert len(chosen) <= 12 and sum(chosen) >= 4 and len(dialled) <= 8


def test_a_dead_node_that_nobody_can_dial_is_forgotten_and_one_that_can_be_dialled_is_tried_again() -> None:
    core = machine()
    core.handle(hello(LOW, dialled=False, dialable=False), at(0))
    core.handle(hello(HIGH, dialled=False), at(0))
    now = 0.0
    while core.peers and now < 2 * LAN.death_bound:
        now += TICK_S
        core.handle(Tick(), at(now))
    assert core.deaths == 2 and [record.node_id for record in core.book.records()] == [HIGH.node_id]
    assert core.book.good_records() == [] and core.book.contact(HIGH.node_id) is not None


def test_nodes_that_cannot_be_dialled_make_a_swarm_neither_small_nor_large() -> None:
    core = machine()
    for identity in OTHERS[:4]:
        join(core, identity)
    for identity in OTHERS[4:]:
        core.book.add(record(identity, dialable=False))
    assert sum(isinstance(action, Dial) for action in core.handle(Tick(), at(0))) == 0
    assert core.links.is_small and core.links.room == 16
    for identity in OTHERS[4:20]:
        core.book.add(record(identity, start=2))
    core.handle(Tick(), at(TICK_S))
    assert not core.links.is_small and core.links.room == 12


def test_a_node_that_goes_and_comes_changes_nobodys_room_for_links() -> None:
    core = machine()
    for identity in OTHERS[:17]:
        core.book.add(record(identity))
    core.handle(Tick(), at(0))
    assert not core.links.is_small
    core.book.contact(OTHERS[0].node_id).failed(at(0), random.Random(1))
    core.handle(Tick(), at(TICK_S))
    assert not core.links.is_small


@pytest.mark.parametrize("most", [1, 2, 3, 8, 16])
def test_however_few_links_a_node_may_have_it_takes_somebody_in_and_looks_for_somebody(most: int) -> None:
    core = machine(limits=Limits(max_peers=most))
    for identity in OTHERS[:20]:
        core.book.add(record(identity))
    dialled = [action for action in core.handle(Tick(), at(0)) if isinstance(action, Dial)]
    assert not core.links.is_small and 1 <= len(dialled) <= most
    assert core.links.room - core.links._reserve >= min(1, most - 1)  # what is left for callers


def test_a_digest_is_answered_with_what_it_lacks() -> None:
    core = machine()
    for identity in (HIGH, LOW):
        join(core, identity)
        core.handle(peers(identity, record(OTHERS[0]), record(OTHERS[1])), at(0))
    digest = Digest((record(OTHERS[0]).summary, record(LOW).summary, core.record.summary)).encode()
    message = Message(Link(HIGH.curve_key, False), HIGH.node_id, Kind.DIGEST, digest)
    (body,) = bodies(core.handle(message, at(1)), Kind.PEERS)
    assert Peers.decode(body).records == (record(OTHERS[1]).encoded,)


def test_nodes_behind_one_address_compare_records_as_often_as_others() -> None:
    """64 in one building asked six times a second in all: their network had two, was blamed, and was then refused."""
    core, crowd = machine(), [Identity(bytes([200, number]) * 16) for number in range(64)]
    for identity in crowd:
        core.handle(Accepted(Link(identity.curve_key, False), "93.184.216.34"), at(0))
        core.handle(hello(identity, dialled=False, dialable=False), at(0))
    digest = Digest(tuple(record.summary for record in core.book.records())).encode()
    pause = HURRY * LAN.exchange_interval
    for turn in range(24):
        for identity in crowd:
            link = Link(identity.curve_key, False)
            core.handle(Message(link, identity.node_id, Kind.DIGEST, digest), at(turn * pause))


def test_nobody_enters_the_book_by_the_word_of_one_peer_and_such_are_passed_on_to_nobody() -> None:
    core = machine()
    join(core, LOW)
    join(core, HIGH)
    actions = core.handle(peers(LOW, *map(record, OTHERS)), at(0))
    assert core.book.records() == [record(LOW), record(HIGH)] and told(actions, Kind.PEERS) == []
    core.handle(peers(LOW, *map(record, OTHERS)), at(0))
    assert len(core.book) == 2
    actions = core.handle(peers(HIGH, record(OTHERS[0])), at(0))
    assert OTHERS[0].node_id in core.book and told(actions, Kind.PEERS) == []


@pytest.mark.parametrize(
    ("hosts", "other"),
    [
        (["93.184.216.1", "93.184.216.2"], "198.41.0.4"),
        (["172.17.0.1", "::ffff:172.17.0.1"], "172.17.0.2"),  # behind a gateway, or one neighbour with two keys
    ],
)
def test_tellers_of_one_public_network_or_at_one_private_address_count_as_one(hosts: list[str], other: str) -> None:
    core = machine()
    for identity, host in zip([LOW, HIGH, OTHERS[0]], [*hosts, other], strict=True):
        core.handle(Accepted(Link(identity.curve_key, False), host), at(0))
        join(core, identity)
    for identity in (LOW, HIGH):
        core.handle(peers(identity, record(OTHERS[1])), at(0))
    assert OTHERS[1].node_id not in core.book
    core.handle(peers(OTHERS[0], record(OTHERS[1])), at(0))
    assert OTHERS[1].node_id in core.book


def test_callers_that_are_turned_away_leave_nothing_in_the_book() -> None:
    core = machine(limits=Limits(max_peers=3))
    for identity in OTHERS:
        core.handle(hello(identity, dialled=False), at(0))
    assert {record.node_id for record in core.book.records()} == set(core.peers) and len(core.peers) == 2


HOME = Endpoint("192.168.0.7", 4001)
OUTSIDE = Endpoint("198.41.0.4", 4001)


def test_a_peer_seen_at_a_public_address_makes_nobody_dial_into_the_own_network() -> None:
    core = machine()
    core.handle(Accepted(Link(HIGH.curve_key, False), "198.41.0.4"), at(0))
    join(core, HIGH)
    inside = [at_host(identity, f"192.168.0.{number}") for number, identity in enumerate(OTHERS[:5])]
    inside += [at_host(identity, f"127.0.0.{number}") for number, identity in enumerate(OTHERS[5:10])]
    core.handle(peers(HIGH, *inside), at(0))
    assert not [action for action in core.handle(Tick(), at(1)) if isinstance(action, Dial)]
    core.handle(Accepted(Link(LOW.curve_key, False), "::ffff:192.168.0.99"), at(1))
    join(core, LOW, 1)
    actions = core.handle(peers(LOW, *inside), at(1)) + core.handle(Tick(), at(3))
    dialled = {action.address.endpoint.host for action in actions if isinstance(action, Dial)}
    assert dialled == {f"192.168.0.{number}" for number in range(5)}


def test_private_endpoints_are_told_to_peers_of_the_same_network_only() -> None:
    setup = Setup(ME, SWARM, (HOME, OUTSIDE))
    core = Membership(setup, Book((), Limits(max_known_peers=100)), random.Random(1), at(0))
    near, far, neighbour = LOW, HIGH, OTHERS[0]
    shown = {}
    for identity, host in ((near, "192.168.0.8"), (far, "2001:4860:4860::8888")):
        core.handle(Accepted(Link(identity.curve_key, False), host), at(0))
        (greeting,) = bodies(core.handle(hello(identity, dialled=False), at(0)), Kind.HELLO)
        shown[identity] = open_record(Hello.decode(greeting).record, SWARM, UNIX)
    assert shown[near].endpoints == (HOME, OUTSIDE) and shown[far].endpoints == (OUTSIDE,)
    assert shown[near].replaces(shown[far])  # wherever both come, the one that says more holds
    core.handle(Accepted(Link(neighbour.curve_key, False), "192.168.0.9"), at(1))
    greeting = Message(
        Link(neighbour.curve_key, False),
        neighbour.node_id,
        Kind.HELLO,
        Hello(at_host(neighbour, "192.168.0.9").encoded).encode(),
    )
    core.handle(greeting, at(1))
    asked = Digest(()).encode()
    for identity, is_told in ((near, True), (far, False)):
        answer = core.handle(Message(Link(identity.curve_key, False), identity.node_id, Kind.DIGEST, asked), at(20))
        known = [record for body in bodies(answer, Kind.PEERS) for record in Peers.decode(body).records]
        assert (at_host(neighbour, "192.168.0.9").encoded in known) is is_told


def test_a_neighbours_record_with_private_endpoints_beside_public_ones_is_told_to_neighbours_only() -> None:
    """It signs another for those out there, and whoever hears of it there has that one."""
    core = machine()
    expiry_ms = int((UNIX + 3600) * 1000)
    both = make_record(OTHERS[0], SWARM, (HOME, OUTSIDE), 1 << RENEWAL_BITS, "test", expiry_ms + 2)
    outside = make_record(OTHERS[1], SWARM, (OUTSIDE,), 1 << RENEWAL_BITS, "test", expiry_ms + 1)
    for identity, host, shown in ((OTHERS[0], "192.168.0.9", both), (OTHERS[1], "198.41.0.4", outside)):
        link = Link(identity.curve_key, False)
        core.handle(Accepted(link, host), at(0))
        core.handle(Message(link, identity.node_id, Kind.HELLO, Hello(shown.encoded).encode()), at(0))
    for identity, host, expected in (
        (LOW, "192.168.0.8", {both.encoded, outside.encoded}),
        (HIGH, "2001:4860:4860::8888", {outside.encoded}),
    ):
        core.handle(Accepted(Link(identity.curve_key, False), host), at(1))
        actions = core.handle(hello(identity, dialled=False), at(1))
        link = Link(identity.curve_key, False)
        told_at_once = bodies([action for action in actions if getattr(action, "to", None) == link], Kind.PEERS)
        asked = Message(Link(identity.curve_key, False), identity.node_id, Kind.DIGEST, Digest(()).encode())
        for body in (*told_at_once, *bodies(core.handle(asked, at(20)), Kind.PEERS)):
            known = set(Peers.decode(body).records)
            assert known & {both.encoded, outside.encoded} == expected


@settings(max_examples=20)
@given(st.integers())
def test_one_public_network_gets_so_many_links_that_dial_us_and_so_many_that_we_choose(chance: int) -> None:
    core = machine(limits=Limits(max_peers=12, max_prefix_peers=2), chance=chance)
    for number, identity in enumerate(OTHERS[:6]):
        core.handle(Accepted(Link(identity.curve_key, False), f"93.184.216.{number}"), at(0))
        core.handle(hello(identity, dialled=False, needy=True), at(0))
    assert len(core.peers) == 2
    join(core, HIGH)  # of another network
    near = [at_host(identity, f"2001:4860:{number:x}::1") for number, identity in enumerate(OTHERS[6:10])]
    same = [at_host(identity, f"198.41.0.{number}") for number, identity in enumerate(OTHERS[10:16])]
    actions = core.handle(peers(HIGH, *near, *same), at(0))
    for turn in range(24):  # what is drawn may be of a network that has enough: then others are, next time
        actions += core.handle(Tick(), at(1 + turn / 100))
    hosts = [action.address.endpoint.host for action in actions if isinstance(action, Dial)]
    assert sum(host.startswith("198.41.0.") for host in hosts) == 2  # there are 4 of the others, in a /48 each
    assert len(hosts) == len(set(hosts)) == 6  # with those 3 that are there, as many as it wants


def test_who_tells_before_its_hello_counts_as_all_at_its_private_address_do() -> None:
    core = machine()
    join(core, HIGH)
    core.handle(peers(HIGH, record(OTHERS[0]), record(OTHERS[1])), at(0))
    for turn in range(10):
        core.handle(Tick(), at(1 + turn / 100))
    for identity in OTHERS[:2]:
        core.handle(Opened(Link(identity.curve_key, True), "10.0.0.1"), at(2))
        core.handle(peers_before_hello(identity, record(OTHERS[20])), at(2))
    assert core.book.get(OTHERS[20].node_id) is not None and OTHERS[20].node_id not in core.book


def test_nodes_of_one_machine_are_tellers_of_their_own() -> None:
    core = machine()
    for identity in (LOW, HIGH):
        core.handle(Accepted(Link(identity.curve_key, False), "127.0.0.1"), at(0))
        join(core, identity)
        core.handle(peers(identity, record(OTHERS[1])), at(0))
    assert OTHERS[1].node_id in core.book


def named(core: Membership, *identities: Identity) -> list[Identity]:
    """Let nodes be dialled by names of as many domains that all mean one network; return who gets a hello."""
    core.handle(
        peers(HIGH, *(at_host(identity, f"node.domain{at}.org") for at, identity in enumerate(identities))), at(0)
    )
    for turn in range(24):
        core.handle(Tick(), at(1 + turn / 100))
    links = {identity: Link(identity.curve_key, True) for identity in identities}
    opened = {
        identity: core.handle(Opened(links[identity], f"198.41.0.{n}"), at(2)) for n, identity in enumerate(identities)
    }
    return [one for one, actions in opened.items() if told(actions, Kind.HELLO) == [links[one]]]


def test_names_of_many_domains_do_not_make_one_network_many() -> None:
    core = machine(limits=Limits(max_prefix_peers=2))
    join(core, HIGH)
    greeted = named(core, *OTHERS[:6])
    assert len(greeted) == 2
    for identity in greeted:
        core.handle(peers_before_hello(identity, record(OTHERS[20])), at(2))
    assert OTHERS[20].node_id not in core.book  # they told of it with one voice


@pytest.mark.parametrize(
    ("hosts", "most"),
    [
        ("60.0.7.%d", 8),
        ("60.0.7.200", 8),  # nodes of one machine
        ("60.0.8.%d", 4),
        ("::ffff:60.0.8.%d", 4),
        ("2600:1:2:3::%d", 8),
        ("2600:1:2:4::%d", 4),  # a machine that is rented there has as many addresses as it likes
    ],
)
def test_only_beside_us_each_address_of_a_public_network_has_links_of_its_own(hosts: str, most: int) -> None:
    setup = Setup(ME, SWARM, (Endpoint("60.0.7.200", 1), Endpoint("2600:1:2:3::200", 1)))
    core = Membership(setup, Book((), LIMITS), random.Random(1), at(0))
    for number, identity in enumerate(OTHERS[:8]):
        core.handle(Accepted(Link(identity.curve_key, False), hosts.replace("%d", str(number))), at(0))
        core.handle(hello(identity, dialled=False), at(0))
    assert len(core.peers) == most


def test_one_address_beside_us_has_as_many_links_as_a_network_however_it_is_written() -> None:
    core = Membership(Setup(ME, SWARM, (Endpoint("60.0.7.200", 1),)), Book((), LIMITS), random.Random(1), at(0))
    for number, identity in enumerate(OTHERS[:8]):
        core.handle(Accepted(Link(identity.curve_key, False), "::ffff:60.0.7.9" if number % 2 else "60.0.7.9"), at(0))
        core.handle(hello(identity, dialled=False), at(0))
    assert len(core.peers) == 4


def test_a_seed_is_greeted_whatever_network_its_name_is_in() -> None:
    core = machine(OTHERS[0], limits=Limits(max_prefix_peers=1))
    join(core, HIGH)
    assert OTHERS[0] in named(core, *OTHERS[1:6], OTHERS[0])


def test_a_ping_is_answered_with_its_token() -> None:
    core = machine()
    join(core, HIGH)
    link = Link(HIGH.curve_key, False)
    actions = core.handle(Message(link, HIGH.node_id, Kind.PING, Ping(77).encode()), at(1))
    assert actions == [Send(link, Pong(77))]


def test_links_are_bounded() -> None:
    core = machine(limits=Limits(max_peers=3))
    for identity in OTHERS[:10]:
        core.handle(hello(identity, dialled=False), at(0))
    assert len(core.peers) == 2  # a third is kept for links of our own choice
    refused = core.handle(hello(OTHERS[11], dialled=False), at(0))
    assert told(refused, Kind.HELLO) == []
    core = machine(*OTHERS)
    dials = [action for action in core.handle(Tick(), at(0)) if isinstance(action, Dial)]
    assert len(dials) == LIMITS.max_dials


def test_of_what_is_saved_the_peers_that_we_chose_are_first_and_then_those_who_came() -> None:
    core = machine(HIGH)
    join(core, LOW)
    core.handle(peers(LOW, record(OTHERS[0])), at(0))
    core.book.add(record(OTHERS[1]))
    core.handle(Closed(Link(LOW.curve_key, False)), at(0))
    join(core, OTHERS[2])
    core.handle(Tick(), at(0))
    core.handle(Opened(Link(HIGH.curve_key, True)), at(0))
    core.handle(hello(HIGH, dialled=True), at(0))
    assert core.saved_records == [record(HIGH), record(OTHERS[2]), record(LOW), record(OTHERS[1])]


def test_known_records_are_bounded() -> None:
    core = machine(limits=Limits(max_known_peers=5))
    join(core, HIGH)
    core.handle(peers(HIGH, *map(record, OTHERS)), at(0))
    assert len(core.book) <= 5


def test_a_newer_record_of_ourselves_is_outbid() -> None:
    core = machine()
    join(core, HIGH)
    newer = make_record(ME, SWARM, (), core.record.incarnation + 10, "", int((UNIX + 3600) * 1000))
    core.handle(peers(HIGH, newer), at(1))
    assert core.record.started == newer.started + 1
    assert core.record.endpoints == (Endpoint("me", 1),)


def test_our_record_is_renewed_before_it_expires() -> None:
    core = machine()
    for hours in range(0, 100, 6):
        core.handle(Tick(), at(hours * 3600.0))
        assert core.record.expiry_ms / 1000 > UNIX + hours * 3600 + 6 * 3600


def test_our_record_is_renewed_when_our_clock_is_set_back_and_others_would_not_believe_it() -> None:
    core = machine()
    before, now = core.record, UNIX - 30 * 24 * 3600.0
    with pytest.raises(RecordError, match="stale"):
        open_record(before.encoded, SWARM, now)
    core.handle(Tick(), Instant(1.0, now))
    assert open_record(core.record.encoded, SWARM, now).replaces(before)


def test_a_node_that_moved_tells_its_peers_at_once_and_is_not_taken_for_restarted() -> None:
    core = machine()
    join(core, HIGH)
    before = core.record
    actions = core.handle(Moved((Endpoint("elsewhere", 5),)), at(1))
    assert bodies(actions, Kind.PEERS) == [Peers((core.record.encoded,)).encode()]
    assert core.record.endpoints == (Endpoint("elsewhere", 5),) and core.record.services == ()
    served = (Service("weights/1", Endpoint("elsewhere", 6)),)
    core.handle(Moved((Endpoint("elsewhere", 5),), served), at(2))
    core.handle(Tick(), at(100_000))  # also when it is renewed
    assert core.record.services == served
    assert core.record.replaces(before) and core.record.started == before.started


def test_however_many_are_refused_at_once_every_link_is_closed() -> None:
    core = machine()
    links = [Link(bytes([number // 256, number % 256]) * 16, False) for number in range(LIMITS.max_parting + 50)]
    closed = set()
    for link in links:
        actions = core._refuse(link, "full", at(1))
        assert told(actions, Kind.GOODBYE) == [link]
        closed |= {action.link for action in actions if isinstance(action, HangUp)}
    closed |= {action.link for action in core.handle(Tick(), at(1 + GRACE_S)) if isinstance(action, HangUp)}
    assert closed == set(links)


def test_an_expelled_peer_is_told_and_is_none_from_then_on() -> None:
    core = machine()
    join(core, HIGH)
    link = Link(HIGH.curve_key, False)
    assert core.expel(HIGH.node_id, at(1)) == [Send(link, Goodbye("graylisted")), PeerDown(HIGH.node_id)]
    assert core.peers == [] and HangUp(link) in core.handle(Tick(), at(60)), "it did not hang up itself"


def test_whose_key_is_refused_in_the_handshake_learns_that_it_is() -> None:
    core = machine(HIGH)
    assert core.handle(Tick(), at(0)) == [Dial(address(HIGH))]
    core.handle(TurnedAway(Link(HIGH.curve_key, True)), at(1))
    (told,) = core.refusals.take()
    assert (told.case, told.who, told.reason) == (Case.BY_THEM, str(address(HIGH).endpoint), "graylisted")
    assert core.refusals.latest == "graylisted"


identities = st.sampled_from([LOW, HIGH, *OTHERS[:4]])
links = st.builds(lambda identity, dialled: Link(identity.curve_key, dialled), identities, st.booleans())
events = st.one_of(
    links.map(Opened),
    links.map(Closed),
    st.builds(lambda i, dialled, n: hello(i, dialled=dialled, start=n), identities, st.booleans(), st.integers(1, 3)),
    st.builds(lambda i, j, n: peers(i, record(j, n)), identities, identities, st.integers(1, 3)),
    identities.map(lambda i: i.node_id),  # to be expelled
    st.builds(
        Message, links, identities.map(lambda i: i.node_id), st.sampled_from(list(Kind)) | st.just(99), st.binary()
    ),
    st.just(Tick()),
)


@given(st.lists(st.tuples(st.floats(0, 20), events), max_size=60))
def test_whatever_happens_peers_are_bounded_and_their_ups_and_downs_match(history) -> None:
    core = machine(HIGH, limits=Limits(max_peers=3, max_known_peers=4))
    now = 0.0
    up: set[str] = set()
    for pause, event in history:
        now += pause
        try:
            actions = core.expel(event, at(now)) if isinstance(event, str) else core.handle(event, at(now))
        except PeerError:
            continue
        for action in actions:
            match action:
                case PeerUp(node):
                    up.add(node)
                case PeerDown(node):
                    up.remove(node)
        assert up == set(core.peers)
        assert len(core.peers) <= 3 and len(core.book) <= 4
        assert all(core.link_of(node) is not None for node in up)
