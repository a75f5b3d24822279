"""A node's record of its rounds, `rounds.journal`: all that is needed to do any of them again.

Frames of four bytes of length (big-endian) and that much MessagePack, compressed by zstandard. The first is a `Start`:
the settings, and the replay buffer as the node found it. Each `Round` after it holds what came from outside in that
round: the bodies that peers sent, the tokens that the policy sampled, what the clock said; and, to compare with, what
became of them: which were refused and why, as they came or once they were drawn, which rows were trained on with which
weight, and a digest of each.

A node that starts again begins with a `Start` of its own, so a round may be there twice: as it was done before a kill,
and as it was done again. A file above `max_bytes` is renamed to `rounds.old.journal`, in place of an older one. A frame
that a kill cut off is cut out.
"""

import hashlib
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgpack
import zstandard

from node.engines import Generated
from node.rollouts.group import Group, encode
from node.rollouts.replay_buffer import Snapshot
from node.rollouts.sampling import Sample
from node.rollouts.screening import Limits, Refused, Seen

JOURNAL_FILE = "rounds.journal"
OLDER_FILE = "rounds.old.journal"
_LENGTH = struct.Struct(">I")
_MAX_FRAME = 1 << 30  # of a file that is our own, but may be damaged


class Start(NamedTuple):
    """What a node went on from: rounds done before, its settings, its seed, and what was in its replay buffer."""

    done: int
    config: Mapping[str, Any]
    seed: int
    limits: Limits
    pool: Snapshot


class Row(NamedTuple):
    """A completion that a round trained on: of which group (content id), its place in it, and how."""

    group: bytes
    place: int
    advantage: float
    weight: float
    external: bool


class Round(NamedTuple):
    """One round: what came from outside, and what was made of it."""

    number: int
    generated: Sequence[Sequence[Generated]]
    seen: Sequence[Seen]
    refused: Sequence[Refused]
    times: Sequence[float]
    measured: Sequence[float]  # by the policy's weights: how likely completions were
    own: Sequence[bytes]  # this node's groups as their bodies
    rows: Sequence[Row]
    admitted: bytes  # digests, see `digest_of_verdicts` and `digest_of_draw`
    drawn: bytes


class RoundJournal(Protocol):
    """What a loop tells of its rounds."""

    def now(self) -> float:
        """Return the time, Unix seconds, that this round goes by from here on."""
        ...

    def saw(self, seen: Seen) -> None:
        """Take note of an item that was read."""
        ...

    def refused(self, one: Refused) -> None:
        """Take note of a group that was drawn and is of no use."""
        ...

    def measured(self, count: int, measure: Callable[[], list[float]]) -> list[float]:
        """Return the `count` numbers that `measure` finds."""
        ...

    def end_round(
        self, number: int, generated: Sequence[Sequence[Generated]], own: Sequence[Group], samples: Sequence[Sample]
    ) -> None:
        """Take note of the rest of a round."""
        ...


class NoJournal:
    """Records nothing."""

    def now(self) -> float:
        """Return the time."""
        return time.time()

    def saw(self, seen: Seen) -> None:
        """Forget it."""

    def refused(self, one: Refused) -> None:
        """Forget it."""

    def measured(self, count: int, measure: Callable[[], list[float]]) -> list[float]:
        """Measure."""
        return measure()

    def end_round(
        self, number: int, generated: Sequence[Sequence[Generated]], own: Sequence[Group], samples: Sequence[Sample]
    ) -> None:
        """Forget it."""


