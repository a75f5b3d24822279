"""Shared state: named tensors with a revision that the members of a group hold in common, and their hashes.

A tensor is hashed in chunks (SHA-256, FIPS 180-4), and its hash is that of its name, type, shape and
chunk hashes. So what comes from another member can be checked chunk by chunk as it arrives, who sent
a wrong one is known at once, and of a large tensor only the chunks that differ have to travel.

    chunk hashes -> hash of the tensor -> table of tensors -> hash of the layout, hash of the content
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from collectives.errors import BadArgument, Mismatch
from collectives.reduce.tensors import MOVED, TensorLike, check_target, dtype_name, flatten, memory
from collectives.shared_state.selection import HASH_BYTES, MAX_INLINE_TABLE, MAX_TABLE_BYTES, Share, ShareError
from collectives.types import SyncStrategy
from protocol.identity import NodeId
from protocol.wire.encoding import is_uint, pack, unpack

MIN_CHUNK = 1 << 20  # bytes: long enough that a request costs little, short enough to spread over sources
MAX_CHUNKS = 8192  # of a tensor, above which its chunks grow: so the list of their hashes is at most 256 KiB
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 64  # as many as torch and NumPy allow
HASHING_THREADS = 2  # hashing leaves the interpreter to others; more than two compete with training

Bytes = memoryview


class SharedState:
    """Named tensors that a group keeps equal, and how far they have come.

    Args:
        tensors: by name, torch tensors or NumPy arrays, on any device; `sync_state` writes to them in place.
        revision: raise it by one with each change that all members make; a group refuses larger steps.
        allow_difference: names of tensors that each member keeps to itself: never compared, never fetched.

    Raises:
        BadArgument: a name is too long, a tensor of a type that cannot travel, `allow_difference`
            names no tensor, or the revision is negative.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorLike],
        revision: int = 0,
        allow_difference: Iterable[str] = frozenset(),
    ) -> None:
        self.tensors = dict(tensors)
        self.revision = revision
        self.allow_difference = frozenset(allow_difference)
        self.synced: int | None = None  # the revision last held in common
        self.arrived: dict[bytes, torch.Tensor] = {}  # verified chunks of a transfer that was cut off
        self.contents: Contents | None = None  # while it is being synchronised
        if not is_uint(revision):
            raise BadArgument(f"revision = {revision!r}: give an integer of at least 0")
        for name, tensor in self.tensors.items():
            if len(name.encode()) > MAX_NAME_BYTES:
                raise BadArgument(f"{name!r:.60} cannot name a tensor: use text of at most {MAX_NAME_BYTES} bytes")
            dtype_name(tensor)
        if unknown := self.allow_difference - self.tensors.keys():
            raise BadArgument(f"allow_difference names {sorted(unknown)}: no such tensor in the state")

    def __repr__(self) -> str:
        return f"SharedState({len(self.tensors)} tensors, revision {self.revision})"


