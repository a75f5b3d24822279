"""The agreement's messages: what is encoded is read again, and nothing else is read at all.

All but the last few tests iterate over the declarations in `messages.MESSAGES`.
"""

import dataclasses
from collections.abc import Iterator
from enum import IntEnum
from functools import cache
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectives.agreement import messages
from collectives.agreement.fields import MAX_TEXT_BYTES, Ascending, AtMost, CutText, Packed, Size
from collectives.agreement.message_codec import decode, encode, form_of
from collectives.agreement.messages import MAX_SHARE_BYTES, MESSAGES
from collectives.agreement.views import Ballot, Member, OpId, View
from protocol.errors import MessageError
from protocol.identity import NODE_ID_BYTES, NodeId, id_of_bytes
from protocol.wire.encoding import UINT64_MAX

FEW = 4  # items of a tuple, at most, where any number will do
NODE = NodeId("a" * 32)
OP = OpId(bytes(8), 1, 2, 3)


@cache
def fields_of(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass or a named tuple, in order; {} of any other type."""
    if not (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")):
        return {}
    hints = get_type_hints(kind, include_extras=True)
    names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else kind._fields
    return {name: hints[name] for name in names}


def unpacked(hint: Any) -> Any:
    """What a declaration says of values that travel as bytes of their own; others as they are."""
    if get_origin(hint) is Annotated and Packed() in get_args(hint):
        return get_args(hint)[0]
    return hint


def valid(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a declaration allows."""
    hint = unpacked(hint)
    if get_origin(hint) is Annotated:
        plain, bound, *rules = get_args(hint)
        if get_origin(plain) is tuple:
            least = min(len(rules), 1)
            once = (lambda item: item[0]) if Ascending() in rules else None
            items = st.lists(valid(get_args(plain)[0]), min_size=least, max_size=FEW, unique_by=once)
            return items.map(lambda found: tuple(sorted(found) if once else found))
        if plain is int:
            return st.integers(0, bound.most)
        least, most = (bound.bytes, bound.bytes) if isinstance(bound, Size) else (0, min(bound.most, 50))
        return st.binary(min_size=least, max_size=most) if plain is bytes else st.text(max_size=most // 4)
    if hint is NodeId:
        return st.binary(min_size=NODE_ID_BYTES, max_size=NODE_ID_BYTES).map(id_of_bytes)
    if hint is bool:
        return st.booleans()
    if get_origin(hint) is tuple:
        return st.tuples(*map(valid, get_args(hint)))
    if fields_of(hint):
        return st.builds(hint, *map(valid, fields_of(hint).values()))
    if isinstance(hint, type) and issubclass(hint, IntEnum):
        return st.sampled_from(hint)
    if set(get_args(hint)) == {int, str}:
        return st.integers(-(2**63), 2**64 - 1) | st.text(max_size=40)
    if NoneType in get_args(hint):
        return st.none() | valid(next(part for part in get_args(hint) if part is not NoneType))
    return st.builds(hint)


def plain(hint: Any, number: int = 0) -> Any:
    """One value that a declaration allows; those with different numbers differ in their node ids."""
    hint = unpacked(hint)
    if get_origin(hint) is Annotated:
        kind, bound, *rules = get_args(hint)
        if get_origin(kind) is tuple:
            return (plain(get_args(kind)[0], number),) if rules else ()
        return bytes(bound.bytes) if isinstance(bound, Size) else kind()
    if hint is NodeId:
        return id_of_bytes(number.to_bytes(NODE_ID_BYTES, "big"))
    if get_origin(hint) is tuple:
        return tuple(plain(item, number) for item in get_args(hint))
    if fields_of(hint):
        return hint(*(plain(inner, number) for inner in fields_of(hint).values()))
    if isinstance(hint, type) and issubclass(hint, IntEnum):
        return next(iter(hint))
    if NoneType in get_args(hint):
        return None
    return 0 if get_args(hint) else hint()


def many(hint: Any, count: int) -> tuple[Any, ...]:
    return tuple(plain(hint, number) for number in range(count))


def beyond(hint: Any) -> Iterator[Any]:
    """Values that break one bound of a declaration, anywhere in it."""
    hint = unpacked(hint)
    if get_origin(hint) is Annotated:
        kind, bound, *rules = get_args(hint)
        if get_origin(kind) is tuple:
            item = get_args(kind)[0]
            yield many(item, bound.most + 1)
            yield from ((inner,) for inner in beyond(item))
            if rules:
                yield ()
            if Ascending() in rules:
                yield (plain(item, 1), plain(item, 1))
                yield (plain(item, 2), plain(item, 1))
        elif kind is int:
            yield from (-1, True, "1")
            if bound.most < UINT64_MAX:
                yield bound.most + 1
        elif isinstance(bound, Size):
            yield from (bytes(bound.bytes - 1), bytes(bound.bytes + 1), "t" * bound.bytes)
        elif kind is bytes:
            yield from (bytes(bound.most + 1), "t")
        elif isinstance(bound, AtMost):
            yield from ("t" * (bound.most + 1), "ü" * (bound.most // 2 + 1), b"t")
    elif fields_of(hint):
        inner = fields_of(hint)
        whole = [plain(field) for field in inner.values()]
        for at, field in enumerate(inner.values()):
            for wrong in beyond(field):
                yield hint(*whole[:at], wrong, *whole[at + 1 :])
    elif set(get_args(hint)) == {int, str}:
        yield from ("t" * (MAX_TEXT_BYTES + 1), b"t", True)
    elif get_origin(hint) is tuple:
        first, *rest = get_args(hint)
        yield from ((wrong, *map(plain, rest)) for wrong in beyond(first))
    elif NoneType in get_args(hint):
        yield from beyond(next(part for part in get_args(hint) if part is not NoneType))
    elif isinstance(hint, type) and issubclass(hint, IntEnum):
        yield max(hint) + 1


def largest(hint: Any, number: int = 0) -> Any:
    """The value that takes the most bytes."""
    hint = unpacked(hint)
    if get_origin(hint) is Annotated:
        kind, bound, *rules = get_args(hint)
        if get_origin(kind) is tuple:
            items = (largest(get_args(kind)[0], number) for number in range(bound.most))
            return tuple(sorted(items) if Ascending() in rules else items)
        if kind is int:
            return bound.most
        size = bound.bytes if isinstance(bound, Size) else bound.most
        return bytes(size) if kind is bytes else "t" * size
    if get_origin(hint) is tuple:
        return tuple(largest(item, number) for item in get_args(hint))
    if fields_of(hint):
        return hint(*(largest(inner, number) for inner in fields_of(hint).values()))
    if set(get_args(hint)) == {int, str}:
        return "t" * MAX_TEXT_BYTES
    if NoneType in get_args(hint):
        return largest(next(part for part in get_args(hint) if part is not NoneType))
    return plain(hint, number)


every_message = st.one_of([valid(kind) for kind in MESSAGES.values()])
every_kind = pytest.mark.parametrize("kind", MESSAGES.values(), ids=lambda kind: kind.__name__)


def test_every_message_has_a_number() -> None:
    assert set(MESSAGES.values()) == set(get_args(messages.Message))
    assert len(set(MESSAGES.values())) == len(MESSAGES)
    assert set(MESSAGES) <= set(range(1, 128))  # one byte


@given(every_message)
def test_what_is_encoded_is_read_again(message: messages.Message) -> None:
    assert decode(encode(message)) == message


@every_kind
def test_what_is_beyond_its_bounds_is_refused(kind: type) -> None:
    assert decode(encode(plain(kind))) == plain(kind)
    for wrong in beyond(kind):
        with pytest.raises(MessageError):
            decode(encode(wrong))


@every_kind
def test_the_largest_message_is_read_and_its_size_is_known(kind: type) -> None:
    message = largest(kind)
    whole = encode(message)
    assert decode(whole) == message
    assert len(whole) <= form_of(kind).bytes + 2
    with pytest.raises(MessageError, match="size"):
        decode(encode(plain(kind)) + bytes(form_of(kind).bytes + 4096))


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    try:
        decode(data)
    except MessageError as error:
        assert error.reason == "malformed"


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=10)
    | st.binary(min_size=8, max_size=8)
    | st.binary(max_size=50),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=30,
)


@given(st.integers(0, max(MESSAGES) + 2), st.lists(anything, max_size=8))
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


@every_kind
def test_fields_of_a_newer_version_are_skipped(kind: type) -> None:
    number, fields = msgpack.unpackb(encode(plain(kind)))
    assert decode(msgpack.packb([number, [*fields, 7, "new"], b"newer"])) == plain(kind)


def test_fields_without_bounds_are_no_message() -> None:
    @dataclasses.dataclass
    class Unbounded:
        text: str

    with pytest.raises(TypeError, match="bounds"):
        form_of(get_type_hints(Unbounded)["text"])
    with pytest.raises(TypeError, match="bounds"):
        form_of(Annotated[bytes, CutText(3)])


def test_the_bytes_of_some_messages_stay_what_they_are() -> None:
    assert encode(messages.Ack(OP)).hex() == "920891" + "94c4080000000000000000010203"
    assert encode(messages.Propose(Ballot(1, NODE), 2, (NODE,))).hex() == (
        "920a93" + "9201c414" + "00" * 20 + "02" + "91c414" + "00" * 20
    )
    assert len(encode(messages.Beat(bytes(8), 7, 1, (NODE,)))) == 40
    assert len(encode(messages.OperationStart(OP, (bytes(MAX_SHARE_BYTES),) * 256))) < 256 * (MAX_SHARE_BYTES + 6)


def test_what_many_reports_say_alike_is_read_once() -> None:
    view = View.of(
        b"group", 2, bytes(8), [Member(id_of_bytes(bytes([n]) * 20), "tcp://h:1", bytes(8)) for n in range(9)]
    )
    ledger = messages.Ledger(bytes(8), view.members, ((OP, messages.Stage.DONE),))
    reports = [messages.BallotReport(Ballot(1, NODE), view, (member,), (ledger,)) for member in view.members]
    read = [decode(encode(report)) for report in reports]
    assert read == reports
    assert len({id(report.view) for report in read}) == 1
    assert len({id(report.ledgers[0]) for report in read}) == 1


def test_a_long_reason_is_cut() -> None:
    read = decode(encode(messages.OperationDone(OP, ok=False, reason="ü" * 400)))
    assert isinstance(read, messages.OperationDone)
    assert read.reason == "ü" * 128
