"""The shelf on disk: items that the memory has no room for, a file each, written and read on the disk's thread.

The files are of this run only: they are removed at its end; those of a killed process are removed at the next start.
Other files in the folder stay. A frame stays in memory until it is written; beyond `MAX_WRITING_BYTES` in all there is
no room. A frame that cannot be written or read is lost, and the store hears so when it asks for the frame. After a
failed write, as on a full disk, nothing is written for `RETRY_S`.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path

import structlog

from protocol.events import Fetched
from protocol.wire.envelope import HASH_BYTES, ItemId

MAX_WRITING_BYTES = 64 << 20
RETRY_S = 60.0

log = structlog.get_logger()


class DiskShelf:
    """Implements `Shelf`; see the module's comment. The network thread calls it; the disk's thread calls `wake`."""

    def __init__(self, folder: Path, disk: Executor, wake: Callable[[], None]) -> None:
        self._folder = folder
        self._disk = disk
        self._wake = wake
        self._writing: dict[bytes, bytes] = {}
        self._written: deque[bytes] = deque()
        self._read: deque[Fetched] = deque()
        self._failed_at = float("-inf")
        disk.submit(self._clear)

    def end(self) -> None:
        """Remove all files. Nothing else may be called after that."""
        self._disk.submit(self._clear)

    def put(self, item: bytes, frame: bytes) -> bool:
        """See `Shelf.put`."""
        if time.monotonic() < self._failed_at + RETRY_S:
            return False
        if sum(map(len, self._writing.values())) + len(frame) > MAX_WRITING_BYTES:
            return False
        self._writing[item] = frame
        self._disk.submit(self._write, item, frame)
        return True

    def fetch(self, item: bytes) -> None:
        """See `Shelf.fetch`."""
        self._disk.submit(self._bring, item)

    def drop(self, item: bytes) -> None:
        """See `Shelf.drop`."""
        self._writing.pop(item, None)
        self._disk.submit(self._remove, item)

    def take(self) -> list[Fetched]:
        """Return what was brought since the last call."""
        while self._written:
            self._writing.pop(self._written.popleft(), None)
        return [self._read.popleft() for _ in range(len(self._read))]

    # On the disk's thread

    def _clear(self) -> None:
        with suppress(OSError):  # the first write will log it
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.iterdir():
                if len(path.name) == 2 * HASH_BYTES:
                    path.unlink()

    def _write(self, item: bytes, frame: bytes) -> None:
        try:
            self._path(item).write_bytes(frame)
        except OSError as error:
            if time.monotonic() >= self._failed_at + RETRY_S:
                log.warning("cannot keep items on disk", path=str(self._folder), error=str(error))
            self._failed_at = time.monotonic()
        self._written.append(item)

    def _bring(self, item: bytes) -> None:
        try:
            frame = self._path(item).read_bytes()
        except OSError:
            frame = b""
        self._read.append(Fetched(ItemId(item), frame))
        self._wake()

    def _remove(self, item: bytes) -> None:
        with suppress(OSError):
            self._path(item).unlink()

    def _path(self, item: bytes) -> Path:
        return self._folder / item.hex()
