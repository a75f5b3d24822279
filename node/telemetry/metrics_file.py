"""A node's metrics: one JSON object a round, appended to `metrics.jsonl`; its evaluations and rollouts are files alike.

The node only appends. After a kill it goes on from its checkpoint, and a line `{"rewound": 20}` says that what was
written of rounds after the 20th counts no more: these rounds are done again. Readers look while the node writes and
after it was killed. They leave out what does not count, and a last line without its end.
"""

import json
import math
import os
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RECENT = 20  # rounds: as far back as a person means by "now"
MAX_BYTES = 64 << 20  # of the rows of who trains nothing
REWOUND = "rewound"


class MetricsLog:
    """The writing end of such a file; one node owns it.

    Raises `OSError` as the file system does. A file that grows above `max_bytes` is renamed (rollouts.jsonl.1), and
    begins anew.
    """

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._recent: deque[Row] = deque(maxlen=RECENT)

    @property
    def last(self) -> Mapping[str, Any]:
        """The newest row; empty before the first."""
        return self._recent[-1] if self._recent else {}

    @property
    def recent(self) -> Sequence[Mapping[str, Any]]:
        """The newest rows, at most `RECENT`; safe to ask for from another thread."""
        return tuple(self._recent.copy())

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Write each of `rows` as one line and flush them; NaN and infinities become null."""
        if rows:
            self._write(b"".join(map(_encode, rows)))
            self._recent.extend(map(dict, rows))

    def sync(self) -> None:
        """Wait until the rows are on the disk, if there are any."""
        if self._path.exists():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def rewind(self, round_number: int) -> None:
        """Say that the rows after `round_number` count no more, as a node does that goes on from its checkpoint."""
        recent: deque[Row] = deque(maxlen=RECENT)
        if self._path.exists():
            with self._path.open("rb") as file:
                for row in _decode(file):
                    if row.get("round", 0) <= round_number:
                        _take(row, recent)
                file.seek(max(file.tell() - 1, 0))
                is_torn = file.read(1) not in (b"", b"\n")
            self._write(b"\n" * is_torn + _encode({REWOUND: round_number}))
        self._recent = recent

    def _write(self, lines: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(lines)
            size = file.tell()
        if self._max_bytes is not None and size > self._max_bytes:
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))


class MetricsTail:
    """The reading end of a live file: each `poll` reads only what is new.

    Once rows count no more, all that do are told anew; a consumer therefore takes a row of round r to replace
    everything it has from r on. It returns `keys` of each row, or all, with which a file takes seven times its size.
    """

    def __init__(self, path: Path, keys: Collection[str] | None = None) -> None:
        self._path = path
        self._keys = keys
        self._offset = 0

    def poll(self) -> list[Row]:
        """Return the rows since the last call; none while the file does not exist."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            began = self._offset if self._offset <= os.fstat(file.fileno()).st_size else 0
            file.seek(began)
            self._offset = began
            rows: list[Row] = []
            for row in _decode(self._whole(file), self._keys):
                if began and REWOUND in row:
                    self._offset = 0
                    return self.poll()
                _take(row, rows)
        return rows

    def _whole(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        for line in lines:
            if not line.endswith(b"\n"):
                return
            self._offset += len(line)
            yield line


def read_metrics(path: Path, keys: Collection[str] | None = None) -> list[Row]:
    """Return the rows of `path` that count, which may be missing, growing or torn; of each, `keys` or all."""
    return MetricsTail(path, keys).poll()


def _take(row: Row, rows: list[Row] | deque[Row]) -> None:
    """Add a row to those that count, or drop those that count no more."""
    if REWOUND not in row:
        rows.append(row)
        return
    while rows and rows[-1]["round"] > row[REWOUND]:
        rows.pop()


def _encode(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(_finite(row), allow_nan=False, separators=(",", ":")) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _decode(lines: Iterable[bytes], keys: Collection[str] | None = None) -> Iterator[Row]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # torn by a kill or a full disk
            continue
        if isinstance(row, dict) and isinstance(row.get("round", row.get(REWOUND)), int):
            wanted = row if keys is None else (key for key in (*keys, REWOUND) if key in row)
            yield {sys.intern(key): row[key] for key in wanted}  # tens of thousands of rows have the same few keys


def number(row: Row, key: str) -> float:
    """Return `row[key]` as a number; 0 when it is missing or null."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else 0.0
