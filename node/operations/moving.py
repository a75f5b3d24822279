"""A node that moves to another swarm: a new folder with the key, the settings and the newest checkpoint of its old one.

A swarm with other rules is another swarm, and a folder belongs to one. The old folder stays as it was.

The new folder takes the key, what was set and what ran, the rows of past rounds and the newest whole checkpoint. It
leaves what belongs to the old swarm: manifest, grant, revocations, uses of invites, peers, replay buffer, seeds, a
group's weights and the scores of evaluations, which were of other questions.

The new folder is filled aside and renamed, so that a kill leaves all of it or nothing.
"""

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from node.config import NodeConfig, parse_config
from node.errors import UserError, for_shell
from node.operations.backup import scratch_folder
from node.state_folder import CONFIG_FILE, KEY_FILE, check_free, exclusive, full_disk_is_clear, recall
from node.swarm import founding
from node.swarm.averaging import STATE_FILE
from node.swarm.founding import load_manifest, split_of
from node.telemetry.metrics import older
from node.training.checkpoint import EVALUATION_FILE, list_checkpoints, whole_checkpoint
from protocol.credentials.invite import Invite
from protocol.storage import sync_folder, sync_tree

METRICS = Path("metrics.jsonl")
ROWS = (METRICS, older(METRICS))


def check_old(old: Path, folder: Path, invite: Invite) -> None:
    """Raise `UserError` where the node in `old` cannot move to the invite's swarm, into `folder`."""
    if not (old / CONFIG_FILE).exists() or not (old / KEY_FILE).exists():
        raise UserError(f"--from {old}: no node ran there, for it has no {CONFIG_FILE} or no {KEY_FILE}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} is there already: start its node with `gossamer node --state {for_shell(folder)}`, or name "
            "another --state"
        )
    check_free(old)  # two processes of one key push each other out
    manifest = load_manifest(old)
    if manifest is not None and manifest.hash == invite.manifest:
        raise UserError(
            f"the node in {old} is in swarm {manifest.name!r} already: `gossamer join INVITE --state {for_shell(old)}`"
        )


def join_from(invite: Invite, config: NodeConfig, old: Path, folder: Path, allowed: Collection[str] = ()) -> NodeConfig:
    """Make `folder` a node of the invite's swarm that goes on from the one in `old`; return what it is to run.

    `config` is settled with what `old` remembers. `check_old` was called. `allowed` names tasks as for `founding.join`.

    Raises:
        UserError: as `founding.join`; the new swarm holds questions out that the node has trained on; the checkpoint is
            damaged, or of another model; the disk is full.
        JoinError: as `founding.join`.
    """
    memory = recall(old)
    has_trained = bool(list_checkpoints(old / "checkpoints"))
    was = parse_config(memory.last).policy.model
    if has_trained and config.policy.model != was:
        raise UserError(f"the checkpoint in {old} is of model {was}: leave out --model, or join without --from")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}.joining"
    with exclusive(old), full_disk_is_clear(folder.parent), scratch_folder(aside) as scratch:
        shutil.copy2(old / KEY_FILE, scratch)
        shutil.copy2(old / CONFIG_FILE, scratch)  # the seed is in it
        without_seeds = _without_seeds(config, parse_config(memory.settings).network.seeds)
        joined = founding.join(invite, without_seeds, scratch, allowed)
        manifest = load_manifest(scratch)
        if has_trained and split_of(manifest) != split_of(load_manifest(old)):
            raise UserError(
                f"the node in {old} has trained on questions that swarm {invite.name!r} holds out for evaluation: join "
                "without --from, or ask its founder for a swarm with the old --held-out and --salt"
            )
        for name in ROWS:
            if (old / name).exists():
                shutil.copy2(old / name, scratch)
        if (checkpoint := whole_checkpoint(old / "checkpoints")) is not None:
            shutil.copytree(
                checkpoint.path,
                scratch / "checkpoints" / checkpoint.path.name,
                ignore=shutil.ignore_patterns(STATE_FILE, EVALUATION_FILE),
                copy_function=_link,
            )
        sync_tree(scratch)
        if folder.exists():
            folder.rmdir()
        scratch.rename(folder)
        sync_folder(folder.parent)
    return joined


def _without_seeds(config: NodeConfig, seeds: Sequence[str]) -> NodeConfig:
    """Return `config` without the old swarm's seeds."""
    kept = [seed for seed in config.network.seeds if seed not in seeds]
    return config.model_copy(update={"network": config.network.model_copy(update={"seeds": kept})})


def _link(source: str, target: str) -> None:
    """Link a checkpoint's file, which never changes; copy it to another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
