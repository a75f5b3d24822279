"""A node's folder in one file, and a folder made from it.

A backup is a tar archive, readable by its owner alone, as it holds the node's key:

    backup.json     format, node id (null: it never met a network), version, Unix time, the checkpoint's round
    ...             the files of `FILES` that are there, the databases, the newest whole checkpoint
    SHA256SUMS      a line for each of the others, as sha256sum(1) writes and checks them

**While the node runs.** A checkpoint is whole or absent, and never changes: its files are linked into a folder of their
own first, so that they stay when the node removes it. Then the rows and the record of rounds are taken, which are never
behind a checkpoint; rows beyond it are forgotten when a node goes on from there, and the record may have a round twice.
SQLite itself copies the group buffer and a board's history. The uses of invites come last: the restored node does not
know those granted later, but the peers that admitted them do.

**After kill -9.** The archive is written aside and renamed; a folder is filled aside and renamed, too. The leftovers of
a killed backup or restore begin with a dot, and the next one removes them.
"""

import hashlib
import io
import json
import os
import re
import shutil
import sqlite3
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from node.errors import UserError, for_shell
from node.state_folder import (
    CONFIG_FILE,
    HISTORY_FILE,
    KEY_FILE,
    SETTINGS_FILE,
    check_parent,
    full_disk_is_clear,
    sole_process_of,
)
from node.swarm.swarm_folder import GRANT_FILE, MANIFEST_FILE, REVOCATIONS_FILE, USES_FILE
from node.telemetry.evaluations import EVALUATIONS_FILE
from node.telemetry.metrics_file import older
from node.training.checkpoint import Checkpoint, find_damage, latest_checkpoint
from protocol.identity import Identity
from protocol.storage import replacing, sync_folder, sync_tree

DATABASES = {"pool.sqlite": "shared rollouts are", HISTORY_FILE: "what the board showed of the past is"}
ROWS = (*(name for file in ("metrics.jsonl", EVALUATIONS_FILE) for name in (file, older(Path(file)).name)),)
FILES = (KEY_FILE, CONFIG_FILE, SETTINGS_FILE, MANIFEST_FILE, GRANT_FILE, REVOCATIONS_FILE, "peers.json", "address")
HEAD, SUMS = "backup.json", "SHA256SUMS"
FORMAT = 1
MAX_TEXT_BYTES = 1 << 20  # of the head, and of the sums: a line of about 120 bytes for each file
ROTATIONS = 8  # how often the newest checkpoint may be removed while it is being linked
BLOCK = 1 << 20
_CHECKPOINT_FILE = re.compile(r"checkpoints/checkpoint-\d{1,12}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")

Head = dict[str, Any]


def back_up(folder: Path, file: Path) -> Head:
    """Write what the node of `folder` needs to live on into `file`, whether it runs or not; return what the head says.

    Raises:
        UserError: there is no node, its newest checkpoint is damaged, `file` is there already or its folder is not, or
            the disk is full.
        IdentityError: the folder's key cannot be used.
    """
    if not (folder / CONFIG_FILE).exists():
        raise UserError(f"{folder} is no node's folder, or of one that never ran: it has no {CONFIG_FILE}")
    if not any((folder / name).exists() for name in (KEY_FILE, SETTINGS_FILE)):  # a model has a config.json, too
        raise UserError(f"{folder} is no node's folder: it has neither {KEY_FILE} nor {SETTINGS_FILE}")
    if file.exists():
        raise UserError(f"{file} is there already: choose another name")
    check_parent(file)
    node = _node_of(folder)
    with full_disk_is_clear(file.parent), scratch_folder(folder / ".backup") as scratch:
        checkpoint = _link_checkpoint(folder / "checkpoints", scratch / "checkpoint")
        sources = {name: folder / name for name in FILES} | _link_rows(folder, scratch)
        if checkpoint is not None:
            place = f"checkpoints/{checkpoint.path.name}"
            sources |= {f"{place}/{path.name}": path for path in sorted((scratch / "checkpoint").iterdir())}
        for name, lost in DATABASES.items():
            if (folder / name).exists():
                sources[name] = _copy_database(folder / name, scratch / name, lost)
        sources[USES_FILE] = folder / USES_FILE
        head = {
            "format": FORMAT,
            "node": node,
            "version": version("gossamer"),
            "time": int(time.time()),
            "round": checkpoint.round if checkpoint else None,
        }
        aside = file.with_name(f".{file.name}.writing")
        with replacing(file, aside, 0o600) as out, tarfile.open(fileobj=out, mode="w") as archive:
            sums = {HEAD: _add_text(archive, HEAD, json.dumps(head))}
            sums |= {name: _add(archive, name, path) for name, path in sources.items() if path.exists()}
            _add_text(archive, SUMS, "".join(f"{total}  {name}\n" for name, total in sums.items()))
    return head


