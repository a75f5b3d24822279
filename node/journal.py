"""A node's record of its rounds, `rounds.journal`: all that is needed to do any of them again.

`gossamer node --journal` begins one. A folder that has one goes on with it; to end it, delete the file.

The file is a row of frames: four bytes of length (big-endian), then that much MessagePack, compressed by zstandard. The
first frame is a `Start`: the settings, which questions are held out, and the group buffer as the node found it. Each
`Round` after it holds

- what came from outside in that round: the bodies that peers sent, the episodes that were played, what the clock
  said, which verdicts were None or late;
- what the round made of it, to compare with: which groups were refused and why, on arrival or once drawn; which rows
  were trained on with which weight; a digest of each.

A node that starts again writes a new `Start`, so a round may be there twice: as it was done before a kill, and as it
was done again. Once the rounds since the newest `Start` take more than `max_bytes`, the file is renamed to
`rounds.old.journal`, in place of an older one. A node that starts does the same if all frames after the first take
more. A frame that a kill cut off is removed; a frame of another release is skipped.
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

from node.engines.episodes import Played
from node.rollouts.group import Group, encode
from node.rollouts.group_buffer import Snapshot
from node.rollouts.rule import Sample
from node.rollouts.screening import GroupBounds, ReadGroup, RefusedGroup
from node.tasks.questions import Split
from node.tasks.scoring.verdicts import LATE, MaybeLate

FORMAT = 5  # of a frame
JOURNAL_FILE = "rounds.journal"
OLDER_FILE = "rounds.old.journal"
_LENGTH = struct.Struct(">I")
_MAX_FRAME = 1 << 30  # bytes: the file is our own, but may be damaged


class Start(NamedTuple):
    """The state that a node went on from.

    Rounds done before, its settings, its seed, the bounds on a peer's group, which questions are held out, and what was
    in its group buffer.
    """

    done: int
    config: Mapping[str, Any]
    seed: int
    limits: GroupBounds
    split: Split
    buffer: Snapshot


class TrainedRow(NamedTuple):
    """A completion that a round trained on: of which group (content id), its place in it, and how."""

    group: bytes
    place: int
    advantage: float
    weight: float
    external: bool


class Round(NamedTuple):
    """One round: what came from outside, and what was made of it."""

    number: int
    played: Sequence[Sequence[Played]]
    seen: Sequence[ReadGroup]
    refused: Sequence[RefusedGroup]
    times: Sequence[float]
    measured: Sequence[float]  # how surprising completions were under the policy's weights
    unscorable: Sequence[Sequence[int]]  # of each batch of verdicts: i where number i is None, -1 - i if it is late
    barred: Sequence[Sequence[str]]  # the signers that the round kept out, each time that it asked for them
    own: Sequence[bytes]  # the bodies of this node's groups
    rows: Sequence[TrainedRow]
    admitted: bytes  # digests, see `digest_of_verdicts` and `digest_of_draw`
    drawn: bytes


class RoundJournal(Protocol):
    """Takes a loop's record of its rounds, and hands it everything that comes from outside."""

    def now(self) -> float:
        """Return the time, Unix seconds, that this round goes by from here on."""
        ...

    def saw(self, seen: ReadGroup) -> None:
        """Take note of an item that was read."""
        ...

    def refused(self, group: RefusedGroup) -> None:
        """Take note of a group that was drawn and is of no use."""
        ...

    def measured(self, count: int, measure: Callable[[], list[float]]) -> list[float]:
        """Return the `count` numbers that `measure` finds."""
        ...

    def judged(self, judge: Callable[[float], list[MaybeLate]], seconds: float) -> list[MaybeLate]:
        """Return the verdicts that `judge` finds within `seconds`."""
        ...

    def barred(self, find: Callable[[], Sequence[str]]) -> Sequence[str]:
        """Return the signers that `find` returns: revoked ones, those set aside, or those whose budget is spent."""
        ...

    def end_round(
        self, number: int, played: Sequence[Sequence[Played]], own: Sequence[Group], samples: Sequence[Sample]
    ) -> None:
        """Take note of the rest of a round."""
        ...


