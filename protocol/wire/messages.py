"""The bodies of the messages, typed, with strict decoding.

Every array and text is bounded before it is parsed. Every `decode` raises
`MessageError("malformed")` for what it does not expect; fields that a newer minor version
appended are skipped.
"""

import hashlib
from functools import lru_cache
from typing import ClassVar, NamedTuple, Protocol, Self

from protocol.credentials.records import MAX_RECORD_BYTES
from protocol.errors import MessageError
from protocol.identity import NodeId, id_bytes
from protocol.value import value
from protocol.wire.encoding import is_bytes, is_uint, pack, unpack
from protocol.wire.envelope import (
    CHUNK_BYTES,
    HASH_BYTES,
    HEAD_BYTES,
    MAX_ITEM_BYTES,
    PLACE_BYTES,
    ItemId,
    Kind,
    chunk_count,
)

MAX_RECORDS = 64  # about 20 kB: all of a swarm of tens at once
MAX_IDS = 512
MAX_TOPICS = 64
MAX_DIGEST = 512  # entries: the largest full directory
MAX_MANIFEST_BYTES = 32 << 10
MAX_REVOCATIONS_BYTES = 24 << 10
MAX_REASON_BYTES = 64
MAX_HOST_BYTES = 253  # of a name; an IPv6 address has at most 45, and its zone
MAX_CHUNKS = 16  # of one item, asked for at once
MAX_PARTS_BYTES = (chunk_count(MAX_ITEM_BYTES) + 8) // 8
ID_BYTES = 32
TOPIC_BYTES = 8
NO_TOPIC = bytes(TOPIC_BYTES)
ITEM_OVERHEAD_BYTES = TOPIC_BYTES + 1  # the topic, and how the content is written (`protocol.wire.compression`)
MAX_ITEM_FRAME_BYTES = HEAD_BYTES + ITEM_OVERHEAD_BYTES + MAX_ITEM_BYTES
SUMMARY_BYTES = 8  # of a node id, and of a record, in a digest
HINT_BYTES = 4  # of a signer's node id: 10,000 signers share one with a chance of 1 in 100
NO_HINT = bytes(HINT_BYTES)


class Body(Protocol):
    """The base of every message below: the kind that its frame names, and the body's bytes."""

    kind: ClassVar[Kind]

    def encode(self) -> bytes:
        """Return the body's bytes."""
        ...


@lru_cache(maxsize=4096)
def hint(node: NodeId) -> bytes:
    """Return the beginning of a node's id by which announcements name a signer."""
    return id_bytes(node)[:HINT_BYTES]


@value
class Hello:
    """First on every connection, from both ends: the sender's own record, not yet verified.

    `needy` says that the sender lacks links of its own choice, so that room may be made for it. `revision` is that of
    the revocation list that it obeys, 0 for none.
    """

    kind: ClassVar[Kind] = Kind.HELLO
    record: bytes
    needy: bool = False
    revision: int = 0

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return pack([self.record, int(self.needy), self.revision])

    @classmethod
    def decode(cls, body: bytes) -> "Hello":
        """Read a body."""
        record, needy, revision = unpack(body, 3, error=MessageError, max_bytes=MAX_RECORD_BYTES)
        _check(isinstance(record, bytes) and is_uint(needy) and is_uint(revision))
        return cls(record, needy > 0, revision)


@value
class Peers:
    """Records that the sender knows, each signed by the node it is about, not yet verified."""

    kind: ClassVar[Kind] = Kind.PEERS
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


@value
class Ping:
    """Asks for a pong with the same token: is the process alive, not only its socket?"""

    kind: ClassVar[Kind] = Kind.PING
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


@value
class Pong(Ping):
    """The answer to a `Ping` with that token."""

    kind: ClassVar[Kind] = Kind.PONG


