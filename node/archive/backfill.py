"""Back-fill: archived groups for the slots of a round that peers' groups leave empty.

The archive is a folder of this machine. Nothing of it travels: archived groups enter neither gossip nor the replay
buffer, and nobody is asked for them. Each is screened as a peer's is (`node.rollouts.screening`) before it is used.

Files are gone through in the order of their names, which are hashes, from a cursor on. Groups that were read and not
drawn wait for the next rounds. A group that was used or refused is remembered for good, by its question and texts, so
another signature on the same texts makes no further use of them. Once `MAX_DONE` are remembered, back-fill ends. It
also ends with the last file. A later start begins again at the first one if files were added meanwhile, and only then.

All of that is in each checkpoint, as it was when the checkpoint's last round was done: a round that is done again draws
the same.
"""

import json
import random
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from node.archive.store import Archive, ArchivedGroup, ArchiveError, is_in_place
from node.config import NodeConfig
from node.errors import UserError
from node.exchange.rounds import SwarmRounds
from node.rollouts.group import Group, GroupError
from node.rollouts.group_buffer import texts_id
from node.rollouts.rule import Candidate
from node.rollouts.screening import RefusedGroup, Screening, read
from node.tasks import derive_seed
from node.tasks.questions import question_id
from node.tasks.task_set import TaskSet
from protocol.storage import read_bounded, write_atomically

STATE_FILE = "backfill.json"
MAX_DONE = 1 << 16  # groups: 3 MB in a checkpoint
READ_PER_SLOT = 4  # groups that a round reads anew for each empty slot: a rule leaves out those with equal rewards
LOOKED_AT = 64  # files that a round opens at most, for each of these groups
WAITING_PER_SLOT = 16  # groups that wait; older ones are passed over until the archive is gone through again
MAX_STATE_BYTES = 64 << 20

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _State:
    """The manifest's hash, the name of the last file that was read, names of groups that wait, ids of texts that are
    used up or refused; all in hex. `files` is how many files the archive had.
    """

    manifest: str
    files: int
    cursor: str = ""
    waiting: tuple[str, ...] = ()
    done: tuple[str, ...] = ()


