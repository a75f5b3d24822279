"""The membership machine, driven by hand: what it asks for after each event."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.book import LAST_RETRY_S, Book
from protocol.clock import Instant
from protocol.envelope import Kind
from protocol.errors import PeerError, RecordError
from protocol.events import Dial, Expel, HangUp, Message, PeerDown, PeerUp, Tell, Tick
from protocol.identity import Identity
from protocol.limits import Limits
from protocol.membership import (
    DIAL_TIMEOUT_S,
    DIAL_YIELD_S,
    MAX_DIALS,
    PEER_TIMEOUT_S,
    PING_INTERVAL_S,
    SPARE_GRACE_S,
    TICK_S,
    Membership,
)
from protocol.messages import Hello, Peers, Ping
from protocol.records import Address, Endpoint, PeerRecord, make_record
from protocol.setup import Setup
from protocol.transport import Closed, Link, Opened

SWARM = b"a swarm of tests"
UNIX = 1_700_000_000.0
# In the order of their node ids, as the rules about pairs look at that order.
LOW, ME, HIGH, *OTHERS = sorted((Identity(bytes([n]) * 32) for n in range(30)), key=lambda i: i.node_id)


def at(seconds: float) -> Instant:
    return Instant(seconds, UNIX + seconds)


def record(identity: Identity, incarnation: int = 1, *, dialable: bool = True, swarm: bytes = SWARM) -> PeerRecord:
    endpoints = (Endpoint(identity.node_id, 1000 + incarnation),) if dialable else ()
    return make_record(identity, swarm, endpoints, incarnation, "test", int((UNIX + 3600) * 1000))


def address(identity: Identity) -> Address:
    made = record(identity).address
    assert made is not None
    return made


def machine(*seeds: Identity, limits: Limits | None = None) -> Membership:
    limits = limits or Limits()
    book = Book(tuple(map(address, seeds)), limits.max_known_peers)
    setup = Setup(ME, SWARM, (Endpoint("me", 1),), limits, agent="me")
    return Membership(setup, book, random.Random(1), at(0))


def hello(identity: Identity, *, dialled: bool, incarnation: int = 1, dialable: bool = True) -> Message:
    link = Link(identity.curve_key, dialled)
    body = Hello(record(identity, incarnation, dialable=dialable).encoded).encode()
    return Message(link, identity.node_id, Kind.HELLO, body)


def peers(sender: Identity, *records: PeerRecord) -> Message:
    body = Peers(tuple(record.encoded for record in records)).encode()
    return Message(Link(sender.curve_key, False), sender.node_id, Kind.PEERS, body)


def told(actions, kind: Kind) -> list[Link]:
    return [action.link for action in actions if isinstance(action, Tell) and action.kind == kind]


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
    early = core.handle(Tick(), at(SPARE_GRACE_S - 0.1))
    late = core.handle(Tick(), at(SPARE_GRACE_S))
    spare = Link(other.curve_key, not keep_dialled)
    assert HangUp(spare) not in early and HangUp(spare) in late
    assert core.peers == [other.node_id]


def test_when_the_used_link_breaks_the_spare_takes_over() -> None:
    core = machine(HIGH)
    core.handle(Tick(), at(0))
    core.handle(Opened(Link(HIGH.curve_key, True)), at(0))
    core.handle(hello(HIGH, dialled=True), at(0))
    core.handle(hello(HIGH, dialled=False), at(0))
    assert core.handle(Closed(Link(HIGH.curve_key, True)), at(1)) == [PeerUp(HIGH.node_id)]
    assert core.link_of(HIGH.node_id) == Link(HIGH.curve_key, False)


def test_a_restarted_peer_goes_down_and_up_with_its_new_record() -> None:
    core = machine()
    join(core, HIGH)
    actions = core.handle(hello(HIGH, dialled=False, incarnation=2), at(1))
    assert actions.index(PeerDown(HIGH.node_id)) < actions.index(PeerUp(HIGH.node_id))
    assert HangUp(Link(HIGH.curve_key, False)) not in actions
    known = core.book.get(HIGH.node_id)
    assert known is not None and known.endpoints[0].port == 1002
    core.handle(peers(HIGH, record(HIGH, 1)), at(2))
    assert core.book.get(HIGH.node_id) == known  # an old record that still makes the rounds


def test_the_larger_id_leaves_the_first_try_to_the_smaller() -> None:
    core = machine()
    join(core, OTHERS[0])
    actions = core.handle(peers(OTHERS[0], record(HIGH), record(LOW)), at(0))
    assert [action.address.key for action in actions if isinstance(action, Dial)] == [HIGH.curve_key]
    later = core.handle(Tick(), at(DIAL_YIELD_S))
    assert [action.address.key for action in later if isinstance(action, Dial)] == [LOW.curve_key]


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


def test_a_silent_peer_is_pinged_then_dropped_and_a_talking_one_is_neither() -> None:
    core = machine()
    join(core, HIGH)
    link = Link(HIGH.curve_key, False)
    assert not told(run(core, 0, PING_INTERVAL_S - 1), Kind.PING)
    assert told(run(core, PING_INTERVAL_S - 1, PING_INTERVAL_S + 1), Kind.PING) == [link]
    core.heard(HIGH.node_id, at(PING_INTERVAL_S + 1))
    actions = run(core, PING_INTERVAL_S + 1, PEER_TIMEOUT_S + 1)
    assert PeerDown(HIGH.node_id) not in actions
    assert PeerDown(HIGH.node_id) in run(core, PEER_TIMEOUT_S + 1, PEER_TIMEOUT_S + PING_INTERVAL_S + 2)
    assert core.peers == []


def test_nobody_is_blamed_for_the_time_we_were_not_run() -> None:
    core = machine()
    join(core, HIGH)
    run(core, 0, 1)
    assert PeerDown(HIGH.node_id) not in core.handle(Tick(), at(3600))
    assert PeerDown(HIGH.node_id) in run(core, 3600, 3600 + PEER_TIMEOUT_S + 1)


def test_a_ping_is_answered_with_its_token() -> None:
    core = machine()
    join(core, HIGH)
    link = Link(HIGH.curve_key, False)
    actions = core.handle(Message(link, HIGH.node_id, Kind.PING, Ping(77).encode()), at(1))
    assert actions == [Tell(link, Kind.PONG, Ping(77).encode())]


def test_links_are_bounded() -> None:
    core = machine(limits=Limits(max_peers=3))
    for identity in OTHERS[:10]:
        core.handle(hello(identity, dialled=False), at(0))
    assert len(core.peers) == 3
    refused = core.handle(hello(OTHERS[11], dialled=False), at(0))
    assert told(refused, Kind.HELLO) == []
    core = machine(*OTHERS)
    dials = [action for action in core.handle(Tick(), at(0)) if isinstance(action, Dial)]
    assert len(dials) == MAX_DIALS


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
    assert core.record.incarnation == newer.incarnation + 1
    assert core.record.endpoints == (Endpoint("me", 1),)


def test_our_record_is_renewed_before_it_expires() -> None:
    core = machine()
    for hours in range(0, 100, 6):
        core.handle(Tick(), at(hours * 3600.0))
        assert core.record.expiry_ms / 1000 > UNIX + hours * 3600 + 6 * 3600


def test_an_expelled_peer_is_gone_at_once() -> None:
    core = machine()
    join(core, HIGH)
    actions = core.handle(Expel(HIGH.node_id), at(1))
    assert PeerDown(HIGH.node_id) in actions and HangUp(Link(HIGH.curve_key, False)) in actions


identities = st.sampled_from([LOW, HIGH, *OTHERS[:4]])
links = st.builds(lambda identity, dialled: Link(identity.curve_key, dialled), identities, st.booleans())
events = st.one_of(
    links.map(Opened),
    links.map(Closed),
    st.builds(
        lambda i, dialled, n: hello(i, dialled=dialled, incarnation=n), identities, st.booleans(), st.integers(1, 3)
    ),
    st.builds(lambda i, j, n: peers(i, record(j, n)), identities, identities, st.integers(1, 3)),
    st.builds(lambda i: Expel(i.node_id), identities),
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
            actions = core.handle(event, at(now))
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
