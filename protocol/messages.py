"""The bodies of the control messages, typed, with strict decoding.

Bounds: `MAX_RECORDS` records in one peer exchange and `MAX_IDS` ids in one announcement
or pull. Every `decode` raises `MessageError("malformed")` for what it does not expect.
"""

from dataclasses import dataclass

from protocol.codec import is_uint, pack, unpack
from protocol.envelope import MAX_FRAME_BYTES, ItemId
from protocol.errors import MessageError
from protocol.records import MAX_RECORD_BYTES

MAX_RECORDS = 64  # about 20 kB: all of a swarm of tens at once
MAX_IDS = 512
ID_BYTES = 32


@dataclass(frozen=True, slots=True)
class Hello:
    """First on every connection, from both ends: the sender's own record, not yet verified."""

    record: bytes

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return pack([self.record])

    @classmethod
    def decode(cls, body: bytes) -> "Hello":
        """Read a body."""
        (record,) = unpack(body, 1, error=MessageError, max_bytes=MAX_RECORD_BYTES)
        _check(isinstance(record, bytes))
        return cls(record)


@dataclass(frozen=True, slots=True)
class Peers:
    """Records that the sender knows, each signed by the node it is about, not yet verified."""

    records: tuple[bytes, ...]

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return pack([list(self.records)])

    @classmethod
    def decode(cls, body: bytes) -> "Peers":
        """Read a body."""
        (records,) = unpack(body, 1, error=MessageError, max_bytes=MAX_RECORD_BYTES, max_array=MAX_RECORDS)
        _check(isinstance(records, list) and all(isinstance(record, bytes) for record in records))
        return cls(tuple(records))


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks for a `Pong` with the same token: is the process alive, not only its socket? The body of both kinds."""

    token: int

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return pack([self.token])

    @classmethod
    def decode(cls, body: bytes) -> "Ping":
        """Read a body."""
        (token,) = unpack(body, 1, error=MessageError)
        _check(is_uint(token))
        return cls(token)


@dataclass(frozen=True, slots=True)
class Announce:
    """Items that the sender holds and will give: id and size of the frame in bytes."""

    items: tuple[tuple[ItemId, int], ...]

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return pack([b"".join(item for item, _ in self.items), [size for _, size in self.items]])

    @classmethod
    def decode(cls, body: bytes) -> "Announce":
        """Read a body."""
        ids, sizes = unpack(body, 2, error=MessageError, max_bytes=ID_BYTES * MAX_IDS, max_array=MAX_IDS)
        _check(isinstance(ids, bytes) and isinstance(sizes, list) and len(ids) == ID_BYTES * len(sizes))
        _check(all(is_uint(size, MAX_FRAME_BYTES) for size in sizes))
        return cls(tuple(zip(_split(ids), sizes, strict=True)))


@dataclass(frozen=True, slots=True)
class Pull:
    """Items that the sender asks for."""

    ids: tuple[ItemId, ...]

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return pack([b"".join(self.ids)])

    @classmethod
    def decode(cls, body: bytes) -> "Pull":
        """Read a body."""
        (ids,) = unpack(body, 1, error=MessageError, max_bytes=ID_BYTES * MAX_IDS)
        _check(isinstance(ids, bytes) and len(ids) % ID_BYTES == 0)
        return cls(_split(ids))


def _split(ids: bytes) -> tuple[ItemId, ...]:
    return tuple(ItemId(ids[start : start + ID_BYTES]) for start in range(0, len(ids), ID_BYTES))


def _check(condition: bool) -> None:
    if not condition:
        raise MessageError("malformed", "layout")
