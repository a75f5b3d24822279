"""Founding a swarm, inviting to it, joining it: what changes in a node's folder before the node runs.

A node's folder holds the swarm that it founded or joined.

manifest.bin   the swarm's signed manifest
grant.bin      what admits this node to it; missing in open swarms and for nodes that are listed
revocations.bin  what the swarm's owner has revoked, and to whom the swarm was handed over; missing if neither
uses.bin       which numbers of which invites are used, as far as this node admitted or met their holders
"""

import json
import random
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from pydantic import ValidationError

from node.config import FILE_OPTIONS, HUB_OPTIONS, NodeConfig, TaskConfig, is_file_task, parse_config
from node.errors import UserError, for_shell
from node.state_folder import KEY_FILE, exclusive, gone_if_new, keep_config, recall, resolve_seed
from node.tasks import Task, TaskKey, founder_may_choose, has_own_code, kind_of, load_tasks, own_options
from node.tasks.questions import DEFAULT_SPLIT, Split
from node.tasks.task_set import TaskSet
from node.tasks.third_party import installed
from protocol.credentials.grants import REFUSALS, Gatekeeper, Pass, Ticket, Use, make_pass, open_grant, revocable_id
from protocol.credentials.invite import MAX_SEEDS, Invite, SharedInvite, make_shared_invite
from protocol.credentials.manifest import (
    MAX_NAME_BYTES,
    NAME,
    JoinPolicy,
    ManifestLimits,
    ManifestSplit,
    ManifestTask,
    SwarmManifest,
    make_manifest,
    open_manifest,
)
from protocol.credentials.records import MAX_GRANT_BYTES, Address, Endpoint, saved_records
from protocol.credentials.revocations import (
    MAX_HANDOVERS,
    MAX_REVOKED,
    Handover,
    RevocationList,
    make_handover,
    make_revocations,
    open_revocations,
)
from protocol.errors import GrantError, JoinError, ManifestError, RevocationError
from protocol.identity import Identity, NodeId, id_bytes, node_id
from protocol.joiner import FetchedManifest, fetch_manifest
from protocol.limits.networks import Scope, netgroup, scope_of
from protocol.notices import CLOCK_AHEAD, CLOCK_BEHIND, GRAYLISTED, REMEDIES
from protocol.storage import load_peers, read_bounded, write_atomically
from protocol.wire.messages import MAX_MANIFEST_BYTES, MAX_REVOCATIONS_BYTES

FETCH_TIMEOUT_S = 30.0  # a retried handshake or two over a slow line
MAX_TICKETS = 32  # numbers of an invite that are tried: even where nine in ten are used, one of 32 is free (97 %)
MAX_INVITE_PEERS = 3  # beside an invite's own node, in case it is gone

log = structlog.get_logger()