@dataclass(frozen=True, slots=True)
class StateEntry:
    """One tensor in a table: what it is and, unless members may differ in it, the hash of what it holds."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    own: bool  # each member keeps its own
    digest: bytes

    @property
    def nbytes(self) -> int:
        """Length of its values."""
        return math.prod(self.shape) * MOVED[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Contents:
    """A state as it is at one moment: its table, its memory and the hashes of its chunks. Only read."""

    entries: tuple[StateEntry, ...]  # sorted by name
    values: tuple[Bytes, ...]
    chunks: tuple[bytes, ...]  # of each tensor, `HASH_BYTES` for each chunk
    table: bytes
    layout: bytes
    content: bytes


def contents_of(state: SharedState) -> Contents:
    """Hash `state`; at about 1.5 GB/s on each core where the processor has instructions for it."""
    entries, values, chunks = [], [], []
    with ThreadPoolExecutor(HASHING_THREADS, "hashing") as pool:
        for name, tensor in sorted(state.tensors.items()):
            own = name in state.allow_difference
            data = memory(flatten(tensor))
            hashes = b"" if own else b"".join(pool.map(sha256, chunks_of(data)))
            dtype, shape = dtype_name(tensor), tuple(tensor.shape)
            entries.append(StateEntry(name, dtype, shape, own, b"" if own else digest_of(name, dtype, shape, hashes)))
            values.append(data)
            chunks.append(hashes)
    table = encode_table(entries)
    if len(table) > MAX_TABLE_BYTES:
        raise BadArgument(f"{len(entries)} tensors are too many to share: join some of them into one")
    return Contents(tuple(entries), tuple(values), tuple(chunks), table, *root_hashes(entries))


def share_of(state: SharedState, strategy: SyncStrategy) -> bytes:
    """Hash `state` and return what this member says of it to the others.

    Raises:
        BadArgument: a tensor that may have to be overwritten cannot be written.
    """
    if strategy is not SyncStrategy.SEND_ONLY:
        for name, tensor in state.tensors.items():
            if name not in state.allow_difference:
                check_target(tensor, None)
    if not is_uint(state.revision):
        raise BadArgument(f"revision = {state.revision!r}: give an integer of at least 0")
    contents = state.contents = contents_of(state)
    inline = contents.table if len(contents.table) <= MAX_INLINE_TABLE else b""
    return Share(
        strategy, state.revision, state.synced, contents.layout, contents.content, len(contents.table), inline
    ).encode()


def sha256(data: bytes | Bytes) -> bytes:
    """Return the SHA-256 of `data`."""
    return hashlib.sha256(data).digest()


def digest_of(name: str, dtype: str, shape: Sequence[int], hashes: bytes) -> bytes:
    """Return the hash of a tensor from the hashes of its chunks."""
    return sha256(pack([name, dtype, list(shape), hashes]))


def chunk_bytes(nbytes: int) -> int:
    """Return the length of the chunks of a tensor of `nbytes`: a multiple of `MIN_CHUNK`, the last may be shorter."""
    return MIN_CHUNK * max(1, math.ceil(nbytes / (MIN_CHUNK * MAX_CHUNKS)))


def chunk_count(nbytes: int) -> int:
    """Return the number of chunks of a tensor of `nbytes`."""
    return math.ceil(nbytes / chunk_bytes(nbytes))


def chunks_of(data: Bytes) -> list[Bytes]:
    """Cut the memory of a tensor into its chunks."""
    size = chunk_bytes(len(data))
    return [data[at : at + size] for at in range(0, len(data), size)]


def encode_table(entries: Iterable[StateEntry]) -> bytes:
    """Return the wire form of a table."""
    return pack([[[entry.name, entry.dtype, list(entry.shape), int(entry.own), entry.digest] for entry in entries]])


def root_hashes(entries: Iterable[StateEntry]) -> tuple[bytes, bytes]:
    """Return the hash of a table's layout, and that of its content."""
    entries = list(entries)
    layout = sha256(
        encode_table([StateEntry(entry.name, entry.dtype, entry.shape, entry.own, b"") for entry in entries])
    )
    return layout, sha256(layout + b"".join(entry.digest for entry in entries))


def decode_table(data: bytes, share: Share) -> tuple[StateEntry, ...]:
    """Read the table that belongs to a member's `share`.

    Raises:
        ShareError: it does not.
    """
    (rows,) = unpack(
        data,
        1,
        error=ShareError,
        max_bytes=HASH_BYTES,
        max_text=MAX_NAME_BYTES,
        max_array=len(data),
        max_arrays=len(data),
    )
    if not isinstance(rows, list):
        raise ShareError("malformed", "table")
    entries = tuple(_entry(row) for row in rows)
    if root_hashes(entries) != (share.layout, share.content):
        raise ShareError("forged", "table")
    return entries


def _entry(row: Any) -> StateEntry:
    if not isinstance(row, list) or len(row) != 5:
        raise ShareError("malformed", "row")
    name, dtype, shape, own, digest = row
    sound = (
        isinstance(name, str)
        and dtype in MOVED
        and isinstance(shape, list)
        and len(shape) <= MAX_DIMENSIONS
        and all(is_uint(size) for size in shape)
        and own in (0, 1)
        and isinstance(digest, bytes)
    )
    if not sound:
        raise ShareError("malformed", "row")
    return StateEntry(name, dtype, tuple(shape), bool(own), digest)


def check_layout(member: NodeId, theirs: Iterable[StateEntry], ours: Iterable[StateEntry]) -> None:
    """Raise the `Mismatch` that says where `member`'s table of tensors differs from this one's, if it does."""
    other, own = ({entry.name: entry for entry in entries} for entries in (theirs, ours))
    for name in sorted(other.keys() | own.keys()):
        if name not in own or name not in other:
            words = {True: "present", False: "absent"}
            raise Mismatch(member, f"tensor {name!r}", words[name in other], words[name in own])
        for field, called in (("dtype", "dtype"), ("shape", "shape"), ("own", "allow_difference")):
            if getattr(other[name], field) != getattr(own[name], field):
                raise Mismatch(member, f"{called} of {name!r}", getattr(other[name], field), getattr(own[name], field))
