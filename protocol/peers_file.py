"""The records of known peers on disk, so that a node that comes back needs no seed.

    {"version": 1, "records": ["<hex of a signed record>", ...]}

What is read is checked as if a peer had sent it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import structlog

from protocol.clock import Instant
from protocol.credentials.records import MAX_RECORD_BYTES, PeerRecord, open_record
from protocol.errors import RecordError
from protocol.storage import write_atomically

VERSION = 1
MAX_RECORDS = 1024
MAX_FILE_BYTES = 2 * MAX_RECORDS * MAX_RECORD_BYTES

log = structlog.get_logger()


def load_peers(path: Path, swarm: bytes, now: Instant) -> list[PeerRecord]:
    """Return the usable records in `path`; none for a missing or damaged file, since seeds do as well."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError("too large")
        tree = json.loads(path.read_bytes())
        encoded = [bytes.fromhex(text) for text in tree["records"][:MAX_RECORDS]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("peers file is not usable", path=str(path), error=repr(error))
        return []
    records = []
    for data in encoded:
        try:
            records.append(open_record(data, swarm, now.unix))
        except RecordError:
            continue  # expired, most likely
    return records


def save_peers(path: Path, records: Sequence[PeerRecord]) -> None:
    """Write `records` to `path`, atomically.

    Raises:
        OSError: the disk is full or the folder is gone.
    """
    tree = {"version": VERSION, "records": [record.encoded.hex() for record in records[:MAX_RECORDS]]}
    write_atomically(path, json.dumps(tree, indent=1).encode())