def found(
    config: NodeConfig,
    folder: Path,
    name: str,
    policy: JoinPolicy,
    allowed: Sequence[NodeId],
    split: Split = DEFAULT_SPLIT,
    *,
    reports_s: int = 0,
    archive: bool = False,
) -> SwarmManifest:
    """Make `folder` the first node of a new swarm with the configuration's tasks; it runs `config` from now on.

    `split` says which questions every node holds out for evaluation. Each node reports every `reports_s` seconds; 0:
    never. `archive` says whether members may keep for good what is shared.

    Raises:
        UserError: the folder belongs to a swarm already, its node has trained under another split, or what was asked
            for fits no manifest.
        IdentityError: the folder's key cannot be used.
    """
    if not NAME.fullmatch(name):
        raise UserError(
            f"{name!r:.80} is no name of a swarm: a name begins with a letter or digit, and has no more than "
            f"{MAX_NAME_BYTES} letters without accents, digits, '.', '_' and '-'"
        )
    if allowed and policy is JoinPolicy.OPEN:
        raise UserError("an open swarm admits everybody: leave out --allow, or use --policy allowlist")
    limits = ManifestLimits(
        max_completions=4 * config.sampling.completions,
        max_item_age_s=max(1, int(config.buffer.max_age)),
        reports_s=reports_s,
    )
    tasks = describe_tasks(config.tasks)
    with gone_if_new(folder), exclusive(folder):
        if (known := load_manifest(folder)) is not None:
            raise UserError(
                f"{folder} belongs to swarm {known.name!r} already: run `gossamer node --state {for_shell(folder)}`, "
                "or choose another --state"
            )
        key = folder / KEY_FILE
        identity = Identity.load(key) if key.exists() else Identity.generate()
        try:
            apart = ManifestSplit(round(split.share * 1e6), split.salt)
            manifest = make_manifest(
                identity, name, int(time.time() * 1000), policy, tasks, allowed, limits, apart, archive=archive
            )
        except ManifestError as error:
            raise UserError(f"cannot make a manifest ({error}): use fewer tasks, or shorter options") from None
        _check_split(folder, manifest)
        keep_config(config, resolve_seed(config, folder), folder)  # first, so that a folder with a key has settings
        if not key.exists():
            identity.save(key)
        save_manifest(folder, manifest)  # last, so that a folder with a manifest has all that it needs
        return manifest


def _check_split(folder: Path, manifest: SwarmManifest) -> None:
    """Raise `UserError` where the node in `folder`, until now in no swarm, has trained on what the swarm holds out."""
    if split_of(manifest) != DEFAULT_SPLIT and any((folder / "checkpoints").glob("checkpoint-*")):
        raise UserError(
            f"the node in {folder} has trained on questions that swarm {manifest.name!r} holds out for evaluation: "
            "choose a new folder (with this one's identity.key in it, if your invite is spent)"
        )


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
    manifest = _manifest_of(folder)
    known = dict.fromkeys([*(seeds or own or _own_address(folder)), *_peers(folder, manifest)[:MAX_INVITE_PEERS]])
    if not known:
        raise UserError(
            f"no address of this node is known: start it (`gossamer node --state {for_shell(folder)} --listen ...`), "
            "and ask again when it says `listening`; or name a seed with --seed"
        )
    return Invite(manifest.name, manifest.hash, tuple(known)[:MAX_SEEDS], grant)


def check_open(folder: Path) -> None:
    """Raise `UserError` where an invite without a grant admits nobody."""
    manifest = _manifest_of(folder)
    if manifest.policy is not JoinPolicy.OPEN:
        raise UserError(
            f"swarm {manifest.name!r} has an allowlist, so this invite would admit nobody: add --uses N or "
            "--for NODE_ID as its owner, or --plain if it is for a node that is listed or holds a grant"
        )


def reach(invite: Invite) -> Scope:
    """Return how far away a seed of the invite can be dialled from, by its address."""
    return max(scope_of(seed.endpoint.host) for seed in invite.seeds)


def pass_for(folder: Path, node: NodeId, lifetime_s: float) -> Pass:
    """Return a pass for `node`, signed by the founder, whose folder this must be."""
    manifest, founder = _granter_of(folder)
    return make_pass(founder, manifest.swarm, node, _expiry(lifetime_s))


def shared_invite(folder: Path, uses: int, lifetime_s: float) -> SharedInvite:
    """Return an invite for `uses` nodes, signed by the founder, whose folder this must be."""
    manifest, founder = _granter_of(folder)
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


def revoke(folder: Path, ids: Iterable[NodeId], *, undo: bool = False) -> RevocationList:
    """Revoke nodes, invites and passes by their ids, or with `undo` let them count again; return the new list.

    Raises:
        UserError: the folder is not that of the swarm's owner, or the list would be too long.
    """
    manifest, owner, gate = _owner_of(folder)
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
    manifest, owner, gate = _owner_of(folder)
    if successor in gate.owners:
        raise UserError(f"{node_id(successor)} owns or owned swarm {manifest.name!r} already: choose another key")
    before = _list_of(gate, manifest)
    chain = (*before.handovers, make_handover(owner, manifest, len(before.handovers), successor))
    return _sign_list(folder, manifest, owner, before.revoked, 0, chain)


