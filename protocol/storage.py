"""A node's files: whole after a crash, and bounded when they are read.

A file is written aside, fsynced and renamed, so that it holds its old content or the new, never half of it.
A disk may take seconds for that, so the network thread leaves it to a thread of the disk (`protocol.host`).

peers.json holds the records of known peers, so that a node that comes back needs no seed:

    {"version": 1, "records": ["<hex of a signed record>", ...]}

What is read is to be checked as if a peer had sent it.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import structlog

MAX_SAVED_RECORDS = 1024
_PEERS_VERSION = 1
_MAX_PEERS_BYTES = 6 << 20  # all of them at their largest, in hex

log = structlog.get_logger()


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `data` with permissions `mode`: written aside, fsynced, renamed.

    Raises:
        OSError: the disk is full, the folder is missing or read-only.
    """
    with replacing(path, path.with_name(f".{path.name}.{os.getpid()}.tmp"), mode) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, aside: Path, mode: int) -> Iterator[IO[bytes]]:
    """Write `aside`. At the end of the block it replaces `path`, or is removed if the block raised.

    A file that a killed process left at `aside` is removed first.
    """
    try:
        aside.unlink(missing_ok=True)
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # the caller knows `path` only
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bounded(path: Path, limit: int) -> bytes:
    """Return what is in `path`, at most `limit` bytes of it; nothing for a missing file.

    Raises:
        OSError: it is there and cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except FileNotFoundError:
        return b""


def exchange_bytes(path: Path, known: bytes, ours: bytes, limit: int) -> bytes:
    """Keep `ours` in `path` if it still holds `known`, which we read last; return what it holds now.

    Raises:
        OSError: the file cannot be read or written.
    """
    content = read_bounded(path, limit)
    if content != known or ours in (known, b""):
        return content
    write_atomically(path, ours)
    return ours


def load_peers(path: Path) -> list[bytes]:
    """Return the records in `path`, unchecked; none if it is missing or damaged, as the node has its seeds."""
    try:
        if path.stat().st_size > _MAX_PEERS_BYTES:
            raise ValueError("too large")
        tree = json.loads(path.read_bytes())
        return [bytes.fromhex(text) for text in tree["records"][:MAX_SAVED_RECORDS]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("peers file is not usable", path=str(path), error=repr(error))
        return []


def save_peers(path: Path, records: Sequence[bytes]) -> None:
    """Write `records` to `path`, atomically.

    Raises:
        OSError: the disk is full or the folder is gone.
    """
    tree = {"version": _PEERS_VERSION, "records": [record.hex() for record in records[:MAX_SAVED_RECORDS]]}
    write_atomically(path, json.dumps(tree, indent=1).encode())


def sync_tree(root: Path) -> None:
    """Wait until everything in `root` is on the disk."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            with Path(folder, name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))
