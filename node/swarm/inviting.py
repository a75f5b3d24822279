"""Invites to a swarm: where to dial its nodes, and what admits the guest."""

import time
from collections.abc import Sequence
from pathlib import Path

from node.config import parse_config
from node.errors import UserError, for_shell
from node.state_folder import KEY_FILE, recall
from node.swarm.revoking import owner_of
from node.swarm.swarm_folder import load_gate, manifest_of
from protocol.credentials.grants import Pass, make_pass
from protocol.credentials.invite import MAX_SEEDS, Invite, SharedInvite, make_shared_invite
from protocol.credentials.manifest import (
    JoinPolicy,
    SwarmManifest,
)
from protocol.credentials.records import Address, Endpoint, saved_records
from protocol.errors import GrantError
from protocol.identity import Identity, NodeId, id_bytes
from protocol.limits.networks import Scope, netgroup, scope_of
from protocol.storage import load_peers

MAX_INVITE_PEERS = 3  # beside an invite's own node, in case it is gone


def parse_node_id(text: str) -> NodeId:
    """Read a node id as `gossamer identity show` prints it; `UserError` for anything else."""
    try:
        if len(text) == 32 and text == text.lower() and len(id_bytes(NodeId(text))) == 20:
            return NodeId(text)
    except ValueError:
        pass
    raise UserError(f"{text!r} is no node id: it has 32 characters, as `gossamer identity show` prints it")


def make_invite(
    folder: Path, seeds: Sequence[Address], grant: Pass | SharedInvite | None = None, own: Sequence[Address] = ()
) -> Invite:
    """Return an invite to the swarm of `folder`.

    `seeds` come first. Without seeds the node's own addresses do: `own` if there are any, else the one where it was
    dialled last. Up to three peers that it knows follow. Raises `UserError` when nobody can be dialled.
    """
    manifest = manifest_of(folder)
    known = dict.fromkeys([*(seeds or own or _own_address(folder)), *_peers(folder, manifest)[:MAX_INVITE_PEERS]])
    if not known:
        raise UserError(
            f"no address of this node is known: start it (`gossamer node --state {for_shell(folder)} --listen ...`), "
            "and ask again when it says `listening`; or name a seed with --seed"
        )
    return Invite(manifest.name, manifest.hash, tuple(known)[:MAX_SEEDS], grant)


def check_open(folder: Path) -> None:
    """Raise `UserError` where an invite without a grant admits nobody."""
    manifest = manifest_of(folder)
    if manifest.policy is not JoinPolicy.OPEN:
        raise UserError(
            f"swarm {manifest.name!r} has an allowlist, so this invite would admit nobody: add --uses N or "
            "--for NODE_ID as its owner, or --no-grant if it is for a node that is listed or holds a grant"
        )


def reach(invite: Invite) -> Scope:
    """Return how far away a seed of the invite can be dialled from, by its address."""
    return max(scope_of(seed.endpoint.host) for seed in invite.seeds)


def pass_for(folder: Path, node: NodeId, lifetime_s: float) -> Pass:
    """Return a pass for `node`, signed by the swarm's owner, whose folder this must be."""
    manifest, owner = _granter_of(folder)
    return make_pass(owner, manifest.swarm, node, _expiry(lifetime_s))


def shared_invite(folder: Path, uses: int, lifetime_s: float) -> SharedInvite:
    """Return an invite for `uses` nodes, signed by the swarm's owner, whose folder this must be."""
    manifest, owner = _granter_of(folder)
    try:
        return make_shared_invite(owner, manifest, uses, _expiry(lifetime_s))
    except GrantError as error:
        raise UserError(f"--uses: {error}") from None


def _expiry(lifetime_s: float) -> int:
    return int((time.time() + lifetime_s) * 1000)


def _granter_of(folder: Path) -> tuple[SwarmManifest, Identity]:
    manifest, owner, _ = owner_of(folder)
    if manifest.policy is JoinPolicy.OPEN:
        raise UserError(f"swarm {manifest.name!r} is open: an invite needs neither --for nor --uses")
    return manifest, owner


def _own_address(folder: Path) -> list[Address]:
    """Return where the node in `folder` was dialled last; before its first start, what it is to advertise."""
    try:
        return [Address.parse((folder / "address").read_text())]
    except FileNotFoundError:
        advertised = parse_config(recall(folder).last).network.advertise
        return [Address(Endpoint.parse(text), Identity.load(folder / KEY_FILE).curve_key) for text in advertised]


def _peers(folder: Path, manifest: SwarmManifest) -> list[Address]:
    """Return where to dial peers that the node in `folder` knows: one of each public network, its links first.

    The newest record does not come first: each peer says itself how long its record holds.
    """
    gate = load_gate(folder, manifest)
    addresses: dict[str, Address] = {}
    for record in saved_records(load_peers(folder / "peers.json"), manifest.swarm):
        if record.addresses and record.expiry_ms > 1000 * time.time() and not gate.is_revoked(record.node_id):
            farthest = max(record.addresses, key=lambda address: scope_of(address.endpoint.host))
            network = netgroup(farthest.endpoint.host) or str(farthest)  # nodes of private networks are not one
            addresses.setdefault(network, farthest)
    return list(addresses.values())