class Journal:
    """Writes the record of a node; one process owns the folder.

    Args:
        folder: the node's.
        max_bytes: of the file, see above.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._path = folder / JOURNAL_FILE
        self._max_bytes = max_bytes
        self._start: Callable[[int], Start] | None = None
        self._seen: list[Seen] = []
        self._refused: list[Refused] = []
        self._times: list[float] = []
        self._measured: list[float] = []

    def begin(self, done: int, start: Callable[[int], Start]) -> None:
        """Write where the node goes on from; `start` is called again, with the rounds done, when a new file begins."""
        self._start = start
        _cut_torn_frame(self._path)
        self._append(start(done))

    def now(self) -> float:
        """Return the time, and keep it."""
        self._times.append(time.time())
        return self._times[-1]

    def saw(self, seen: Seen) -> None:
        """Take note of an item that was read."""
        self._seen.append(seen)

    def refused(self, one: Refused) -> None:
        """Take note of a group that was drawn and is of no use."""
        self._refused.append(one)

    def measured(self, count: int, measure: Callable[[], list[float]]) -> list[float]:
        """Measure, and keep what is found."""
        found = measure()
        self._measured += found
        return found

    def end_round(
        self, number: int, generated: Sequence[Sequence[Generated]], own: Sequence[Group], samples: Sequence[Sample]
    ) -> None:
        """Write the round."""
        bodies = [encode(one) for one in own]
        rows = [Row(one.source, one.index, one.advantage, one.weight, one.external) for one in samples]
        admitted, drawn = digest_of_verdicts(self._seen, self._refused), digest_of_draw(bodies, samples)
        outside = (self._seen, self._refused, self._times, self._measured)
        size = self._append(Round(number, generated, *outside, bodies, rows, admitted, drawn))
        self._seen, self._refused, self._times, self._measured = [], [], [], []
        if size > self._max_bytes and self._start is not None:
            self._path.replace(self._path.with_name(OLDER_FILE))
            self._append(self._start(number))

    def _append(self, entry: Start | Round) -> int:
        body = zstandard.compress(msgpack.packb([type(entry).__name__, *entry], default=_plain), 1)
        with self._path.open("ab") as file:
            file.write(_LENGTH.pack(len(body)) + body)
            return file.tell()


def read_journal(folder: Path) -> Iterator[Start | Round]:
    """Yield what the node in `folder` has recorded, oldest first; it may be running.

    Raises:
        ValueError: a frame is damaged.
    """
    for name in (OLDER_FILE, JOURNAL_FILE):
        try:
            with (folder / name).open("rb") as file:
                while (body := _read_frame(file)) is not None:
                    yield _decode(body)
        except FileNotFoundError:
            continue


def digest_of_verdicts(seen: Sequence[Seen], refused: Sequence[Refused]) -> bytes:
    """Return a SHA-256 over which items were judged, as they came and as they were drawn, and how."""
    return _digest(verdicts(seen, refused))


def verdicts(seen: Sequence[Seen], refused: Sequence[Refused]) -> list[tuple[bytes, str]]:
    """Return what was found of each item, as they came and then as they were drawn; no reason where it was taken."""
    return [*((one.id, one.reason) for one in seen), *((one.id, one.reason) for one in refused)]


def digest_of_draw(own: Sequence[bytes], samples: Sequence[Sample]) -> bytes:
    """Return a SHA-256 over a round's own groups and every row that it trains on: tokens, advantage, weight, order."""
    rows = [
        [list(one.prompt), list(one.completion), one.advantage, one.weight, one.group, one.external] for one in samples
    ]
    return _digest([list(own), rows])


def _digest(value: object) -> bytes:
    return hashlib.sha256(msgpack.packb(value)).digest()


def _read_frame(file: Any) -> bytes | None:
    """Return the next whole frame's body; None at the end, or where the rest of one is not there (yet)."""
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = file.read(length)
    return body if len(body) == length else None


def _decode(body: bytes) -> Start | Round:
    try:
        raw = zstandard.decompress(body, max_output_size=_MAX_FRAME)
        kind, *fields = msgpack.unpackb(raw, strict_map_key=False)
        if kind == Start.__name__:
            done, config, seed, limits, pool = fields
            return Start(done, config, seed, Limits(*limits), Snapshot(*pool))
        number, generated, seen, refused, times, measured, own, rows, admitted, drawn = fields
    except (zstandard.ZstdError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"a frame is damaged ({error})") from None
    made = [[_generated(*one) for one in group] for group in generated]
    judged = [Seen(*one) for one in seen], [Refused(*one) for one in refused]
    return Round(number, made, *judged, times, measured, own, [Row(*one) for one in rows], admitted, drawn)


def _plain(value: object) -> object:
    """Return a completion as the list that `_generated` takes."""
    if isinstance(value, Generated):
        return [value.token_ids, value.text, value.finished, value.logprobs]
    raise TypeError(type(value).__name__)


def _generated(token_ids: Sequence[int], text: str, finished: bool, logprobs: Sequence[float] | None) -> Generated:
    return Generated(tuple(token_ids), text, finished, None if logprobs is None else tuple(logprobs))


def _cut_torn_frame(path: Path) -> None:
    try:
        with path.open("rb") as file:
            whole = 0
            while _read_frame(file) is not None:
                whole = file.tell()
    except FileNotFoundError:
        return
    if whole < path.stat().st_size:
        os.truncate(path, whole)
