"""A node's folder: what is kept in it, and who may use it.

    identity.key   the node's key (0600)
    config.json    what it last ran               settings.json what was set for it, by a person
    peers.json     whom it has met                pool.sqlite   peers' groups, their uses
    checkpoints/   model, optimiser, counters     metrics.jsonl one object a round
    address        where peers dial it now        log.jsonl     structured events
    board.sqlite   what a board has seen

Nobody but its owner may look into it (0700): it holds a key, rights to enter swarms and what was said there.
One process at a time: the folder is locked while a node runs, and the lock dies with it.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from node.config import SETTINGS_VERSION, NodeConfig, OtherVersionError, read_tree
from node.errors import UserError
from protocol.storage import write_atomically

KEY_FILE = "identity.key"
CONFIG_FILE = "config.json"
SETTINGS_FILE = "settings.json"
HISTORY_FILE = "board.sqlite"


class Memory(NamedTuple):
    """A folder's memory: the tree of what was set, and all of what it last ran; both empty in a new folder."""

    settings: Mapping[str, Any]
    last: Mapping[str, Any]


def make_folder(folder: Path) -> None:
    """Make a node's folder where there is none yet, for its owner alone; `UserError` where that cannot be."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {folder} as a node's folder: {error.strerror}: choose another path") from None


def check_parent(file: Path) -> None:
    """Raise `UserError` where the folder that `file` is to be in is not there."""
    if not file.absolute().parent.is_dir():
        raise UserError(f"there is no folder {file.absolute().parent}: make it first")


def check_free(folder: Path) -> None:
    """Raise `UserError` where a node is running in `folder`; nothing is made, and the folder is not held."""
    with contextlib.suppress(OSError), (folder / "lock").open("r+") as lock:  # `exclusive` says what else is wrong
        _lock(lock, folder)


def is_held(folder: Path) -> bool:
    """Tell whether a node is running in `folder`."""
    try:
        check_free(folder)
    except UserError:
        return True
    return False


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it for this process; `UserError` when another node holds it."""
    make_folder(folder)
    try:
        lock = (folder / "lock").open("w")  # closed by the `with` below
    except OSError as error:
        raise UserError(f"cannot use {folder} as a node's folder: {error.strerror}: choose another path") from None
    with lock:
        _lock(lock, folder)
        yield


def _lock(lock: IO[str], folder: Path) -> None:
    """Hold the folder until `lock` is closed."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another node is running in {folder}: stop it, or choose another folder") from None


@contextmanager
def sole_process_of(node: str, folder: Path) -> Iterator[None]:
    """Hold the identity of `node` among this user's processes here, for one that runs in `folder`.

    A folder that was copied has a lock of its own; this one is of the key. On other machines only the
    network can tell: `status` and the log name a twin.

    Raises:
        UserError: a process holds it already.
    """
    place = _runtime_folder()
    if place is None:
        yield
        return
    with (place / node).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            where = lock.read(4096).strip()
            raise UserError(
                f"node {node} runs on this machine already{f', in {where}' if where else ''}: two processes of one key "
                "push each other out of the swarm; stop that one first"
            ) from None
        lock.truncate(0)
        lock.write(f"{folder.absolute()}\n")
        lock.flush()
        yield


def _runtime_folder() -> Path | None:
    """Return a folder of this user's alone on this machine; None where somebody else's is in its place."""
    user = os.getuid()
    run = Path(f"/run/user/{user}")
    folder = (run if run.is_dir() else Path(tempfile.gettempdir())) / f"gossamer-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    return folder if stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o077 else None


@contextmanager
def gone_if_new(folder: Path, keep: Callable[[BaseException], bool] = lambda _: False) -> Iterator[None]:
    """Remove `folder` if it was not there before the block and that fails, unless `keep` says yes to the failure."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException as error:
        if missing and not keep(error):
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # somebody put something into a parent meanwhile
                for parent in missing[1:]:
                    parent.rmdir()
        raise


def resolve_seed(config: NodeConfig, folder: Path) -> int:
    """Return the configured seed; without one, that of the folder's last start; without that, a new one.

    Raises:
        UserError: the folder's config.json cannot be read.
    """
    path = folder / CONFIG_FILE
    seed = config.seed
    if seed is None and path.exists():
        try:
            seed = NodeConfig(seed=json.loads(path.read_text())["seed"]).seed  # the rest may be of another version
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged: delete it, or set the seed with --seed") from None
    return secrets.randbits(63) if seed is None else seed


