"""A node's metrics: one JSON object a round, appended to `metrics.jsonl`.

The writer is the node; readers (table, summary, report) look while it writes and
after it was killed, so a reader stops at the last whole line, and the writer cuts a
torn one off before it appends.
"""

import io
import json
import math
import os
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from protocol.storage import write_atomically

Row = dict[str, Any]
RECENT = 20  # rounds: as far back as a person means by "now"
MAX_METRICS_BYTES = 64 << 20  # of what never ends: some 35,000 rounds; one older file is kept beside it


class MetricsLog:
    """The writing end of such a file, or of another with rows of rounds; one node owns it.

    Raises `OSError` as the file system does. A file that grows above `max_bytes` is renamed
    (metrics.old.jsonl), in place of an older one.
    """

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=RECENT)
        _cut_torn_line(path)

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
        if not rows:
            return
        with self._path.open("ab") as file:
            file.write(b"".join(map(_encode, rows)))
            size = file.tell()
        if self._max_bytes is not None and size > self._max_bytes:
            self._path.replace(older(self._path))
        self._recent.extend(map(dict, rows))

    def sync(self) -> None:
        """Wait until the rows are on the disk, if there are any."""
        if self._path.exists():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def rewind(self, round_number: int) -> None:
        """Drop the rows after `round_number`, as a node does that resumes from its checkpoint.

        The file that was moved out of the way is older, and read only if nothing is left here.
        """
        recent: deque[Mapping[str, Any]] = deque(maxlen=RECENT)
        for path in (self._path, older(self._path)):
            total = kept = 0
            for row in iter_metrics(path):
                total += 1
                if row["round"] <= round_number:
                    kept += 1
                    recent.append(row)
            if kept < total:
                left = (row for row in iter_metrics(path) if row["round"] <= round_number)
                write_atomically(path, b"".join(map(_encode, left)))
            if kept:
                break
        self._recent = recent


class MetricsTail:
    """The reading end of a live file: each `poll` reads only what is new.

    After a rewind the file is another one and is read again from its start; a consumer therefore takes a row of round r
    to replace everything it has from r on. It returns `keys` of each row, or all, with which a file takes seven times
    its size.
    """

    def __init__(self, path: Path, keys: Collection[str] | None = None) -> None:
        self._path = path
        self._keys = keys
        self._file: BinaryIO | None = None
        self._offset = 0

    def poll(self) -> list[Row]:
        """Return the rows since the last call; none while the file does not exist."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return []
        rest = b""
        if self._file is None or os.fstat(self._file.fileno()).st_ino != status.st_ino or status.st_size < self._offset:
            rest = self._read() if self._file is not None else b""  # it was moved out of the way with new rows in it
            self.close()
            self._file = self._path.open("rb")
            self._offset = 0
        return list(_decode(io.BytesIO(rest + self._read()), self._keys))

    def _read(self) -> bytes:
        assert self._file is not None
        self._file.seek(self._offset)
        whole, newline, _ = self._file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return whole + newline

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._file is not None:
            self._file.close()
            self._file = None


def iter_metrics(path: Path, keys: Collection[str] | None = None) -> Iterator[Row]:
    """Yield the whole rows of `path`, which may be missing, growing or torn; of each, `keys` or all."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        yield from _decode(file, keys)


def read_metrics(path: Path) -> list[Row]:
    """Return the whole rows of `path`, which may be missing, growing or torn."""
    return list(iter_metrics(path))


def iter_with_older(path: Path) -> Iterator[Row]:
    """Yield the whole rows of `path` and, before them, those of the file that it took the place of."""
    yield from iter_metrics(older(path))
    yield from iter_metrics(path)


def read_with_older(path: Path) -> list[Row]:
    """Return what `iter_with_older` yields."""
    return list(iter_with_older(path))


def older(path: Path) -> Path:
    """Return where the rows are kept that were moved out of the way of `path`."""
    return path.with_suffix(f".old{path.suffix}")


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
        if isinstance(row, dict) and isinstance(row.get("round"), int):
            wanted = row if keys is None else (key for key in keys if key in row)
            yield {sys.intern(key): row[key] for key in wanted}  # tens of thousands of rows have the same few keys


def _cut_torn_line(path: Path) -> None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def number(row: Row, key: str) -> float:
    """Return `row[key]` as a number; 0 when it is missing or null."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else 0.0
