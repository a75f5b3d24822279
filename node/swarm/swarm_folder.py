"""What a node's folder holds of the swarm that it founded or joined.

manifest.bin   the swarm's signed manifest
grant.bin      what admits this node to it; missing in open swarms and for nodes that are listed
revocations.bin  what the swarm's owner has revoked, and to whom the swarm was handed over; missing if neither
"""

from pathlib import Path

import structlog

from node.errors import UserError
from node.tasks.questions import DEFAULT_SPLIT, Split
from protocol.credentials.grants import Gatekeeper
from protocol.credentials.manifest import (
    SwarmManifest,
    open_manifest,
)
from protocol.credentials.records import MAX_GRANT_BYTES
from protocol.errors import ManifestError, RevocationError
from protocol.storage import read_bounded, write_atomically
from protocol.wire.messages import MAX_MANIFEST_BYTES, MAX_REVOCATIONS_BYTES

MANIFEST_FILE = "manifest.bin"
GRANT_FILE = "grant.bin"
REVOCATIONS_FILE = "revocations.bin"

log = structlog.get_logger()


def load_manifest(folder: Path, otherwise: str = "join the swarm again with an invite") -> SwarmManifest | None:
    """Return the manifest in `folder`, None if it belongs to no swarm.

    Raises:
        UserError: the manifest is damaged: copy it, or delete it and do what `otherwise` says.
    """
    data = _read(folder / MANIFEST_FILE, MAX_MANIFEST_BYTES)
    if data is None:
        return None
    try:
        return open_manifest(data)
    except ManifestError as error:
        raise UserError(
            f"{folder / MANIFEST_FILE} is damaged ({error}): copy it from another node of the swarm, "
            f"or delete it and {otherwise}"
        ) from None


def manifest_of(folder: Path) -> SwarmManifest:
    """Return the manifest in `folder`; `UserError` if it belongs to no swarm."""
    manifest = load_manifest(folder)
    if manifest is None:
        raise UserError(
            f"{folder} belongs to no swarm: found one with `gossamer found`, or join one with `gossamer join`"
        )
    return manifest


def save_manifest(folder: Path, manifest: SwarmManifest) -> None:
    """Make `folder` the folder of a node in the manifest's swarm."""
    write_atomically(folder / MANIFEST_FILE, manifest.encoded)


def split_of(manifest: SwarmManifest | None) -> Split:
    """Return which questions a swarm holds out for evaluation; the default if it has no manifest."""
    return DEFAULT_SPLIT if manifest is None else Split(manifest.split.millionths / 1e6, manifest.split.salt)


def check_split(folder: Path, manifest: SwarmManifest) -> None:
    """Raise `UserError` where the node in `folder`, until now in no swarm, has trained on what the swarm holds out."""
    if split_of(manifest) != DEFAULT_SPLIT and any((folder / "checkpoints").glob("checkpoint-*")):
        raise UserError(
            f"the node in {folder} has trained on questions that swarm {manifest.name!r} holds out for evaluation: "
            "choose a new folder (with this one's identity.key in it, if your invite is spent)"
        )


def lasting(manifest: SwarmManifest) -> str:
    """Return what a member of a swarm that allows archives is told before it shares anything."""
    return f"what is shared in swarm {manifest.name!r} is public and lasting: its manifest lets archives keep it"


def load_grant(folder: Path) -> bytes:
    """Return the node's grant, empty if it has none; its peers decide whether it counts."""
    return _read(folder / GRANT_FILE, MAX_GRANT_BYTES) or b""


def save_grant(folder: Path, grant: bytes) -> None:
    """Keep what admits the node; an empty grant never replaces another."""
    if grant:
        write_atomically(folder / GRANT_FILE, grant)


def load_gate(folder: Path, manifest: SwarmManifest) -> Gatekeeper:
    """Return who may be in the swarm, as far as the node in `folder` knows."""
    gate = Gatekeeper(manifest)
    path = folder / REVOCATIONS_FILE
    if encoded := read_bounded(path, MAX_REVOCATIONS_BYTES):
        try:
            gate.obey(encoded)
        except RevocationError as error:  # peers know it, and tell it again
            log.warning("the revocation list on disk is damaged", path=str(path), error=str(error))
    return gate


def save_revocations(folder: Path, encoded: bytes) -> None:
    """Keep the swarm's revocation list; a node that runs in `folder` tells the others."""
    write_atomically(folder / REVOCATIONS_FILE, encoded)


def _read(path: Path, limit: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