class NoJournal:
    """Records nothing."""

    def now(self) -> float:
        """Return the time."""
        return time.time()

    def saw(self, seen: ReadGroup) -> None:
        """Forget it."""

    def refused(self, group: RefusedGroup) -> None:
        """Forget it."""

    def measured(self, count: int, measure: Callable[[], list[float]]) -> list[float]:
        """Measure."""
        return measure()

    def judged(self, judge: Callable[[float], list[MaybeLate]], seconds: float) -> list[MaybeLate]:
        """Judge."""
        return judge(seconds)

    def barred(self, find: Callable[[], Sequence[str]]) -> Sequence[str]:
        """Find them."""
        return find()

    def end_round(
        self, number: int, played: Sequence[Sequence[Played]], own: Sequence[Group], samples: Sequence[Sample]
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
        self._seen: list[ReadGroup] = []
        self._refused: list[RefusedGroup] = []
        self._times: list[float] = []
        self._measured: list[float] = []
        self._unscorable: list[list[int]] = []
        self._barred: list[Sequence[str]] = []
        self._began = 0  # bytes of the file before the first round after its newest start

    def begin(self, done: int, start: Callable[[int], Start]) -> None:
        """Write where the node goes on from; `start` is called again, with the rounds done, when a new file begins."""
        self._start = start
        first, size = _cut_torn_frame(self._path)
        if size - first > self._max_bytes:
            self._make_way()
        self._began = self._append(start(done))

    def now(self) -> float:
        """Return the time, and keep it."""
        self._times.append(time.time())
        return self._times[-1]

    def saw(self, seen: ReadGroup) -> None:
        """Take note of an item that was read."""
        self._seen.append(seen)

    def refused(self, group: RefusedGroup) -> None:
        """Take note of a group that was drawn and is of no use."""
        self._refused.append(group)

    def measured(self, count: int, measure: Callable[[], list[float]]) -> list[float]:
        """Measure, and keep what is found."""
        nats = measure()
        self._measured += nats
        return nats

    def judged(self, judge: Callable[[float], list[MaybeLate]], seconds: float) -> list[MaybeLate]:
        """Judge, and keep which verdicts were None and which late."""
        verdicts_found = judge(seconds)
        self._unscorable.append(
            [
                -1 - at if verdict == LATE else at
                for at, verdict in enumerate(verdicts_found)
                if verdict is None or verdict == LATE
            ]
        )
        return verdicts_found

    def barred(self, find: Callable[[], Sequence[str]]) -> Sequence[str]:
        """Find them, and keep them."""
        self._barred.append(sorted(find()))
        return self._barred[-1]

    def end_round(
        self, number: int, played: Sequence[Sequence[Played]], own: Sequence[Group], samples: Sequence[Sample]
    ) -> None:
        """Write the round."""
        bodies = [encode(group) for group in own]
        rows = [
            TrainedRow(sample.source, sample.index, sample.advantage, sample.weight, sample.external)
            for sample in samples
        ]
        admitted, drawn = digest_of_verdicts(self._seen, self._refused), digest_of_draw(bodies, samples)
        outside = (self._seen, self._refused, self._times, self._measured, self._unscorable, self._barred)
        size = self._append(Round(number, played, *outside, bodies, rows, admitted, drawn))
        for kept in outside:
            kept.clear()
        if size - self._began > self._max_bytes and self._start is not None:
            self._make_way()
            self._began = self._append(self._start(number))

    def _make_way(self) -> None:
        self._path.replace(self._path.with_name(OLDER_FILE))

    def _append(self, entry: Start | Round) -> int:
        body = zstandard.compress(msgpack.packb([_kind(type(entry)), *entry], default=_plain), 1)
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
                    if (entry := _decode(body)) is not None:
                        yield entry
        except FileNotFoundError:
            continue


def digest_of_verdicts(seen: Sequence[ReadGroup], refused: Sequence[RefusedGroup]) -> bytes:
    """Return a SHA-256 over the decision on each item, on arrival and once drawn (`verdicts`)."""
    return _digest(verdicts(seen, refused))


def verdicts(seen: Sequence[ReadGroup], refused: Sequence[RefusedGroup]) -> list[tuple[bytes, str]]:
    """Return the decision on each item, first on arrival and then once drawn: a reason, empty if it was taken."""
    return [*((group.id, group.reason) for group in seen), *((group.id, group.reason) for group in refused)]


def digest_of_draw(own: Sequence[bytes], samples: Sequence[Sample]) -> bytes:
    """Return a SHA-256 over a round's own groups and every row that it trains on: tokens, advantage, weight, order."""
    rows = [
        [
            *(list(sample.prompt), list(sample.completion), sorted(sample.given)),
            *(sample.advantage, sample.weight, sample.group, sample.external),
        ]
        for sample in samples
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


def _decode(body: bytes) -> Start | Round | None:
    """Return what a frame holds; None for one of another release."""
    try:
        raw = zstandard.decompress(body, max_output_size=_MAX_FRAME)
        kind, *fields = msgpack.unpackb(raw, strict_map_key=False)
        if kind not in (_kind(Start), _kind(Round)):
            return None
        if kind == _kind(Start):
            done, config, seed, limits, split, buffer = fields
            return Start(done, config, seed, GroupBounds(*limits), Split(*split), Snapshot(*buffer))
        number, played, seen, refused, times, measured, unscorable, barred, own, rows, admitted, drawn = fields
    except (zstandard.ZstdError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"a frame is damaged ({error})") from None
    groups = [[Played.from_list(completion) for completion in group] for group in played]
    judged = [ReadGroup(*fields) for fields in seen], [RefusedGroup(*fields) for fields in refused]
    outside = (*judged, times, measured, unscorable, barred)
    return Round(number, groups, *outside, own, [TrainedRow(*row) for row in rows], admitted, drawn)


def _kind(entry: type) -> str:
    return f"{entry.__name__} {FORMAT}"


def _plain(value: object) -> object:
    """Return an episode as the list that `Played.from_list` takes."""
    if isinstance(value, Played):
        return value.as_list()
    raise TypeError(type(value).__name__)


def _cut_torn_frame(path: Path) -> tuple[int, int]:
    """Cut off what is no whole frame; return the bytes of the first frame, and of all."""
    first = whole = 0
    try:
        with path.open("rb") as file:
            while _read_frame(file) is not None:
                whole = file.tell()
                first = first or whole
    except FileNotFoundError:
        return first, whole
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    return first, whole