def revoked_in(folder: Path) -> frozenset[NodeId]:
    """Return the ids that the swarm's owner has revoked, as far as the node in `folder` knows."""
    manifest = _manifest_of(folder)
    return _list_of(load_gate(folder, manifest), manifest).revoked


def _granter_of(folder: Path) -> tuple[SwarmManifest, Identity]:
    manifest, owner, _ = _owner_of(folder)
    if manifest.policy is JoinPolicy.OPEN:
        raise UserError(f"swarm {manifest.name!r} is open: an invite needs neither --for nor --uses")
    return manifest, owner


def _owner_of(folder: Path) -> tuple[SwarmManifest, Identity, Gatekeeper]:
    manifest = _manifest_of(folder)
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
        made = make_revocations(owner, manifest, revoked, sequence, handovers)
    except RevocationError as error:
        raise UserError(
            f"cannot make a revocation list ({error}): it holds at most {MAX_REVOKED} ids (--undo removes some) and "
            f"{MAX_HANDOVERS} owners after the founder"
        ) from None
    save_revocations(folder, made.encoded)
    return made


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
            raise UserError(f"{folder} belongs to another swarm, {manifest.name!r}: choose another --out")
        if manifest is None:
            fetched = _fetch(identity, invite, folder)
            _check_split(folder, fetched.manifest)
            manifest = fetched.manifest
            _keep_rights(folder, fetched)
            if manifest.name != invite.name:  # which anybody can write into the line
                raise UserError(
                    f"the invite is to swarm {manifest.name!r}, and not to {invite.name!r} as it says: if that is the "
                    "swarm you want, put its name into the line"
                )
        elif _needs_grant(invite, folder):
            try:
                _keep_rights(folder, _fetch(identity, invite, folder))
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


def _keep_rights(folder: Path, fetched: FetchedManifest) -> None:
    """Keep what admits the node, and whom the swarm's owner has revoked."""
    if fetched.revocations and load_gate(folder, fetched.manifest).obey(fetched.revocations):
        save_revocations(folder, fetched.revocations)
    save_grant(folder, fetched.grant)


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


def _fetch(identity: Identity, invite: Invite, folder: Path) -> FetchedManifest:
    log.info("asking for the manifest", swarm=invite.name, seeds=[str(seed.endpoint) for seed in invite.seeds])
    try:
        grants = _grants(identity, invite) if _needs_grant(invite, folder) else [load_grant(folder)]
        return fetch_manifest(identity, invite, grants, FETCH_TIMEOUT_S)
    except JoinError as error:
        raise _explained(error, identity, invite) from None


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
        "revoked": f"node {identity.node_id} was revoked by the owner of swarm {invite.name!r}",
        "invite_revoked": f"this invite to swarm {invite.name!r} was revoked: {ask}",
        GRAYLISTED: f"swarm {invite.name!r} does not admit node {identity.node_id}, {REMEDIES[GRAYLISTED]}",
        **{
            reason: f"the clocks of this machine and of the members of swarm {invite.name!r} differ by a day or more: "
            f"{REMEDIES[reason]}"
            for reason in (CLOCK_BEHIND, CLOCK_AHEAD)
        },
    }
    said = ", ".join(f"{endpoint} says {reason}" for endpoint, reason in error.refusals.items())
    by = f" ({said})" if said else ""
    return JoinError(lines.get(error.reason, str(error)) + by, error.reason, error.refusals)


MANIFEST_FILE = "manifest.bin"
GRANT_FILE = "grant.bin"
REVOCATIONS_FILE = "revocations.bin"
USES_FILE = "uses.bin"
PROMPTING = "prompting"  # among a manifest's options: how the task is asked and read, whatever its kind


