"""Joining a swarm: its manifest is fetched once, and the folder becomes a node of it."""

from collections.abc import Collection, Sequence
from pathlib import Path

import structlog

from node.config import NodeConfig, TaskConfig
from node.errors import UserError
from node.state_folder import KEY_FILE, exclusive, gone_if_new, keep_config, resolve_seed
from node.swarm.agreed_tasks import adopt_tasks
from node.swarm.notices import REMEDIES
from node.swarm.swarm_folder import (
    GRANT_FILE,
    check_split,
    load_gate,
    load_grant,
    load_manifest,
    save_grant,
    save_manifest,
    save_revocations,
)
from protocol.credentials.grants import REFUSALS, Pass, Ticket, open_grant
from protocol.credentials.invite import Invite, SharedInvite
from protocol.errors import GrantError, JoinError
from protocol.identity import Identity
from protocol.joiner import FetchedManifest, fetch_manifest
from protocol.refusals import CLOCK_AHEAD, CLOCK_BEHIND, GRAYLISTED

FETCH_TIMEOUT_S = 30.0  # a retried handshake or two over a slow line

log = structlog.get_logger()


def join(invite: Invite, config: NodeConfig, folder: Path, allowed: Collection[str] = ()) -> NodeConfig:
    """Make `folder` a node of the invite's swarm and return the configuration to run.

    The manifest is fetched once; when it is there already, seeds are asked only for what the invite grants anew. A
    member goes on with what it has unless one of them refuses it by the swarm's rules (`REFUSALS`). The tasks are the
    manifest's, unless the node only relays. `config` decides all else. `allowed` names tasks as for `adopt_tasks`.

    A join that fails leaves no new folder unless the next try needs its key: a refusal names the key, and a grant
    belongs to it.

    Raises:
        WordNeededError: as `adopt_tasks`.
        UserError: the folder belongs to another swarm, the swarm has another name than the invite says, the node has
            trained under another split, or a task cannot be verified here.
        JoinError: no seed admitted one who is no member yet, or one of them refused a member.
        IdentityError: the folder's key cannot be used.
    """

    def needs_key(error: BaseException) -> bool:
        return _is_refusal(error) or (folder / GRANT_FILE).exists()

    # The folder is held: a second host with this key would take the first one's place.
    with gone_if_new(folder, keep=needs_key), exclusive(folder):
        identity = Identity.load_or_generate(folder / KEY_FILE)
        manifest = load_manifest(folder)
        if manifest is not None and manifest.hash != invite.manifest:
            raise UserError(f"{folder} belongs to another swarm, {manifest.name!r}: choose another --state")
        if manifest is None:
            grant, fetched = _fetch(identity, invite, folder)
            check_split(folder, fetched.manifest)
            manifest = fetched.manifest
            _keep_rights(folder, grant, fetched)
            if manifest.name != invite.name:  # which anybody can write into the line
                raise UserError(
                    f"the invite is to swarm {manifest.name!r}, and not to {invite.name!r} as it says: if that is the "
                    "swarm you want, put its name into the line"
                )
        elif _needs_grant(invite, folder):
            try:
                _keep_rights(folder, *_fetch(identity, invite, folder))
            except JoinError as error:
                if _is_refusal(error):
                    raise
                log.warning(
                    "going on without what the invite grants",
                    why=str(error),
                    more="the same `gossamer join` asks again",
                )
        adopted = adopt_tasks(manifest, config.tasks, allowed) if config.role == "train" else config.tasks
        settled = _joined(config, invite, adopted)
        save_manifest(folder, manifest)
        keep_config(settled, resolve_seed(settled, folder), folder)  # last: until then `check_begun` says so
    log.info("joined", swarm=manifest.name, founder=manifest.founder, policy=str(manifest.policy))
    return settled


def _keep_rights(folder: Path, grant: bytes, fetched: FetchedManifest) -> None:
    """Keep what admits the node, and whom the swarm's owner has revoked."""
    if fetched.revocations and load_gate(folder, fetched.manifest).obey(fetched.revocations):
        save_revocations(folder, fetched.revocations)
    save_grant(folder, grant)


def _is_refusal(error: BaseException) -> bool:
    """Tell whether a member refused this node by the swarm's rules, not for its clock or its version, say."""
    return isinstance(error, JoinError) and not REFUSALS.isdisjoint(error.refusals.values())


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


def _fetch(identity: Identity, invite: Invite, folder: Path) -> tuple[bytes, FetchedManifest]:
    """Return the grant that admitted us, and what came."""
    log.info("asking for the manifest", swarm=invite.name, seeds=[str(seed.endpoint) for seed in invite.seeds])
    try:
        grant = _grant(identity, invite) if _needs_grant(invite, folder) else load_grant(folder)
        return grant, fetch_manifest(identity, invite, grant, FETCH_TIMEOUT_S)
    except JoinError as error:
        raise _explained(error, identity, invite) from None


def _grant(identity: Identity, invite: Invite) -> bytes:
    match invite.grant:
        case None:
            return b""
        case Pass():
            return invite.grant.encode()
        case SharedInvite():
            return invite.grant.ticket(invite.swarm, identity.public_key).encode()


def _explained(error: JoinError, identity: Identity, invite: Invite) -> JoinError:
    ask = f"ask its founder to run `gossamer invite DIR --for {identity.node_id}`"
    lines = {
        "not_admitted": f"swarm {invite.name!r} does not admit node {identity.node_id}: {ask}",
        "invite_used": f"this invite to swarm {invite.name!r} is used up: {ask}",
        "invite_expired": f"this invite to swarm {invite.name!r} has expired: {ask}",
        "revoked": f"node {identity.node_id} was revoked by the owner of swarm {invite.name!r}",
        "invite_revoked": f"this invite to swarm {invite.name!r} was revoked: {ask}",
        GRAYLISTED: f"swarm {invite.name!r} does not admit node {identity.node_id}, {REMEDIES[GRAYLISTED]}",
        **{
            reason: f"the clocks of this machine and of the members of swarm {invite.name!r} differ by a day or more: "
            f"{REMEDIES[reason]}"
            for reason in (CLOCK_BEHIND, CLOCK_AHEAD)
        },
    }
    refusals = ", ".join(f"{endpoint} says {reason}" for endpoint, reason in error.refusals.items())
    by = f" ({refusals})" if refusals else ""
    return JoinError(lines.get(error.reason, str(error)) + by, error.reason, error.refusals)
