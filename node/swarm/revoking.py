"""What a swarm's owner signs to take rights back: revocations, and the hand-over of the swarm to another owner."""

from collections.abc import Iterable
from pathlib import Path

from node.errors import UserError
from node.state_folder import KEY_FILE
from node.swarm.swarm_folder import load_gate, manifest_of, save_revocations
from protocol.credentials.grants import Gatekeeper, Pass, revocable_id
from protocol.credentials.invite import Invite, SharedInvite
from protocol.credentials.manifest import (
    SwarmManifest,
)
from protocol.credentials.revocations import (
    MAX_HANDOVERS,
    MAX_REVOKED,
    Handover,
    RevocationList,
    make_handover,
    make_revocations,
    open_revocations,
)
from protocol.errors import RevocationError
from protocol.identity import Identity, NodeId, node_id


def revoke(folder: Path, ids: Iterable[NodeId], *, undo: bool = False) -> RevocationList:
    """Revoke nodes, invites and passes by their ids, or with `undo` let them count again; return the new list.

    Raises:
        UserError: the folder is not that of the swarm's owner, or the list would be too long.
    """
    manifest, owner, gate = owner_of(folder)
    before = _list_of(gate, manifest)
    ids = set(ids)
    if owner.node_id in ids:
        raise UserError(f"{owner.node_id} is the owner of swarm {manifest.name!r} itself: hand the swarm over first")
    revoked = before.revoked - ids if undo else before.revoked | ids
    return _sign_list(folder, manifest, owner, revoked, before.sequence + 1, before.handovers)


def revocable(invite: Invite) -> NodeId | None:
    """Return the id that revokes what the invite grants; None if it grants nothing."""
    match invite.grant:
        case None:
            return None
        case Pass():
            return revocable_id(invite.grant)
        case SharedInvite():
            return revocable_id(invite.grant.certificate)


def hand_over(folder: Path, successor: bytes) -> RevocationList:
    """Make the holder of the public key `successor` the swarm's owner; return the list that says so.

    Raises:
        UserError: the folder is not that of the swarm's owner, or it was handed over too often.
    """
    manifest, owner, gate = owner_of(folder)
    if successor in gate.owners:
        raise UserError(f"{node_id(successor)} owns or owned swarm {manifest.name!r} already: choose another key")
    before = _list_of(gate, manifest)
    chain = (*before.handovers, make_handover(owner, manifest, len(before.handovers), successor))
    return _sign_list(folder, manifest, owner, before.revoked, 0, chain)


def revoked_in(folder: Path) -> frozenset[NodeId]:
    """Return the ids that the swarm's owner has revoked, as far as the node in `folder` knows."""
    manifest = manifest_of(folder)
    return _list_of(load_gate(folder, manifest), manifest).revoked


def owner_of(folder: Path) -> tuple[SwarmManifest, Identity, Gatekeeper]:
    """Return what the swarm's owner signs with, from its folder; `UserError` where the folder is another's."""
    manifest = manifest_of(folder)
    gate = load_gate(folder, manifest)
    identity = Identity.load(folder / KEY_FILE)
    if identity.public_key != gate.owners[-1]:
        who = f"the {'owner' if len(gate.owners) > 1 else 'founder'} of swarm {manifest.name!r}"
        raise UserError(f"only {who} ({node_id(gate.owners[-1])}) can sign this: ask whoever holds its key")
    return manifest, identity, gate


def _list_of(gate: Gatekeeper, manifest: SwarmManifest) -> RevocationList:
    """Return the list that `gate` obeys, or an empty unsigned one."""
    if gate.revocations:
        return open_revocations(gate.revocations, manifest)
    return RevocationList(0, (), b"", b"")


def _sign_list(
    folder: Path,
    manifest: SwarmManifest,
    owner: Identity,
    revoked: frozenset[NodeId],
    sequence: int,
    handovers: tuple[Handover, ...],
) -> RevocationList:
    try:
        revocations = make_revocations(owner, manifest, revoked, sequence, handovers)
    except RevocationError as error:
        raise UserError(
            f"cannot make a revocation list ({error}): it holds at most {MAX_REVOKED} ids (--undo removes some) and "
            f"{MAX_HANDOVERS} owners after the founder"
        ) from None
    save_revocations(folder, revocations.encoded)
    return revocations
