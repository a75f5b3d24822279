"""Every frame's path through the core: what is counted, who pays, and what is not disturbed."""

import random
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.config import Instant, Setup
from protocol.core import QUEUE_FULL, Core, Traffic
from protocol.credentials.records import Address, Endpoint, make_record
from protocol.driver import Driver
from protocol.events import (
    Accepted,
    Arrived,
    ChargePrefix,
    Closed,
    Deliver,
    Dial,
    FillLink,
    HangUp,
    Item,
    ItemVerdict,
    Judgement,
    Link,
    Moving,
    Offer,
    Opened,
    RefusedEarly,
    SendFrame,
    Subscribe,
    Tick,
)
from protocol.host import describe_peers, dialable_members
from protocol.identity import Identity, Verify
from protocol.limits.limits import Limits
from protocol.limits.peer_scores import PENALTIES
from protocol.limits.quotas import FRAME_S, SENT_BYTE_S
from protocol.limits.timing import LAN
from protocol.membership.address_book import CANDIDATES, Book
from protocol.membership.links import GRACE_S
from protocol.refusals import LINES_BURST, Case, Refusal
from protocol.transport.memory import Conditions, MemoryNetwork, MemoryTransport
from protocol.wire.envelope import (
    CHUNK_BYTES,
    HEAD_BYTES,
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    PLACE_BYTES,
    Envelope,
    ItemId,
    Kind,
    chunk_hashes,
    claimed_id,
    control_frame,
    digest,
    digest_of_hashes,
    header_of,
    item_id,
    open_frame,
    seal,
)
from protocol.wire.messages import (
    NO_TOPIC,
    AskRevocations,
    Cancel,
    DialledBack,
    Digest,
    Entry,
    Goodbye,
    Have,
    Hello,
    ItemOutline,
    Peers,
    Ping,
    Want,
    WantedPart,
    hint,
)
from protocol.wire.version import EARLIER, VERSION, goodbye_reason, spoken_version
from tests.protocol_frames import frame_of, opened

LIMITS = Limits()
MANY_CHUNKS = Cancel(tuple(WantedPart(ItemId(bytes([n]) * 32), tuple(range(16))) for n in range(128)))

SWARM = b"a swarm of tests"
UNIX = 1_700_000_000.0
ME, PEER, OTHER = (Identity(bytes([n]) * 32) for n in range(3))
LINK = Link(PEER.curve_key, dialled=False)
OTHER_LINK = Link(OTHER.curve_key, dialled=False)


def at(seconds: float) -> Instant:
    return Instant(seconds, UNIX + seconds)


class Talk:
    """A core with one live peer, and that peer's voice."""

    def __init__(self, limits: Limits | None = None, manifest: bytes | None = None) -> None:
        setup = Setup(ME, SWARM, limits=limits or Limits(), manifest=manifest)
        self.core = Core(setup, Book((), Limits(max_known_peers=16)), random.Random(1), at(0))
        self.sequence = 0
        self.charged: list[ChargePrefix] = []
        self.greet(PEER, LINK)

    def greet(self, identity: Identity, link: Link, now: float = 0.0) -> None:
        record = make_record(identity, SWARM, (), 1, "", int((UNIX + 3600) * 1000))
        self.hear(self.frame(Kind.HELLO, Hello(record.encoded).encode(), identity), link, now)
        assert identity.node_id in self.core.membership.peers

    def frame(
        self, kind: int, body: bytes, identity: Identity = PEER, *, swarm: bytes = SWARM, age: float = 0
    ) -> bytes:
        self.sequence += 1
        body = NO_TOPIC + body if kind == Kind.ITEM else body
        return frame_of(identity, swarm, kind, self.sequence, int((UNIX - age) * 1000), body)

    def hear(self, frame: bytes, link: Link = LINK, now: float = 0.0) -> list:
        actions = self.core.handle(Arrived(link, frame), at(now))
        self.charged += [action for action in actions if isinstance(action, ChargePrefix)]
        return [action for action in actions if not isinstance(action, ChargePrefix)]

    def say(self, kind: int, body: bytes, identity: Identity = PEER, link: Link = LINK) -> list:
        return self.hear(self.frame(kind, body, identity), link)

    def announce(self, entry: Entry, identity: Identity = PEER, link: Link = LINK) -> list:
        """Hear of an item; return what is done then, and at the next tick."""
        actions = self.say(Kind.HAVE, Have((entry,)).encode(), identity, link)
        return actions + self.core.handle(Tick(), at(LAN.announce_interval))

    def give(self, frame: bytes, link: Link = LINK, now: float = 0.0) -> list:
        """Announce an item, and send it, as it is asked for by then; return what is done."""
        entry = Entry(claimed_id(frame), len(frame))
        self.hear(control_frame(Kind.HAVE, Have((entry,)).encode()), link, now)
        self.core.handle(Tick(), at(now + LAN.announce_interval))
        return self.hear(frame, link, now)

    def publish(self, body: bytes) -> ItemId:
        """Publish an item; return its id."""
        body = NO_TOPIC + body
        self.core.handle(Offer(body), at(0))
        return item_id(ME.public_key, digest_of_hashes(chunk_hashes(body)))

    @property
    def rejected(self) -> dict[str, int]:
        return dict(self.core.scores.rejected)

    @property
    def score(self) -> float:
        return self.core.scores.score(PEER.node_id, at(0))


def pulls(actions: list) -> list[SendFrame]:
    frames = [action for action in actions if isinstance(action, SendFrame)]
    return [action for action in frames if opened(action.frame).kind == Kind.WANT]


def received(actions: list) -> list[Item]:
    return [action.item for action in actions if isinstance(action, Deliver)]


