"""The fields of messages: their types and bounds, declared once.

A message is a dataclass or a named tuple whose annotations come from here; `message_codec` makes its
form as bytes, and the size that it may have, from nothing else. The tests iterate over the same.

    bool, an IntEnum, NodeId                 as they are; a node id is 20 bytes
    Annotated[int, AtMost(n)]                0 to n
    Annotated[bytes | str, Size(n)]          exactly n bytes (of a text: in UTF-8)
    Annotated[bytes | str, AtMost(n)]        at most n bytes
    Annotated[str, CutText(n)]               at most n bytes; a longer one is cut when it is written
    Annotated[tuple[T, ...], AtMost(n)]      at most n items; with NotEmpty() or Ascending() besides
    tuple[A, B], a dataclass, a named tuple  one after the other
    Annotated[T, Packed()]                   bytes of its own, read once however often they come
    int | str                                64 bits with a sign, or a text of MAX_TEXT_BYTES
    T | None
"""

from dataclasses import dataclass
from typing import Annotated

from protocol.identity import NodeId
from protocol.wire.encoding import UINT64_MAX

MARK_BYTES = 8
SESSION_BYTES = 8
MAX_MEMBERS = 256  # an OperationStart carries a share from each: 256 x 64 KiB is what one message may be
MAX_TEXT_BYTES = 256
MAX_COUNT = 2**62  # of an epoch, a round or an operation: one more than any of them can still be sent


@dataclass(frozen=True, slots=True)
class Size:
    """Exactly `bytes` bytes."""

    bytes: int


@dataclass(frozen=True, slots=True)
class AtMost:
    """At most so much: the integer itself, the bytes of a string, the items of a tuple."""

    most: int


@dataclass(frozen=True, slots=True)
class CutText:
    """A text that is cut to `most` bytes when it is written."""

    most: int


@dataclass(frozen=True, slots=True)
class NotEmpty:
    """At least one item."""


@dataclass(frozen=True, slots=True)
class Ascending:
    """At least one item, and their first fields rise: none is there twice."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Shares equal parts of many messages: 255 reports with one view and one history cost little more than one."""


Mark = Annotated[bytes, Size(MARK_BYTES)]
Session = Annotated[bytes, Size(SESSION_BYTES)]
Count = Annotated[int, AtMost(MAX_COUNT)]
Tag = Annotated[int, AtMost(UINT64_MAX)]
Text = Annotated[str, AtMost(MAX_TEXT_BYTES)]
Reason = Annotated[str, CutText(MAX_TEXT_BYTES)]
MemberIds = Annotated[tuple[NodeId, ...], AtMost(MAX_MEMBERS)]
