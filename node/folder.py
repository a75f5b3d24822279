"""A node's folder: what is kept in it, and who may use it.

    identity.key   the node's key (0600)          address       where peers dial it now
    config.json    what it last ran               pool.sqlite   peers' verified groups
    checkpoints/   model, optimiser, counters     metrics.jsonl one object a round
    peers.json     whom it has met                log.jsonl     structured events

One process at a time: the folder is locked while a node runs, and the lock dies with it.
"""

import errno
import fcntl
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from node.config import NodeConfig
from node.errors import UserError
from protocol.files import write_atomically


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it for this process; `UserError` when another node holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")  # closed by the `with` below
    except OSError as error:
        raise UserError(f"cannot use {folder} as a node's folder: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another node is running in {folder}: stop it, or choose another folder") from None
        yield


def resolve_seed(config: NodeConfig, folder: Path) -> int:
    """Return the configured seed; without one, the folder's own, drawn at its first start.

    The resolved configuration is kept in config.json, for people and for the next start.
    """
    path = folder / "config.json"
    seed = config.seed
    if seed is None and path.exists():
        try:
            seed = json.loads(path.read_text())["seed"]
        except (ValueError, KeyError):
            raise UserError(f"{path} is damaged: delete it, or set the seed with --seed") from None
    if seed is None:
        seed = secrets.randbits(63)
    resolved = config.model_copy(update={"seed": seed})
    write_atomically(path, resolved.model_dump_json(indent=1).encode())
    return seed


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
