"""An archive's folder: a swarm's manifest, and signed groups of the swarm, each in a file named by its id.

    manifest.bin        the swarm's signed manifest, which allows archives
    groups/ab/ab12...   a group as its signer sent it, signature and all; the name is the item's id in hex: a hash of
                        the signer's key and the group's bytes

Files are added, never changed or removed. Each is written aside and renamed, so after `kill -9` it is whole or not
there. Anybody can check all of a folder: nothing in it is taken on its keeper's word.

An archive has a bound in bytes, of which one signer fills at most `MAX_SIGNER_SHARE`. Each file counts as whole blocks
of `BLOCK` bytes, as it does on a disk.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from node.errors import UserError, for_shell
from node.rollouts.group import Group, GroupError, decode
from node.state_folder import exclusive, full_disk_is_clear
from node.swarm.swarm_folder import MANIFEST_FILE, load_manifest, save_manifest
from protocol.credentials.manifest import SwarmManifest
from protocol.errors import EnvelopeError, MessageError
from protocol.identity import KEY_BYTES, NodeId, node_id
from protocol.storage import read_bounded, sync_folder, write_atomically
from protocol.wire.compression import unpack_content
from protocol.wire.envelope import HEAD_BYTES, Kind, open_item
from protocol.wire.messages import TOPIC_BYTES

GROUPS = "groups"
BLOCK = 4096
MAX_SIGNER_SHARE = 0.5
ID_DIGITS = 64
MEND = "let `gossamer archive run` write it again"  # what becomes of a damaged manifest once it is deleted


class ArchiveError(ValueError):
    """A file or an item that is no group of the archive's swarm, or may not be kept; `reason` is a counter's name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ArchivedGroup(NamedTuple):
    """A group whose signature was checked and whose content was not: the item's id, its signer, and its bytes.

    `body` is the group as it travels, `frame` all that was signed with the signature.
    """

    id: bytes
    signer: NodeId
    group: Group
    body: bytes
    frame: bytes


def open_group(frame: bytes, manifest: SwarmManifest) -> ArchivedGroup:
    """Return the group in a signed item of the manifest's swarm, if an archive may keep it.

    Raises:
        ArchiveError: reason "forged", "malformed", "oversized", "other_version", "other_swarm" or "not_kept".
    """
    try:
        item = open_item(frame)
        if item.swarm != manifest.swarm:
            raise ArchiveError("other_swarm")
        if item.kind != Kind.ITEM:
            raise ArchiveError("malformed")
        body = unpack_content(memoryview(frame)[HEAD_BYTES + TOPIC_BYTES :], manifest.limits.max_group_bytes)
        group = decode(body, manifest.limits.max_group_bytes)
    except (EnvelopeError, MessageError, GroupError) as error:
        raise ArchiveError(error.reason) from None
    if not (group.kept and manifest.archive):
        raise ArchiveError("not_kept")
    return ArchivedGroup(item.item_id, node_id(item.public_key), group, body, frame)


class Archive:
    """An archive that is read. It may grow meanwhile.

    Raises:
        UserError: the folder is no archive or has lost its groups, or its swarm allows none.
    """

    def __init__(self, folder: Path) -> None:
        # Somebody else's folder may hold a pipe of that name, whose reader would wait for ever.
        manifest = load_manifest(folder, MEND) if (folder / MANIFEST_FILE).is_file() else None
        if manifest is None:
            raise UserError(f"{folder} is no archive: it has no {MANIFEST_FILE}; `gossamer archive run` begins one")
        check_allowed(manifest)
        if not (folder / GROUPS).is_dir():
            raise UserError(f"{folder} has lost its groups, the folder {GROUPS}/: copy them there from another copy")
        self.folder = folder
        self.manifest = manifest

    def files(self) -> Iterator[Path]:
        """Yield what is in the place of a group or astray, by its name; not what a kill left half written."""
        for path in sorted((self.folder / GROUPS).glob("[!.]*")):
            yield from sorted(path.glob("[!.]*")) if path.is_dir() else (path,)

    def read(self, path: Path) -> ArchivedGroup:
        """Return the group in a file.

        Raises:
            ArchiveError: as `open_group`; or reason "misnamed" or "unreadable".
        """
        most = HEAD_BYTES + TOPIC_BYTES + 1 + self.manifest.limits.max_group_bytes  # an item's content begins by a byte
        try:
            if path.is_symlink() or not path.is_file():
                raise ArchiveError("unreadable")
            frame = read_bounded(path, most + 1)
        except OSError:
            raise ArchiveError("unreadable") from None
        if len(frame) > most:
            raise ArchiveError("oversized")
        archived = open_group(frame, self.manifest)
        if path != _path(self.folder, archived.id):
            raise ArchiveError("misnamed")
        return archived

    def groups(self, damaged: Callable[[Path, str], None]) -> Iterator[ArchivedGroup]:
        """Yield all groups, by their ids; `damaged` is told of each other file, and why."""
        for path in self.files():
            try:
                yield self.read(path)
            except ArchiveError as error:
                damaged(path, error.reason)


