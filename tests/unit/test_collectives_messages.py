"""The agreement's messages: what is encoded is read again, and nothing else is read at all."""

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectives.agreement import messages
from collectives.agreement.message_codec import decode, encode
from collectives.agreement.messages import MAX_FIELDS, MAX_SHARE_BYTES, Mismatched, Stage
from collectives.agreement.views import Ballot, Member, OpId, View
from protocol.errors import MessageError
from protocol.identity import NodeId, id_of_bytes

uints = st.integers(0, 2**62)
nodes = st.binary(min_size=20, max_size=20).map(id_of_bytes)
marks = st.binary(min_size=8, max_size=8)
texts = st.text(max_size=40)
values = st.one_of(st.integers(-(2**63), 2**63 - 1), texts)
ids = st.lists(nodes, max_size=4).map(tuple)
members = st.builds(Member, nodes, texts, marks)
rosters = st.lists(members, min_size=1, max_size=4, unique_by=lambda line: line.id)
views = st.builds(View.of, st.binary(max_size=32), uints, marks, rosters)
ops = st.builds(OpId, marks, uints, st.integers(0, 2**64 - 1), uints)
ballots = st.builds(Ballot, uints, nodes)
mismatches = st.none() | st.builds(Mismatched, nodes, texts, values, values)
entries = st.lists(st.tuples(ops, st.sampled_from(Stage)), max_size=3).map(tuple)
ledgers = st.builds(messages.Ledger, marks, st.lists(nodes, min_size=1, max_size=3).map(tuple), entries, st.booleans())
rulings = st.builds(messages.Ruling, ops, st.sampled_from(Stage))
digests = st.lists(st.tuples(texts, values), max_size=4).map(tuple)
shares = st.binary(max_size=50)
every_message = st.one_of(
    st.builds(messages.Beat, marks, uints, uints, ids, ids, st.booleans()),
    st.builds(messages.Apply, texts, marks, st.integers(0, 2**48)),
    st.builds(messages.Sight, views),
    st.builds(messages.Pending, st.lists(members, max_size=3).map(tuple)),
    st.builds(messages.Initiate, ops, texts, digests, shares),
    st.builds(messages.Start, ops, st.lists(shares, max_size=4).map(tuple)),
    st.builds(messages.Done, ops, st.booleans(), st.booleans(), texts),
    st.builds(messages.Commit, ops, st.none() | views),
    st.builds(messages.Ack, ops),
    st.builds(messages.Abort, ops, st.booleans(), texts, mismatches),
    st.builds(messages.Propose, ballots, uints, ids),
    st.builds(messages.Report, ballots, views, ids, st.lists(ledgers, max_size=3).map(tuple)),
    st.builds(messages.Decide, ballots, views, st.lists(rulings, max_size=3).map(tuple)),
    st.builds(messages.Welcome, marks, views),
    st.just(messages.Goodbye()),
)
NODE = NodeId("a" * 32)
OP = OpId(bytes(8), 1, 2, 3)


@given(every_message)
def test_what_is_encoded_is_read_again(message: messages.Message) -> None:
    assert decode(encode(message)) == message


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    try:
        decode(data)
    except MessageError as error:
        assert error.reason == "malformed"


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=10) | marks | shares,
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=30,
)


@given(st.integers(0, 17), st.lists(anything, max_size=8))
def test_no_fields_do_more_than_be_refused(kind: int, fields: list[Any]) -> None:
    try:
        decode(msgpack.packb([kind, fields], use_bin_type=True))
    except MessageError as error:
        assert error.reason == "malformed"


@given(every_message, st.data())
def test_a_changed_byte_is_refused_or_read_as_another_message(message: messages.Message, data: st.DataObject) -> None:
    raw = bytearray(encode(message))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(raw))
    except MessageError as error:
        assert error.reason == "malformed"


def test_fields_of_a_newer_version_are_skipped() -> None:
    kind, fields = msgpack.unpackb(encode(messages.Ack(OP)))
    assert decode(msgpack.packb([kind, [*fields, 7, "new"], b"newer"])) == messages.Ack(OP)


@pytest.mark.parametrize(
    "message",
    [
        messages.Initiate(OP, "kind", (), bytes(MAX_SHARE_BYTES + 1)),
        messages.Initiate(OP, "kind", tuple((str(n), n) for n in range(MAX_FIELDS + 1)), b""),
        messages.Initiate(OP, "k" * 300, (), b""),
        messages.Start(OP, (b"",) * 257),
        messages.Propose(Ballot(1, NODE), 1, (NODE,) * 257),
        messages.Apply("a" * 400, bytes(8), 0),
        messages.Beat(bytes(7), 0, 0),
        messages.Sight(View(b"group", 1, bytes(8), ())),
        messages.Sight(View(b"group", 1, bytes(8), (Member(NODE, "", bytes(8)),) * 2)),
    ],
)
def test_what_is_beyond_its_bounds_is_refused(message: messages.Message) -> None:
    with pytest.raises(MessageError):
        decode(encode(message))


def test_only_a_start_may_be_large() -> None:
    whole = messages.Start(OP, (bytes(MAX_SHARE_BYTES),) * 256)
    assert decode(encode(whole)) == whole
    with pytest.raises(MessageError, match="size"):
        decode(encode(messages.Goodbye()) + bytes(1 << 20))


def test_a_long_reason_is_cut() -> None:
    read = decode(encode(messages.Done(OP, ok=False, reason="ü" * 400)))
    assert isinstance(read, messages.Done)
    assert read.reason == "ü" * 128