def test_an_item_is_delivered_with_its_signers_name_whoever_brings_it() -> None:
    talk = Talk()
    frame = talk.frame(Kind.ITEM, b"body", OTHER, age=60)
    (item,) = received(talk.give(frame))
    assert item == Item(
        item_id(OTHER.public_key, digest(NO_TOPIC + b"body")), OTHER.node_id, UNIX - 60, NO_TOPIC, frame
    )
    assert item.content == b"body"
    assert talk.rejected == {} and talk.core.items_received == 1


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("oversized", lambda talk: bytes(MAX_FRAME_BYTES + 1)),
        ("malformed", lambda talk: b"garbage"),
        ("malformed", lambda talk: talk.frame(Kind.HAVE, b"no announcement")),
        ("malformed", lambda talk: talk.frame(Kind.HELLO, b"no hello")),
        ("unasked_item", lambda talk: talk.frame(Kind.ITEM, b"body")),
        ("unasked_item", lambda talk: talk.frame(Kind.CHUNK, bytes(PLACE_BYTES) + b"data")),
        ("unasked_item", lambda talk: talk.frame(Kind.CHUNK, bytes(PLACE_BYTES - 1))),
    ],
)
def test_what_breaks_the_protocol_is_counted_and_costs_whoever_sent_it(reason: str, make) -> None:
    talk = Talk()
    assert talk.hear(make(talk)) == []
    assert talk.rejected == {reason: 1}
    assert talk.score < 0
    assert talk.charged == [ChargePrefix(LINK, -talk.score)]
    assert received(talk.give(talk.frame(Kind.ITEM, b"an honest item")))


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("forged", lambda talk: talk.frame(Kind.ITEM, b"body")[:-1] + b"!"),
        ("forged", lambda talk: talk.frame(Kind.ITEM, b"body")[:-1]),
        ("forged", lambda talk: OTHER.public_key + talk.frame(Kind.ITEM, b"body")[32:]),
        ("wrong_swarm", lambda talk: talk.frame(Kind.ITEM, b"body", swarm=b"another swarm id")),
        ("stale", lambda talk: talk.frame(Kind.ITEM, b"body", age=3601)),
        ("stale", lambda talk: talk.frame(Kind.ITEM, b"body", age=-601)),
    ],
)
def test_an_item_that_is_none_is_counted_and_costs_whoever_was_asked_for_it_and_sent_it(reason: str, make) -> None:
    talk = Talk()
    assert talk.give(make(talk)) == []
    assert talk.rejected == {reason: 1}
    assert talk.charged == [ChargePrefix(LINK, -talk.score)] and talk.score < 0
    assert received(talk.give(talk.frame(Kind.ITEM, b"an honest item")))


def given_by_two(talk: Talk, frame: bytes) -> list[Item]:
    """Ask one peer for an item, then, as it is silent, another; return what is delivered once both send it."""
    entry = Entry(claimed_id(frame), len(frame))
    talk.greet(OTHER, OTHER_LINK)
    for identity, link in ((PEER, LINK), (OTHER, OTHER_LINK)):
        talk.say(Kind.HAVE, Have((entry,)).encode(), identity, link)
    asked = {sent.link for tenth in range(100) for sent in pulls(talk.core.handle(Tick(), at(tenth / 10)))}
    assert asked == {LINK, OTHER_LINK}
    return received(talk.hear(frame, now=10.0) + talk.hear(frame, OTHER_LINK, now=10.0))


def test_the_same_item_from_another_peer_is_a_duplicate_and_from_one_that_was_not_asked_again_an_offence() -> None:
    talk = Talk()
    frame = talk.frame(Kind.ITEM, b"body")
    assert len(given_by_two(talk, frame)) == 1
    assert (talk.core.duplicates, talk.rejected) == (1, {})
    assert talk.hear(frame, now=10.0) == []
    assert talk.rejected == {"unasked_item": 1}


def test_an_item_that_was_asked_for_twice_may_come_twice() -> None:
    talk = Talk()
    frame = talk.frame(Kind.ITEM, b"body", OTHER)
    entry = Entry(open_frame(frame).item_id, len(frame), NO_TOPIC, hint(OTHER.node_id))
    asks = len(pulls(talk.say(Kind.HAVE, Have((entry,)).encode())))
    for tenth in range(200):
        asks += len(pulls(talk.core.handle(Tick(), at(tenth / 10))))
    assert asks > 1
    assert len(received(talk.hear(frame, now=20.0))) == 1
    for _ in range(asks - 1):
        talk.hear(frame, now=20.0)
    assert talk.rejected == {} and talk.score == 0.0
    talk.hear(frame, now=20.0)
    assert talk.rejected == {"unasked_item": 1}


def test_a_body_that_its_signer_signs_again_is_not_asked_for_again() -> None:
    talk = Talk()
    talk.greet(OTHER, OTHER_LINK)
    assert received(talk.give(talk.frame(Kind.ITEM, b"body")))
    again = talk.frame(Kind.ITEM, b"body")
    assert not pulls(talk.announce(Entry(claimed_id(again), len(again)), OTHER, OTHER_LINK))


def of_version(frame: bytes, version: int) -> bytes:
    """Return a frame as another major version says whose it is; the rest may be anything."""
    return frame[:HEADER_BYTES] + version.to_bytes(2) + frame[HEADER_BYTES + 2 :]


def hello_of(version: int) -> bytes:
    record = make_record(OTHER, SWARM, (), 1, "", int((UNIX + 3600) * 1000))
    return of_version(seal(OTHER, SWARM, Kind.HELLO, 1, int(UNIX * 1000), Hello(record.encoded).encode()), version)


@pytest.mark.parametrize(("version", "theirs"), [(0x0200, 0x0200), (0x0507, 0x0507), (0x96CD, EARLIER)])
def test_a_peer_that_dialled_us_in_another_version_is_told_ours_and_we_are_told_once(version: int, theirs: int) -> None:
    talk = Talk()
    (goodbye,) = talk.hear(hello_of(version), OTHER_LINK)
    told = [Refusal(Case.OTHER_VERSION, OTHER_LINK.key.hex(), goodbye_reason(theirs))]
    assert talk.core.membership.refusals.take() == told
    assert spoken_version(goodbye.frame) == VERSION
    assert Goodbye.decode(opened(goodbye.frame).body).reason == "other_version_4_0"
    assert talk.hear(hello_of(version), OTHER_LINK) == []  # it is parted from
    assert talk.core.handle(Tick(), at(5))
    again = talk.hear(hello_of(version), OTHER_LINK, now=60.0)
    assert [type(action) for action in again] == [SendFrame] and talk.core.membership.refusals.take() == []
    assert OTHER.node_id not in talk.core.membership.peers
    assert talk.core.scores.score(OTHER_LINK.key.hex(), at(60)) == 0.0


def test_the_log_has_few_lines_about_other_versions_however_many_keys_come() -> None:
    talk = Talk()
    for number in range(200):
        talk.hear(hello_of(0x0200), Link(number.to_bytes(32, "big"), dialled=False))
    assert len(talk.core.membership.refusals.take()) == LINES_BURST and talk.rejected == {"other_version": 200}


