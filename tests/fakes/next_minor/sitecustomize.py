"""Makes a process one of the protocol's next minor version, where this folder is on PYTHONPATH.

It says that version, and appends an element to all that it packs: messages, records, grants, reports.
"""

from typing import Any

from protocol.wire import encoding, version

version.MINOR += 1
version.VERSION = version.MAJOR << 8 | version.MINOR
APPENDED = "what only the next minor version knows"
_pack = encoding.pack


def pack(fields: list[Any]) -> bytes:
    """Pack an array and one element more."""
    return _pack([*fields, APPENDED])


encoding.pack = pack