@value
class DialBack:
    """Asks at which address the receiver sees the sender, and whether it can be dialled at a port (0: not listening).

    It is to be dialled at `host`, which is one of its own, or, if that is empty, at the address where it is seen.
    """

    kind: ClassVar[Kind] = Kind.DIAL_BACK
    port: int
    host: str = ""

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return pack([self.port, self.host])

    @classmethod
    def decode(cls, body: bytes) -> "DialBack":
        """Read a body."""
        port, host = unpack(body, 2, error=MessageError, max_text=MAX_HOST_BYTES)
        _check(is_uint(port, 0xFFFF) and isinstance(host, str))
        return cls(port, host)


@value
class DialledBack:
    """The answer to a `DialBack`, of which it repeats port and host, and whether the sender was `reached` there.

    `seen_at` is the IP address, as text, at which the answering node sees the other.
    """

    kind: ClassVar[Kind] = Kind.DIALLED_BACK
    seen_at: str
    port: int
    reached: bool
    host: str = ""

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return pack([self.seen_at, self.port, int(self.reached), self.host])

    @classmethod
    def decode(cls, body: bytes) -> "DialledBack":
        """Read a body."""
        seen_at, port, reached, host = unpack(body, 4, error=MessageError, max_text=MAX_HOST_BYTES)
        _check(isinstance(seen_at, str) and isinstance(host, str) and is_uint(port, 0xFFFF) and is_uint(reached, 1))
        return cls(seen_at, port, reached > 0, host)


@value
class Goodbye:
    """The sender will close this link; `reason` is a short name."""

    kind: ClassVar[Kind] = Kind.GOODBYE
    reason: str

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return pack([self.reason])

    @classmethod
    def decode(cls, body: bytes) -> "Goodbye":
        """Read a body."""
        (reason,) = unpack(body, 1, error=MessageError, max_text=MAX_REASON_BYTES)
        _check(isinstance(reason, str) and reason.isascii() and reason.isidentifier())
        return cls(reason)


@value
class Digest:
    """The sender's records in short: for each 8 bytes of its node's id, and 8 bytes that change with the record."""

    kind: ClassVar[Kind] = Kind.DIGEST
    entries: tuple[tuple[bytes, bytes], ...]

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return pack([b"".join(node + version for node, version in self.entries)])

    @classmethod
    def decode(cls, body: bytes) -> "Digest":
        """Read a body."""
        (joined,) = unpack(body, 1, error=MessageError, max_bytes=2 * SUMMARY_BYTES * MAX_DIGEST)
        _check(isinstance(joined, bytes) and len(joined) % (2 * SUMMARY_BYTES) == 0)
        halves = _split(joined, SUMMARY_BYTES)
        return cls(tuple(zip(halves[::2], halves[1::2], strict=True)))


class Entry(NamedTuple):
    """An item that somebody holds: its id, the size of its frame in bytes, and its topic (8 bytes).

    `signer` is the beginning of its signer's node id. Nothing proves it before the item comes: it only decides when to
    ask for the item. `parts` says which chunks the sender has, a bit each, the first chunk lowest in the first byte;
    empty: all.
    """

    id: ItemId
    size: int
    topic: bytes = NO_TOPIC
    signer: bytes = NO_HINT
    parts: bytes = b""


@value
class Have:
    """Items that the sender holds, or has some chunks of, and will give."""

    kind: ClassVar[Kind] = Kind.HAVE
    items: tuple[Entry, ...]

    def encode(self) -> bytes:
        """Return the body's bytes."""
        columns = [[*column] for column in zip(*self.items, strict=True)] if self.items else [[], [], [], [], []]
        ids, sizes, topics, signers, parts = columns
        return pack([b"".join(ids), sizes, b"".join(topics), b"".join(signers), parts if any(parts) else []])

    @classmethod
    def decode(cls, body: bytes) -> "Have":
        """Read a body."""
        fields = unpack(body, 5, error=MessageError, max_bytes=ID_BYTES * MAX_IDS, max_array=MAX_IDS)
        ids, sizes, topics, signers, parts = fields
        _check(isinstance(sizes, list) and len(sizes) <= MAX_IDS)
        # All at once, as there are hundreds. By their types, as a boolean would count as an integer.
        _check({*map(type, sizes)} <= {int} and (not sizes or 0 <= min(sizes) <= max(sizes) <= MAX_ITEM_FRAME_BYTES))
        for joined, width in ((ids, ID_BYTES), (topics, TOPIC_BYTES), (signers, HINT_BYTES)):
            _check(is_bytes(joined, width * len(sizes)))
        _check(isinstance(parts, list) and len(parts) in (0, len(sizes)) and {*map(type, parts)} <= {bytes})
        _check(max(map(len, parts), default=0) <= MAX_PARTS_BYTES)
        columns = map(ItemId, _split(ids, ID_BYTES)), sizes, _split(topics, TOPIC_BYTES), _split(signers, HINT_BYTES)
        return cls(tuple(map(Entry, *columns, parts or [b""] * len(sizes))))