def test_a_peer_that_we_dialled_and_that_answers_in_another_version_is_named() -> None:
    talk = Talk()
    address = Address(Endpoint("10.0.0.7", 4001), OTHER.curve_key)
    talk.core = Core(Setup(ME, SWARM), Book((address,), LIMITS), random.Random(1), at(0))
    link = Link(OTHER.curve_key, dialled=True)
    talk.core.handle(Tick(), at(0))
    talk.core.handle(Opened(link), at(1))
    (goodbye,) = talk.hear(hello_of(0x0200), link, now=5)
    assert spoken_version(goodbye.frame) == VERSION
    assert talk.core.membership.refusals.take() == [
        Refusal(Case.OTHER_VERSION, "tcp://10.0.0.7:4001", "other_version_2_0")
    ]
    assert talk.core.membership.refusals.latest == "it speaks protocol 2.0"


def test_a_live_peer_that_changes_its_version_sends_nonsense() -> None:
    talk = Talk()
    assert talk.hear(of_version(talk.frame(Kind.HELLO, b"body"), 0x0200)) == []
    assert talk.rejected == {"forged": 1} and talk.score < 0


def test_a_repeated_frame_costs_no_second_signature_check(monkeypatch) -> None:
    talk, opened_ids = Talk(), []
    frame = talk.frame(Kind.ITEM, b"body")

    def count(frame: bytes, verify) -> Envelope:
        envelope = open_frame(frame, verify)
        opened_ids.extend([envelope.item_id] if envelope.kind == Kind.ITEM else [])
        return envelope

    monkeypatch.setattr("protocol.core.open_frame", count)
    assert given_by_two(talk, frame) and talk.core.duplicates == 1
    assert opened_ids == [claimed_id(frame)]


def test_what_has_to_be_sealed_is_not_taken_otherwise_and_the_other_way_round() -> None:
    talk = Talk()
    record = make_record(PEER, SWARM, (), 1, "", int((UNIX + 3600) * 1000))
    assert talk.hear(control_frame(Kind.HELLO, Hello(record.encoded).encode())) == []
    assert talk.hear(seal(PEER, SWARM, Kind.PING, 1, int(UNIX * 1000), Ping(1).encode())) == []
    assert talk.rejected == {"malformed": 2}
    unsealed = Entry(ItemId(bytes(32)), 300)
    assert pulls(talk.announce(unsealed))
    assert talk.hear(control_frame(Kind.ITEM, unsealed.id + bytes(300))) == []
    assert talk.rejected == {"malformed": 2, "forged": 1}


def test_a_kind_that_a_newer_minor_version_added_is_ignored_sealed_or_not_once_the_peer_is_known() -> None:
    talk = Talk()
    assert talk.hear(seal(PEER, SWARM, 99, 1, int(UNIX * 1000), b"\x90")) == []  # type: ignore[arg-type]
    assert talk.hear(control_frame(98, b"\x90")) == []
    assert talk.rejected == {}
    assert talk.hear(seal(OTHER, SWARM, 99, 1, int(UNIX * 1000), b"\x90"), OTHER_LINK) == []  # type: ignore[arg-type]
    assert talk.rejected == {"malformed": 1}


def test_a_forgery_does_not_keep_the_real_item_out() -> None:
    talk = Talk()
    frame = talk.frame(Kind.ITEM, b"body")
    forged = frame[:40] + bytes([frame[40] ^ 1]) + frame[41:]
    assert not received(talk.give(forged))
    assert received(talk.give(frame, now=60.0))


def test_a_stranger_gets_nothing_and_gives_nothing() -> None:
    talk = Talk()
    assert talk.hear(talk.frame(Kind.ITEM, b"body", OTHER), OTHER_LINK) == []
    assert talk.hear(talk.frame(Kind.PING, Ping(1).encode(), OTHER), OTHER_LINK) == []
    assert talk.rejected == {"no_hello": 2}
    talk.core.handle(Offer(NO_TOPIC + b"mine"), at(0))
    told = talk.core.handle(Tick(), at(LAN.announce_interval))
    assert {action.link for action in told if isinstance(action, SendFrame)} == {LINK}


def test_what_one_that_we_dialled_says_before_it_answers_our_hello_is_nobodys_fault() -> None:
    """It holds us for live since an earlier hello, and takes one a second: so it is when a person joins and trains."""
    address, dialled = Address(Endpoint("192.0.2.1", 4001), PEER.curve_key), Link(PEER.curve_key, dialled=True)
    core = Core(Setup(ME, SWARM), Book((address,), Limits(max_known_peers=16)), random.Random(1), at(0))
    ping = control_frame(Kind.PING, Ping(1).encode())
    assert Dial(address) in core.handle(Tick(), at(0))
    core.handle(Opened(dialled, "192.0.2.1"), at(0))
    core.handle(Arrived(dialled, ping), at(0))
    assert not core.scores.rejected
    core.handle(Arrived(Link(PEER.curve_key, dialled=False), ping), at(0))
    assert core.scores.rejected == {"no_hello": 1}


def test_what_was_on_its_way_when_a_link_ended_is_nobodys_fault() -> None:
    talk = Talk()
    assert HangUp(LINK) in talk.say(Kind.GOODBYE, Goodbye("rotated").encode())
    assert talk.say(Kind.ITEM, b"behind the goodbye") == []
    talk.greet(OTHER, OTHER_LINK)
    talk.core.handle(Closed(OTHER_LINK), at(0))
    assert talk.say(Kind.PING, Ping(1).encode(), OTHER, OTHER_LINK) == []
    assert talk.rejected == {}
    talk.core.handle(Accepted(OTHER_LINK, "127.0.0.1"), at(0))
    talk.say(Kind.PING, Ping(2).encode(), OTHER, OTHER_LINK)
    assert talk.rejected == {"no_hello": 1}


@pytest.mark.parametrize("kind", [24, 200], ids=lambda kind: f"{kind}")
def test_a_kind_that_is_unknown_or_no_more_is_ignored(kind: int) -> None:
    talk = Talk()
    assert talk.say(kind, b"from another node") == []
    assert talk.rejected == {}


def test_only_a_rejected_item_costs_its_signer() -> None:
    talk = Talk()
    (item,) = received(talk.give(talk.frame(Kind.ITEM, b"body")))
    talk.core.handle(Judgement(item.id, ItemVerdict.ACCEPT, ""), at(0))
    talk.core.handle(Judgement(item.id, ItemVerdict.IGNORE, "unknown_task"), at(0))
    assert talk.score == 0 and talk.rejected == {"unknown_task": 1}
    talk.core.handle(Judgement(item.id, ItemVerdict.REJECT, "lie"), at(0))
    assert talk.score < 0 and talk.rejected == {"unknown_task": 1, "lie": 1}