def restore(file: Path, folder: Path) -> Head:
    """Make `folder` from the backup in `file`; return what its head says.

    Raises:
        UserError: there is something in `folder`, or it is the current or a mounted one, `file` is damaged or no
            backup, its node runs on this machine, or the disk is full.
        IdentityError: the key in it cannot be used.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: choose another --state, or move it away first")
    if folder.resolve() == Path.cwd() or os.path.ismount(folder):  # no folder can be renamed to it
        raise UserError(
            f"{folder} is the current folder, or a mounted one: name a new folder in it, such as "
            f"--state {for_shell(folder / 'n0')}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_is_clear(folder.parent), scratch_folder(folder.parent / f".{folder.name}.restoring") as scratch:
        try:
            with file.open("rb") as held, tarfile.open(fileobj=held, mode="r:") as archive:
                head = _extract(archive, scratch)
        except FileNotFoundError:
            raise UserError(f"there is no {file}: name what `gossamer backup` wrote") from None
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{file} is no backup, or is not complete ({error})") from None
        except ValueError as error:
            raise UserError(f"{file} is damaged: {error}") from None
        node = _node_of(scratch)
        if node != head["node"]:
            raise UserError(f"{file} is damaged: its key is not that of node {head['node']}")
        for checkpoint in (scratch / "checkpoints").glob("checkpoint-*"):
            if damage := find_damage(checkpoint):
                raise UserError(f"{file} is damaged: {checkpoint.name}: {damage}")
        sync_tree(scratch)
        with sole_process_of(node) if node else nullcontext():  # it does not run here at this moment
            scratch.rename(folder)
        sync_folder(folder.parent)
    return head


def _node_of(folder: Path) -> str | None:
    """Return the id of the folder's node; None where it never met a network."""
    return Identity.load(folder / KEY_FILE).node_id if (folder / KEY_FILE).exists() else None


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Make an empty folder at `path`, for its owner alone; what is left of it afterwards is removed.

    There is one of a name: what a killed process left there goes first.
    """
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _link_checkpoint(checkpoints: Path, into: Path) -> Checkpoint | None:
    """Link the files of the newest checkpoint, if there is one, into a folder where the node does not remove them."""
    for _ in range(ROTATIONS):
        newest = latest_checkpoint(checkpoints)
        if newest is None:
            return None
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir()
        try:
            for path in sorted(newest.path.iterdir()):
                os.link(path, into / path.name)
        except FileNotFoundError:  # the node has newer ones, and removed this one
            continue
        if damage := find_damage(into):
            raise UserError(f"{newest.path} is damaged ({damage}): start the node, which goes on from an older one")
        return newest
    raise RuntimeError(f"checkpoints in {checkpoints} go faster than they can be linked")


def _link_rows(folder: Path, scratch: Path) -> dict[str, Path]:
    """Link the files of rows, the newer of each pair first: the node may give it the older one's name meanwhile."""
    linked: dict[str, Path] = {}
    for name in ROWS:
        try:
            os.link(folder / name, scratch / name)
        except FileNotFoundError:
            continue
        if not any((scratch / name).samefile(path) for path in linked.values()):
            linked[name] = scratch / name
    return linked


def _copy_database(source: Path, target: Path, lost: str) -> Path:
    """Copy a database that another process may be writing to."""
    try:
        with closing(sqlite3.connect(source)) as database, closing(sqlite3.connect(target)) as copy:
            database.backup(copy)
    except sqlite3.DatabaseError as error:
        raise UserError(f"{source} is damaged ({error}): delete it; only {lost} lost") from None
    return target


def _add(archive: tarfile.TarFile, name: str, path: Path) -> str:
    """Add what `path` holds now, and return its SHA-256; what is appended meanwhile is left out."""
    with path.open("rb") as file:
        return _add_file(archive, name, file, os.fstat(file.fileno()).st_size)


def _add_text(archive: tarfile.TarFile, name: str, text: str) -> str:
    return _add_file(archive, name, io.BytesIO(text.encode()), len(text.encode()))


def _add_file(archive: tarfile.TarFile, name: str, file: IO[bytes], size: int) -> str:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, 0o600, int(time.time())
    summed = _Summed(file)
    archive.addfile(entry, summed)
    return summed.total.hexdigest()


class _Summed:
    """A file that adds up what is read of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.total = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.total.update(data)
        return data


def _extract(archive: tarfile.TarFile, folder: Path) -> Head:
    """Write the archive's files into `folder` and return what its head says.

    Raises:
        ValueError: it is damaged, or holds what no backup holds.
    """
    head: Head | None = None
    sums: dict[str, str] = {}
    for entry in archive:
        if not entry.isreg():
            raise ValueError(f"{entry.name!r:.80} is no file")
        if entry.name == SUMS:
            written = "".join(f"{total}  {name}\n" for name, total in sums.items())
            if head is None or _text(archive, entry) != written:
                raise ValueError("its sums are not those of its files")
            return head
        if entry.name == HEAD and head is None:
            text = _text(archive, entry)
            head, sums[HEAD] = _read_head(text), hashlib.sha256(text.encode()).hexdigest()
        elif entry.name not in sums and _is_kept(entry.name):
            sums[entry.name] = _write(archive, entry, folder / entry.name)
        else:
            raise ValueError(f"{entry.name!r:.80} belongs into no backup")
    raise ValueError("its end is missing")


def _is_kept(name: str) -> bool:
    return name in (*FILES, *ROWS, *DATABASES, USES_FILE) or _CHECKPOINT_FILE.fullmatch(name) is not None


def _read_head(text: str) -> Head:
    head = json.loads(text)
    if not isinstance(head, dict) or not isinstance(head.get("node"), str | None):
        raise ValueError("its head is none")  # what is wrong is the file
    if head.get("format") != FORMAT:
        raise ValueError(
            f"it is of format {head.get('format')!r:.20}, and this version reads {FORMAT}: update gossamer"
        )
    return head


def _text(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> str:
    file = archive.extractfile(entry)
    if file is None or entry.size > MAX_TEXT_BYTES:
        raise ValueError(f"{entry.name} is too long")
    return file.read().decode()


def _write(archive: tarfile.TarFile, entry: tarfile.TarInfo, path: Path) -> str:
    """Write a file of the archive to `path`, for its owner alone, and return its SHA-256."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    total = hashlib.sha256()
    file = archive.extractfile(entry)
    assert file is not None
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:  # noqa: PTH123  # modes
        while data := file.read(BLOCK):
            total.update(data)
            out.write(data)
    return total.hexdigest()