class WantedPart(NamedTuple):
    """What is asked for of an item: these chunks. Without any, the item itself, or the outline of a large item."""

    id: ItemId
    chunks: tuple[int, ...] = ()


@value
class Want:
    """Items and chunks that the sender asks for. The answer is each of them, or `DontHave`, or `Busy`."""

    kind: ClassVar[Kind] = Kind.WANT
    parts: tuple[WantedPart, ...]

    def encode(self) -> bytes:
        """Return the body's bytes."""
        chunks = [list(part.chunks) for part in self.parts] if any(part.chunks for part in self.parts) else []
        return pack([b"".join(part.id for part in self.parts), chunks])

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Read a body."""
        joined, chunks = unpack(body, 2, error=MessageError, max_bytes=ID_BYTES * MAX_IDS, max_array=MAX_IDS)
        ids = _ids(joined)
        _check(isinstance(chunks, list) and len(chunks) in (0, len(ids)))
        for indices in chunks:
            _check(isinstance(indices, list) and len(indices) <= MAX_CHUNKS)
            _check(all(is_uint(index, chunk_count(MAX_ITEM_BYTES)) for index in indices))
        return cls(tuple(map(WantedPart, ids, map(tuple, chunks) if chunks else [()] * len(ids))))


@value
class Cancel(Want):
    """The sender no longer asks for these. What is on its way still comes."""

    kind: ClassVar[Kind] = Kind.CANCEL


@value
class Ack(Want):
    """These came, which the sender had asked for: it has them, or needs them no longer."""

    kind: ClassVar[Kind] = Kind.ACK


@value
class DontHave:
    """The sender was asked for these items, or chunks of them, and does not have them."""

    kind: ClassVar[Kind] = Kind.DONT_HAVE
    ids: tuple[ItemId, ...]

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return pack([b"".join(self.ids)])

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Read a body."""
        (joined,) = unpack(body, 1, error=MessageError, max_bytes=ID_BYTES * MAX_IDS)
        return cls(_ids(joined))


@value
class Busy(DontHave):
    """The sender gives nothing of these items for now, and may be asked again.

    Without ids: all that it was asked for waits for its line, and will come.
    """

    kind: ClassVar[Kind] = Kind.BUSY


def _ids(joined: object) -> tuple[ItemId, ...]:
    _check(isinstance(joined, bytes) and len(joined) % ID_BYTES == 0)
    assert isinstance(joined, bytes)
    return tuple(map(ItemId, _split(joined, ID_BYTES)))


@value
class ItemOutline:
    """An item of several chunks, without its body: the first `HEAD_BYTES` of its frame, and its chunks' hashes."""

    kind: ClassVar[Kind] = Kind.OUTLINE
    head: bytes
    hashes: bytes

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return pack([self.head, self.hashes])

    @classmethod
    def decode(cls, body: bytes) -> "ItemOutline":
        """Read a body."""
        head, hashes = unpack(body, 2, error=MessageError, max_bytes=HASH_BYTES * chunk_count(MAX_ITEM_BYTES))
        _check(is_bytes(head, HEAD_BYTES) and isinstance(hashes, bytes) and len(hashes) % HASH_BYTES == 0)
        return cls(head, hashes)


