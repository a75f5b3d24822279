"""Founding a swarm, inviting to it, joining it: what changes in a node's folder before the node runs."""

import random
import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from node.config import NodeConfig, TaskConfig
from node.errors import UserError
from node.folder import exclusive, keep_config, resolve_seed
from node.manifest import adopt_tasks, describe_tasks, load_grant, load_manifest, save_grant, save_manifest
from node.network import is_loopback
from protocol.clock import read_clock
from protocol.errors import GrantError, JoinError, ManifestError
from protocol.fetch import fetch_manifest
from protocol.grants import Pass, Ticket, make_pass, open_grant
from protocol.identity import Identity, NodeId, id_bytes
from protocol.invite import Invite, SharedInvite, make_shared_invite
from protocol.manifest import ManifestLimits, Policy, SwarmManifest, make_manifest
from protocol.peers_file import load_peers
from protocol.records import Address

FETCH_TIMEOUT_S = 30.0  # a retried handshake or two over a slow line
MAX_TICKETS = 32  # numbers of an invite that are tried: even where nine in ten are used, one of 32 is free (97 %)
MAX_INVITE_SEEDS = 4  # an invite's own node, and three others in case it is gone

log = structlog.get_logger()


def found(config: NodeConfig, folder: Path, name: str, policy: Policy, allowed: Sequence[NodeId]) -> SwarmManifest:
    """Make `folder` the first node of a new swarm with the configuration's tasks; it runs `config` from now on.

    Raises:
        UserError: the folder belongs to a swarm already, or what was asked for fits no manifest.
        IdentityError: the folder's key cannot be used.
    """
    if allowed and policy is Policy.OPEN:
        raise UserError("an open swarm admits everybody: leave out --allow, or use --policy allowlist")
    limits = ManifestLimits(
        max_completions=4 * config.sampling.completions, max_item_age_s=max(1, int(config.pool.max_age))
    )
    tasks = describe_tasks(config.tasks)
    with exclusive(folder):
        if (known := load_manifest(folder)) is not None:
            raise UserError(
                f"{folder} belongs to swarm {known.name!r} already: run `gossamer node --state {folder}`, "
                "or choose another --out"
            )
        identity = Identity.load_or_generate(folder / "identity.key")
        try:
            manifest = make_manifest(identity, name, int(time.time() * 1000), policy, tasks, allowed, limits)
        except ManifestError as error:
            raise UserError(f"this makes no manifest ({error}): check the name and the tasks' options") from None
        keep_config(config, resolve_seed(config, folder), folder)
        save_manifest(folder, manifest)  # last, so that a folder with a manifest has all that it needs
        return manifest


def parse_node_id(text: str) -> NodeId:
    """Read a node id as `gossamer identity show` prints it; `UserError` for anything else."""
    try:
        if len(text) == 32 and text == text.lower() and len(id_bytes(NodeId(text))) == 20:
            return NodeId(text)
    except ValueError:
        pass
    raise UserError(f"{text!r} is no node id: it has 32 characters, as `gossamer identity show` prints it")


def make_invite(folder: Path, seeds: Sequence[Address], grant: Pass | SharedInvite | None = None) -> Invite:
    """Return an invite to the swarm of `folder`.

    `seeds` come first; without any the node's own address does. Up to three of the peers
    that it knows follow. Raises `UserError` when nobody can be dialled.
    """
    manifest = _manifest_of(folder)
    known = dict.fromkeys([*(seeds or _own_address(folder)), *_peers(folder, manifest)])
    if not known:
        raise UserError(f"nobody could dial this node: start it with --listen, or name a seed with --seed ({folder})")
    return Invite(manifest.name, manifest.hash, tuple(known)[: max(MAX_INVITE_SEEDS, len(seeds))], grant)


def works_elsewhere(invite: Invite) -> bool:
    """Tell whether another machine could reach a seed: not all are on loopback."""
    return not all(is_loopback(seed.endpoint) for seed in invite.seeds)


def pass_for(folder: Path, node: NodeId, lifetime_s: float) -> Pass:
    """Return a pass for `node`, signed by the founder, whose folder this must be."""
    manifest, founder = _founder_of(folder)
    return make_pass(founder, manifest.swarm, node, _expiry(lifetime_s))


def shared_invite(folder: Path, uses: int, lifetime_s: float) -> SharedInvite:
    """Return an invite for `uses` nodes, signed by the founder, whose folder this must be."""
    manifest, founder = _founder_of(folder)
    try:
        return make_shared_invite(founder, manifest, uses, _expiry(lifetime_s))
    except GrantError as error:
        raise UserError(f"--uses: {error}") from None


def _expiry(lifetime_s: float) -> int:
    return int((time.time() + lifetime_s) * 1000)


