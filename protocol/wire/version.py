"""Protocol versions: how two nodes of different major versions find out, and what each tells its person.

A version is major x 256 + minor. Every frame says its version at the same place, before whatever
else differs: the two bytes after the signature, since version 2. In version 1 these are the beginning
of a MessagePack array, whose first element is the version.

A node of version 1 knows frames of version 1 only: to it, ours are forged. So it is told in
its own form: who dialled us gets a goodbye, and whom we dialled, and who does not answer, gets a
hello, which makes it answer in its form, and then a goodbye. Nothing else is ever said to it.
Whoever does not answer may as well be a node of ours that our hello did not reach. What we say in the older form
therefore says version 1.255, which a node of version 1 takes and no such node ever said: ours leave it aside.
"""

import re

from protocol.identity import KEY_BYTES, SIGNATURE_BYTES, Identity
from protocol.wire.encoding import pack

MAJOR, MINOR = 2, 0
VERSION = MAJOR << 8 | MINOR
OTHER_VERSION = "other_version"

_GOODBYE = re.compile(rf"{OTHER_VERSION}_(\d{{1,3}})_(\d{{1,3}})")
_AT = KEY_BYTES + SIGNATURE_BYTES
_OLDER_FORM = 0x01FF
_V1_DOMAIN = b"gossamer/envelope/1\x00"
_ARRAY, _ARRAY_MASK, _UINT16 = 0x90, 0xF0, 0xCD  # of MessagePack, as every envelope of version 1 began


def said(version: int) -> str:
    """Return a version as people write it."""
    return f"{version >> 8}.{version & 0xFF}"


def spoken_version(frame: bytes) -> int | None:
    """Return the version that a frame says it is of; None for one that is too short to say."""
    said_at = frame[_AT : _AT + 4]
    if len(said_at) < 4:
        return None
    if said_at[0] & _ARRAY_MASK == _ARRAY and said_at[1] == _UINT16:
        return int.from_bytes(said_at[2:4], "big")
    return int.from_bytes(said_at[:2], "big")


def is_older_form(frame: bytes) -> bool:
    """Tell whether a frame is what a node of this version says to those of version 1."""
    return spoken_version(frame) == _OLDER_FORM


def goodbye_reason(version: int = VERSION) -> str:
    """Return what a goodbye says to a node of another major version: it may show this to its person."""
    return f"{OTHER_VERSION}_{version >> 8}_{version & 0xFF}"


def version_in(reason: str) -> str:
    """Return the version that a goodbye of another major version names, as people write it; "" in any other."""
    match = _GOODBYE.fullmatch(reason)
    return f"{match[1]}.{match[2]}" if match else ""


def seal_v1(
    identity: Identity, swarm: bytes, kind: int, sequence: int, time_ms: int, body: bytes, version: int = _OLDER_FORM
) -> bytes:
    """Return a frame as a node of version 1 reads it. Kinds and bodies of a hello and a goodbye have not changed."""
    payload = pack([version, swarm, int(kind), sequence, time_ms, body])
    return identity.public_key + identity.sign(_V1_DOMAIN + payload) + payload