def test_a_liars_items_are_refused_from_everybody_and_a_relay_is_not_blamed() -> None:
    talk = Talk()
    for number in range(30):
        for item in received(talk.give(talk.frame(Kind.ITEM, b"lie %d" % number, OTHER))):
            talk.core.handle(Judgement(item.id, ItemVerdict.REJECT, "lie"), at(0))
    assert talk.rejected["lie"] == 21 and talk.rejected["graylisted"] == 9
    assert talk.score == 0
    assert received(talk.give(talk.frame(Kind.ITEM, b"the relay's own item")))


def test_a_stale_item_costs_its_signer_and_not_whoever_passes_it_on() -> None:
    talk = Talk()
    stale = talk.frame(Kind.ITEM, b"old", OTHER, age=Limits().max_item_age_s + 1)
    item = item_id(OTHER.public_key, digest(NO_TOPIC + b"old"))
    assert pulls(talk.announce(Entry(item, len(stale), NO_TOPIC, hint(OTHER.node_id))))
    assert not received(talk.hear(stale))
    for second in range(1, 60):  # nor is it a promise that was broken
        talk.core.handle(Tick(), at(second))
        talk.core.membership.heard(PEER.node_id, at(second))
    assert talk.rejected == {"stale": 1} and talk.score == 0
    assert not received(talk.give(talk.frame(Kind.ITEM, b"own", age=Limits().max_item_age_s + 1)))
    assert talk.rejected == {"stale": 2} and talk.score < 0


def test_a_signer_that_states_two_sizes_of_one_item_pays_itself_and_not_who_holds_the_other() -> None:
    """A hostile peer gives the outline with the wrong size, an honest one a chunk of what it was given itself."""
    talk = Talk()
    talk.greet(OTHER, OTHER_LINK)
    liar = Identity(bytes([3]) * 32)
    chunks = [bytes(CHUNK_BYTES), b"the end"]
    hashes = b"".join(map(chunk_hashes, chunks))
    root = digest_of_hashes(hashes)
    header = struct.pack(">HH16sQQI32s", VERSION, Kind.ITEM, SWARM, 1, int(UNIX * 1000), CHUNK_BYTES + 9, root)
    head = liar.public_key + liar.sign(b"gossamer/envelope/3\x00" + header) + header
    item = item_id(liar.public_key, root)
    entry = Entry(item, CHUNK_BYTES + 500)
    assert [action.link for action in pulls(talk.announce(entry, OTHER, OTHER_LINK))] == [OTHER_LINK]
    talk.say(Kind.HAVE, Have((entry,)).encode())
    asked = talk.say(Kind.OUTLINE, ItemOutline(head, hashes).encode(), OTHER, OTHER_LINK)
    asked += talk.core.handle(Closed(OTHER_LINK), at(1)) + talk.core.handle(Tick(), at(5))
    frames = [opened(action.frame) for action in asked if isinstance(action, SendFrame) and action.link == LINK]
    parts = [part for frame in frames if frame.kind == Kind.WANT for part in Want.decode(frame.body).parts]
    assert {index for part in parts for index in part.chunks} == {0, 1}
    for index in (0, 1):
        talk.say(Kind.CHUNK, item + index.to_bytes(2, "big") + chunks[index])
    assert talk.score == 0.0 and talk.core.scores.score(liar.node_id, at(0)) == -PENALTIES["malformed"]
    assert talk.rejected == {"malformed": 1}


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("false_chunk", lambda place, data: place + data[:-1] + b"!"),
        ("false_chunk", lambda place, data: place + data[:-1]),
        ("malformed", lambda place, data: place + data + b"!"),
    ],
    ids=["other data", "less data", "more than a chunk"],
)
def test_a_chunk_that_is_none_costs_its_sender_and_not_the_items_signer(reason: str, make) -> None:
    talk = Talk()
    signer = Identity(bytes([3]) * 32)
    data = bytes(CHUNK_BYTES)
    frame = seal(signer, SWARM, Kind.ITEM, 1, int(UNIX * 1000), data + b"the end")
    item, hashes = header_of(frame).item_id, chunk_hashes(data + b"the end")
    talk.announce(Entry(item, len(frame)))
    talk.say(Kind.OUTLINE, ItemOutline(frame[:HEAD_BYTES], hashes).encode())
    talk.say(Kind.CHUNK, make(item + bytes(2), data))
    assert talk.rejected == {reason: 1} and talk.score == -PENALTIES[reason]
    assert talk.core.scores.score(signer.node_id, at(0)) == 0.0


def outline(data: bytes = bytes(2 * CHUNK_BYTES), kind: Kind = Kind.ITEM, swarm: bytes = SWARM) -> ItemOutline:
    return ItemOutline(seal(OTHER, swarm, kind, 1, int(UNIX * 1000), data)[:HEAD_BYTES], chunk_hashes(data))


@pytest.mark.parametrize(
    ("reason", "false"),
    [
        ("forged", ItemOutline(outline().head[:-1] + b"!", outline().hashes)),
        ("malformed", ItemOutline(outline().head, outline(bytes(CHUNK_BYTES) + b"!").hashes)),
        ("malformed", outline(kind=Kind.HELLO)),
        ("malformed", outline(b"one chunk")),
        ("wrong_swarm", outline(swarm=b"another swarm id")),
        ("oversized", outline(bytes(3 * CHUNK_BYTES))),
    ],
    ids=["another digest", "other hashes", "no item", "one chunk", "another swarm", "larger than any item"],
)
def test_an_outline_that_is_none_costs_its_sender_and_no_chunk_of_it_is_asked_for(
    reason: str, false: ItemOutline
) -> None:
    talk = Talk(Limits(max_item_bytes=2 * CHUNK_BYTES))
    assert pulls(talk.announce(Entry(header_of(false.head).item_id, HEAD_BYTES + CHUNK_BYTES + 1)))
    assert talk.say(Kind.OUTLINE, false.encode()) == []
    assert talk.rejected == {reason: 1} and talk.score == -PENALTIES[reason]
    honest = outline()
    talk.announce(Entry(header_of(honest.head).item_id, HEAD_BYTES + 2 * CHUNK_BYTES))
    assert pulls(talk.say(Kind.OUTLINE, honest.encode()))


def test_an_item_that_was_sent_unasked_is_taken_when_it_is_asked_for() -> None:
    talk = Talk()
    frame = talk.frame(Kind.ITEM, b"body", OTHER)
    assert not received(talk.hear(frame))
    assert received(talk.give(frame, now=5.0))
    assert talk.rejected == {"unasked_item": 1}


