"""A swarm's manifest: its name, rules, tasks and limits, signed by the node that founded it.

    manifest = public key (32) | signature (64) | payload
    payload  = MessagePack [1, name, protocol version, created in ms, policy, node ids (20 each, joined),
                            [[task, its version, its config hash, its options as JSON], ...],
                            [group bytes, completions, item age in s, seconds between two reports of a node],
                            [millionths of all questions that are held out for evaluation, salt of that choice],
                            1 where archives may keep what is shared]

A manifest of an earlier release lacks the last elements; then the default split counts, and archives keep nothing. A
manifest of a swarm without reports lacks their seconds; then they are 0.

A swarm's id is a hash of the whole manifest. So a node that knows the id, or the hash in an invite, can take the
manifest from anybody, and nothing in it can change afterwards.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from protocol.errors import ManifestError
from protocol.identity import KEY_BYTES, NODE_ID_BYTES, Identity, NodeId, Verify, id_bytes, id_of_bytes, node_id, verify
from protocol.wire.encoding import is_uint, pack, unpack
from protocol.wire.envelope import HEADER_BYTES, MAX_ITEM_BYTES, SWARM_BYTES
from protocol.wire.messages import MAX_MANIFEST_BYTES
from protocol.wire.version import VERSION

FORMAT = 1
MAX_ALLOWED = 1024  # 20 KiB; larger swarms admit by invite
MAX_TASKS = 64
MAX_NAME_BYTES = 64
MAX_TASK_BYTES = 128
MAX_OPTIONS_BYTES = 2048
MAX_GROUP_BYTES = MAX_ITEM_BYTES
MAX_COMPLETIONS = 1024
MAX_ITEM_AGE_S = 24 * 3600
MIN_REPORTS_S, MAX_REPORTS_S = 60, 24 * 3600  # of a swarm that has reports
MAX_MILLIONTHS = 500_000  # half of all questions
_DOMAIN = b"gossamer/manifest/1\x00"
# A name is shown, written into invites and used for nothing else.
NAME = re.compile(rf"[A-Za-z0-9](?:[A-Za-z0-9._-]{{0,{MAX_NAME_BYTES - 1}}})")
_TASK = re.compile(rf"[A-Za-z0-9_](?:[A-Za-z0-9_./-]{{0,{MAX_TASK_BYTES - 1}}})")
_CONFIG = re.compile(r"[0-9a-f]{1,64}")


class JoinPolicy(StrEnum):
    """Who may join."""

    OPEN = "open"
    ALLOWLIST = "allowlist"


class ManifestTask(NamedTuple):
    """A task of the swarm. Its name, version and config hash identify it; `options` (JSON) build it."""

    name: str
    version: int
    config: str
    options: str


class ManifestLimits(NamedTuple):
    """The bounds of a shared group: its size, its number of completions, and its age.

    Each node sends a report once in `reports_s` seconds, unless that is 0.
    """

    max_group_bytes: int = 16 << 20  # as `Limits.max_item_bytes`
    max_completions: int = 128
    max_item_age_s: int = 3600
    reports_s: int = 0


DEFAULT_LIMITS = ManifestLimits()


class ManifestSplit(NamedTuple):
    """Which questions every node holds out for evaluation: how many millionths of all, by a hash with a salt."""

    millionths: int = 125_000
    salt: int = 0


DEFAULT_SPLIT = ManifestSplit()


@dataclass(frozen=True)
class SwarmManifest:
    """The manifest; `encoded` holds the exact bytes that its hash and the swarm's id are made from.

    `allowed` lists the nodes that a swarm with an allowlist admits without a grant. The founder, who signed, needs no
    place in it. `archive` says whether members may keep for good what is shared.
    """

    founder_key: bytes
    name: str
    protocol_version: int
    created_ms: int
    policy: JoinPolicy
    allowed: frozenset[NodeId]
    tasks: tuple[ManifestTask, ...]
    limits: ManifestLimits
    split: ManifestSplit
    archive: bool
    encoded: bytes

    @cached_property
    def hash(self) -> bytes:
        """SHA-256 of the encoded manifest, 32 bytes: what an invite holds."""
        return hashlib.sha256(self.encoded).digest()

    @property
    def swarm(self) -> bytes:
        """The swarm's id, 16 bytes."""
        return swarm_id(self.hash)

    @cached_property
    def founder(self) -> NodeId:
        """The id of the node that founded the swarm."""
        return node_id(self.founder_key)


def swarm_id(manifest_hash: bytes) -> bytes:
    """Return the id (16 bytes) of the swarm whose manifest has this hash."""
    return manifest_hash[:SWARM_BYTES]


