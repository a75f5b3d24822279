"""A node's folder in two places, where it runs and with the person who runs it: parts of files go from here to there.

    rows, logs   metrics, evaluations, rollouts, what is logged: the copy grows by what is new, through all processes
    address      the copy is what the file is
    checkpoints  the newest, and the best by evaluation, each from when it is whole at its node until it is whole here

Parts are to be put in the order in which they were taken. A checkpoint comes after all rows that were written before
it, and is written aside until its last part is here, so that a node can go on from the copy at any moment. Keys and
peers' groups stay where they are.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from node.telemetry.evaluations import EVALUATIONS_FILE
from node.telemetry.logs import MAX_LOG_BYTES
from node.telemetry.rollout_log import ROLLOUTS_FILE
from node.training.checkpoint import (
    Keep,
    best_checkpoint,
    end_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    remove_leftovers,
)

CHECKPOINTS = "checkpoints"
ADDRESS = "address"
LOGS = ("log.jsonl", "output.log")
ROWS = ("metrics.jsonl", EVALUATIONS_FILE, ROLLOUTS_FILE)
PART = 8 << 20  # bytes of a checkpoint that go at once: an answer takes some hundredths of a second
KEEP = Keep(total=1, full=1)  # the newest, to go on from; the best is kept beside it


class FilePart(NamedTuple):
    """The next part of a file, by its path in the node's folder."""

    name: str
    data: bytes


class CheckpointEnd(NamedTuple):
    """All parts of the checkpoint of this round have come."""

    round: int


Part = FilePart | CheckpointEnd


def parts_of(folder: Path) -> Iterator[Part]:
    """Yield what a node needs to go on elsewhere: its rows, and its checkpoints, oldest first."""
    for name in ROWS:
        if (folder / name).exists():
            yield from _parts(folder / name, name)
    for checkpoint in list_checkpoints(folder / CHECKPOINTS):
        yield from _parts_of_checkpoint(checkpoint.round, checkpoint.path)


def _parts(file: Path, name: str) -> Iterator[FilePart]:
    with file.open("rb") as opened:
        yield FilePart(name, opened.read(PART))
        while data := opened.read(PART):
            yield FilePart(name, data)


def _parts_of_checkpoint(number: int, path: Path) -> Iterator[Part]:
    for file in sorted(path.iterdir()):
        yield from _parts(file, f"{CHECKPOINTS}/.writing-{number}/{file.name}")
    yield CheckpointEnd(number)


class MirrorSender:
    """Finds what is new in a node's folder; what is there at first is known at the other place.

    `scratch` is a folder of its own on the same disk, for links to what is being sent.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._folder = folder
        self._scratch = scratch
        self._files: dict[str, BinaryIO] = {}  # held, so that no other file can get the inode of one that was sent
        for name in ROWS:
            if (folder / name).exists():
                self._files[name] = (folder / name).open("rb")
                self._files[name].seek(0, os.SEEK_END)
        newest = latest_checkpoint(folder / CHECKPOINTS)
        self._newest = newest.round if newest else -1
        self._sending: Iterator[Part] = iter(())

    def take(self) -> list[Part]:
        """Return what is new, and of a checkpoint one part; nothing once the other place has everything."""
        grown = [self._grown(name) for name in (ADDRESS, *LOGS, *ROWS)]
        part = next(self._sending, None)
        if part is None:
            self._sending = self._next_checkpoint()
            part = next(self._sending, None)
        return [piece for piece in (*grown, part) if piece is not None]

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _grown(self, name: str) -> FilePart | None:
        path = self._folder / name
        try:
            status, file, before = path.stat(), self._files.get(name), b""
            if file is None or os.fstat(file.fileno()).st_ino != status.st_ino or status.st_size < file.tell():
                fresh = path.open("rb")
                if file is not None:
                    before = b"" if name == ADDRESS else file.read()  # the end of a file that was moved away
                    file.close()
                self._files[name] = file = fresh
        except FileNotFoundError:
            return None
        data = before + file.read()
        return FilePart(name, data) if data else None

    def _next_checkpoint(self) -> Iterator[Part]:
        """Link the next checkpoint to send, so that the node does not remove it, and return its parts."""
        folder = self._folder / CHECKPOINTS
        ends = (best_checkpoint(folder), latest_checkpoint(folder))
        newer = [end for end in ends if end is not None and end.round > self._newest]
        if not newer:
            return iter(())
        checkpoint = min(newer, key=lambda end: end.round)
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir()
        try:
            for path in sorted(checkpoint.path.iterdir()):
                os.link(path, self._scratch / path.name)
        except FileNotFoundError:  # the node has newer ones, and removed this one
            return iter(())
        self._newest = checkpoint.round
        return _parts_of_checkpoint(checkpoint.round, self._scratch)


class MirrorReceiver:
    """Puts the parts into the other folder, in order. Raises `OSError` as the file system does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        remove_leftovers(folder / CHECKPOINTS)

    def put(self, parts: Sequence[Part]) -> None:
        """Put what was taken.

        Raises:
            UserError: a checkpoint has no room on the disk.
        """
        for part in parts:
            if isinstance(part, CheckpointEnd):
                end_checkpoint(self._folder / CHECKPOINTS / f".writing-{part.round}", lambda _: None, KEEP)
                continue
            path = self._folder / part.name
            path.parent.mkdir(parents=True, exist_ok=True)
            if part.name in (*LOGS, ROLLOUTS_FILE) and path.exists() and path.stat().st_size > MAX_LOG_BYTES:
                path.replace(path.with_name(f"{path.name}.1"))
            with path.open("wb" if part.name == ADDRESS else "ab") as file:
                file.write(part.data)