@pytest.mark.parametrize("kind", [Kind.ITEM, Kind.CHUNK])
def test_who_sends_what_nobody_asked_for_is_refused_for_its_bytes_however_it_links_and_its_network_pays(kind) -> None:
    """700 MB came in the first minute where pushes were free."""
    talk, came = Talk(), 0
    while not talk.core.refuses(LINK.key, at(0)):
        talk.core.handle(Closed(LINK), at(0))
        talk.greet(PEER, LINK)
        frame = talk.frame(kind, came.to_bytes(32) + bytes(60_000))
        assert not received(talk.hear(frame))
        came += len(frame)
    assert came < 1_000_000
    assert sum(charge.points for charge in talk.charged) == -talk.score


def test_a_refused_peer_that_talks_on_while_it_is_parted_from_is_hung_up_on_once_its_network_has_paid_enough() -> None:
    talk, came = Talk(), 0
    talk.core.scores.offence("lie", PEER.node_id, at(0), 50)
    frame = talk.frame(Kind.ITEM, bytes(60_000))
    assert HangUp(LINK) not in talk.hear(frame)  # so that it hears why
    while HangUp(LINK) not in talk.hear(frame):
        came += len(frame)
    assert came < 3_000_000


@pytest.mark.parametrize("kind", [Kind.ASK_MANIFEST, Kind.ASK_REVOCATIONS, Kind.DIGEST, Kind.WANT])
def test_a_peer_pays_for_the_bytes_that_its_asking_makes_us_send(kind) -> None:
    """Whatever it asks for, once its network has nothing left its frames wait."""
    talk = Talk(Limits(network_cores=1e-9, network_burst_s=0.1), manifest=b"m" * 30_000)
    item = talk.publish(bytes(65_000))
    ask = {
        Kind.ASK_MANIFEST: b"",
        Kind.ASK_REVOCATIONS: AskRevocations(0).encode(),
        Kind.DIGEST: Digest(()).encode(),
        Kind.WANT: Want((WantedPart(item),)).encode(),
    }[kind]
    answers = []
    for _ in range(1000):
        for action in talk.hear(control_frame(kind, ask)):
            if isinstance(action, SendFrame):
                answers.append(action.frame)
            elif isinstance(action, FillLink):
                answers.append(talk.core.make_frame(LINK, at(0)))
    assert len(answers) * FRAME_S + sum(map(len, answers)) * SENT_BYTE_S <= 0.1
    assert talk.hear(control_frame(Kind.PING, Ping(1).encode())) == []


def test_a_persistent_offender_is_dropped_refused_and_heard_again_after_a_while() -> None:
    talk = Talk()
    for _ in range(11):
        talk.hear(b"garbage")
    actions = talk.say(Kind.ITEM, b"body")
    assert [opened(action.frame).kind for action in actions] == [Kind.GOODBYE]
    assert talk.core.membership.peers == []
    (told,) = talk.core.membership.refusals.take()
    assert (told.case, told.who, told.reason) == (Case.OFFENDER, PEER.node_id, "malformed")
    record = make_record(PEER, SWARM, (), 1, "", int((UNIX + 36000) * 1000))
    hello = talk.frame(Kind.HELLO, Hello(record.encoded).encode())
    assert talk.hear(hello) == []
    assert talk.rejected == {"malformed": 11, "graylisted": 2}
    assert talk.hear(hello, now=3600.0) != []
    assert talk.core.membership.peers == [PEER.node_id]


def test_a_live_peer_stays_live_however_many_strangers_greet_and_leave() -> None:
    talk = Talk()
    for number in range(3, 1103):
        stranger = Identity(number.to_bytes(32, "big"))
        record = make_record(stranger, SWARM, (), 1, "", int((UNIX + 3600) * 1000))
        link = Link(stranger.curve_key, dialled=False)
        talk.say(Kind.HELLO, Hello(record.encoded).encode(), stranger, link)
        talk.core.handle(Closed(link), at(0))
        if number % 50 == 0:
            assert talk.say(Kind.PING, Ping(number).encode()), number
    assert talk.core.membership.live_node(LINK) == PEER.node_id
    assert talk.rejected == {}


def test_two_live_peers_never_hold_one_key() -> None:
    talk = Talk()
    other = Identity(bytes([7]) * 32)
    other.curve_key = PEER.curve_key
    record = make_record(other, SWARM, (), 1, "", int((UNIX + 3600) * 1000))
    talk.say(Kind.HELLO, Hello(record.encoded).encode(), other)
    assert talk.rejected == {"impostor": 1} and talk.core.membership.peers == [PEER.node_id]


def rekeyed(identity_seed: int) -> Identity:
    """The identity of that seed under another CURVE key than its own."""
    identity = Identity(bytes([identity_seed]) * 32)
    identity.curve_key = b"another curve key of that node !"
    return identity


def test_a_refused_node_is_refused_under_every_key_that_it_brings_and_each_such_key_with_it() -> None:
    talk = Talk()
    talk.core.scores.offence("lie", OTHER.node_id, at(1), 50)
    other = rekeyed(2)
    link = Link(other.curve_key, dialled=False)
    assert not talk.core.refuses(other.curve_key, at(2))
    record = make_record(other, SWARM, (), 1, "", int((UNIX + 3600) * 1000))
    hello = talk.frame(Kind.HELLO, Hello(record.encoded).encode(), other)
    (goodbye,) = talk.hear(hello, link, now=2.0)
    assert Goodbye.decode(opened(goodbye.frame).body).reason == "graylisted"
    assert OTHER.node_id not in talk.core.membership.peers
    assert talk.core.refuses(other.curve_key, at(2)) and not talk.core.refuses(other.curve_key, at(3600))


def test_a_captured_hello_of_a_refused_node_makes_nobody_elses_key_refused() -> None:
    talk = Talk()
    talk.core.scores.offence("lie", OTHER.node_id, at(1), 50)
    record = make_record(OTHER, SWARM, (), 1, "", int((UNIX + 3600) * 1000))
    link = Link(b"k" * 32, dialled=False)
    talk.hear(talk.frame(Kind.HELLO, Hello(record.encoded).encode(), OTHER), link, now=2.0)
    assert talk.rejected["impostor"] == 1 and not talk.core.refuses(link.key, at(2))


def test_who_was_expelled_is_not_dialled_until_its_refusal_is_over() -> None:
    talk = Talk()
    record = make_record(OTHER, SWARM, (Endpoint("other", 1),), 1, "", int((UNIX + 36000) * 1000))
    talk.say(Kind.HELLO, Hello(record.encoded).encode(), OTHER, OTHER_LINK)
    talk.core.scores.offence("lie", OTHER.node_id, at(1), 50)
    assert OTHER.node_id in talk.core.membership.peers
    talk.hear(b"x" * 200, OTHER_LINK, now=1.0)
    assert OTHER.node_id not in talk.core.membership.peers

    def dialled_by(seconds: float) -> bool:
        talk.core.membership.heard(PEER.node_id, at(seconds))
        return any(isinstance(action, Dial) for action in talk.core.handle(Tick(), at(seconds)))

    assert not any(dialled_by(second) for second in range(2, int(LIMITS.first_refusal_s)))
    assert dialled_by(LIMITS.first_refusal_s + 2)