class ArchiveWriter:
    """Adds groups to an archive; made by `open_writer`."""

    def __init__(self, folder: Path, manifest: SwarmManifest, max_bytes: int) -> None:
        self._folder = folder
        self.manifest = manifest
        self._max_bytes = max_bytes
        self._ids: set[bytes] = set()
        self._by_signer: Counter[NodeId] = Counter()
        self.bytes = 0
        for path in Archive(folder).files():
            if len(path.name) == ID_DIGITS and is_in_place(path) and path.is_file():
                with path.open("rb") as file:
                    signer = node_id(file.read(KEY_BYTES).ljust(KEY_BYTES, b"\0"))
                self._count(path.name, signer, path.stat().st_size)

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, group_id: object) -> bool:
        return group_id in self._ids

    def keep(self, archived: ArchivedGroup) -> str:
        """Write a group to the disk; return "" if it is there now, or why it is not: "signer_full".

        Raises:
            OSError: the folder is gone, say.
            UserError: the archive or its disk is full.
        """
        if archived.id in self._ids:
            return ""
        size = _on_disk(len(archived.frame))
        if self.bytes + size > self._max_bytes:
            raise UserError(
                f"the archive in {self._folder} is full, with {len(self)} groups: raise --gigabytes, or begin another "
                f"one with another --out (`gossamer archive verify {for_shell(self._folder)}` checks this one)"
            )
        if self._by_signer[archived.signer] + size > MAX_SIGNER_SHARE * self._max_bytes:
            return "signer_full"
        path = _path(self._folder, archived.id)
        with full_disk_is_clear(self._folder):
            if not path.parent.exists():
                path.parent.mkdir()
                sync_folder(path.parent.parent)
            write_atomically(path, archived.frame)
        self._count(path.name, archived.signer, len(archived.frame))
        return ""

    def _count(self, name: str, signer: NodeId, size: int) -> None:
        try:
            self._ids.add(bytes.fromhex(name))
        except ValueError:
            return
        self._by_signer[signer] += _on_disk(size)
        self.bytes += _on_disk(size)


@contextmanager
def open_writer(folder: Path, manifest: SwarmManifest, max_bytes: int) -> Iterator[ArchiveWriter]:
    """Make or open the archive of a swarm in `folder`, and hold it for this process while the block lasts.

    Raises:
        UserError: the swarm allows no archive; the folder is another swarm's, holds other things, has lost its groups,
            or is held.
    """
    check_allowed(manifest)
    is_begun = not folder.is_dir() or (folder / MANIFEST_FILE).exists()
    if not is_begun and not all(map(_is_ours, folder.iterdir())):
        raise UserError(f"{folder} holds other things than an archive: choose another --out")
    with exclusive(folder):
        if (own := load_manifest(folder, MEND)) is None:
            with full_disk_is_clear(folder):
                (folder / GROUPS).mkdir(exist_ok=True)  # first: a manifest without groups has lost them
                save_manifest(folder, manifest)
        elif own.hash != manifest.hash:
            raise UserError(f"{folder} is the archive of another swarm, {own.name!r}: choose another --out")
        for left in (folder / GROUPS).glob("*/.*.tmp"):  # by a kill
            left.unlink()
        yield ArchiveWriter(folder, manifest, max_bytes)


def check_allowed(manifest: SwarmManifest) -> None:
    """Raise `UserError` where a swarm's manifest does not allow archives."""
    if not manifest.archive:
        raise UserError(
            f"swarm {manifest.name!r} allows no archives: its founder has to say so when it is founded "
            "(`gossamer found --archive`)"
        )


def is_in_place(path: Path) -> bool:
    """Tell whether a file of an archive is in the folder that its name says."""
    return path.parent.name == path.name[:2]


def _path(folder: Path, group_id: bytes) -> Path:
    name = group_id.hex()
    return folder / GROUPS / name[:2] / name


def _on_disk(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _is_ours(path: Path) -> bool:
    """Tell whether a kill may have left the file in an archive that was begun."""
    return path.name in {"lock", GROUPS} or path.name.startswith(f".{MANIFEST_FILE}.")