def recall(folder: Path) -> Memory:
    """Return what `folder` remembers.

    Raises:
        OtherVersionError: the settings are of another version.
        UserError: what is there cannot be read.
    """
    settings = _read(folder / SETTINGS_FILE)
    try:
        last = _read(folder / CONFIG_FILE)
    except OtherVersionError:
        if settings is None:
            raise
        last = None  # a start with new settings was cut off before it kept what it ran
    return Memory(settings or {}, last or {})


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return read_tree(path)
    except OtherVersionError:
        raise
    except UserError as error:
        raise UserError(f"{path} is damaged: delete it ({error})") from None


def keep_config(config: NodeConfig, seed: int, folder: Path) -> None:
    """Keep what a node runs, for people and for the next start.

    To be called when nothing in the configuration can turn out wrong any more: the next start would fail as well.
    """
    _keep_settings(config, folder)
    _write(folder / CONFIG_FILE, config.model_copy(update={"seed": seed}).model_dump(mode="json"))


def _keep_settings(config: NodeConfig, folder: Path) -> None:
    """Keep what was set for its owner alone: among it may be a token, and an id that lets into a swarm."""
    _write(folder / SETTINGS_FILE, config.model_dump(mode="json", exclude_unset=True))


def _write(path: Path, tree: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps({"version": SETTINGS_VERSION, **tree}, indent=1).encode(), 0o600)


class Before(NamedTuple):
    """A folder before a start in it: the settings of a first start that was cut off, and whether there was a key."""

    settings: bytes | None
    has_key: bool


@contextmanager
def first_start(config: NodeConfig, folder: Path, before: Before | None = None) -> Iterator[Before]:
    """Let a node's first start, which has not come to `keep_config` yet, leave its settings or the folder as it was.

    They are kept before the block makes a key, so that a start after a kill is the same node. If the block fails, the
    key that it made goes, and what was set before is there again: what was set now may be the reason. A later start
    changes nothing here. A start of two blocks gives the second what the first yielded, as `before`.
    """
    settings, key = folder / SETTINGS_FILE, folder / KEY_FILE
    before = before or Before(settings.read_bytes() if settings.exists() else None, key.exists())
    if (folder / CONFIG_FILE).exists():
        yield before
        return
    _keep_settings(config, folder)
    try:
        yield before
    except Exception:
        if not (folder / CONFIG_FILE).exists():
            if not before.has_key:
                key.unlink(missing_ok=True)  # first: a key without settings is nobody's
            if before.settings is None:
                settings.unlink(missing_ok=True)
            else:
                write_atomically(settings, before.settings, 0o600)
        raise


def check_begun(given: NodeConfig, folder: Path) -> None:
    """Raise `UserError` where neither `given` nor `folder` says what its node is to be.

    So it is where the folder's name is misspelt, and after a `gossamer join` that was refused or cut off.
    """
    is_begun = any((folder / name).exists() for name in (SETTINGS_FILE, CONFIG_FILE))
    if not is_begun and given.model_fields_set.isdisjoint({"policy", "tasks", "role"}):
        raise UserError(
            f"no node was started in {folder} yet: for a new one say what to train, such as --model builtin, or join a "
            "swarm with `gossamer join`"
        )


@contextmanager
def full_disk_is_clear(folder: Path) -> Iterator[None]:
    """Turn "no space left" from anywhere inside the block into one clear line."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise UserError(f"the disk that holds {folder} is full: free some space and start again") from error
        raise


def is_disk_full(error: OSError) -> bool:
    """Tell "no space left" and "quota exceeded" from other failures."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def of_a_node(folder: Path) -> Path:
    """Return `folder`, where a node's is wanted.

    Raises:
        UserError: it is a file, or the folder of a run of several.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file and no folder: choose another path")
    if (folder / "nodes").is_dir():
        raise UserError(f"{folder} is the folder of a run: name one of its nodes, e.g. {folder / 'nodes' / 'n0'}")
    return folder
