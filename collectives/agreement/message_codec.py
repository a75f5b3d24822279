"""The bytes of the agreement's messages: [kind, [fields...]] in MessagePack, every length bounded beforehand.

Node ids are 20 bytes, marks and sessions 8; tags, counts, epochs and rounds are below 2**64; the
integers of a digest may have a sign. Fields that a newer minor version appends are skipped.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NoReturn, TypeVar

from collectives.agreement.messages import (
    MAX_ADDRESS_BYTES,
    MAX_ENTRIES,
    MAX_FIELDS,
    MAX_LEDGERS,
    MAX_MESSAGE_BYTES,
    MAX_OPEN,
    MAX_PENDING,
    MAX_SHARE_BYTES,
    MAX_TEXT_BYTES,
    Abort,
    Ack,
    Apply,
    Beat,
    Commit,
    Decide,
    Done,
    Goodbye,
    Initiate,
    Ledger,
    Message,
    Mismatched,
    Pending,
    Propose,
    Report,
    Ruling,
    Sight,
    Stage,
    Start,
    Welcome,
)
from collectives.agreement.views import MARK_BYTES, MAX_MEMBERS, SESSION_BYTES, Ballot, Member, OpId, View
from protocol.errors import MessageError
from protocol.identity import NODE_ID_BYTES, NodeId, id_bytes, id_of_bytes
from protocol.wire.encoding import UINT64_MAX, is_bytes, is_uint, pack, unpack

MAX_GROUP_BYTES = 64
MAX_RULINGS = MAX_LEDGERS * (MAX_ENTRIES + MAX_OPEN)
MAX_OTHER_BYTES = 1 << 20  # of any message but a Start: a report on 4 x 4,096 operations has about 0.7 MB
MAX_COUNT = 2**62  # of an epoch, a round or an operation: one more than any of them can still be sent
MAX_APPLIED_EPOCH = 2**48  # a stranger cannot use the epochs up
_START = 5

T = TypeVar("T")


def encode(message: Message) -> bytes:
    """Return a message's bytes."""
    kind, write = _WRITERS[type(message)]
    return pack([kind, write(message)])


def decode(data: bytes) -> Message:
    """Read a message. Raises `MessageError("malformed")` for anything else."""
    if len(data) > (MAX_MESSAGE_BYTES if data[1:2] == bytes([_START]) else MAX_OTHER_BYTES):
        _refuse("size")
    kind, fields = unpack(
        data, 2, error=MessageError, max_bytes=MAX_SHARE_BYTES, max_text=MAX_TEXT_BYTES, max_array=MAX_RULINGS
    )
    read = _READERS.get(kind) if is_uint(kind) else None
    if read is None:
        _refuse("kind")
    return read(Fields(fields))


def _refuse(detail: str) -> NoReturn:
    raise MessageError("malformed", detail)


class Fields:
    """Reads the fields of an array, one after the other, each of the type that is asked for."""

    def __init__(self, fields: object) -> None:
        if not isinstance(fields, list):
            _refuse("array")
        self._fields = fields
        self._at = 0

    def any(self) -> Any:
        """Return the next field."""
        if self._at >= len(self._fields):
            _refuse("layout")
        self._at += 1
        return self._fields[self._at - 1]

    def uint(self, limit: int = UINT64_MAX) -> int:
        """Return an integer in [0, limit]."""
        value: int = self.any()
        return value if is_uint(value, limit) else _refuse("integer")

    def flag(self) -> bool:
        """Return a truth value, sent as 0 or 1."""
        return self.uint(1) == 1

    def sized(self, size: int) -> bytes:
        """Return a byte string of exactly `size` bytes."""
        value: bytes = self.any()
        return value if is_bytes(value, size) else _refuse("bytes")

    def bytes(self, limit: int) -> bytes:
        """Return a byte string of at most `limit` bytes."""
        value = self.any()
        return value if isinstance(value, bytes) and len(value) <= limit else _refuse("bytes")

    def text(self, limit: int = MAX_TEXT_BYTES) -> str:
        """Return a text of at most `limit` bytes."""
        value = self.any()
        return value if isinstance(value, str) and len(value.encode()) <= limit else _refuse("text")

    def value(self) -> int | str:
        """Return an integer or a text."""
        value = self.any()
        return value if isinstance(value, int | str) and not isinstance(value, bool) else _refuse("value")

    def node(self) -> NodeId:
        """Return a node id."""
        return id_of_bytes(self.sized(NODE_ID_BYTES))

    def each(self, limit: int, read: Callable[["Fields"], T]) -> tuple[T, ...]:
        """Return what `read` makes of each of at most `limit` arrays."""
        items = self._list(limit)
        return tuple(read(Fields(item)) for item in items)

    def flat(self, limit: int, read: Callable[["Fields"], T]) -> tuple[T, ...]:
        """Return at most `limit` values of one kind."""
        items = self._list(limit)
        fields = Fields(items)
        return tuple(read(fields) for _ in items)

    def within(self, read: Callable[["Fields"], T]) -> T:
        """Return what `read` makes of an array."""
        return read(Fields(self.any()))

    def maybe(self, read: Callable[["Fields"], T]) -> T | None:
        """Return what `read` makes of the one array in an array, or None for an empty one."""
        found = self.each(1, read)
        return found[0] if found else None

    def _list(self, limit: int) -> list[Any]:
        items = self.any()
        return items if isinstance(items, list) and len(items) <= limit else _refuse("array")


