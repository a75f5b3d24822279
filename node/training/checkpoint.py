"""Checkpoint folders that are whole or absent, whenever the process or the machine dies.

    checkpoints/checkpoint-<round>     complete: model, optimiser, schedule, random states, counters, and what
                                       `also_save` in `node/run.py` adds
    checkpoints/.writing-<round>       being written; of no use to anyone after a crash
    checkpoints/.deleting-<round>      being removed; likewise
    .../checkpoint-<round>/weights-only  marks one whose optimiser's state, two thirds of it, was or may be removed
    .../checkpoint-<round>/evaluation.json  what the policy scored then, if it was evaluated
    checkpoints/best                   a link to the one with the highest score; `gossamer eval` and `export` take it

A folder is written aside, every file and folder in it is fsynced, and then it is renamed:
the rename is the commit, so a folder of the first kind is complete by construction. An old
one is renamed before it is deleted, so that half of it is never taken for the whole. The mark of weights alone is
committed before the first file goes, so that what is missing is known to be missing on purpose.

A disk, a copy or a person may damage a folder later. So it is checked before a node goes on from it, and a damaged one
is passed over for the newest that is whole.
"""

import errno
import json
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from safetensors import SafetensorError, safe_open

from node.errors import UserError
from node.state_folder import is_disk_full
from protocol.storage import sync_folder, sync_tree, write_atomically

_NAME = re.compile(r"checkpoint-(\d+)")
_NEEDED = ("*model*.safetensors", "scheduler.pt", "rng_state*.pth", "trainer_state.json")
_OPTIMISER = "optimizer.pt"
_WEIGHTS_ONLY = "weights-only"
EVALUATION_FILE = "evaluation.json"
_BEST = "best"
SLICE = 1 << 24  # numbers of a tensor that are looked at together: it takes a few times their bytes
A_DAY = 10**12  # bytes: a small SSD stands some 600 times as much, one for servers is made to be rewritten each day
AT_ONCE = 20 * 10**9  # bytes before that counts: short runs and small models save as often as is set
_ALMOST_NOTHING = 1 << 20  # bytes free; the last file's remains leave this little on a disk that filled up


log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint, taken when `round` rounds were done."""

    round: int
    path: Path


class Writes:
    """Bounds what checkpoints write to `A_DAY` bytes a day, after the first `AT_ONCE`.

    A larger one than that is allowed as soon as nothing is owed.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = 0  # bytes of the newest checkpoint
        self._owed, self._at = 0.0, clock()  # bytes that were too many then

    def note(self, size: int) -> None:
        """Note a checkpoint of so many bytes."""
        self._last, self._owed, self._at = size, self._now_owed() + size, self._clock()

    def allow(self) -> bool:
        """Tell whether another one like the last may be written."""
        owed = self._now_owed()
        return owed == 0 or owed + self._last <= AT_ONCE

    def _now_owed(self) -> float:
        return max(0.0, self._owed - (self._clock() - self._at) * A_DAY / 86400)


class Keep(NamedTuple):
    """How many of the newest checkpoints are kept, and how many of those with the optimiser's state.

    The best one by evaluation is kept beside them.
    """

    total: int
    full: int


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the complete checkpoints in `folder`, oldest first; none when it does not exist."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(
        (Checkpoint(int(match[1]), path) for match, path in found if match), key=lambda checkpoint: checkpoint.round
    )


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint in `folder`, or None."""
    return max(list_checkpoints(folder), key=lambda checkpoint: checkpoint.round, default=None)


def best_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the complete checkpoint in `folder` with the highest score, the oldest of equals; None if none has one."""
    scored = [
        (found, checkpoint) for checkpoint in list_checkpoints(folder) if (found := _score(checkpoint.path)) is not None
    ]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def write_score(path: Path, row: Mapping[str, Any]) -> None:
    """Add the result of an evaluation to the checkpoint in `path`: a row of `evaluations.jsonl`."""
    (path / EVALUATION_FILE).write_text(json.dumps({key: row[key] for key in ("accuracy", "reward")}))


def is_better(row: Mapping[str, Any], folder: Path) -> bool:
    """Tell whether an evaluation has a higher score than any complete checkpoint in `folder`."""
    best = best_checkpoint(folder)
    found = None if best is None else _score(best.path)
    return found is None or (row["accuracy"], row["reward"]) > found


def _score(path: Path) -> tuple[float, float] | None:
    try:
        row = json.loads((path / EVALUATION_FILE).read_text())
        return float(row["accuracy"]), float(row["reward"])
    except (OSError, ValueError, KeyError, TypeError):  # not evaluated, or damaged: then it is no worse than that
        return None


def whole_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint in `folder` that is whole, None where there is none at all; warn of damaged ones.

    One of weights alone is taken where no other is whole: its optimiser begins anew.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    damage = []
    for checkpoint in reversed(list_checkpoints(folder)):
        found = find_damage(checkpoint.path)
        if not found:
            if not has_optimiser(checkpoint.path):
                log.warning("the optimiser begins anew", path=str(checkpoint.path), reason="it keeps weights alone")
            return checkpoint
        log.warning("checkpoint is damaged", path=str(checkpoint.path), damage=found)
        damage.append(f"{checkpoint.path.name}: {found}")
    if damage:
        raise UserError(
            f"no checkpoint in {folder} can be read ({'; '.join(damage)}): "
            "restore one from a copy, or delete the folder to begin at round 0"
        )
    return None


