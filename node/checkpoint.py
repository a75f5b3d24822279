"""Checkpoint folders that are whole or absent, whenever the process or the machine dies.

    checkpoints/checkpoint-<round>     complete: model, optimiser, schedule, random states, counters
    checkpoints/.writing-<round>       being written; of no use to anyone after a crash
    checkpoints/.deleting-<round>      being removed; likewise

A folder is written aside, every file and folder in it is fsynced, and then it is renamed:
the rename is the commit, so a folder of the first kind is complete by construction. An old
one is renamed before it is deleted, so that half of it is never taken for the whole.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from node.errors import UserError
from node.folder import is_disk_full
from protocol.files import sync_folder

_NAME = re.compile(r"checkpoint-(\d+)")
_ALMOST_NOTHING = 1 << 20  # bytes free; the last file's remains leave this little on a disk that filled up


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint, taken when `round` rounds were done."""

    round: int
    path: Path


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the complete checkpoints in `folder`, oldest first; none when it does not exist."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((Checkpoint(int(match[1]), path) for match, path in found if match), key=lambda one: one.round)


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint in `folder`, or None."""
    return max(list_checkpoints(folder), key=lambda one: one.round, default=None)


def save_checkpoint(folder: Path, round_number: int, write: Callable[[Path], None], keep: int) -> Checkpoint:
    """Let `write` fill a new folder, commit it as that of `round_number`, and keep the newest `keep`.

    One that already carries this number is replaced: the same round, done again after a restart.

    Raises:
        UserError: the disk is full. What was there before is as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".writing-{round_number}"
    final = folder / f"checkpoint-{round_number}"
    shutil.rmtree(aside, ignore_errors=True)
    with _full_disk_is_clear(aside):
        aside.mkdir()
        write(aside)
        _sync_tree(aside)
    _discard(final)
    aside.rename(final)
    sync_folder(folder)
    for old in list_checkpoints(folder)[:-keep]:
        _discard(old.path)
    return Checkpoint(round_number, final)


def remove_leftovers(folder: Path) -> None:
    """Delete what a crash left half written or half deleted. For the process that owns `folder` only."""
    for pattern in (".writing-*", ".deleting-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _discard(path: Path) -> None:
    match = _NAME.fullmatch(path.name)
    if match is None or not path.exists():
        return
    doomed = path.with_name(f".deleting-{match[1]}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            with Path(folder, name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))


@contextmanager
def _full_disk_is_clear(aside: Path) -> Iterator[None]:
    """Leave nothing of a failed write behind, and name a full disk as the reason where it is one."""
    try:
        yield
    except BaseException as error:
        full = _means_full_disk(error, aside.parent)
        shutil.rmtree(aside, ignore_errors=True)
        if full:
            raise UserError(
                f"the disk that holds {aside.parent} is full: free some space and start again; "
                "what was saved before is intact"
            ) from error
        raise


def _means_full_disk(error: BaseException, folder: Path) -> bool:
    """Tell a full disk from other failures: safetensors wraps the error number in text, torch drops it."""
    if isinstance(error, OSError):
        return is_disk_full(error)
    if isinstance(error, SafetensorError):
        return f"os error {errno.ENOSPC}" in str(error) or f"os error {errno.EDQUOT}" in str(error)
    return isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < _ALMOST_NOTHING