def _manifest_of(folder: Path) -> SwarmManifest:
    manifest = load_manifest(folder)
    if manifest is None:
        raise UserError(
            f"{folder} belongs to no swarm: found one with `gossamer found`, or join one with `gossamer join`"
        )
    return manifest


def _founder_of(folder: Path) -> tuple[SwarmManifest, Identity]:
    manifest = _manifest_of(folder)
    if manifest.policy is Policy.OPEN:
        raise UserError(f"swarm {manifest.name!r} is open: an invite needs neither --for nor --uses")
    identity = Identity.load(folder / "identity.key")
    if identity.public_key != manifest.founder_key:
        raise UserError(
            f"only the founder of swarm {manifest.name!r} ({manifest.founder}) can sign this: ask it for an invite"
        )
    return manifest, identity


def _own_address(folder: Path) -> list[Address]:
    try:
        return [Address.parse((folder / "address").read_text())]
    except FileNotFoundError:
        return []


def _peers(folder: Path, manifest: SwarmManifest) -> list[Address]:
    records = load_peers(folder / "peers.json", manifest.swarm, read_clock())
    newest = sorted(records, key=lambda record: record.expiry_ms, reverse=True)
    return [record.address for record in newest if record.address is not None]


def join(invite: Invite, config: NodeConfig, folder: Path, *, tasks: bool = True) -> NodeConfig:
    """Make `folder` a node of the invite's swarm and return the configuration to run.

    The manifest is fetched once; when it is there already, nothing is asked. The tasks are the
    manifest's, unless the node runs none. What else the node does is up to `config`.

    Raises:
        UserError: the folder belongs to another swarm, or a task cannot be verified here.
        JoinError: no seed answered, or this node is not admitted.
        IdentityError: the folder's key cannot be used.
    """
    with exclusive(folder):  # a second host with this key would take the first one's place
        identity = Identity.load_or_generate(folder / "identity.key")
        manifest = load_manifest(folder)
        if manifest is not None and manifest.hash != invite.manifest:
            raise UserError(f"{folder} belongs to another swarm, {manifest.name!r}: choose another --out")
        if manifest is None or _needs_grant(invite, folder):
            manifest, grant = _fetch(identity, invite)
            save_grant(folder, grant)
        adopted = adopt_tasks(manifest, config.tasks) if tasks else config.tasks
        settled = _joined(config, invite, adopted)
        keep_config(settled, resolve_seed(settled, folder), folder)
        save_manifest(folder, manifest)
    log.info("joined", swarm=manifest.name, founder=manifest.founder, policy=str(manifest.policy))
    return settled


def _joined(config: NodeConfig, invite: Invite, tasks: Sequence[TaskConfig]) -> NodeConfig:
    seeds = list(dict.fromkeys([*config.network.seeds, *map(str, invite.seeds)]))
    network = config.network.model_copy(update={"seeds": seeds, "swarm": ""})
    return config.model_copy(update={"network": network, "tasks": list(tasks)})


def _needs_grant(invite: Invite, folder: Path) -> bool:
    """Tell whether the invite brings a right that the folder does not hold yet."""
    if invite.grant is None:
        return False
    try:
        held = open_grant(load_grant(folder))
    except GrantError:
        return True
    if isinstance(invite.grant, Pass):
        return held != invite.grant
    return not (isinstance(held, Ticket) and held.certificate == invite.grant.certificate)


def _fetch(identity: Identity, invite: Invite) -> tuple[SwarmManifest, bytes]:
    """Return the manifest, and the grant with which it was given."""
    log.info("asking for the manifest", swarm=invite.name, seeds=[str(seed.endpoint) for seed in invite.seeds])
    refused: JoinError | None = None
    for grant in _grants(identity, invite):
        try:
            return fetch_manifest(identity, invite, grant, FETCH_TIMEOUT_S), grant
        except JoinError as error:
            if error.reason != "invite_used":
                raise _explained(error, identity, invite) from None
            refused = error
    raise _explained(refused, identity, invite) if refused else AssertionError("an invite has a number to try")


def _grants(identity: Identity, invite: Invite) -> Sequence[bytes]:
    match invite.grant:
        case None:
            return [b""]
        case Pass():
            return [invite.grant.encode()]
        case SharedInvite():
            numbers = invite.grant.numbers(random.SystemRandom())[:MAX_TICKETS]
            return [invite.grant.ticket(invite.swarm, number, identity.public_key).encode() for number in numbers]


def _explained(error: JoinError, identity: Identity, invite: Invite) -> JoinError:
    ask = f"ask its founder to run `gossamer invite DIR --for {identity.node_id}`"
    lines = {
        "not_admitted": f"swarm {invite.name!r} does not admit node {identity.node_id}: {ask}",
        "invite_used": f"this invite to swarm {invite.name!r} is used up: {ask}",
        "invite_expired": f"this invite to swarm {invite.name!r} has expired: {ask}",
    }
    return JoinError(lines.get(error.reason, str(error)), error.reason)
