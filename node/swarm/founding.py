"""Founding a swarm: its manifest, and the folder of its first node."""

import time
from collections.abc import Sequence
from pathlib import Path

from node.config import NodeConfig
from node.errors import UserError, for_shell
from node.state_folder import KEY_FILE, exclusive, gone_if_new, keep_config, resolve_seed
from node.swarm.agreed_tasks import describe_tasks
from node.swarm.swarm_folder import check_split, load_manifest, save_manifest
from node.tasks.questions import DEFAULT_SPLIT, Split
from protocol.credentials.manifest import (
    MAX_NAME_BYTES,
    NAME,
    JoinPolicy,
    ManifestLimits,
    ManifestSplit,
    SwarmManifest,
    make_manifest,
)
from protocol.errors import ManifestError
from protocol.identity import Identity, NodeId


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
        check_split(folder, manifest)
        keep_config(config, resolve_seed(config, folder), folder)  # first, so that a folder with a key has settings
        if not key.exists():
            identity.save(key)
        save_manifest(folder, manifest)  # last, so that a folder with a manifest has all that it needs
        return manifest
