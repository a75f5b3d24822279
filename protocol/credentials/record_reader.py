"""Reading peers' records, each signature checked once: the same bytes come again and again."""

import hashlib

from protocol.credentials.records import PeerRecord, check_expiry, open_record
from protocol.identity import Verify
from protocol.lru import Recent

CAPACITY = 1024  # about 1 kB each; twice the directory


class RecordReader:
    """Remembers the newest records that it found good, by a hash of their bytes."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._known: Recent[bytes, PeerRecord] = Recent(capacity)

    def open(self, data: bytes, swarm: bytes, now_unix: float, check: Verify) -> PeerRecord:
        """As `open_record`, which see for the errors."""
        digest = hashlib.sha256(data).digest()
        record = self._known.get(digest)
        if record is None or record.swarm != swarm:
            record = open_record(data, swarm, now_unix, check)
            self._known.set(digest, record)
        check_expiry(record, now_unix)
        return record
