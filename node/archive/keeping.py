"""A relay that keeps what it hears: each group of a swarm that allows it, on a question that may be kept.

    item -> open_group (signature, the mark "not kept") -> GroupJudge.read (the question, held out or false) -> a file

Answers are not scored: who exports the archive scores them (`node.archive.rows`). So nobody's slow texts keep others
out. What is refused is counted by its reason. A false question is reported, as a node reports it.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import structlog

from node.archive.judging import GroupJudge
from node.archive.store import ArchivedGroup, ArchiveError, ArchiveWriter, check_allowed, open_group, open_writer
from node.config import TaskConfig
from node.errors import UserError
from node.rollouts.screening import BLAMELESS
from node.swarm.peering import Network
from node.swarm.reports import REPORTS_TOPIC
from protocol.host import Host, ItemVerdict, Received
from protocol.wire.envelope import ItemId

SAY_S = 60.0  # between two lines about progress

log = structlog.get_logger()

Take = Callable[[Sequence[Received]], None]


@contextmanager
def open_keeper(
    network: Network, out: Path, max_bytes: int, own: Sequence[TaskConfig] = (), allowed: Sequence[str] = ()
) -> Iterator[Take]:
    """Open the archive in `out` while the block lasts; yield what takes the items that come.

    Args:
        network: the keeper's own, which relays.
        out: the archive's folder.
        max_bytes: that the archive may have.
        own: what the owner of this machine says of the tasks, as for `GroupJudge`.
        allowed: tasks that are taken with all that the founder chose.

    Raises:
        UserError: there is no manifest, it allows no archives, or a task cannot be built here. The block raises it when
            the archive is full.
    """
    if network.manifest is None:
        raise UserError("an archive is of a swarm that was joined: give it an invite")
    check_allowed(network.manifest)
    judge = GroupJudge(network.manifest, own, allowed)
    with open_writer(out, network.manifest, max_bytes) as writer:
        keeper = Keeper(network.host, judge, writer)
        keeper.say()
        yield keeper.take
        keeper.say()


class Keeper:
    """Keeps those of the items that come which may be kept."""

    def __init__(self, host: Host, judge: GroupJudge, writer: ArchiveWriter) -> None:
        self._host = host
        self._judge = judge
        self._writer = writer
        self.refused: Counter[str] = Counter()
        self._said_at = time.monotonic()

    def take(self, items: Sequence[Received]) -> None:
        """Take the items that came, at most `relay.DRAIN`; called twice a second, also without any."""
        for archived in filter(None, map(self._open, items)):
            if reason := self._judge.read(archived).reason:
                self._refuse(archived.id, reason)
            elif reason := self._writer.keep(archived):
                self.refused[reason] += 1
        if time.monotonic() - self._said_at >= SAY_S:
            self.say()

    def say(self) -> None:
        """Tell the log what is kept."""
        self._said_at = time.monotonic()
        log.info("the archive", groups=len(self._writer), bytes=self._writer.bytes, refused=dict(self.refused))

    def _open(self, item: Received) -> ArchivedGroup | None:
        if item.topic == REPORTS_TOPIC or item.id in self._writer:
            return None
        try:
            return open_group(item.frame, self._writer.manifest)
        except ArchiveError as error:
            if error.reason == "not_kept":
                self.refused[error.reason] += 1
            else:
                self._refuse(item.id, error.reason)
            return None

    def _refuse(self, group_id: bytes, reason: str) -> None:
        self.refused[reason] += 1
        verdict = ItemVerdict.IGNORE if reason in BLAMELESS else ItemVerdict.REJECT
        self._host.judge(ItemId(group_id), verdict, reason)