def load_manifest(folder: Path) -> SwarmManifest | None:
    """Return the manifest in `folder`, None if it belongs to no swarm; `UserError` for a damaged one."""
    data = _read(folder / MANIFEST_FILE, MAX_MANIFEST_BYTES)
    if data is None:
        return None
    try:
        return open_manifest(data)
    except ManifestError as error:
        raise UserError(
            f"{folder / MANIFEST_FILE} is damaged ({error}): copy it from another node of the swarm, "
            "or delete it and join the swarm again with an invite"
        ) from None


def split_of(manifest: SwarmManifest | None) -> Split:
    """Return which questions a swarm holds out for evaluation; the default if it has no manifest."""
    return DEFAULT_SPLIT if manifest is None else Split(manifest.split.millionths / 1e6, manifest.split.salt)


def lasting(manifest: SwarmManifest) -> str:
    """Return what a member of a swarm that allows archives is told before it shares anything."""
    return f"what is shared in swarm {manifest.name!r} is public and lasting: its manifest lets archives keep it"


def save_manifest(folder: Path, manifest: SwarmManifest) -> None:
    """Make `folder` the folder of a node in the manifest's swarm."""
    write_atomically(folder / MANIFEST_FILE, manifest.encoded)


def load_grant(folder: Path) -> bytes:
    """Return the node's grant, empty if it has none; its peers decide whether it counts."""
    return _read(folder / GRANT_FILE, MAX_GRANT_BYTES) or b""


def save_grant(folder: Path, grant: bytes) -> None:
    """Keep what admits the node; an empty grant never replaces another."""
    if grant:
        write_atomically(folder / GRANT_FILE, grant)


def load_gate(folder: Path, manifest: SwarmManifest, uses: Iterable[Use] = ()) -> Gatekeeper:
    """Return who may be in the swarm, as far as the node in `folder` knows; `uses` are those of invites."""
    gate = Gatekeeper(manifest, uses, keeps=True)
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


def describe_tasks(configs: Sequence[TaskConfig]) -> list[ManifestTask]:
    """Return the manifest's entries for the tasks that `configs` name, each built once to learn its key."""
    described = []
    for config in configs:
        for task in load_tasks([config]).tasks:
            name = _name_to_build_by(config, task)
            options = {} if has_own_code(name) else _without(config.options, own_options(name))
            if is_file_task(name):
                for option in FILE_OPTIONS:
                    options.pop(option, None)  # paths of this machine concern nobody else
            if PROMPTING in options:
                raise UserError(f"task {name!r}: an option of a swarm's task cannot be called {PROMPTING!r}")
            if config.prompting:
                options[PROMPTING] = config.prompting
            described.append(ManifestTask(name, task.key.version, task.key.config, _canonical(name, options)))
    return described