class Backfill:
    """Draws from an archive; one thread owns it.

    Args:
        archive: to draw from.
        tasks: those that this node verifies.
    """

    def __init__(self, archive: Archive, tasks: TaskSet) -> None:
        self._archive = archive
        self._tasks = tasks
        self._files = {path.name: path for path in archive.files() if is_in_place(path)}
        self._names = sorted(self._files)
        self._cursor = ""
        self._waiting: dict[str, Candidate] = {}  # groups themselves stay on the disk: one may have 16 MiB
        self._done: dict[str, None] = {}
        self._has_ended = False
        self._committed = self._state()
        self.skipped: Counter[str] = Counter()  # files by why they are of no use

    def resume(self, checkpoint: Path | None) -> None:
        """Go on from what `save` added to a checkpoint; from the beginning without one.

        Raises:
            UserError: what is there cannot be read.
        """
        state = _load(checkpoint / STATE_FILE) if checkpoint is not None else None
        if state is not None:
            self._done = dict.fromkeys(state.done)
            if state.manifest == self._archive.manifest.hash.hex():
                self._cursor = state.cursor
                for name in state.waiting:
                    self._read(name)
                if state.files != len(self._names):
                    self._cursor = ""
        self.commit()

    def save(self, checkpoint: Path) -> None:
        """Add to a checkpoint where the last whole round left off."""
        tree = {name: getattr(self._committed, name) for name in _State.__slots__}
        write_atomically(checkpoint / STATE_FILE, json.dumps(tree).encode())

    def commit(self) -> None:
        """Note that a round is whole: `save` tells of it from now on."""
        self._committed = self._state()

    def fill(
        self, swarm: SwarmRounds, peers: Screening, round_number: int, slots: int, seconds: float
    ) -> Screening | None:
        """Return the screening of archived groups for the `slots` that `peers` leave, their uses recorded.

        None without an empty slot. It waits for verdicts for `seconds` at most.
        """
        if slots <= 0:
            return None
        candidates = peers.left(self.candidates(slots, swarm.buffer.is_used_up))
        signers = {candidate.peer for candidate in candidates}
        rng = random.Random(derive_seed(swarm.seed, "backfill", round_number - 1))
        context = replace(swarm.context, read=self.read)
        screening = Screening(context, peers.rule, replace(peers.asked, count=slots, rng=rng), len(signers))
        screening.revoked = frozenset(swarm.exchange.revoked(signers))
        screening.fill(candidates, swarm.buffer.own_results, seconds)
        self.settle(screening.used, screening.refused, screening.liars)
        swarm.buffer.use(screening.used, round_number, time.time())
        return screening

    def candidates(self, slots: int, is_used_up: Callable[[bytes], bool]) -> list[Candidate]:
        """Return the groups that a round with so many empty slots may draw, at most one for each question.

        `is_used_up` tells of texts, by their id, whether they were drawn from a peer.
        """
        if len(self._done) < MAX_DONE:
            self._read_on(READ_PER_SLOT * slots)
        elif not self._has_ended:
            self._end("as many groups as can be remembered were used or refused")
        for name in list(self._waiting)[: max(0, len(self._waiting) - WAITING_PER_SLOT * slots)]:
            del self._waiting[name]
        drawable: dict[bytes, Candidate] = {}
        for candidate in self._waiting.values() if len(self._done) < MAX_DONE else ():
            if not is_used_up(candidate.texts):
                drawable.setdefault(candidate.question, candidate)
        return list(drawable.values())

    def read(self, ids: Iterable[bytes]) -> Mapping[bytes, Group]:
        """Return the groups with these ids that wait here, from the disk."""
        groups: dict[bytes, Group] = {}
        for group_id in ids:
            name = group_id.hex()
            if name not in self._waiting:
                continue
            try:
                groups[group_id] = self._archive.read(self._files[name]).group
            except ArchiveError as error:  # it was damaged since
                self.skipped[error.reason] += 1
                del self._waiting[name]
        return groups

    def settle(self, used: Sequence[Candidate], refused: Sequence[RefusedGroup], liars: Collection[str] = ()) -> None:
        """Remember for good what a round used and what it refused, and the groups of liars that wait."""
        names = {candidate.id.hex() for candidate in used} | {group.id.hex() for group in refused}
        names |= {name for name, candidate in self._waiting.items() if candidate.peer in liars}
        for name in [name for name in self._waiting if name in names]:
            self._done[self._waiting.pop(name).texts.hex()] = None

    def _read_on(self, count: int) -> None:
        before, first = len(self._waiting), bisect_right(self._names, self._cursor)
        for name in self._names[first : first + LOOKED_AT * count]:
            if len(self._waiting) - before == count:
                return
            self._cursor = name
            self._read(name)
        if not self._is_more() and not self._has_ended:
            self._end("the archive is gone through")

    def _is_more(self) -> bool:
        """Tell whether there are files behind the cursor."""
        return bool(self._names) and self._names[-1] > self._cursor

    def _end(self, why: str) -> None:
        self._has_ended = True
        log.info("back-fill reads no more", why=why, done=len(self._done), skipped=dict(self.skipped))

    def _read(self, name: str) -> None:
        """Let the group in a file wait, if it is of use."""
        if name in self._waiting:
            return
        try:
            archived = self._archive.read(self._files[name])
            limits = self._archive.manifest.limits
            read(archived.body, self._tasks, limits.max_completions, limits.max_group_bytes)
        except (KeyError, ArchiveError, GroupError) as error:
            self.skipped["missing" if isinstance(error, KeyError) else error.reason] += 1
            return
        candidate = _candidate(archived)
        waiting = self._waiting.values()
        if candidate.texts.hex() in self._done or any(other.texts == candidate.texts for other in waiting):
            self.skipped["same_texts"] += 1
            return
        self._waiting[name] = candidate

    def _state(self) -> _State:
        manifest, files = self._archive.manifest.hash.hex(), len(self._names)
        return _State(manifest, files, self._cursor, tuple(self._waiting), tuple(self._done))


class NoBackfill:
    """Draws nothing; a start without an archive takes the state of an earlier one from checkpoint to checkpoint."""

    def __init__(self) -> None:
        self._state = b""

    def resume(self, checkpoint: Path | None) -> None:
        """Keep what an earlier start added to a checkpoint."""
        self._state = b"" if checkpoint is None else read_bounded(checkpoint / STATE_FILE, MAX_STATE_BYTES)

    def save(self, checkpoint: Path) -> None:
        """Add it to the next one."""
        if self._state:
            write_atomically(checkpoint / STATE_FILE, self._state)

    def commit(self) -> None:
        """Do nothing."""

    def fill(self, swarm: SwarmRounds, peers: Screening, round_number: int, slots: int, seconds: float) -> None:
        """Do nothing."""


def open_backfill(folder: Path, config: NodeConfig, tasks: TaskSet) -> Backfill:
    """Open the archive in `folder` for the rounds of a node.

    Raises:
        UserError: it is no archive, or the node cannot draw from one.
    """
    if config.sampling.external == 0 or config.sampling.source != "peers":
        raise UserError("--backfill fills the slots of peers' groups: it needs sampling.external and source = 'peers'")
    return Backfill(Archive(folder), tasks)


def _candidate(archived: ArchivedGroup) -> Candidate:
    group, name = archived.group, archived.group.task.name
    question = question_id(name, group.question)
    return Candidate(archived.id, archived.signer, name, question, texts_id(group), 0.0, 0, group.rewards)


def _load(path: Path) -> _State | None:
    data = read_bounded(path, MAX_STATE_BYTES)
    if not data:
        return None
    try:
        tree: Mapping[str, Any] = json.loads(data)
        files, cursor = int(tree["files"]), str(tree["cursor"])
        return _State(str(tree["manifest"]), files, cursor, tuple(tree["waiting"]), tuple(tree["done"]))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: delete it; archived groups may be used again") from None