@value
class ItemChunk:
    """Chunk `index` of an item: its data, and the SHA-256 of the data, which is not sent."""

    kind: ClassVar[Kind] = Kind.CHUNK
    id: ItemId
    index: int
    data: bytes
    hash: bytes

    @property
    def place(self) -> bytes:
        """The beginning of the body: the item's id, and which chunk it is."""
        return self.id + self.index.to_bytes(PLACE_BYTES - ID_BYTES, "big")

    def encode(self) -> bytes:
        """Return the body's bytes, which are no array."""
        return self.place + self.data

    @classmethod
    def decode(cls, body: bytes) -> "ItemChunk":
        """Read a body."""
        _check(PLACE_BYTES <= len(body) <= PLACE_BYTES + CHUNK_BYTES)
        index = int.from_bytes(body[ID_BYTES:PLACE_BYTES], "big")
        _check(index <= chunk_count(MAX_ITEM_BYTES))
        data = body[PLACE_BYTES:]
        return cls(ItemId(body[:ID_BYTES]), index, data, hashlib.sha256(data).digest())


@value
class Interest:
    """The topics that the sender wants to be offered.

    `topics` is None for every topic. One that `is_sated` has more on offer than it can use: it is told in batches.
    """

    kind: ClassVar[Kind] = Kind.INTEREST
    topics: frozenset[bytes] | None
    is_sated: bool = False

    def covers(self, topic: bytes) -> bool:
        """Tell whether items of the topic are wanted at all; one without a topic is for everybody."""
        return self.topics is None or topic == NO_TOPIC or topic in self.topics

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return pack([int(self.topics is None), b"".join(sorted(self.topics or ())), int(self.is_sated)])

    @classmethod
    def decode(cls, body: bytes) -> "Interest":
        """Read a body."""
        everything, topics, is_sated = unpack(body, 3, error=MessageError, max_bytes=TOPIC_BYTES * MAX_TOPICS)
        _check(is_uint(everything, 1) and is_uint(is_sated, 1))
        _check(isinstance(topics, bytes) and len(topics) % TOPIC_BYTES == 0)
        return cls(None if everything else frozenset(_split(topics, TOPIC_BYTES)), is_sated > 0)


@value
class AskManifest:
    """Asks for the swarm's manifest."""

    kind: ClassVar[Kind] = Kind.ASK_MANIFEST

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return b""


@value
class Manifest:
    """The swarm's signed manifest as bytes, in answer to `AskManifest`."""

    kind: ClassVar[Kind] = Kind.MANIFEST
    encoded: bytes

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return pack([self.encoded])

    @classmethod
    def decode(cls, body: bytes) -> "Manifest":
        """Read a body."""
        (encoded,) = unpack(body, 1, error=MessageError, max_bytes=MAX_MANIFEST_BYTES)
        _check(isinstance(encoded, bytes))
        return cls(encoded)


@value
class AskRevocations:
    """Asks for the swarm's revocation list, if the receiver's has a larger revision than this."""

    kind: ClassVar[Kind] = Kind.ASK_REVOCATIONS
    revision: int

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return pack([self.revision])

    @classmethod
    def decode(cls, body: bytes) -> "AskRevocations":
        """Read a body."""
        (revision,) = unpack(body, 1, error=MessageError)
        _check(is_uint(revision))
        return cls(revision)


@value
class Revocations:
    """The swarm's signed revocation list as bytes: the answer to `AskRevocations`, and told to all peers when new."""

    kind: ClassVar[Kind] = Kind.REVOCATIONS
    encoded: bytes

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return pack([self.encoded])

    @classmethod
    def decode(cls, body: bytes) -> "Revocations":
        """Read a body."""
        (encoded,) = unpack(body, 1, error=MessageError, max_bytes=MAX_REVOCATIONS_BYTES)
        _check(isinstance(encoded, bytes))
        return cls(encoded)


def _split(joined: bytes, size: int) -> list[bytes]:
    return [joined[start : start + size] for start in range(0, len(joined), size)]


def _check(condition: bool) -> None:
    if not condition:
        raise MessageError("malformed", "layout")
