"""Envelope, records and messages: what is valid comes back, and nothing else raises but the typed error."""

import hashlib
import json
import random
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.large_items import Cores
from protocol.credentials.grants import REFUSALS
from protocol.credentials.records import (
    MAX_AGENT_BYTES,
    MAX_ENDPOINTS,
    MAX_GRANT_BYTES,
    MAX_RECORD_BYTES,
    MAX_RECORD_LIFE_S,
    MAX_SERVICE_BYTES,
    MAX_SERVICES,
    Address,
    Endpoint,
    Service,
    make_record,
    open_record,
)
from protocol.errors import BadAddress, EnvelopeError, MessageError, RecordError
from protocol.identity import Identity, id_of_bytes
from protocol.limits.limits import MIB, Limits
from protocol.limits.quotas import BYTE_S, FRAME_S, GIVEN_S, SENT_BYTE_S, SIGNATURE_S
from protocol.limits.timing import LOCAL, WAN
from protocol.membership.membership import NO_ROOM
from protocol.refusals import GRAYLISTED
from protocol.wire import messages
from protocol.wire.encoding import MAX_ARRAYS
from protocol.wire.envelope import (
    CHUNK_BYTES,
    HEAD_BYTES,
    HEADER_BYTES,
    MAX_BODY_BYTES,
    MAX_FRAME_BYTES,
    PLACE_BYTES,
    Control,
    ItemId,
    Kind,
    chunk_hashes,
    control_frame,
    digest,
    header_of,
    item_id,
    kind_of,
    open_frame,
    read_control,
    seal,
)
from protocol.wire.messages import (
    MAX_CHUNKS,
    MAX_IDS,
    MAX_RECORDS,
    MAX_TOPICS,
    AskRevocations,
    Busy,
    Cancel,
    DialBack,
    DialledBack,
    Digest,
    DontHave,
    Entry,
    Goodbye,
    Have,
    Hello,
    Interest,
    ItemChunk,
    ItemOutline,
    Manifest,
    Peers,
    Ping,
    Revocations,
    Want,
    WantedPart,
)
from protocol.wire.version import EARLIER, MAJOR, said, spoken_version

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"
ALICE = Identity(bytes(32))
BOB = Identity(bytes([1]) * 32)
SWARM = b"a swarm of tests"
NOW = 1_700_000_000.0

uint64 = st.integers(0, 2**64 - 1)
ids = st.binary(min_size=32, max_size=32)
eight = st.binary(min_size=8, max_size=8)
entries = st.builds(
    Entry, ids, st.integers(0, MAX_FRAME_BYTES), eight, st.binary(min_size=4, max_size=4), st.binary(max_size=64)
)
parts = st.lists(st.builds(WantedPart, ids, st.lists(st.integers(0, 512), max_size=MAX_CHUNKS).map(tuple)), max_size=20)
nodes = st.binary(min_size=20, max_size=20).map(id_of_bytes)
# Valid MessagePack of every sort, the sorts that the protocol has no use for included.
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)
DECLARED = [var for var in vars(messages).values() if isinstance(getattr(var, "kind", None), Kind)]
BODIES = [one for one in DECLARED if hasattr(one, "decode") and one is not ItemChunk]  # a chunk's is no MessagePack
packed = values.map(msgpack.packb) | st.binary() | st.just(msgpack.packb(msgpack.ExtType(5, b"x")))


def test_every_kind_but_an_item_is_declared_as_a_message_once() -> None:
    assert sorted(one.kind for one in DECLARED) == sorted(set(Kind) - {Kind.ITEM})


@given(st.integers(0, 0xFFFF), uint64, uint64, st.binary(max_size=500))
def test_an_envelope_comes_back_as_it_was_sealed(kind: int, sequence: int, time_ms: int, body: bytes) -> None:
    envelope = open_frame(seal(ALICE, SWARM, kind, sequence, time_ms, body))
    assert (envelope.kind, envelope.sequence, envelope.time_ms, envelope.body) == (kind, sequence, time_ms, body)
    assert (envelope.public_key, envelope.swarm) == (ALICE.public_key, SWARM)