def test_a_lie_costs_the_network_that_its_signer_dialled_from_and_not_that_of_its_relay() -> None:
    talk = Talk()
    for signer in (PEER, OTHER):
        (item,) = received(talk.give(talk.frame(Kind.ITEM, b"lie", signer)))
        charged = talk.core.handle(Judgement(item.id, ItemVerdict.REJECT, "lie"), at(0))
        assert charged == ([ChargePrefix(LINK, 1.0)] if signer is PEER else [])


def test_who_answers_nothing_pays_and_its_network_does_not() -> None:
    talk = Talk()
    talk.core.handle(Subscribe(None, float("inf")), at(0))
    for second in range(6):
        names = (ItemId(number.to_bytes(32)) for number in range(10 * second, 10 * second + 10))
        talk.hear(talk.frame(Kind.HAVE, Have(tuple(Entry(name, 1000) for name in names)).encode()), now=second)
        talk.charged += [action for action in talk.core.handle(Tick(), at(second)) if isinstance(action, ChargePrefix)]
    assert talk.rejected == {"unanswered": 1} and talk.score < -PENALTIES["unanswered"] / 2
    assert talk.charged == []


def test_a_strangers_offences_are_held_against_its_key() -> None:
    talk = Talk()
    for _ in range(12):
        talk.hear(b"garbage", OTHER_LINK)
    assert talk.rejected == {"malformed": 11, "graylisted": 1}


def test_a_stranger_that_talks_without_a_hello_pays_and_its_network_too() -> None:
    """Each such message costs us a signature, and strangers of one network may send 2,000 a second."""
    talk = Talk()
    frame = talk.frame(Kind.PING, Ping(1).encode(), OTHER)
    for _ in range(1010):
        talk.hear(frame, OTHER_LINK)
    assert talk.rejected["graylisted"] > 0
    assert {charge.link for charge in talk.charged} == {OTHER_LINK}
    assert sum(charge.points for charge in talk.charged) > -Limits().graylist_score


LEAN = Limits(network_cores=0.001, network_burst_s=0.002, waiting_bytes=8_000)  # ten small messages, one a 0.2 s


def test_a_flood_is_dropped_and_counted() -> None:
    """What its network's quota does not cover waits, as far as there is room; the rest costs points by its price."""
    talk = Talk(LEAN)
    for _ in range(500):
        talk.say(Kind.PING, Ping(1).encode())
    assert 400 < talk.rejected["flood"] < 460
    assert talk.score == pytest.approx(-PENALTIES["flood"] * talk.rejected["flood"] * FRAME_S, rel=0.05)
    answers = sum(len(talk.core.handle(Tick(), at(second))) for second in range(1, 40))
    assert answers > 40, "what waited is answered, in time"


def test_a_flood_by_one_key_after_the_other_costs_its_network_handshakes_and_is_no_new_payer_as_it_parts() -> None:
    talk, ping = Talk(replace(Limits(), waiting_bytes=0)), control_frame(Kind.PING, Ping(1).encode())
    read: dict[Link, int] = {}
    for number in range(3):
        identity = Identity(bytes([90, number]) * 16)
        link = Link(identity.curve_key, dialled=False)
        talk.core.handle(Accepted(link, f"198.41.0.{number}"), at(number))
        talk.greet(identity, link, now=number)
        while HangUp(link) not in talk.hear(ping, link, now=number):
            read[link] = read.get(link, 0) + 1
    assert all(frames < 2500 for frames in list(read.values())[1:]), "it was 5,000 more, for each key"
    for link in read:
        charged = sum(charge.points for charge in talk.charged if charge.link == link)
        assert charged > -Limits().graylist_score


def test_many_keys_of_one_network_cost_no_more_than_one_and_each_is_heard_in_turn() -> None:
    talk = Talk(replace(LEAN, waiting_bytes=1 << 20))
    links = []
    for number in range(4):
        identity = Identity(bytes([90, number]) * 16)
        links.append(Link(identity.curve_key, dialled=False))
        talk.core.handle(Accepted(links[-1], f"198.41.0.{number}"), at(0))
        talk.greet(identity, links[-1], now=number)
    cheap, dear = control_frame(Kind.PING, Ping(1).encode()), control_frame(Kind.CANCEL, MANY_CHUNKS.encode())

    def spoke(start: int, link: Link, frame: bytes) -> list[int]:
        """Let the first one flood, and `link` speak; return when it is answered."""
        for _ in range(8):
            talk.hear(dear, links[0], now=start)
        answers = [(start, action) for action in talk.hear(frame, link, now=start)]
        for second in range(start + 1, start + 200):
            answers += [(second, action) for action in talk.core.handle(Tick(), at(second))]
        return [
            second
            for second, action in answers
            if isinstance(action, SendFrame) and action.link == link and opened(action.frame).kind == Kind.PONG
        ]

    (when,) = spoke(100, links[1], cheap)
    assert 100 < when < 130, "after one of the eight, and not after all"
    other = Link(OTHER.curve_key, dialled=False)
    talk.core.handle(Accepted(other, "193.0.14.129"), at(400))
    talk.greet(OTHER, other, now=400)
    assert spoke(500, other, cheap) == [500], "another network pays for itself"


def test_strangers_of_a_peers_network_do_not_use_up_its_quota_and_are_hung_up_on() -> None:
    talk = Talk(replace(LEAN, waiting_bytes=0))
    neighbour = Identity(bytes(31) + b"9")
    links = [Link(identity.curve_key, dialled=False) for identity in (neighbour, OTHER)]
    for number, link in enumerate(links):
        talk.core.handle(Accepted(link, f"198.41.0.{number}"), at(0))
    talk.greet(neighbour, links[0])
    ping, ended = control_frame(Kind.PING, Ping(1).encode()), []
    for _ in range(3000):
        ended += talk.hear(ping, links[1], now=5)
    assert HangUp(links[1]) in ended and talk.rejected["flood"] > 500
    assert talk.hear(ping, links[0], now=5), "the peer's own quota is there"