def _without(options: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {option: value for option, value in options.items() if option not in names}


def _name_to_build_by(config: TaskConfig, task: Task) -> str:
    # "builtin" stands for seven tasks, each of which can be built by its own name.
    if config.name not in ("builtin", task.key.name):
        raise UserError(f"task {config.name!r} calls itself {task.key.name!r}: a swarm's task goes by one name")
    return task.key.name


def _canonical(name: str, options: Mapping[str, Any]) -> str:
    try:
        return json.dumps(options, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"task {name!r}: its options cannot be written into a manifest: {error}") from None


class WordNeededError(UserError):
    """A swarm's task does what only the owner of this machine may decide."""


def adopt_tasks(manifest: SwarmManifest, own: Sequence[TaskConfig], allowed: Collection[str] = ()) -> list[TaskConfig]:
    """Return the configuration of the manifest's tasks on this machine.

    A task of the same name in `own` decides its weight, how this node asks its own model (examples, instruction) and
    where its files are. All else comes from the manifest, as far as a founder may choose it (`node.tasks.choices`). Any
    other option has to be the same in `own`, unless the task's name is among `allowed`.

    Raises:
        WordNeededError: a task needs the word of this machine's owner; the text has what it is and what to do.
        UserError: this machine cannot build a task, or builds it differently; or no task has an allowed name.
    """
    names = {task.name for task in manifest.tasks}
    if unknown := set(allowed) - names:
        raise UserError(f"swarm {manifest.name!r} has no task {min(unknown)!r}: it has {', '.join(sorted(names))}")
    plans = [_plan(task, own, allowed) for task in manifest.tasks]
    if lacking := [plan.lacks for plan in plans if plan.lacks]:
        raise WordNeededError("; ".join(lacking))
    for task in manifest.tasks:
        if task.name in allowed:
            log.warning("this task of the swarm runs by your word", task=task.name, what=_described(task))
    return [_first_that_is(task, plan.candidates) for task, plan in zip(manifest.tasks, plans, strict=True)]


def words_needed(manifest: SwarmManifest) -> list[str]:
    """Return what a joiner whose configuration lists no task is told to decide itself, a line for each task."""
    return [plan.lacks for plan in (_plan(task, (), ()) for task in manifest.tasks) if plan.lacks]


class _Plan(NamedTuple):
    """The configurations that may build a manifest's task here; without any, what this machine's owner has to say."""

    candidates: Sequence[TaskConfig] = ()
    lacks: str = ""


def _plan(task: ManifestTask, own: Sequence[TaskConfig], allowed: Collection[str]) -> _Plan:
    named = [config for config in own if config.name == task.name]
    kind = kind_of(task.name)
    if kind and kind.own_code and not named:
        return _Plan(
            lacks=f"the swarm's task {task.name!r} needs rows and {kind.own_code} of yours: list the task under "
            f"[[tasks]] of your CONFIG with the options path and {kind.code_option}, the same as its founder's"
        )
    if is_file_task(task.name) and (files := [config for config in named if "path" in config.options]):
        named = files
    elif is_file_task(task.name) and not has_own_code(task.name) and "hub" not in _options(task):
        return _Plan(
            lacks=f"the swarm's task {task.name!r} needs a file of yours: list the task under [[tasks]] of your CONFIG "
            "with the option path"
        )
    candidates = [(_merged(task, mine), mine) for mine in named or [TaskConfig(name=task.name)]]
    if task.name in allowed or (kind is None and task.name not in installed()):  # what is not here cannot run
        return _Plan([merged for merged, _ in candidates])
    within = [merged for merged, mine in candidates if not _chosen_by_founder(merged, mine)]
    if within and (named or not _code_of(task.name)):
        return _Plan(within)
    return _Plan(
        lacks=f"the swarm's task {task.name!r} {_described(task)}: if you want that on this machine, join with "
        f"--allow-task {task.name}, or list the task with these options under [[tasks]] of your CONFIG"
    )


def _chosen_by_founder(merged: TaskConfig, mine: TaskConfig) -> list[str]:
    """Return the options that neither a founder may choose nor this node has listed with the same value."""
    return [
        option
        for option, value in merged.options.items()
        if not (option in mine.options and mine.options[option] == value)
        and not founder_may_choose(merged.name, option, value)
    ]


def _code_of(name: str) -> str:
    """Return which installed package's code a task of this name would run; empty for code of this release alone."""
    kind = kind_of(name)
    if kind is not None:
        return "of an installed package" if kind.package_code else ""
    point = installed().get(name)
    return f"of the package {point.dist.name if point.dist else '?'} ({point.value})" if point else ""


def _described(task: ManifestTask) -> str:
    """Say what a task would do here, for a person to judge."""
    options = {option: value for option, value in _options(task).items() if option != PROMPTING}
    written = json.dumps(options, sort_keys=True).replace("\x7f", "\\u007f")  # JSON escapes the others
    code = _code_of(task.name)
    does = f"runs code {code}" if code else f"is of the kind {task.name.partition('/')[0]!r}"
    return f"{does} with its founder's options {written}"


def _first_that_is(task: ManifestTask, candidates: Sequence[TaskConfig]) -> TaskConfig:
    """Return the first configuration that builds this very task."""
    for config in candidates[:-1]:
        if _is_same(task, load_tasks([config])):
            return config
    _check_key(task, load_tasks(candidates[-1:]))
    return candidates[-1]


def _merged(task: ManifestTask, mine: TaskConfig) -> TaskConfig:
    own = own_options(task.name)
    options = _without(_options(task), own)
    prompting = options.pop(PROMPTING, {})
    if has_own_code(task.name):  # no founder chooses what runs here
        options = dict(mine.options)
    elif is_file_task(task.name):
        ours = "path" in mine.options
        for option in (*FILE_OPTIONS, *(HUB_OPTIONS if ours else ())):
            options.pop(option, None)  # no founder chooses our files
        if ours:  # our files: we say what they hold, and in which columns
            options |= mine.options
    options |= {option: mine.options[option] for option in own & mine.options.keys()}
    asked = mine.model_dump(include={"examples", "instruction"}, exclude_unset=True)
    try:  # a founder who sets another field too, such as whose code to run, makes this a TypeError
        return TaskConfig(name=task.name, weight=mine.weight, options=options, **(prompting | asked))
    except (TypeError, ValidationError):
        raise _unreadable(task) from None


def _options(task: ManifestTask) -> dict[str, Any]:
    try:
        options = json.loads(task.options)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise _unreadable(task)
    return options


def _unreadable(task: ManifestTask) -> UserError:
    return UserError(f"the swarm's task {task.name!r} has options that cannot be read: its founder must found it anew")


def _is_same(task: ManifestTask, built: TaskSet) -> bool:
    return built.get(TaskKey(task.name, task.version, task.config)) is not None


def _check_key(task: ManifestTask, built: TaskSet) -> None:
    if _is_same(task, built):
        return
    here = built.tasks[0].key
    if here.version != task.version:
        raise UserError(
            f"task {task.name!r} has version {task.version} in the swarm and {here.version} here: "
            "install the release of gossamer that the swarm's founder runs"
        )
    raise UserError(
        f"task {task.name!r} version {task.version} has another configuration here ({here.config}) than in the swarm "
        f"({task.config}): install the release of what provides it, or get the file, that the swarm's founder has"
    )


def earlier_versions(manifest: SwarmManifest, tasks: TaskSet) -> dict[TaskKey, int]:
    """Return those tasks here that the swarm has in an earlier version, and that version."""
    return {
        task.key: then.version
        for task in tasks.tasks
        for then in manifest.tasks
        if then.version < task.key.version and TaskKey(*then[:3]) == task.key._replace(version=then.version)
    }


def check_rules(manifest: SwarmManifest, tasks: TaskSet, completions: int) -> None:
    """Raise `UserError` when no peer would take what the node makes: another task, or too many completions a group."""
    if completions > manifest.limits.max_completions:
        raise UserError(
            f"sampling.completions={completions} is more than swarm {manifest.name!r} allows in a group: "
            f"set it to at most {manifest.limits.max_completions}"
        )
    known, earlier = {TaskKey(*task[:3]) for task in manifest.tasks}, earlier_versions(manifest, tasks)
    for task in tasks.tasks:
        if task.key in earlier:
            log.warning(
                "the swarm was founded by an earlier release: nodes that still run it share nothing with this one",
                task=task.key.name,
                version=earlier[task.key],
                here=task.key.version,
            )
        elif task.key not in known:
            raise UserError(
                f"task {task.key.name!r} (version {task.key.version}, configuration {task.key.config}) is none of "
                f"swarm {manifest.name!r}: start with the tasks it was joined with, or in another folder"
            )