def make_manifest(  # noqa: PLR0913  # one parameter for each part
    founder: Identity,
    name: str,
    created_ms: int,
    policy: JoinPolicy,
    tasks: Sequence[ManifestTask],
    allowed: Sequence[NodeId] = (),
    limits: ManifestLimits = DEFAULT_LIMITS,
    split: ManifestSplit = DEFAULT_SPLIT,
    *,
    archive: bool = False,
) -> SwarmManifest:
    """Sign a new manifest.

    Raises:
        ManifestError: a part is too large or not of its form; the message names it.
    """
    ids = b"".join(id_bytes(node) for node in dict.fromkeys(allowed))
    listed = [list(task) for task in tasks]
    bounds = list(limits if limits.reports_s else limits[:3])
    archives = [1] if archive else []
    payload = pack([FORMAT, name, VERSION, created_ms, str(policy), ids, listed, bounds, list(split), *archives])
    return open_manifest(founder.public_key + founder.sign(_DOMAIN + payload) + payload)


def open_manifest(data: bytes, check: Verify = verify) -> SwarmManifest:
    """Verify and decode a manifest; `check` verifies signatures.

    Raises:
        ManifestError: reason "oversized", "malformed" or "forged".
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError("oversized", f"a manifest has at most {MAX_MANIFEST_BYTES} bytes, this one {len(data)}")
    if len(data) <= HEADER_BYTES:
        raise ManifestError("malformed", f"{len(data)} bytes")
    public_key, signature, payload = data[:KEY_BYTES], data[KEY_BYTES:HEADER_BYTES], data[HEADER_BYTES:]
    if not check(public_key, signature, _DOMAIN + payload):
        raise ManifestError("forged", "manifest")
    fields = unpack(
        payload,
        8,
        error=ManifestError,
        max_bytes=MAX_ALLOWED * NODE_ID_BYTES,
        max_text=MAX_OPTIONS_BYTES,
        max_array=MAX_TASKS,
        optional=2,
    )
    form, name, version, created_ms, policy, ids, tasks, limits, *more = fields
    split = more[0] if more else list(DEFAULT_SPLIT)
    archive = more[1] if len(more) > 1 else 0
    _check(form == FORMAT, "format")
    _check(isinstance(name, str) and NAME.fullmatch(name) is not None, "name")
    _check(is_uint(version, 0xFFFF) and is_uint(created_ms), "integers")
    _check(policy in (JoinPolicy.OPEN.value, JoinPolicy.ALLOWLIST.value), "policy")
    _check(isinstance(ids, bytes) and len(ids) % NODE_ID_BYTES == 0, "node ids")
    _check(isinstance(tasks, list) and 0 < len(tasks) <= MAX_TASKS, "tasks")
    _check(is_uint(archive, 1), "archive")
    allowed = (id_of_bytes(ids[start : start + NODE_ID_BYTES]) for start in range(0, len(ids), NODE_ID_BYTES))
    opened = tuple(map(_task, tasks))
    _check(len({task[:3] for task in opened}) == len(opened), "a task twice")
    return SwarmManifest(
        public_key,
        name,
        version,
        created_ms,
        JoinPolicy(policy),
        frozenset(allowed),
        opened,
        _limits(limits),
        _split(split),
        archive == 1,
        data,
    )


def _task(fields: object) -> ManifestTask:
    if not isinstance(fields, list) or len(fields) < 4:
        raise ManifestError("malformed", "task")
    name, version, config, options = fields[:4]
    _check(isinstance(name, str) and _TASK.fullmatch(name) is not None, "task's name")
    _check(is_uint(version), "task's version")
    _check(isinstance(config, str) and _CONFIG.fullmatch(config) is not None, "task's configuration")
    _check(isinstance(options, str), "task's options")
    return ManifestTask(name, version, config, options)


def _limits(fields: object) -> ManifestLimits:
    if not isinstance(fields, list) or len(fields) < 3:
        raise ManifestError("malformed", "limits")
    bounds = (MAX_GROUP_BYTES, MAX_COMPLETIONS, MAX_ITEM_AGE_S)
    limits = fields[: len(bounds)]
    _check(all(is_uint(value, bound) and value > 0 for value, bound in zip(limits, bounds, strict=True)), "limits")
    reports_s = fields[len(bounds)] if len(fields) > len(bounds) else 0
    _check(is_uint(reports_s, MAX_REPORTS_S) and (reports_s == 0 or reports_s >= MIN_REPORTS_S), "reports")
    return ManifestLimits(*limits)._replace(reports_s=reports_s)


def _split(fields: object) -> ManifestSplit:
    if not isinstance(fields, list) or len(fields) < 2:
        raise ManifestError("malformed", "split")
    millionths, salt = fields[:2]
    _check(is_uint(millionths, MAX_MILLIONTHS) and millionths > 0 and is_uint(salt, 2**32 - 1), "split")
    return ManifestSplit(millionths, salt)


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise ManifestError("malformed", what)