def test_what_was_asked_for_is_taken_though_the_senders_network_has_used_up_its_quota() -> None:
    talk = Talk(replace(LEAN, waiting_bytes=0))
    frame = talk.frame(Kind.ITEM, bytes(10_000), OTHER)
    entry = Entry(claimed_id(frame), len(frame))
    assert pulls(talk.announce(entry))
    for _ in range(20):
        talk.say(Kind.PING, Ping(1).encode())
    assert talk.rejected["flood"] > 0
    assert received(talk.hear(frame))
    assert not received(talk.say(Kind.ITEM, b"nobody asked for this"))


@pytest.mark.parametrize("acknowledged", [True, False])
def test_one_item_asked_for_again_and_again_leaves_at_the_rate_of_a_quota(acknowledged: bool) -> None:
    """It left as fast as the line took it: 3.9 GB in ten seconds."""
    talk = Talk()
    item = talk.publish(bytes(5_000_000))
    want = Want((WantedPart(item, tuple(range(16))),)).encode()
    given = 0
    for step in range(1000):
        now = step / 100
        talk.hear(control_frame(Kind.WANT, want), now=now)
        talk.core.handle(Tick(), at(now))
        while frame := talk.core.make_frame(LINK, at(now)):
            given += len(frame)
            if acknowledged:
                talk.hear(control_frame(Kind.ACK, want), now=now)
    limits = Limits()
    most = (limits.network_burst_s / 2 + 10 * limits.network_cores) / SENT_BYTE_S
    assert 100_000_000 < given < most if acknowledged else given < 3 * CHUNK_BYTES
    assert talk.rejected == {}, "and it is no offence: the others are asked meanwhile"


def test_what_waits_for_a_quota_is_given_later_and_the_peer_is_told_that_it_waits() -> None:
    talk = Talk(Limits(network_cores=0.001, network_burst_s=0.002))
    item = talk.publish(bytes(5_000_000))
    want = Want((WantedPart(item, tuple(range(16))),)).encode()
    talk.say(Kind.WANT, want)
    given, told = 0, 0
    for second in range(60):
        for action in talk.core.handle(Tick(), at(second)):
            told += isinstance(action, SendFrame) and opened(action.frame).kind == Kind.BUSY
            while isinstance(action, FillLink) and talk.core.make_frame(LINK, at(second)):
                given += 1
                talk.hear(control_frame(Kind.ACK, want), now=second)
    assert given == 16 and told > 3


def test_what_was_told_before_a_bad_record_makes_room_as_if_there_were_none() -> None:
    talk = Talk()
    told = [make_record(Identity(bytes([n]) * 32), SWARM, (), 1, "", int((UNIX + 60) * 1000)) for n in range(50, 90)]
    talk.say(Kind.PEERS, Peers((*(record.encoded for record in told), b"bad")).encode())
    assert talk.rejected == {"malformed": 1}
    book = talk.core.membership.book
    assert len(book.candidates(PEER.node_id)) <= book.capacity // CANDIDATES


def test_a_caller_for_whom_there_is_no_room_is_hung_up_on_however_often_it_greets() -> None:
    talk = Talk(Limits(max_callers=1))
    hello = Hello(make_record(OTHER, SWARM, (), 1, "", int((UNIX + 3600) * 1000)).encoded).encode()
    ended = []
    for second in range(4):
        talk.hear(talk.frame(Kind.HELLO, hello, OTHER), OTHER_LINK, now=second)
        ended += talk.core.handle(Tick(), at(second))
    assert HangUp(OTHER_LINK) in ended and list(talk.core.membership.peers) == [PEER.node_id]


def test_a_caller_for_whom_there_is_no_room_gets_the_manifest_nevertheless_and_a_stranger_does_not() -> None:
    manifest = b"a manifest"
    talk = Talk(Limits(max_callers=1), manifest=manifest)
    asks = talk.frame(Kind.ASK_MANIFEST, b"", OTHER)
    assert talk.hear(asks, OTHER_LINK) == [] and talk.rejected == {"no_hello": 1}
    talk.hear(
        talk.frame(
            Kind.HELLO,
            Hello(make_record(OTHER, SWARM, (), 1, "", int((UNIX + 3600) * 1000)).encoded).encode(),
            OTHER,
        ),
        OTHER_LINK,
    )
    (answer,) = talk.hear(talk.frame(Kind.ASK_MANIFEST, b"", OTHER), OTHER_LINK)
    assert isinstance(answer, SendFrame) and manifest in answer.frame
    assert list(talk.core.membership.peers) == [PEER.node_id]


def test_the_room_for_large_items_is_counted_for_the_network_that_a_peer_is_seen_in() -> None:
    talk = Talk()
    talk.core.handle(Accepted(OTHER_LINK, "198.41.0.4"), at(0))
    talk.greet(OTHER, OTHER_LINK)
    assert talk.core.gossip._wants._holders[OTHER.node_id].voice == "198.41.0.0/24"


@pytest.mark.parametrize("moves", [True, False])
def test_a_peer_of_which_a_frame_takes_minutes_is_not_thought_dead(moves: bool) -> None:
    talk = Talk()
    for second in range(2 * int(LAN.death_bound)):
        if moves:
            talk.core.handle(Moving(LINK), at(second))
        talk.core.handle(Tick(), at(second))
    assert talk.core.membership.deaths == (not moves)


def test_what_never_became_a_link_is_counted() -> None:
    talk = Talk()
    talk.core.handle(RefusedEarly("handshake"), at(0))
    talk.core.handle(RefusedEarly("malformed", LINK), at(0))
    assert talk.rejected == {"handshake": 1, "malformed": 1}


def test_a_published_frame_is_signed_and_given_as_it_will_be_relayed() -> None:
    talk = Talk()
    mine = talk.publish(b"mine")
    assert talk.say(Kind.WANT, Want((WantedPart(mine),)).encode()) == [FillLink(LINK)]
    envelope = open_frame(talk.core.make_frame(LINK, at(0)))
    assert (envelope.public_key, envelope.body, envelope.kind) == (ME.public_key, NO_TOPIC + b"mine", Kind.ITEM)
    assert talk.core.handle(Offer(NO_TOPIC + b"mine"), at(1)) == []


def test_waiting_is_bounded_by_the_next_timer() -> None:
    talk = Talk()
    talk.core.handle(Tick(), at(1))
    assert 0.4 < talk.core.wait(at(1)) <= 0.5
    talk.core.handle(Offer(NO_TOPIC + bytes(100_000)), at(1))
    assert talk.core.wait(at(1)) == pytest.approx(LAN.announce_interval)


@given(st.lists(st.tuples(st.binary(max_size=300), st.integers(0, 9), st.booleans()), max_size=20))
def test_no_bytes_raise_from_the_core(frames) -> None:
    talk = Talk()
    for body, kind, signed in frames:
        talk.hear(talk.frame(kind, body) if signed else body)
    talk.core.handle(Tick(), at(1))