def find_damage(path: Path) -> str:
    """Return what is wrong with the checkpoint in `path`, empty if it can be read.

    Looks for missing, empty, cut and garbled files, and for weights that are not finite.
    """
    optimiser = () if (path / _WEIGHTS_ONLY).exists() else (_OPTIMISER,)
    for pattern in (*_NEEDED, *optimiser):
        if not any(path.glob(pattern)):
            return f"{pattern.replace('*', '')} is missing"
    for file in sorted(path.iterdir()):
        try:
            _look_into(file)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
            return f"{file.name} cannot be read ({str(error) or type(error).__name__})"
    return ""


def is_finite(tensor: Any) -> bool:
    """Tell whether all numbers of a tensor are finite; of float8, too, for most of whose kinds torch cannot tell."""
    parts = tensor.detach().flatten().split(SLICE)
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        parts = (part.float() for part in parts)
    return all(bool(part.isfinite().all()) for part in parts)


def has_optimiser(path: Path) -> bool:
    """Tell whether the checkpoint in `path` holds the optimiser's state, and training goes on from it to the bit."""
    return (path / _OPTIMISER).exists()


def _look_into(file: Path) -> None:
    """Raise one of several errors where `file` is not what its name says."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:  # its header says how long the file is
            for name in tensors.keys():  # noqa: SIM118  # it is no dictionary
                if not is_finite(tensors.get_tensor(name)):
                    raise ValueError(f"{name} is not finite")
    elif file.suffix in (".pt", ".pth"):
        with zipfile.ZipFile(file) as archive:  # its directory is at the end
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    archive.read(name)
    elif file.name == "trainer_state.json":
        int(json.loads(file.read_text())["global_step"])
    elif file.name.endswith(".safetensors.index.json"):
        for part in set(json.loads(file.read_text())["weight_map"].values()):
            (file.parent / part).stat()


def begin_checkpoint(folder: Path, round_number: int, write: Callable[[Path], None]) -> Path:
    """Let `write` begin to fill a new folder for `round_number`, which `end_checkpoint` makes a checkpoint.

    Raises:
        UserError: the disk is full. All that was there before is unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".writing-{round_number}"
    shutil.rmtree(aside, ignore_errors=True)
    with _full_disk_is_clear(aside):
        aside.mkdir()
        write(aside)
    return aside


def end_checkpoint(aside: Path, write: Callable[[Path], None], keep: Keep) -> None:
    """Let `write` fill the folder to its end, commit it, and remove what is not to be kept.

    A checkpoint of the same round is replaced: the round was done again after a restart. Those of later rounds are
    damaged, or the node would have gone on from there, and are deleted.

    Raises:
        UserError: the disk is full. All that was there before is unchanged.
    """
    folder, number = aside.parent, aside.name.removeprefix(".writing-")
    with _full_disk_is_clear(aside):
        write(aside)
        sync_tree(aside)
    final = folder / f"checkpoint-{number}"
    _discard(final)
    aside.rename(final)
    sync_folder(folder)
    _prune(folder, int(number), keep)


def remove_leftovers(folder: Path) -> None:
    """Delete what a crash left half written or half deleted. For the process that owns `folder` only."""
    for pattern in (".writing-*", ".deleting-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _prune(folder: Path, newest: int, keep: Keep) -> None:
    for checkpoint in list_checkpoints(folder):
        if checkpoint.round > newest:
            _discard(checkpoint.path)
    found, best = list_checkpoints(folder), best_checkpoint(folder)
    for checkpoint in found[: -keep.total]:
        if checkpoint != best:
            _discard(checkpoint.path)
    for checkpoint in found[: max(0, len(found) - keep.full)]:
        if has_optimiser(checkpoint.path):
            _keep_weights_alone(checkpoint.path)
    _link(folder / _BEST, best)


def _discard(path: Path) -> None:
    match = _NAME.fullmatch(path.name)
    if match is None or not path.exists():
        return
    doomed = path.with_name(f".deleting-{match[1]}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _link(link: Path, checkpoint: Checkpoint | None) -> None:
    """Have `link` lead to `checkpoint`; where a file system knows no links there is none."""
    aside = link.with_name(f".{link.name}")
    with suppress(OSError):
        for old in (aside, *([link] if checkpoint is None else [])):
            if old.is_symlink():
                old.unlink()
        if checkpoint is not None:
            aside.symlink_to(checkpoint.path.name)
            aside.rename(link)


def mark_weights_only(path: Path) -> None:
    """Note in a checkpoint that it lacks the optimiser's state, or may lack it, on purpose."""
    write_atomically(path / _WEIGHTS_ONLY, b"")


def _keep_weights_alone(path: Path) -> None:
    mark_weights_only(path)
    (path / _OPTIMISER).unlink(missing_ok=True)


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