# --- parts of messages ---


def _ids(members: tuple[NodeId, ...]) -> list[bytes]:
    return [id_bytes(member) for member in members]


def _text(text: str) -> str:
    """Cut a reason to what may be sent."""
    return text.encode()[:MAX_TEXT_BYTES].decode(errors="ignore")


def _member(fields: Fields) -> Member:
    return Member(fields.node(), fields.text(MAX_ADDRESS_BYTES), fields.sized(SESSION_BYTES))


def _put_member(line: Member) -> list[Any]:
    return [id_bytes(line.id), line.address, line.session]


def _view(fields: Fields) -> View:
    group, epoch, mark = fields.bytes(MAX_GROUP_BYTES), fields.uint(MAX_COUNT), fields.sized(MARK_BYTES)
    roster = fields.each(MAX_MEMBERS, _member)
    ids = [line.id for line in roster]
    if not ids or any(one >= other for one, other in pairwise(ids)):
        _refuse("view")
    return View(group, epoch, mark, roster)


def _put_view(view: View) -> list[Any]:
    return [view.group, view.epoch, view.mark, [_put_member(line) for line in view.roster]]


def _ballot(fields: Fields) -> Ballot:
    return Ballot(fields.uint(MAX_COUNT), fields.node())


def _op(fields: Fields) -> OpId:
    return OpId(fields.sized(MARK_BYTES), fields.uint(MAX_COUNT), fields.uint(), fields.uint(MAX_COUNT))


def _entry(fields: Fields) -> tuple[OpId, Stage]:
    return fields.within(_op), Stage(fields.uint(Stage.ABORTED))


def _ledger(fields: Fields) -> Ledger:
    mark, members = fields.sized(MARK_BYTES), fields.flat(MAX_MEMBERS, Fields.node)
    if not members:
        _refuse("ledger")
    return Ledger(mark, members, fields.each(MAX_ENTRIES, _entry), fields.flag())


def _put_ledger(ledger: Ledger) -> list[Any]:
    entries = [[list(op), int(stage)] for op, stage in ledger.entries]
    return [ledger.mark, _ids(ledger.members), entries, int(ledger.whole)]


def _mismatch(fields: Fields) -> Mismatched:
    return Mismatched(fields.node(), fields.text(), fields.value(), fields.value())


def _pair(fields: Fields) -> tuple[str, int | str]:
    return fields.text(), fields.value()


# --- messages ---

Reader = Callable[[Fields], Message]


def _beat(fields: Fields) -> Beat:
    mark, epoch, number = fields.sized(MARK_BYTES), fields.uint(MAX_COUNT), fields.uint(MAX_COUNT)
    missing = fields.flat(MAX_MEMBERS, Fields.node)
    return Beat(mark, epoch, number, missing, fields.flat(MAX_PENDING, Fields.node), fields.flag())