def test_the_largest_body_fits_and_the_next_frame_does_not() -> None:
    frame = seal(ALICE, SWARM, Kind.ITEM, 2**64 - 1, 2**64 - 1, bytes(MAX_BODY_BYTES))
    assert len(open_frame(frame).body) == MAX_BODY_BYTES
    with pytest.raises(EnvelopeError) as caught:
        open_frame(bytes(MAX_FRAME_BYTES + 1))
    assert caught.value.reason == "oversized"


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_a_digest_is_that_of_the_hashes_of_the_chunks(size: int) -> None:
    body = random.Random(size).randbytes(size)
    chunks = [body[start : start + CHUNK_BYTES] for start in range(0, max(1, size), CHUNK_BYTES)]
    assert chunk_hashes(body) == b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)
    header = header_of(seal(ALICE, SWARM, Kind.ITEM, 1, 1, body))
    assert header.digest == hashlib.sha256(chunk_hashes(body)).digest() and header.size == size
    assert header.item_id == item_id(ALICE.public_key, digest(body))


def test_a_body_is_hashed_once_by_its_signer_and_once_by_its_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    body, hashed = bytes(MAX_BODY_BYTES), []

    class Counting:
        @staticmethod
        def sha256(data: bytes = b""):
            hashed.append(len(data))
            return hashlib.sha256(data)

    monkeypatch.setattr("protocol.wire.envelope.hashlib", Counting)
    frame = seal(ALICE, SWARM, Kind.ITEM, 1, 1, body)
    assert len(body) <= sum(hashed) <= len(body) * 1.01
    hashed.clear()
    assert open_frame(frame, lambda key, signature, message: len(message) < 200).item_id
    assert len(body) <= sum(hashed) <= len(body) * 1.01


