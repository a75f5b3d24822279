"""The write-ahead log of uses of invites: a use is on disk before its holder is admitted, and is there after a crash.

    file = entry (68 bytes), ...
    entry = invite key (32) | number (4) | node id (20) | expiry in ms (8) | CRC-32 of these (4)

Entries are appended and synced. A process that dies meanwhile leaves a part of an entry, or an entry with a wrong sum:
reading stops there, and the next start writes the file anew without it. An expired use is dropped only to make room, so
that a clock that was ahead for a while makes no used invite good again.
"""

import zlib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from protocol.credentials.grants import MAX_NUMBERS, Use
from protocol.identity import KEY_BYTES, NODE_ID_BYTES, id_bytes, id_of_bytes
from protocol.storage import append_durably, write_atomically

ENTRY_BYTES = KEY_BYTES + 4 + NODE_ID_BYTES + 8 + 4
MODE = 0o600
MAX_BYTES = 4 * MAX_NUMBERS * ENTRY_BYTES  # 18 MB; a process that appends more than that writes the file anew


class UseLog:
    """The file at `path`. Belongs to one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: dict[tuple[bytes, int], Use] = {}
        self._size = 0

    def load(self, now_ms: float) -> Sequence[Use]:
        """Return the uses on disk; if there are too many, only those that have not expired at `now_ms`, Unix time.

        Of two uses of one number it returns the first that has not expired, or else the first.

        Raises:
            OSError: the file is there and cannot be read, or not be written anew.
        """
        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_BYTES)
        except FileNotFoundError:
            return ()
        for use in _entries(data):
            first = self._kept.setdefault((use.key, use.number), use)
            if first.expiry_ms <= now_ms < use.expiry_ms:
                self._kept[use.key, use.number] = use
        if len(self._kept) > MAX_NUMBERS:
            self._forget_expired(now_ms)
            self._kept = dict(islice(self._kept.items(), MAX_NUMBERS))
        if len(self._kept) * ENTRY_BYTES != len(data):
            self._write_anew()
        self._size = len(self._kept) * ENTRY_BYTES
        return tuple(self._kept.values())

    def append(self, uses: Sequence[Use], now_ms: float) -> None:
        """Keep `uses`: they are durable when this returns.

        Raises:
            OSError: the disk is full or the folder is gone; none of them counts.
        """
        data = b"".join(map(_entry, uses))
        if self._size + len(data) > MAX_BYTES:
            self._forget_expired(now_ms)
            self._write_anew()
            self._size = len(self._kept) * ENTRY_BYTES
        append_durably(self._path, self._size, data, MODE)
        self._size += len(data)
        self._kept.update(((use.key, use.number), use) for use in uses)

    def _forget_expired(self, now_ms: float) -> None:
        self._kept = {place: use for place, use in self._kept.items() if use.expiry_ms > now_ms}

    def _write_anew(self) -> None:
        write_atomically(self._path, b"".join(map(_entry, self._kept.values())), MODE)


def _entry(use: Use) -> bytes:
    fields = use.key + use.number.to_bytes(4, "big") + id_bytes(use.holder) + use.expiry_ms.to_bytes(8, "big")
    return fields + zlib.crc32(fields).to_bytes(4, "big")


def _entries(data: bytes) -> Iterable[Use]:
    for start in range(0, len(data) - ENTRY_BYTES + 1, ENTRY_BYTES):
        fields, total = data[start : start + ENTRY_BYTES - 4], data[start + ENTRY_BYTES - 4 : start + ENTRY_BYTES]
        if zlib.crc32(fields).to_bytes(4, "big") != total:
            return
        key, number, holder, expiry = fields[:32], fields[32:36], fields[36:56], fields[56:]
        yield Use(key, int.from_bytes(number, "big"), id_of_bytes(holder), int.from_bytes(expiry, "big"))
