"""Protocol versions: how two nodes of different major versions find out, and what each tells its person.

A version is major x 256 + minor. The first frame of either end, a hello, has its version in the same place in every
major version since 2: the two bytes after the key and the signature. So each node logs the other's version. A peer of
another major version gets a goodbye, and is hung up on. The goodbye is sealed as a hello is, so it has our version in
that place, too. Version 1 had a MessagePack array there, and version 2 used version 1's form to answer frames that it
could not read. So a frame with an array there is of either version.
"""

import re

from protocol.identity import KEY_BYTES, SIGNATURE_BYTES

MAJOR, MINOR = 4, 0
VERSION = MAJOR << 8 | MINOR
OTHER_VERSION = "other_version"

_GOODBYE = re.compile(rf"{OTHER_VERSION}_(\d{{1,3}})_(\d{{1,3}})")
_AT = KEY_BYTES + SIGNATURE_BYTES
_ARRAY, _ARRAY_MASK = 0x90, 0xF0  # of MessagePack
EARLIER = 0  # as a version: 1, or 2 in the form of 1
_EARLIER = f"{OTHER_VERSION}_earlier"


def said(version: int) -> str:
    """Return a version as people write it."""
    return "1 or 2" if version == EARLIER else f"{version >> 8}.{version & 0xFF}"


def spoken_version(frame: bytes) -> int | None:
    """Return the version that a frame says it is of; None for one that is too short to say."""
    said_at = frame[_AT : _AT + 2]
    if len(said_at) < 2:
        return None
    return EARLIER if said_at[0] & _ARRAY_MASK == _ARRAY else int.from_bytes(said_at)


def goodbye_reason(version: int = VERSION) -> str:
    """Return what a goodbye says to a node of another major version: it may show this to its person."""
    return _EARLIER if version == EARLIER else f"{OTHER_VERSION}_{version >> 8}_{version & 0xFF}"


def version_in(reason: str) -> str:
    """Return the version that a goodbye of another major version names, as people write it; "" in any other."""
    if reason == _EARLIER:
        return said(EARLIER)
    match = _GOODBYE.fullmatch(reason)
    return f"{match[1]}.{match[2]}" if match else ""
