"""Compression of items (Zstandard, RFC 8878): what is published, and how far a peer's bytes may unpack.

An item's content is one byte that says how the rest is written, and the rest:

    0   as it is
    1   one Zstandard frame that states its content's size and needs no dictionary

A few hundred bytes may claim to unpack to gigabytes. So the claim is checked first, and no more than that is unpacked.
"""

import threading

import zstandard

from protocol.errors import MessageError, UnpackError

PLAIN, ZSTD = b"\x00", b"\x01"
LEVEL = 3  # the library's own default: text shrinks to a third at some 200 MB/s
WORTH_BYTES = 4 << 10  # the least size worth it: for less, the envelope and its signature cost more than the bytes
WORTH_RATIO = 0.9


class _Contexts(threading.local):
    """The workspaces of zstandard, one for each thread. To make one takes longer than to pack a group of 10 kB."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def pack_content(body: bytes, before: bytes = b"") -> bytes:
    """Return `before`, and the content of an item that holds `body`: compressed where that is worth it."""
    if len(body) >= WORTH_BYTES:
        packed = _contexts.compressor.compress(body)
        if len(packed) <= WORTH_RATIO * len(body):
            return b"".join((before, ZSTD, packed))
    return b"".join((before, PLAIN, body))


def unpack_content(content: bytes | memoryview, max_bytes: int) -> bytes:
    """Return the body in an item's content.

    Raises:
        MessageError: reason "oversized" (it has, or claims, more than `max_bytes`) or "malformed".
        UnpackError: it is malformed, which showed only while it was unpacked.
    """
    form, rest = content[:1], memoryview(content)[1:]
    if form == PLAIN:
        _bound(len(rest), max_bytes)
        return bytes(rest)
    if form != ZSTD:
        raise MessageError("malformed", "content")
    try:
        claim = zstandard.get_frame_parameters(rest)
    except zstandard.ZstdError as error:
        raise MessageError("malformed", type(error).__name__) from None
    unknown = claim.content_size == zstandard.CONTENTSIZE_UNKNOWN
    if unknown or claim.dict_id:
        raise MessageError("malformed", "content without a size, or with a dictionary")
    _bound(claim.content_size, max_bytes)
    try:
        # The output has the claimed size, and never grows beyond it.
        body = _contexts.decompressor.decompress(rest, read_across_frames=False, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise UnpackError(type(error).__name__, claim.content_size) from None
    if len(body) != claim.content_size:
        raise UnpackError("content's size", claim.content_size)
    return bytes(body)


def _bound(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise MessageError("oversized", f"{size} bytes unpacked")