def _initiate(fields: Fields) -> Initiate:
    op, kind = fields.within(_op), fields.text()
    return Initiate(op, kind, fields.each(MAX_FIELDS, _pair), fields.bytes(MAX_SHARE_BYTES))


def _start(fields: Fields) -> Start:
    return Start(fields.within(_op), fields.flat(MAX_MEMBERS, lambda items: items.bytes(MAX_SHARE_BYTES)))


def _abort(fields: Fields) -> Abort:
    return Abort(fields.within(_op), fields.flag(), fields.text(), fields.maybe(_mismatch))


def _propose(fields: Fields) -> Propose:
    return Propose(fields.within(_ballot), fields.uint(MAX_COUNT), fields.flat(MAX_MEMBERS, Fields.node))


def _report(fields: Fields) -> Report:
    ballot, view = fields.within(_ballot), fields.within(_view)
    return Report(ballot, view, fields.flat(MAX_MEMBERS, Fields.node), fields.each(MAX_LEDGERS, _ledger))


def _ruling(fields: Fields) -> Ruling:
    return Ruling(*_entry(fields))


def _decide(fields: Fields) -> Decide:
    return Decide(fields.within(_ballot), fields.within(_view), fields.each(MAX_RULINGS, _ruling))


def _put_ballot(ballot: Ballot) -> list[Any]:
    return [ballot.round, id_bytes(NodeId(ballot.proposer))]


def _put_mismatch(mismatch: Mismatched | None) -> list[Any]:
    if mismatch is None:
        return []
    return [[id_bytes(mismatch.member), mismatch.field, mismatch.theirs, mismatch.ours]]


_WRITERS: dict[type[Message], tuple[int, Callable[[Any], list[Any]]]] = {
    Beat: (1, lambda m: [m.mark, m.epoch, m.round, _ids(m.missing), _ids(m.reaches), int(m.pending)]),
    Apply: (2, lambda m: [m.address, m.session, m.epoch]),
    Sight: (3, lambda m: [_put_view(m.view)]),
    Initiate: (4, lambda m: [list(m.op), m.kind, [list(pair) for pair in m.digest], m.share]),
    Start: (_START, lambda m: [list(m.op), list(m.shares)]),
    Done: (6, lambda m: [list(m.op), int(m.ok), int(m.late), _text(m.reason)]),
    Commit: (7, lambda m: [list(m.op), [] if m.view is None else [_put_view(m.view)]]),
    Ack: (8, lambda m: [list(m.op)]),
    Abort: (9, lambda m: [list(m.op), int(m.late), _text(m.reason), _put_mismatch(m.mismatch)]),
    Propose: (10, lambda m: [_put_ballot(m.ballot), m.epoch, _ids(m.members)]),
    Report: (
        11,
        lambda m: [
            _put_ballot(m.ballot),
            _put_view(m.view),
            _ids(m.missing),
            [_put_ledger(ledger) for ledger in m.ledgers],
        ],
    ),
    Decide: (
        12,
        lambda m: [_put_ballot(m.ballot), _put_view(m.view), [[list(r.op), int(r.stage)] for r in m.rulings]],
    ),
    Welcome: (13, lambda m: [m.session, _put_view(m.view)]),
    Pending: (14, lambda m: [[_put_member(line) for line in m.newcomers]]),
    Goodbye: (15, lambda _: []),
}
_READERS: dict[int, Reader] = {
    1: _beat,
    2: lambda f: Apply(f.text(MAX_ADDRESS_BYTES), f.sized(SESSION_BYTES), f.uint(MAX_APPLIED_EPOCH)),
    3: lambda f: Sight(f.within(_view)),
    4: _initiate,
    _START: _start,
    6: lambda f: Done(f.within(_op), f.flag(), f.flag(), f.text()),
    7: lambda f: Commit(f.within(_op), f.maybe(_view)),
    8: lambda f: Ack(f.within(_op)),
    9: _abort,
    10: _propose,
    11: _report,
    12: _decide,
    13: lambda f: Welcome(f.sized(SESSION_BYTES), f.within(_view)),
    14: lambda f: Pending(f.each(MAX_PENDING, _member)),
    15: lambda _: Goodbye(),
}
