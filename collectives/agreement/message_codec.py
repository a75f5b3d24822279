"""The bytes of the agreement's messages: [number, [fields...]] in MessagePack, made from their declarations.

`messages.MESSAGES` says which there are, and `fields` what a field may be. For each type in a declaration a
`Form` is made once: how it is written, how it is read back and checked, and the most bytes that it
takes. So the size of a message is checked against its own bounds before it is parsed, and every value after.
Fields that a newer minor version appends are skipped.
"""

import dataclasses
from collections.abc import Callable, Iterable
from enum import IntEnum
from functools import lru_cache
from itertools import pairwise
from operator import attrgetter
from types import NoneType, UnionType
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

from collectives.agreement.fields import MAX_TEXT_BYTES, Ascending, AtMost, CutText, NotEmpty, Packed, Size
from collectives.agreement.messages import MESSAGES, Message
from protocol.errors import MessageError
from protocol.identity import NODE_ID_BYTES, NodeId, id_bytes, id_of_bytes
from protocol.wire.encoding import UINT64_MAX, pack, unpack

MAX_NEWER_BYTES = 4096  # that all fields of a newer version may take in one message
PACKED_KEPT = 32  # values of each packed type: what a view change among members of one history has, and some to spare
_LENGTH_BYTES = 5  # at most, before a string or an array
_INTEGER_BYTES = 9
_to_node = lru_cache(4096)(id_of_bytes)  # a group's ids come again and again, 256 in one report
_from_node = lru_cache(4096)(id_bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """How values of one type are written and read; `write` None: they are what MessagePack takes.

    `bytes` is the most that one takes; `longest_bytes`, `longest_text` and `longest_array` are of any part of it.
    """

    read: Callable[[Any], Any]
    write: Callable[[Any], Any] | None
    bytes: int
    longest_bytes: int = 0
    longest_text: int = 0
    longest_array: int = 0


def encode(message: Message) -> bytes:
    """Return a message's bytes."""
    number = _NUMBERS[type(message)]
    write = _FORMS[number].write
    assert write is not None
    return pack([number, write(message)])


def decode(data: bytes) -> Message:
    """Read a message. Raises `MessageError("malformed")` for anything else."""
    number = data[1] if len(data) > 1 else 0
    form = _FORMS.get(number)
    if form is None:
        _refuse("kind")
    if len(data) > form.bytes + MAX_NEWER_BYTES:
        _refuse("size")
    said, fields = unpack(
        data,
        2,
        error=MessageError,
        max_bytes=form.longest_bytes,
        max_text=form.longest_text,
        max_array=form.longest_array,
        max_arrays=len(data),
    )
    if said != number:
        _refuse("kind")
    message: Message = form.read(fields)
    return message


def _refuse(detail: str) -> NoReturn:
    raise MessageError("malformed", detail)


# --- what a declaration says ---


def form_of(hint: Any) -> Form:
    """Return the form of a type, as `fields` lists them. Raises `TypeError` for any other type."""
    if get_origin(hint) is Annotated:
        plain, *bounds = get_args(hint)
        return _bounded(plain, bounds)
    if hint is NodeId:
        return Form(_read_node, _from_node, _LENGTH_BYTES + NODE_ID_BYTES, longest_bytes=NODE_ID_BYTES)
    if hint is bool:
        return Form(_read_flag, int, 1)
    if get_origin(hint) is UnionType or NoneType in get_args(hint):
        return _union(hint)
    if get_origin(hint) is tuple:
        return _fixed(tuple, list, [form_of(item) for item in get_args(hint)])
    if isinstance(hint, type) and issubclass(hint, IntEnum):
        return _enum(hint)
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "_fields")):
        return _record(hint)
    raise TypeError(f"{hint}: a field of a message has no such type, or its bounds are missing")


def _bounded(plain: Any, bounds: list[Any]) -> Form:
    match plain, bounds:
        case _, [Packed()]:
            return _packed(form_of(plain))
        case type() as kind, [AtMost(most)] if kind is int:
            return Form(_integers(most), None, _INTEGER_BYTES)
        case type() as kind, [Size(size)] if kind is bytes:
            return Form(_strings(size, size), None, _LENGTH_BYTES + size, longest_bytes=size)
        case type() as kind, [AtMost(most)] if kind is bytes:
            return Form(_strings(0, most), None, _LENGTH_BYTES + most, longest_bytes=most)
        case type() as kind, [AtMost(most)] if kind is str:
            return Form(_texts(most), None, _LENGTH_BYTES + most, longest_text=most)
        case type() as kind, [CutText(most)] if kind is str:
            return Form(_texts(most), _cut(most), _LENGTH_BYTES + most, longest_text=most)
        case _, [AtMost(most), *rest] if get_origin(plain) is tuple and get_args(plain)[1:] == (...,):
            return _many(form_of(get_args(plain)[0]), most, rest)
    raise TypeError(f"{plain} with {bounds}: a field of a message has no such bounds")


