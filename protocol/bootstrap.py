"""Asking a swarm's seeds for its manifest: the first thing that a joiner does."""

import time
from dataclasses import replace

from protocol.config import LAN, Limits, Timing
from protocol.credentials.grants import REFUSALS
from protocol.credentials.invite import Invite
from protocol.credentials.manifest import SwarmManifest, open_manifest
from protocol.errors import JoinError, ManifestError
from protocol.host import Host
from protocol.identity import Identity

POLL_S = 0.02


def fetch_manifest(
    identity: Identity, invite: Invite, grant: bytes, timeout: float, timing: Timing = LAN
) -> SwarmManifest:
    """Dial the invite's seeds as a member that shows `grant`, and return the manifest that the invite names.

    Waits up to `timeout` seconds; the host that asks is gone when this returns.

    Raises:
        JoinError: no seed answered, or one did and keeps this node out; `reason` says for what.
        BadAddress: a seed's endpoint is of no use on this machine.
    """
    limits = replace(Limits(), held_bytes=0)  # it is here for one message, not to relay
    host = Host(
        identity, invite.swarm, None, invite.seeds, limits, "gossamer/joining", timing=timing, grant=grant, manifest=b""
    )
    host.start()
    try:
        deadline = time.monotonic() + timeout
        while not host.manifest and host.refusal not in REFUSALS and time.monotonic() < deadline:
            time.sleep(POLL_S)
        encoded, refusal = host.manifest, host.refusal
    finally:
        host.stop()
    if not encoded and refusal in REFUSALS:
        raise JoinError(f"swarm {invite.name!r} does not admit this node: {refusal}", refusal)
    if not encoded:
        seeds = ", ".join(str(seed.endpoint) for seed in invite.seeds)
        raise JoinError(f"no seed of the invite answered within {timeout:g} s ({seeds}): ask for a newer invite")
    return _verified(encoded, invite)


def _verified(encoded: bytes, invite: Invite) -> SwarmManifest:
    try:
        manifest = open_manifest(encoded)
    except ManifestError as error:
        raise JoinError(f"the manifest of swarm {invite.name!r} is not valid ({error}): do not join it") from None
    # The host compared 16 bytes with the swarm's id; the invite knows all 32.
    if manifest.hash != invite.manifest:
        raise JoinError(f"the manifest of swarm {invite.name!r} is not the one that the invite names: do not join it")
    return manifest