@pytest.mark.parametrize("receivers", [1, 3])
@pytest.mark.parametrize("size", [100_000, 1 << 20])
def test_an_item_is_hashed_once_at_either_end_however_large_and_whoever_asks_for_it(
    size: int, receivers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores, body = Cores(receivers), random.Random(size).randbytes(size)
    hashed, sha256 = [], hashlib.sha256

    def counting(data: bytes = b""):
        hashed.append(len(data))
        return sha256(data)

    monkeypatch.setattr(hashlib, "sha256", counting)
    assert cores.publish(body) == [body] * receivers
    ends = 1 + receivers
    assert ends * size <= sum(hashed) <= 1.01 * ends * size


@given(st.data())
def test_one_changed_bit_anywhere_is_forged(data: st.DataObject) -> None:
    frame = bytearray(seal(ALICE, SWARM, Kind.ITEM, 7, 8, b"a body"))
    position = data.draw(st.integers(0, len(frame) * 8 - 1))
    frame[position // 8] ^= 1 << position % 8
    with pytest.raises(EnvelopeError) as caught:
        open_frame(bytes(frame))
    major = HEADER_BYTES * 8 <= position < (HEADER_BYTES + 1) * 8
    assert caught.value.reason == ("other_version" if major else "forged")


def test_a_signature_from_another_domain_is_forged() -> None:
    frame = seal(ALICE, SWARM, Kind.ITEM, 1, 1, b"x")
    header, body = frame[HEADER_BYTES:HEAD_BYTES], frame[HEAD_BYTES:]
    with pytest.raises(EnvelopeError) as caught:
        open_frame(ALICE.public_key + ALICE.sign(header) + header + body)
    assert caught.value.reason == "forged"


@given(st.binary(max_size=300))
@example(b"")
@example(bytes(HEADER_BYTES))
def test_arbitrary_bytes_are_no_envelope(data: bytes) -> None:
    with pytest.raises(EnvelopeError):
        open_frame(data)


def signed(domain: bytes, payload: bytes) -> bytes:
    return ALICE.public_key + ALICE.sign(domain + payload) + payload


@given(packed)
@example(b"\x96" + b"\xdd\xff\xff\xff\xff" * 6)  # arrays that declare 2^32 elements
@example(b"\x91" * 2000)  # nesting
@example(b"\xc6\xff\xff\xff\xff")  # 4 GiB of bytes, declared
def test_signed_nonsense_raises_only_the_typed_error(payload: bytes) -> None:
    with pytest.raises(EnvelopeError):
        open_frame(signed(b"gossamer/envelope/3\x00", payload))
    with pytest.raises(RecordError) as record_caught:
        open_record(signed(b"gossamer/record/1\x00", payload), SWARM, NOW)
    assert record_caught.value.reason == "malformed"


@given(packed, st.sampled_from(BODIES))
@example(msgpack.packb([b"x" * 31, []]), Want)
@example(msgpack.packb([b"x" * 32, [[0], [1]]]), Want)
@example(msgpack.packb([b"x" * 32, [[-1]]]), Want)
@example(msgpack.packb([b"x" * 31]), DontHave)
@example(msgpack.packb([b"x" * 32, [1, 2], b"t" * 8, b"s" * 4, []]), Have)
@example(msgpack.packb([b"x" * 32, [1], b"t" * 7, b"s" * 4, []]), Have)
@example(msgpack.packb([b"x" * 32, [-1], b"t" * 8, b"s" * 4, []]), Have)
@example(msgpack.packb([b"x" * 32, [MAX_FRAME_BYTES + 1], b"t" * 8, b"s" * 4, []]), Have)
@example(msgpack.packb(["no such name!"]), Goodbye)
@example(msgpack.packb([b"x" * 17]), Digest)
@example(msgpack.packb([b"x" * 32, [1], b"t" * 8, b"s" * 3, []]), Have)
@example(msgpack.packb([b"x" * 32, [1], b"t" * 8, b"s" * 4, [b"", b""]]), Have)
@example(msgpack.packb([b"x" * 32, [1], b"t" * 8, b"s" * 4, [bytes(66)]]), Have)
@example(msgpack.packb([b"x" * 32, [1], b"t" * 8, b"s" * 4, [7]]), Have)
@example(msgpack.packb([2, b"", 0]), Interest)
@example(msgpack.packb([1, b"", 2]), Interest)
@example(msgpack.packb([True]), Ping)
def test_bodies_decode_or_raise_the_typed_error(body: bytes, message) -> None:
    try:
        decoded = message.decode(body)
    except MessageError as error:
        assert error.reason == "malformed"
    else:
        assert message.decode(decoded.encode()) == decoded


@given(
    st.builds(Hello, st.binary(max_size=2048), st.booleans(), uint64)
    | st.builds(Peers, st.lists(st.binary(max_size=300), max_size=MAX_RECORDS).map(tuple))
    | st.builds(Ping, uint64)
    | st.builds(Have, st.lists(entries, max_size=20).map(tuple))
    | st.builds(DialBack, st.integers(0, 0xFFFF), st.sampled_from(["", "2003::5", "box.example"]))
    | st.builds(
        DialledBack,
        st.sampled_from(["", "198.41.0.4", "fe80::1%eth0"]),
        st.integers(0, 0xFFFF),
        st.booleans(),
        st.sampled_from(["", "2003::5", "box.example"]),
    )
    | st.builds(Goodbye, st.sampled_from(["full", "not_admitted"]))
    | st.builds(Digest, st.lists(st.tuples(eight, eight), max_size=20).map(tuple))
    | st.builds(
        Interest,
        st.none() | st.frozensets(eight, max_size=MAX_TOPICS),
        st.booleans(),
    )
    | st.builds(Manifest, st.binary(max_size=300))
    | st.builds(AskRevocations, uint64)
    | st.builds(Revocations, st.binary(max_size=300))
    | st.sampled_from([Want, Cancel]).flatmap(lambda kind: parts.map(tuple).map(kind))
    | st.sampled_from([DontHave, Busy]).flatmap(lambda kind: st.lists(ids, max_size=20).map(tuple).map(kind))
    | st.builds(ItemOutline, st.binary(min_size=HEAD_BYTES, max_size=HEAD_BYTES), ids)
)
def test_messages_come_back(message) -> None:
    assert type(message).decode(message.encode()) == message


@given(ids, st.integers(0, 512), st.binary(max_size=300))
def test_a_chunk_comes_back_with_the_hash_of_its_data(item: ItemId, index: int, data: bytes) -> None:
    chunk = ItemChunk(item, index, data, hashlib.sha256(data).digest())
    assert ItemChunk.decode(chunk.encode()) == chunk


@given(st.integers(0, 0xFFFF), st.binary(max_size=300))
def test_what_is_said_to_one_peer_comes_back_and_is_no_envelope(kind: int, body: bytes) -> None:
    frame = control_frame(kind, body)
    assert read_control(frame) == Control(kind, body) and kind_of(frame) == kind
    assert read_control(seal(ALICE, SWARM, Kind.ITEM, 1, 1, body)) is None
    with pytest.raises(EnvelopeError):
        open_frame(frame)


def test_what_is_said_has_a_bound() -> None:
    assert read_control(control_frame(Kind.PEERS, bytes(MAX_BODY_BYTES))) is not None
    with pytest.raises(EnvelopeError, match="oversized"):
        read_control(control_frame(Kind.PEERS, bytes(MAX_BODY_BYTES + 1)))


@pytest.mark.parametrize(
    "body",
    [b"", bytes(PLACE_BYTES - 1), bytes(32) + b"\x02\x01", bytes(PLACE_BYTES + CHUNK_BYTES + 1)],
    ids=["nothing", "no place", "a place beyond the largest item", "more than a chunk"],
)
def test_a_chunk_that_is_none_is_malformed(body: bytes) -> None:
    with pytest.raises(MessageError, match="malformed"):
        ItemChunk.decode(body)


def test_fields_that_a_newer_minor_version_appended_are_skipped() -> None:
    assert Ping.decode(msgpack.packb([7, "new", [b"field"]])) == Ping(7)
    with pytest.raises(MessageError):
        Ping.decode(msgpack.packb([7] * 20))


def test_a_newer_minor_version_is_understood_and_another_major_one_told_apart_from_nonsense() -> None:
    header = seal(ALICE, SWARM, Kind.ITEM, 1, 1, b"x")[HEADER_BYTES:HEAD_BYTES]
    newer = signed(b"gossamer/envelope/3\x00", (MAJOR << 8 | 9).to_bytes(2, "big") + header[2:])
    assert open_frame(newer + b"x").body == b"x"
    for place, version in ((b"\x96\xcd", EARLIER), (b"\x02\x00", 0x0200), (b"\x05\x07", 0x0507)):
        frame = newer[:HEADER_BYTES] + place + header[2:]
        assert spoken_version(frame) == version
        with pytest.raises(EnvelopeError, match=f"it speaks {said(version)}, this node 4.0") as caught:
            open_frame(frame)
        assert caught.value.reason == "other_version"


@pytest.mark.parametrize(("decode", "width"), [(Hello.decode, 11), (Peers.decode, 57)])
def test_a_body_of_nothing_but_arrays_is_refused_before_it_takes_memory(
    decode: Callable[[bytes], object], width: int
) -> None:
    arrays: list[object] = []
    while len(body := msgpack.packb([arrays])) < MAX_BODY_BYTES // width:
        arrays = [arrays] * width
    body = msgpack.packb([arrays] * min(width, MAX_BODY_BYTES // len(body)))
    tracemalloc.start()
    with pytest.raises(MessageError, match="malformed"):
        decode(body)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 200 * MAX_ARRAYS


def test_messages_beyond_their_bounds_are_refused() -> None:
    item = bytes(32)
    too_many = Interest(frozenset(number.to_bytes(8) for number in range(MAX_TOPICS + 1)))
    chunks = Want((WantedPart(item, tuple(range(MAX_CHUNKS + 1))),))
    for message in (too_many, chunks, DontHave((item,) * (MAX_IDS + 1)), Have((Entry(item, 1),) * (MAX_IDS + 1))):
        with pytest.raises(MessageError):
            type(message).decode(message.encode())
    with pytest.raises(MessageError):
        Peers.decode(Peers((b"",) * (MAX_RECORDS + 1)).encode())
    assert len(Want.decode(Want((WantedPart(item),) * MAX_IDS).encode()).parts) == MAX_IDS
    full = Want((WantedPart(item, tuple(range(MAX_CHUNKS))),) * MAX_IDS)
    assert Want.decode(full.encode()) == full


hosts = st.sampled_from(["127.0.0.1", "::1", "fe80::1:2", "localhost", "a-1.example.org", "10.0.0.255"])
endpoints = st.builds(Endpoint, hosts, st.integers(1, 65535))


services = st.builds(Service, st.from_regex(r"[a-z0-9._/-]{1,48}", fullmatch=True), endpoints)


@given(
    st.lists(endpoints, max_size=4).map(tuple),
    uint64,
    st.text(max_size=100),
    st.floats(1, MAX_RECORD_LIFE_S),
    st.lists(services, max_size=MAX_SERVICES).map(tuple),
)
def test_a_record_comes_back(
    endpoints: tuple[Endpoint, ...], incarnation: int, agent: str, life: float, services: tuple[Service, ...]
) -> None:
    made = make_record(ALICE, SWARM, endpoints, incarnation, agent, int((NOW + life) * 1000), b"", services)
    assert open_record(made.encoded, SWARM, NOW) == made
    assert made.services == services
    assert made.node_id == ALICE.node_id
    assert len(made.agent.encode()) <= MAX_AGENT_BYTES


@pytest.mark.parametrize(
    ("swarm", "expiry", "reason"),
    [
        (b"another swarm id", NOW + 60, "wrong_swarm"),
        (SWARM, NOW, "stale"),
        (SWARM, NOW + MAX_RECORD_LIFE_S + 1, "stale"),
    ],
)
def test_a_record_that_does_not_hold_here_and_now_is_refused(swarm: bytes, expiry: float, reason: str) -> None:
    record = make_record(ALICE, swarm, (), 1, "", int(expiry * 1000))
    with pytest.raises(RecordError) as caught:
        open_record(record.encoded, SWARM, NOW)
    assert caught.value.reason == reason


LARGEST_HOST = ".".join(["a" * 63] * 3 + ["b" * 61])


def test_a_record_with_everything_at_its_largest_fits() -> None:
    endpoint = Endpoint(LARGEST_HOST, 65535)
    other = (Service("s" * MAX_SERVICE_BYTES, endpoint),) * MAX_SERVICES
    made = make_record(
        ALICE,
        SWARM,
        (endpoint,) * MAX_ENDPOINTS,
        2**64 - 1,
        "x" * 999,
        int(NOW * 1000) + 9999,
        b"g" * MAX_GRANT_BYTES,
        other,
    )
    assert len(made.encoded) <= MAX_RECORD_BYTES
    assert open_record(made.encoded, SWARM, NOW) == made


@pytest.mark.parametrize(
    "service",
    [["", "tcp://a:1"], ["A", "tcp://a:1"], ["a b", "tcp://a:1"], ["x" * 49, "tcp://a:1"], ["a", "udp://a:1"],
     ["a", "tcp://a:0"], ["a"], ["a", "tcp://a:1", *range(9)], "a", 7, [b"a", "tcp://a:1"], ["a", b"tcp://a:1"]],
)  # fmt: skip
def test_a_record_with_a_service_that_is_none_is_malformed(service: object) -> None:
    good = ["a", "tcp://a:1"]
    for services in ([service], [good, service], service, [good] * (MAX_SERVICES + 1)):
        payload = msgpack.packb([1, SWARM, ALICE.curve_key, [], 1, "", int(NOW * 1000) + 9999, b"", services])
        with pytest.raises(RecordError) as caught:
            open_record(signed(b"gossamer/record/1\x00", payload), SWARM, NOW)
        assert caught.value.reason == "malformed"


def test_what_a_newer_minor_version_appends_to_a_service_is_ignored() -> None:
    longer = ["a", "tcp://198.41.0.4:1", *range(8)]
    payload = msgpack.packb([1, SWARM, ALICE.curve_key, [], 1, "", int(NOW * 1000) + 9999, b"", [longer]])
    record = open_record(signed(b"gossamer/record/1\x00", payload), SWARM, NOW)
    assert record.services == (Service("a", Endpoint("198.41.0.4", 1)),)


@given(st.integers(0, 8 * 200))
def test_a_changed_record_is_forged(position: int) -> None:
    data = bytearray(make_record(ALICE, SWARM, (Endpoint("a", 1),), 1, "agent", int(NOW * 1000) + 9999).encoded)
    position %= len(data) * 8
    data[position // 8] ^= 1 << position % 8
    with pytest.raises(RecordError) as caught:
        open_record(bytes(data), SWARM, NOW)
    assert caught.value.reason == "forged"


@pytest.mark.parametrize(
    "endpoint",
    [
        "ipc:///tmp/x",
        "inproc://zeromq.zap.01",
        "tcp://10.0.0.1:1;10.0.0.2:2",
        "tcp://*:80",
        "tcp://a:0",
        "tcp://a:65536",
        "tcp://:80",
        "tcp://[::1:80",
        "tcp://::1:80",
        "tcp://a b:80",
        "tcp://a:80/",
        "tcp://a:80\n",
        "tcp://-a:80",
        "tcp://\u212aevin.org:80",  # a K that is none
        "tcp://[127.0.0.1]:80",
        "tcp://" + "a" * 300 + ":80",
    ],
)
def test_endpoints_that_zeromq_would_take_otherwise_are_refused(endpoint: str) -> None:
    with pytest.raises(BadAddress):
        Endpoint.parse(endpoint)
    record = make_record(ALICE, SWARM, (_Raw(endpoint),), 1, "", int(NOW * 1000) + 9999)  # type: ignore[arg-type]
    with pytest.raises(RecordError):
        open_record(record.encoded, SWARM, NOW)


@pytest.mark.parametrize(
    ("host", "is_near"),
    [
        ("127.0.0.1", True),
        ("127.8.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("127.example", False),
        ("0.0.0.0", False),
        ("*", False),
        ("192.168.0.1", False),
    ],
)
def test_only_an_address_of_this_machine_is_loopback(host: str, is_near: bool) -> None:
    assert Endpoint(host, 80).is_loopback is is_near


class _Raw(str):
    """An endpoint as a hostile node would write it."""


@given(endpoints)
def test_endpoints_and_addresses_come_back(endpoint: Endpoint) -> None:
    assert Endpoint.parse(str(endpoint)) == endpoint
    address = Address(endpoint, ALICE.curve_key)
    assert Address.parse(f" {address}\n") == address


@given(st.text() | st.text().map("tcp://{}:80?key=".format))
def test_arbitrary_text_is_no_address(text: str) -> None:
    with pytest.raises(BadAddress):
        Address.parse(text)


def test_binding_allows_a_wildcard_and_any_port() -> None:
    assert Endpoint.parse("tcp://*:0", bind=True) == Endpoint("*", 0)
    with pytest.raises(BadAddress):
        Endpoint.parse("tcp://*:70000", bind=True)


def test_item_ids_depend_on_the_signer_and_the_body_only() -> None:
    assert item_id(ALICE.public_key, digest(b"x")) == item_id(ALICE.public_key, digest(b"x"))
    signed_by = [(ALICE, b"x"), (BOB, b"x"), (ALICE, b"y")]
    assert len({item_id(identity.public_key, digest(body)) for identity, body in signed_by}) == 3


def test_the_documented_vector_holds() -> None:
    match = re.search(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert match is not None
    vector = json.loads(match[1])
    identity = Identity(bytes.fromhex(vector["seed"]))
    frame = seal(
        identity, bytes.fromhex(vector["swarm"]), vector["kind"], vector["sequence"], vector["time_ms"],
        bytes.fromhex(vector["body"]),
    )  # fmt: skip
    chunk = control_frame(Kind.CHUNK, bytes.fromhex(vector["chunk_body"]))
    assert chunk.hex() == vector["chunk_frame"] and vector["chunk_body"].startswith(vector["item_id"])
    assert identity.public_key.hex() == vector["public_key"]
    assert identity.curve_key.hex() == vector["curve_key"]
    assert identity.node_id == vector["node_id"]
    assert frame.hex() == vector["frame"]
    assert item_id(identity.public_key, digest(bytes.fromhex(vector["body"]))).hex() == vector["item_id"]


def test_the_documented_times_rates_kinds_and_reasons_are_those_of_the_code() -> None:
    page = " ".join(PAGE.read_text().split())
    limits = Limits()
    assert (
        f"heard nothing from a peer for {WAN.probe_interval:g} s (on loopback {LOCAL.probe_interval:g} s) sends PING, "
        f"and again after {WAN.probe_timeout:g} s ({LOCAL.probe_timeout:g} s). It drops a peer that is silent for "
        f"{WAN.death_bound:g} s ({LOCAL.death_bound:g} s) in all."
    ) in page
    assert f"answered within {WAN.pull_patience:g} s (on loopback {LOCAL.pull_patience:g} s)" in page
    frame, sealed, each, sent = (f"{1e6 * cost:g} µs" for cost in (FRAME_S, SIGNATURE_S, BYTE_S, SENT_BYTE_S))
    assert (
        f"may together cost a node {limits.network_cores:g} s of its processor time a second, and "
        f"{limits.network_burst_s:g} s at once. A frame costs {frame}, and {sealed} more in an envelope. "
        f"Each of its bytes costs {each}. "
        f"A byte that is sent in answer costs {sent}, and an item or a chunk that is given {1e6 * GIVEN_S:g} µs more. "
        f"What the node asked for costs nothing. "
        f"Beyond the quota frames wait, in {limits.waiting_bytes / MIB:g} MiB"
    ) in page
    assert {kind.name for kind in Kind} <= set(re.findall(r"\w+", page))
    assert {f"`{reason}`" for reason in (*NO_ROOM, GRAYLISTED)} <= set(page.replace(",", "").split())
    assert {f"`{reason}`" for reason in REFUSALS} <= set(re.findall(r"`\w+`", PAGE.with_name("swarms.md").read_text()))
