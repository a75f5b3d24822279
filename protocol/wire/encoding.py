"""MessagePack under limits: arrays, integers, text and bytes, and nothing else.

Every length is bounded before a peer's bytes are unpacked. Maps and extension types, time stamps among them, are
refused.
"""

from collections.abc import Callable
from typing import Any

import msgpack

from protocol.errors import PeerError

UINT64_MAX = 2**64 - 1
MAX_NEWER_FIELDS = 8  # that a newer minor version may append to any array; they are ignored here
MAX_ARRAYS = 1024  # in one message: 64 entries have one each, and a newer version may append 8 to each of those
MAX_NEWER_BYTES = 64  # of a text or byte string in a newer field, at least


def pack(fields: list[Any]) -> bytes:
    """Return the MessagePack form of an array of integers, text, bytes and arrays."""
    return msgpack.packb(fields, use_bin_type=True)


def unpack(
    data: bytes,
    length: int,
    *,
    error: type[PeerError],
    max_bytes: int = 0,
    max_text: int = 0,
    max_array: int = 0,
    optional: int = 0,
    max_arrays: int = MAX_ARRAYS,
) -> list[Any]:
    """Return the first `length` elements of the array in `data`, and of `optional` further ones those that are there.

    `max_bytes`, `max_text` and `max_array` bound any byte string, text (in bytes) and inner
    array; each is at least `MAX_NEWER_BYTES` or `MAX_NEWER_FIELDS`, so that a newer version may
    append elements, which are dropped. There are at most `max_arrays` arrays in all. Raises `error`
    with the reason "malformed" for everything else, trailing bytes included.
    """
    try:
        fields = msgpack.unpackb(
            data,
            raw=False,
            use_list=True,
            strict_map_key=True,
            list_hook=at_most(max_arrays),
            max_bin_len=max(max_bytes, MAX_NEWER_BYTES),
            max_str_len=max(max_text, MAX_NEWER_BYTES),
            max_array_len=max(max_array, length + MAX_NEWER_FIELDS),
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as cause:
        raise error("malformed", type(cause).__name__) from None
    if not isinstance(fields, list) or not length <= len(fields) <= length + MAX_NEWER_FIELDS:
        raise error("malformed", "layout")
    return fields[: length + optional]


def at_most(count: int) -> Callable[[list[Any]], list[Any]]:
    """Return a hook that refuses more than `count` arrays: an empty one is one byte on the wire, and 56 bytes here."""
    left = count

    def took(array: list[Any]) -> list[Any]:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("too many arrays")
        return array

    return took


def is_uint(value: object, limit: int = UINT64_MAX) -> bool:
    """Tell whether `value` is an integer in [0, limit]; a boolean is not."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


def is_bytes(value: object, size: int) -> bool:
    """Tell whether `value` is a byte string of exactly `size` bytes."""
    return isinstance(value, bytes) and len(value) == size
