"""What a swarm's owner takes back and hands over: the list's form, who obeys it, and how it travels."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.config import Instant, Setup
from protocol.core import Core
from protocol.credentials.grants import Gatekeeper, make_pass, revocable_id
from protocol.credentials.invite import make_shared_invite
from protocol.credentials.manifest import JoinPolicy, ManifestTask, make_manifest
from protocol.credentials.records import Endpoint, PeerRecord, make_record
from protocol.credentials.revocations import (
    MAX_HANDOVERS,
    MAX_REVOKED,
    Handover,
    RevocationList,
    make_handover,
    make_revocations,
    open_revocations,
)
from protocol.errors import RevocationError
from protocol.events import (
    Arrived,
    Deliver,
    HangUp,
    Item,
    Link,
    Message,
    PeerDown,
    PeerUp,
    Revoked,
    Send,
    SendFrame,
    Tick,
)
from protocol.identity import Identity, NodeId
from protocol.limits.limits import Limits
from protocol.limits.timing import LAN
from protocol.membership.address_book import Book
from protocol.membership.membership import LIST_WAIT_S, Membership
from protocol.wire.envelope import CHUNK_BYTES, Kind, chunk_hashes, digest, header_of, item_id, seal
from protocol.wire.messages import (
    MAX_REVOCATIONS_BYTES,
    NO_TOPIC,
    AskRevocations,
    Entry,
    Goodbye,
    Have,
    Hello,
    Peers,
    Revocations,
)
from tests.protocol_frames import frame_of, opened

LIMITS = Limits()

FOUNDER, SECOND, THIRD, ME, MEMBER, GUEST, EVIL = (Identity(bytes([n]) * 32) for n in range(7))
NOW = Instant(1000.0, 1_700_000_000.0)
LATER_MS = int(NOW.unix * 1000) + 3_600_000
TASKS = [ManifestTask("t", 1, "ab", "{}")]
CLUB = make_manifest(FOUNDER, "club", 1, JoinPolicy.ALLOWLIST, TASKS, [ME.node_id, MEMBER.node_id])
OPEN = make_manifest(FOUNDER, "open", 1, JoinPolicy.OPEN, TASKS)


def chain(*owners: Identity) -> tuple[Handover, ...]:
    """The founder's handover to the first of `owners`, that one's to the next, and so on."""
    before = (FOUNDER, *owners)
    return tuple(make_handover(before[n], CLUB, n, owner.public_key) for n, owner in enumerate(owners))


def handover_by(owner: Identity, place: int, successor: Identity) -> Handover:
    return make_handover(owner, CLUB, place, successor.public_key)


def signed(*revoked: NodeId, sequence: int = 1, owners: tuple[Identity, ...] = ()) -> RevocationList:
    everybody = (FOUNDER, *owners)
    signer = everybody[-2] if owners and sequence == 0 else everybody[-1]
    return make_revocations(signer, CLUB, revoked, sequence, chain(*owners))


def record(identity: Identity, grant: bytes = b"", swarm: bytes = CLUB.swarm) -> PeerRecord:
    return make_record(identity, swarm, (), 1, "", LATER_MS, grant)


def pass_by(owner: Identity, node: Identity = GUEST) -> bytes:
    return make_pass(owner, CLUB.swarm, node.node_id, LATER_MS).encode()


# The list


ids = st.binary(min_size=20, max_size=20).map(lambda seed: Identity((seed * 2)[:32]).node_id)


@given(st.sets(ids, max_size=5), st.integers(0, 2**48 - 1), st.integers(0, 2))
def test_a_list_is_read_as_it_was_signed(revoked: set[NodeId], sequence: int, generation: int) -> None:
    made = signed(*revoked, sequence=sequence, owners=(SECOND, THIRD)[:generation])
    assert open_revocations(made.encoded, CLUB) == made
    assert (made.revoked, made.sequence, len(made.handovers)) == (revoked, sequence, generation)


@given(st.data())
def test_an_altered_list_is_refused(data: st.DataObject) -> None:
    encoded = bytearray(signed(EVIL.node_id, owners=(SECOND,)).encoded)
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RevocationError):
        open_revocations(bytes(encoded), CLUB)


@given(st.binary(max_size=400))
def test_noise_is_no_list(noise: bytes) -> None:
    with pytest.raises(RevocationError):
        open_revocations(noise, CLUB)


def test_the_largest_list_fits_and_a_larger_one_is_not_made() -> None:
    owners = tuple(Identity(bytes([50 + n]) * 32) for n in range(MAX_HANDOVERS))
    everybody = [Identity(n.to_bytes(32, "big")).node_id for n in range(MAX_REVOKED)]
    assert len(signed(*everybody, sequence=2**48 - 1, owners=owners).encoded) <= MAX_REVOCATIONS_BYTES
    with pytest.raises(RevocationError):
        signed(*everybody, EVIL.node_id)
    with pytest.raises(RevocationError):
        signed(owners=(*owners, EVIL))


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_revocations(EVIL, CLUB, [MEMBER.node_id], 1),
        lambda: make_revocations(EVIL, CLUB, [], 1, chain(SECOND)),
        lambda: make_revocations(EVIL, CLUB, [], 1, (make_handover(EVIL, CLUB, 0, EVIL.public_key),)),
        lambda: make_revocations(FOUNDER, CLUB, [], 1, chain(SECOND)),
        lambda: make_revocations(SECOND, CLUB, [], 0, chain(SECOND)),
        lambda: make_revocations(
            THIRD, CLUB, [], 1, (*chain(SECOND), make_handover(FOUNDER, CLUB, 1, THIRD.public_key))
        ),
        lambda: make_revocations(SECOND, CLUB, [], 1, (make_handover(FOUNDER, OPEN, 0, SECOND.public_key),)),
        lambda: make_revocations(THIRD, CLUB, [], 1, (make_handover(FOUNDER, CLUB, 1, THIRD.public_key),)),
    ],
    ids=[
        "a stranger",
        "not the last",
        "own handover",
        "the one before",
        "oneself",
        "twice away",
        "other swarm",
        "other place",
    ],
)
def test_only_the_last_owner_of_a_chain_that_begins_with_the_founder_signs(make) -> None:
    with pytest.raises(RevocationError):
        make()


def test_a_list_of_another_swarm_is_not_obeyed() -> None:
    with pytest.raises(RevocationError, match="wrong_swarm"):
        Gatekeeper(CLUB).obey(make_revocations(FOUNDER, OPEN, [], 1).encoded)


# The gate


def test_what_is_revoked_counts_no_more_and_again_when_a_newer_list_leaves_it_out() -> None:
    invite = make_shared_invite(FOUNDER, CLUB, 3, LATER_MS)
    ticket = invite.ticket(CLUB.swarm, GUEST.public_key).encode()
    own_pass = make_pass(FOUNDER, CLUB.swarm, GUEST.node_id, LATER_MS)
    keeper = Gatekeeper(CLUB)

    def answers() -> list[str]:
        asked = [record(MEMBER), record(GUEST, own_pass.encode()), record(GUEST, ticket)]
        return [keeper.admits(one, NOW) for one in asked]

    assert answers() == ["", "", ""]
    for sequence, (revoked, expected) in enumerate(
        [
            (MEMBER.node_id, ["revoked", "", ""]),
            (GUEST.node_id, ["", "revoked", "revoked"]),
            (revocable_id(own_pass), ["", "invite_revoked", ""]),
            (revocable_id(invite.certificate), ["", "", "invite_revoked"]),
        ],
        start=1,
    ):
        assert keeper.obey(signed(revoked, sequence=sequence).encoded)
        assert answers() == expected
    assert keeper.obey(signed(sequence=9).encoded) and answers() == ["", "", ""]


def test_an_open_swarm_keeps_out_whom_its_founder_revoked() -> None:
    keeper = Gatekeeper(OPEN)
    keeper.obey(make_revocations(FOUNDER, OPEN, [EVIL.node_id], 1).encoded)
    assert keeper.admits(record(EVIL, swarm=OPEN.swarm), NOW) == "revoked"
    assert keeper.admits(record(GUEST, swarm=OPEN.swarm), NOW) == ""


def test_of_a_list_that_is_no_news_the_ids_are_not_read_since_anybody_may_bring_it(monkeypatch) -> None:
    gate = Gatekeeper(CLUB)
    assert gate.obey(signed(EVIL.node_id, sequence=2).encoded) and gate.is_revoked(EVIL.node_id)
    old = signed(GUEST.node_id, sequence=1)
    monkeypatch.setattr("protocol.credentials.revocations.id_of_bytes", None)
    assert not gate.obey(old.encoded) and gate.is_revoked(EVIL.node_id)


def test_an_older_list_does_not_come_back() -> None:
    keeper = Gatekeeper(CLUB)
    old, new = signed(sequence=1), signed(MEMBER.node_id, sequence=2)
    assert keeper.obey(new.encoded)
    assert not keeper.obey(old.encoded) and not keeper.obey(new.encoded)
    assert keeper.admits(record(MEMBER), NOW) == "revoked" and keeper.revision == new.revision


def test_a_handed_over_swarm_is_the_second_owners_and_the_first_ones_grants_hold_until_it_revokes_them() -> None:
    keeper = Gatekeeper(CLUB)
    assert keeper.admits(record(GUEST, pass_by(SECOND)), NOW) == "not_admitted"
    assert keeper.obey(signed(sequence=7).encoded)
    assert keeper.obey(signed(sequence=0, owners=(SECOND,)).encoded)
    admitted = [keeper.admits(record(GUEST, pass_by(owner)), NOW) for owner in (FOUNDER, SECOND, EVIL)]
    assert admitted == ["", "", "not_admitted"]
    assert keeper.admits(record(SECOND), NOW) == ""
    assert not keeper.obey(signed(MEMBER.node_id, sequence=99).encoded)  # the founder's own word no longer counts
    assert not keeper.obey(signed(sequence=99, owners=(EVIL, THIRD)).encoded)  # nor another handover of its
    assert keeper.obey(signed(FOUNDER.node_id, sequence=2, owners=(SECOND,)).encoded)
    assert keeper.admits(record(GUEST, pass_by(FOUNDER)), NOW) == "invite_revoked"
    assert keeper.admits(record(FOUNDER), NOW) == "revoked"
    assert keeper.admits(record(GUEST, pass_by(SECOND)), NOW) == ""


# How it travels


def machine(gate: Gatekeeper) -> Membership:
    return Membership(Setup(ME, CLUB.swarm, gate=gate), Book((), LIMITS), random.Random(1), NOW)


def link(identity: Identity) -> Link:
    return Link(identity.curve_key, dialled=False)


def say(core: Membership, identity: Identity, kind: Kind, body: bytes):
    return core.handle(Message(link(identity), identity.node_id, kind, body), NOW)


def greet(core: Membership, identity: Identity, grant: bytes = b"", revision: int = 0):
    return say(core, identity, Kind.HELLO, Hello(record(identity, grant).encoded, revision=revision).encode())


def told(actions, kind: Kind) -> list[Link]:
    return [action.to for action in actions if isinstance(action, Send) and action.message.kind == kind]


def test_a_new_list_is_passed_on_and_whom_it_names_is_told_why_and_forgotten() -> None:
    core = machine(Gatekeeper(CLUB))
    greet(core, MEMBER)
    greet(core, GUEST, pass_by(FOUNDER))
    say(core, MEMBER, Kind.PEERS, Peers((record(EVIL, pass_by(FOUNDER, EVIL)).encoded,)).encode())
    assert {GUEST.node_id, EVIL.node_id} <= {known.node_id for known in core.book.all_records()}
    new = Revocations(signed(GUEST.node_id, EVIL.node_id).encoded).encode()
    actions = say(core, MEMBER, Kind.REVOCATIONS, new)
    assert told(actions, Kind.REVOCATIONS) == [link(GUEST)]
    assert PeerDown(GUEST.node_id) in actions and core.peers == [MEMBER.node_id]
    (goodbye,) = [action for action in actions if isinstance(action, Send) and action.message.kind == Kind.GOODBYE]
    assert goodbye.message == Goodbye("revoked") and not told(actions, Kind.PEERS)
    assert {known.node_id for known in core.book.all_records()} == {MEMBER.node_id}
    assert told(greet(core, GUEST, pass_by(FOUNDER)), Kind.GOODBYE) == [link(GUEST)]
    assert say(core, MEMBER, Kind.REVOCATIONS, new) == []  # and not again


def test_a_revoked_node_that_was_lost_sight_of_is_not_looked_for() -> None:
    core, later = machine(Gatekeeper(CLUB)), Instant(NOW.steady + 1, NOW.unix + 1)
    for identity in (MEMBER, EVIL):
        endpoint, expiry_ms = Endpoint("198.41.0.4", 4001), int(NOW.unix * 1000) + 1
        core.book.add(make_record(identity, CLUB.swarm, (endpoint,), 1, "", expiry_ms), endpoint.host)
    core.book.expire(later, random.Random(1))
    core.handle(Revoked(signed(EVIL.node_id).encoded), later)
    assert [record.node_id for record in core.book.lapsed_records()] == [MEMBER.node_id]


def test_of_two_that_meet_the_one_with_the_older_list_asks_for_the_newer() -> None:
    behind, ahead = machine(Gatekeeper(CLUB)), machine(Gatekeeper(CLUB))
    newest = signed(EVIL.node_id)
    ahead.handle(Revoked(newest.encoded), NOW)
    assert told(greet(behind, MEMBER, revision=newest.revision), Kind.ASK_REVOCATIONS) == [link(MEMBER)]
    assert told(greet(ahead, MEMBER), Kind.ASK_REVOCATIONS) == []
    (answer,) = say(ahead, MEMBER, Kind.ASK_REVOCATIONS, AskRevocations(0).encode())
    assert answer.message == Revocations(newest.encoded)
    assert say(ahead, MEMBER, Kind.ASK_REVOCATIONS, AskRevocations(newest.revision).encode()) == []


def test_a_guest_of_an_owner_whom_we_do_not_know_shows_us_that_it_is_one() -> None:
    core = machine(Gatekeeper(CLUB))
    handed_over = signed(owners=(SECOND,))
    actions = greet(core, GUEST, pass_by(SECOND), handed_over.revision)
    assert told(actions, Kind.ASK_REVOCATIONS) == [link(GUEST)] and not told(actions, Kind.GOODBYE)
    say(core, GUEST, Kind.REVOCATIONS, Revocations(handed_over.encoded).encode())
    assert PeerUp(GUEST.node_id) in greet(core, GUEST, pass_by(SECOND), handed_over.revision)
    later = Instant(NOW.steady + LIST_WAIT_S, NOW.unix)
    core.heard(GUEST.node_id, later)
    assert HangUp(link(GUEST)) not in core.handle(Tick(), later) and core.peers == [GUEST.node_id]
    stranger = machine(Gatekeeper(CLUB))
    greet(stranger, EVIL, pass_by(EVIL), handed_over.revision)
    say(stranger, EVIL, Kind.REVOCATIONS, Revocations(handed_over.encoded).encode())
    assert told(greet(stranger, EVIL, pass_by(EVIL), handed_over.revision), Kind.GOODBYE) == [link(EVIL)]


def test_who_promises_a_list_and_brings_none_is_turned_away_and_so_is_who_comes_when_many_wait() -> None:
    core, old = machine(Gatekeeper(CLUB)), signed()
    core.handle(Revoked(old.encoded), NOW)
    revision = old.revision + 1
    strangers = [Identity(bytes([9 + n // 256, n % 256]) * 16) for n in range(LIMITS.max_parting + 1)]
    assert told(greet(core, strangers[0], revision=revision), Kind.ASK_REVOCATIONS) == [link(strangers[0])]
    soon = Instant(NOW.steady + LIST_WAIT_S - 1, NOW.unix)
    for stranger in strangers[:-1]:  # the first greets again, and brings what is no news: it earns no more time
        say(core, stranger, Kind.REVOCATIONS, Revocations(old.encoded).encode())
        greeting = Hello(record(stranger).encoded, revision=revision).encode()
        asked = core.handle(Message(link(stranger), stranger.node_id, Kind.HELLO, greeting), soon)
        assert told(asked, Kind.ASK_REVOCATIONS) == [link(stranger)]
    assert told(greet(core, strangers[-1], revision=revision), Kind.GOODBYE) == [link(strangers[-1])]
    assert not core.handle(Tick(), soon)
    over = core.handle(Tick(), Instant(NOW.steady + LIST_WAIT_S, NOW.unix))
    assert over == [HangUp(link(strangers[0]))]
    over = core.handle(Tick(), Instant(soon.steady + LIST_WAIT_S, NOW.unix))
    assert over == [HangUp(link(stranger)) for stranger in strangers[1:-1]]


@pytest.mark.parametrize("revoked", [(), (EVIL.node_id,)], ids=["nobody", "its signer"])
def test_items_of_a_revoked_signer_are_dropped_whoever_brings_them_and_offered_no_more(revoked) -> None:
    core = Core(Setup(ME, CLUB.swarm, gate=Gatekeeper(CLUB)), Book((), LIMITS), random.Random(1), NOW)
    numbers = itertools.count(1)

    def hear(bearer: Identity, signer: Identity, kind: Kind, body: bytes):
        frame = frame_of(signer, CLUB.swarm, kind, next(numbers), int(NOW.unix * 1000), body)
        return core.handle(Arrived(link(bearer), frame), NOW)

    hear(MEMBER, MEMBER, Kind.HELLO, Hello(record(MEMBER).encoded).encode())

    def give(body: bytes) -> bool:
        """Let the member announce and give an item of the other's; return whether it is delivered."""
        offered = Have((Entry(item_id(EVIL.public_key, digest(body)), 300),))
        hear(MEMBER, MEMBER, Kind.HAVE, offered.encode())
        core.handle(Tick(), NOW._replace(steady=NOW.steady + LAN.announce_interval))
        return any(isinstance(action, Deliver) for action in hear(MEMBER, EVIL, Kind.ITEM, body))

    assert give(NO_TOPIC + b"before")
    core.handle(Revoked(signed(*revoked).encoded), NOW)
    assert give(NO_TOPIC + b"after") == (not revoked)
    assert core.scores.rejected["revoked"] == len(revoked) and core.membership.peers == [MEMBER.node_id]
    actions = hear(GUEST, GUEST, Kind.HELLO, Hello(record(GUEST, pass_by(FOUNDER)).encoded).encode())
    for second in range(30):
        later = Instant(NOW.steady + second, NOW.unix + second)
        core.membership.heard(GUEST.node_id, later)
        actions += core.handle(Tick(), later)
    offered = [a for a in actions if isinstance(a, SendFrame) and opened(a.frame).kind == Kind.HAVE]
    assert bool(offered) == (not revoked)