def test_a_live_peers_bytes_are_counted_apart_from_strangers_and_forgotten_when_it_goes() -> None:
    talk = Talk()
    (peer,) = talk.core.traffic.values()
    assert (peer.since, peer.received) == (0.0, 0)  # its hello came from a stranger
    frame = talk.frame(Kind.PING, Ping(1).encode())
    (pong,) = talk.hear(frame, now=1.0)
    talk.core.note_sent(pong)
    stranger = talk.frame(Kind.PING, Ping(1).encode(), OTHER)
    talk.hear(stranger, OTHER_LINK)
    talk.core.note_sent(SendFrame(OTHER_LINK, bytes(99)))
    assert talk.core.traffic == {PEER.node_id: Traffic(0.0, len(frame), len(pong.frame))}
    (described,) = describe_peers(talk.core, at(5))
    assert (described.age_s, described.bytes_received, described.bytes_sent) == (5.0, len(frame), len(pong.frame))
    assert described.score == 0.0
    talk.hear(b"garbage")
    assert describe_peers(talk.core, at(5))[0].score == pytest.approx(-PENALTIES["malformed"], rel=0.01)
    talk.core.handle(Closed(LINK), at(6))
    assert talk.core.traffic == {} and describe_peers(talk.core, at(6)) == []


def test_a_defect_in_a_core_is_counted_and_the_driver_goes_on(monkeypatch) -> None:
    talk = Talk()
    network = MemoryNetwork(Conditions(), random.Random(1), lambda _: None)
    got: list[Item] = []
    driver = Driver(talk.core, MemoryTransport(network, ME.curve_key, None), lambda: at(0), got.append)
    bad, good = talk.frame(Kind.ITEM, b"bad"), talk.frame(Kind.ITEM, b"good")

    def break_on_bad(frame: bytes, check: Verify):
        if frame == bad:
            raise ZeroDivisionError
        return open_frame(frame, check)

    monkeypatch.setattr("protocol.core.open_frame", break_on_bad)
    for frame in (bad, good):
        driver.feed(Arrived(LINK, control_frame(Kind.HAVE, Have((Entry(claimed_id(frame), len(frame)),)).encode())))
    talk.core.handle(Tick(), at(LAN.announce_interval))
    driver.feed(Arrived(LINK, bad))
    driver.feed(Arrived(LINK, good))
    assert talk.rejected == {"internal": 1}
    assert [item.content for item in got] == [b"good"]


def test_what_waits_for_a_link_is_made_a_frame_of_and_counted_when_it_leaves() -> None:
    talk = Talk()
    talk.say(Kind.WANT, Want((WantedPart(talk.publish(b"mine")),)).encode())
    assert talk.core.items_sent == talk.core.bytes_sent == 0
    frame = talk.core.make_frame(LINK, at(1))
    assert frame and (talk.core.items_sent, talk.core.bytes_sent) == (1, len(frame))
    assert talk.core.make_frame(LINK, at(1)) == talk.core.make_frame(OTHER_LINK, at(1)) == b""


def test_what_waits_for_a_peers_second_link_when_that_ends_waits_for_the_other() -> None:
    us, them = sorted((ME, PEER), key=lambda identity: identity.node_id)  # the link that we dial is kept
    called, dialled = (Link(them.curve_key, dialled=action) for action in (False, True))
    address = Address(Endpoint("192.0.2.1", 4001), them.curve_key)
    core = Core(Setup(us, SWARM), Book((address,), Limits(max_known_peers=16)), random.Random(1), at(0))
    record = make_record(them, SWARM, (), 1, "", int((UNIX + 3600) * 1000))
    greeting = frame_of(them, SWARM, Kind.HELLO, 1, int(UNIX * 1000), Hello(record.encoded).encode())
    assert Dial(address) in core.handle(Tick(), at(0))
    core.handle(Arrived(called, greeting), at(0))
    core.handle(Offer(body := NO_TOPIC + b"body"), at(0))
    want = Want((WantedPart(item_id(us.public_key, digest(body))),))
    (turn,) = core.handle(Arrived(called, control_frame(Kind.WANT, want.encode())), at(0))
    core.handle(Opened(dialled, "192.0.2.1"), at(0))
    core.handle(Arrived(dialled, greeting), at(0))
    assert turn.link == called and core.membership.link_of(them.node_id) == dialled
    ended = core.handle(Tick(), at(GRACE_S))
    assert [action for action in ended if isinstance(action, HangUp | FillLink)][:2] == [
        HangUp(called),
        FillLink(dialled),
    ]
    again = core.handle(Closed(called), at(GRACE_S))
    assert [action.link for action in again if isinstance(action, FillLink)] == [dialled]
    assert core.make_frame(dialled, at(3)) and not core.make_frame(dialled, at(3))


@pytest.mark.parametrize("full", [False, True])
def test_a_holder_whose_queue_is_full_is_not_blamed_for_what_it_was_not_told(full: bool) -> None:
    talk, asked = Talk(), 0
    for second in range(20):  # it goes on announcing
        entry = Entry(ItemId(bytes([second]) * 32), HEAD_BYTES + 100, NO_TOPIC, hint(OTHER.node_id))
        said = talk.hear(talk.frame(Kind.HAVE, Have((entry,)).encode()), now=float(second))
        asked += len(pulls([*said, *talk.core.handle(Tick(), at(second + 0.5))]))
        if full:
            talk.core.handle(RefusedEarly(QUEUE_FULL, LINK), at(second + 0.5))
    assert asked and ("unanswered" in talk.rejected) == (not full)


def test_a_node_counts_itself_among_those_that_can_be_dialled_until_others_say_that_it_cannot() -> None:
    endpoints = (Endpoint("192.168.0.7", 4001),)
    core = Core(Setup(ME, SWARM, endpoints), Book((), Limits(max_known_peers=16)), random.Random(1), at(0))
    assert dialable_members(core) == 1
    record = make_record(PEER, SWARM, (), 1, "", int((UNIX + 3600) * 1000))
    greeting = frame_of(PEER, SWARM, Kind.HELLO, 1, int(UNIX * 1000), Hello(record.encoded).encode())
    core.handle(Accepted(LINK, "93.184.1.1"), at(0))
    core.handle(Arrived(LINK, greeting), at(0))
    core.handle(Tick(), at(2))
    core.handle(Arrived(LINK, control_frame(Kind.DIALLED_BACK, DialledBack("198.41.0.4", 4001, False).encode())), at(3))
    assert core.membership.reachability.standing.dialable is False and dialable_members(core) == 0
