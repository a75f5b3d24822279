"""A Ray cluster, as the laboratory and a swarm use it: how to reach it, and the files that travel to its machines.

Anybody who reaches the ports of a Ray cluster without a token runs code there. So a cluster that is started here for
one command listens on loopback alone. It also has a token, since loopback is open to other users of this machine.
People start a cluster of several machines themselves (`ray start`, `examples/slurm-ray.sh`), and give it a token.

No shared disk is assumed: the local files and folders that settings name travel as archives.
"""

import io
import logging
import os
import secrets
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import structlog

from node.config import FUNCTION_FILE, NodeConfig
from node.errors import UserError, how_to_install
from node.operations.preflight import check_unhidden
from node.policy.detection import measure_model
from node.policy.memory import BUILTIN_SIZE, Machine, memory_held

MOST_SHIPPED = 256 << 20  # bytes of the files that settings name: larger models are better named by their hub's id
MOST_RECORDS = 256 << 20  # bytes that an archive may unpack to
# Ray's switch for systems whose firewall asks: if it is off, Ray knows its machine by loopback alone, and binds that.
BEYOND_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

log = structlog.get_logger()


def connected(on: str) -> Any:
    """Return Ray, connected to the cluster that `on` names, and telling nobody of its use.

    Args:
        on: "ray", for the cluster that this machine belongs to, or a new one on its loopback; or "ray=ADDRESS".

    Raises:
        UserError: Ray is not installed, no cluster answers, a new one would listen beyond loopback, or a file of the
            current folder, from which Ray's workers import, hides a package of ours.
    """
    kind, _, address = on.partition("=")
    if kind != "ray":
        raise UserError(f"--on {on}: write ray, or ray=ADDRESS")
    check_unhidden(Path.cwd())
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    is_new = not address and not _belongs_to_cluster()
    if is_new:  # read when Ray is imported, and by each of its processes
        os.environ[BEYOND_LOOPBACK] = "0"
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home folder
    try:
        import ray
    except ImportError:
        raise UserError(f"--on ray wants Ray: {how_to_install('ray')}") from None
    where = address or ("local" if is_new else "auto")
    try:
        ray.init(address=where, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"no Ray cluster answers at {address or 'this machine'} ({error}): see `ray status`; if it has a token, "
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from None
    if is_new and not ip_address(ray.util.get_node_ip_address()).is_loopback:
        ray.shutdown()
        raise UserError("this release of Ray listens beyond this machine: start a cluster with a token by `ray start`")
    if os.environ.get("RAY_AUTH_MODE") != "token":
        log.warning("this Ray cluster has no token: whoever reaches its ports runs code there", see="docs/clusters.md")
    return ray


def _belongs_to_cluster() -> bool:
    """Tell whether Ray, given no address, would find a cluster: one that is named, or that `ray start` made here."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108  # as Ray has it
    return bool(os.environ.get("RAY_ADDRESS")) or Path(folder, "ray", "ray_current_cluster").exists()


def memory_of(config: NodeConfig) -> int:
    """Return the bytes of main memory that a node takes at its most, without a GPU."""
    size = BUILTIN_SIZE if config.policy.model == "builtin" else measure_model(config.policy.model)
    return memory_held(size, config, Machine(0)).peak()


def packed_files(settings: Sequence[Mapping[str, Any]], name: str) -> dict[str, bytes]:
    """Return the local files and folders that settings name, packed, by their path as the settings have it.

    The programs of an engine are each machine's own.

    Raises:
        UserError: they are too large to travel, for `name`.
    """
    trees = [{key: value for key, value in tree.items() if key != "engine"} for tree in settings]
    paths = sorted({path for tree in trees for text in _texts(tree) if _is_local(path := _path_and_rest(text)[0])})
    size = sum(file.stat().st_size for path in paths for file in _files(Path(path)))
    if size > MOST_SHIPPED:
        raise UserError(
            f"{name}: its files ({', '.join(paths)}) have {size / 1e6:.0f} MB, and {MOST_SHIPPED >> 20} MiB "
            "travel at most: name the model by its id on the hub"
        )
    return {path: packed(Path(path)) for path in paths}


def unpack_files(files: Mapping[str, bytes], folder: Path) -> dict[str, Path]:
    """Unpack what `packed_files` returned into new folders in `folder`; return where each path is now."""
    return {
        path: unpack(data, folder / f"files{number}") / Path(path).name
        for number, (path, data) in enumerate(files.items())
    }


def relocated(settings: Any, places: Mapping[str, Path]) -> Any:
    """Return settings in which each path of `places` is replaced by where it is now."""
    if isinstance(settings, Mapping):
        return {key: relocated(value, places) for key, value in settings.items()}
    if isinstance(settings, list):
        return [relocated(value, places) for value in settings]
    if isinstance(settings, str):
        path, rest = _path_and_rest(settings)
        return f"{places[path]}{rest}" if path in places else settings
    return settings


def packed(path: Path, suffixes: frozenset[str] | None = None) -> bytes:
    """Return a file or a folder as a compressed archive, with only the files of these suffixes if any are named."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz", compresslevel=1) as archive:
        for file in _files(path):
            if suffixes is None:
                archive.add(file, arcname=str(file.relative_to(path.parent)))
            elif file.suffix in suffixes:
                archive.add(file, arcname=str(file.relative_to(path)))
    return data.getvalue()


def unpack(data: bytes, folder: Path) -> Path:
    """Unpack an archive into `folder`, which is made, and return it. Nothing gets outside of it.

    Raises:
        UserError: it is larger than `MOST_RECORDS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        members = archive.getmembers()
        if sum(member.size for member in members) > MOST_RECORDS:
            raise UserError(f"a run brought more than {MOST_RECORDS >> 20} MiB of records")
        archive.extractall(folder, members=members, filter="data")
    return folder


def _texts(settings: Any) -> Iterator[str]:
    if isinstance(settings, Mapping):
        settings = list(settings.values())
    if isinstance(settings, list):
        for value in settings:
            yield from _texts(value)
    elif isinstance(settings, str):
        yield settings


def _path_and_rest(text: str) -> tuple[str, str]:
    """Split what may name a function or a class of a file, as FILE.py:NAME."""
    match = FUNCTION_FILE.fullmatch(text)
    return (text, "") if match is None else (match[1], match[2] + match[3])


def _is_local(text: str) -> bool:
    with suppress(OSError, ValueError):  # a text too long for a path, or with a zero byte
        return os.sep in text and Path(text).exists()
    return False


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