@pytest.mark.parametrize("revoked", [(), (EVIL.node_id,)])
def test_a_large_item_that_is_being_fetched_is_not_taken_once_its_signer_is_revoked(revoked) -> None:
    core = Core(Setup(ME, CLUB.swarm, gate=Gatekeeper(CLUB)), Book((), LIMITS), random.Random(1), NOW)
    numbers = itertools.count(1)

    def hear(kind: Kind, body: bytes):
        frame = frame_of(MEMBER, CLUB.swarm, kind, next(numbers), int(NOW.unix * 1000), body)
        return core.handle(Arrived(link(MEMBER), frame), NOW)

    body = bytes(CHUNK_BYTES + 1)
    hashes = chunk_hashes(body)
    frame = seal(EVIL, CLUB.swarm, Kind.ITEM, 1, int(NOW.unix * 1000), body, hashes)
    item = Item(header_of(frame).item_id, EVIL.node_id, NOW.unix, NO_TOPIC, frame, hashes)
    hear(Kind.HELLO, Hello(record(MEMBER).encoded).encode())
    hear(Kind.HAVE, Have((item.entry,)).encode())
    due = NOW._replace(steady=NOW.steady + core.wait(NOW))
    asked = [opened(a.frame).kind for a in core.handle(Tick(), due) if isinstance(a, SendFrame)]
    assert Kind.WANT in asked
    hear(Kind.OUTLINE, item.outline.encode())
    core.handle(Revoked(signed(*revoked).encoded), NOW)
    came = [action for index in (0, 1) for action in hear(Kind.CHUNK, item.chunk(index).encode())]
    assert any(isinstance(action, Deliver) for action in came) == (not revoked)
    assert core.scores.score(MEMBER.node_id, NOW) == 0  # they were on their way


def test_a_file_that_holds_no_list_is_counted_and_changes_nothing() -> None:
    core = Core(Setup(ME, CLUB.swarm, gate=Gatekeeper(CLUB)), Book((), LIMITS), random.Random(1), NOW)
    assert core.handle(Revoked(b"damaged"), NOW) == []
    assert core.scores.rejected == {"malformed": 1}