def _packed(inner: Form) -> Form:
    write_inner = inner.write or _as_is

    @lru_cache(PACKED_KEPT)
    def read_once(data: bytes) -> Any:
        (value,) = unpack(
            data,
            1,
            error=MessageError,
            max_bytes=inner.longest_bytes,
            max_text=inner.longest_text,
            max_array=inner.longest_array,
            max_arrays=len(data),
        )
        return inner.read(value)

    def read(value: Any) -> Any:
        if type(value) is not bytes or len(value) > most:
            _refuse("packed")
        return read_once(value)

    @lru_cache(PACKED_KEPT)
    def write(value: Any) -> bytes:
        return pack([write_inner(value)])

    most = 1 + inner.bytes
    return Form(read, write, _LENGTH_BYTES + most, longest_bytes=most)


def _read_node(value: Any) -> NodeId:
    if type(value) is not bytes or len(value) != NODE_ID_BYTES:
        _refuse("node id")
    return _to_node(value)


def _read_flag(value: Any) -> bool:
    if type(value) is not int or value not in (0, 1):
        _refuse("flag")
    return value == 1


def _integers(most: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if type(value) is not int or not 0 <= value <= most:
            _refuse("integer")
        return value

    return read


def _strings(least: int, most: int) -> Callable[[Any], bytes]:
    def read(value: Any) -> bytes:
        if type(value) is not bytes or not least <= len(value) <= most:
            _refuse("bytes")
        return value

    return read


def _texts(most: int) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if type(value) is not str or len(value.encode()) > most:
            _refuse("text")
        return value

    return read


def _cut(most: int) -> Callable[[str], str]:
    return lambda text: text.encode()[:most].decode(errors="ignore")


def _enum(kind: type[IntEnum]) -> Form:
    members = {int(member): member for member in kind}

    def read(value: Any) -> IntEnum:
        if type(value) is not int or value not in members:
            _refuse("kind of " + kind.__name__)
        return members[value]

    return Form(read, int, _INTEGER_BYTES)


def _union(hint: Any) -> Form:
    if set(get_args(hint)) == {int, str}:
        return Form(_read_value, None, _LENGTH_BYTES + MAX_TEXT_BYTES, longest_text=MAX_TEXT_BYTES)
    inner = [part for part in get_args(hint) if part is not NoneType]
    if len(inner) != 1 or len(get_args(hint)) != 2:  # T | None
        raise TypeError(f"{hint}: a field of a message has no such type")
    form = _many(form_of(inner[0]), 1, [])
    write = form.write or list

    def read(value: Any) -> Any:
        content = form.read(value)
        return content[0] if content else None

    return dataclasses.replace(form, read=read, write=lambda value: write(() if value is None else (value,)))


def _read_value(value: Any) -> int | str:
    if type(value) is int and -(2**63) <= value <= UINT64_MAX:
        return value
    if type(value) is str and len(value.encode()) <= MAX_TEXT_BYTES:
        return value
    _refuse("value")


def _many(item: Form, most: int, rules: list[Any]) -> Form:
    read_item, write_item = item.read, item.write
    rising, least = Ascending() in rules, int(bool(rules))
    if not all(rule in (Ascending(), NotEmpty()) for rule in rules):
        raise TypeError(f"{rules}: a tuple in a message has no such bounds")

    def read(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or not least <= len(value) <= most:
            _refuse("array")
        items = tuple([read_item(item) for item in value])
        if rising and any(earlier[0] >= other[0] for earlier, other in pairwise(items)):
            _refuse("order")
        return items

    def write(items: Iterable[Any]) -> list[Any]:
        return list(items) if write_item is None else [write_item(item) for item in items]

    return _array([item], read, write, items=most, most=most * item.bytes)


def _record(kind: type) -> Form:
    hints = get_type_hints(kind, include_extras=True)
    names = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else list(hints)
    return _fixed(lambda values: kind(*values), _taker(kind, names), [form_of(hints[name]) for name in names])


def _taker(kind: type, names: list[str]) -> Callable[[Any], Iterable[Any]]:
    """Return what gives the fields of a record, in order."""
    if issubclass(kind, tuple):
        return list
    if len(names) > 1:
        return attrgetter(*names)
    return lambda record: [getattr(record, name) for name in names]


def _fixed(make: Callable[[Any], Any], take: Callable[[Any], Iterable[Any]], forms: list[Form]) -> Form:
    readers, count = [form.read for form in forms], len(forms)
    writers = [form.write or _as_is for form in forms]
    plain = all(form.write is None for form in forms)

    def read(value: Any) -> Any:
        if type(value) is not list or len(value) < count:
            _refuse("layout")
        return make([reader(field) for reader, field in zip(readers, value, strict=False)])  # what is newer is skipped

    def write(record: Any) -> list[Any]:
        if plain:
            return list(take(record))
        return [writer(field) for writer, field in zip(writers, take(record), strict=True)]

    return _array(forms, read, write, items=count, most=sum(form.bytes for form in forms))


def _as_is(value: Any) -> Any:
    return value


def _array(
    parts: list[Form], read: Callable[[Any], Any], write: Callable[[Any], Any], *, items: int, most: int
) -> Form:
    return Form(
        read,
        write,
        _LENGTH_BYTES + most,
        longest_bytes=max((part.longest_bytes for part in parts), default=0),
        longest_text=max((part.longest_text for part in parts), default=0),
        longest_array=max([items, *(part.longest_array for part in parts)]),
    )


_NUMBERS = {kind: number for number, kind in MESSAGES.items()}
_FORMS = {number: form_of(kind) for number, kind in MESSAGES.items()}
MAX_MESSAGE_BYTES = max(form.bytes for form in _FORMS.values()) + MAX_NEWER_BYTES
