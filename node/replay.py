"""Do a node's rounds again, from its record alone (`node.journal`), and compare.

The loop itself runs again. Questions are drawn from the seed, rewards are computed, and every item that a peer sent is
read. The draw is made and verified from a group buffer that began as the node's did. Only what came from outside is
taken from the record: the episodes that were played, peers' bytes, the clock, and what was unscorable. No weight is
used.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from node.config import NodeConfig, parse_config
from node.engines import Generated, SamplingParams
from node.engines.episodes import Episodes, Groups, Played
from node.errors import UserError, for_shell
from node.journal import JOURNAL_FILE, Round, Start, digest_of_draw, digest_of_verdicts, read_journal, verdicts
from node.loop import Loop
from node.policy.load import Policy, load_policy
from node.rollouts.group import Group, encode
from node.rollouts.group_buffer import GroupBuffer, ReceivedGroup
from node.rollouts.rule import Sample
from node.rollouts.screening import ReadGroup, RefusedGroup
from node.swarm.sharing import GroupReader, NoExchange
from node.tasks import load_tasks
from node.tasks.scoring.verdicts import LATE, MaybeLate
from node.tasks.task_set import TaskSet
from node.telemetry.metrics_file import MetricsLog
from node.training.checkpoint import latest_checkpoint

FOREVER_S = 1e9  # scoring takes as long as it takes: nobody waits for a replay's rounds


class Compared(NamedTuple):
    """A round that was done again, and what came out otherwise than recorded: empty if nothing did."""

    number: int
    difference: str


def replay(folder: Path) -> Iterator[Compared]:
    """Do the rounds that the node in `folder` has recorded again, in their order.

    Raises:
        UserError: there is no record, it is damaged, or the node's tasks or model cannot be loaded here.
    """
    section: list[Round] = []
    start: Start | None = None
    newest = latest_checkpoint(folder / "checkpoints")
    checkpoint = newest.path if newest else None
    for entry in _entries(folder):
        if isinstance(entry, Round):
            section.append(entry)
            continue
        if start is not None:
            yield from _again(start, section, checkpoint)
        start, section = entry, []
    if start is None:
        raise UserError(
            f"no round of this version was recorded in {folder}: `gossamer node --state {for_shell(folder)} --journal` "
            f"trains on and records each round in {JOURNAL_FILE}"
        )
    yield from _again(start, section, checkpoint)


def _entries(folder: Path) -> Iterator[Start | Round]:
    try:
        yield from read_journal(folder)
    except ValueError as error:
        raise UserError(f"the record in {folder} cannot be read: {error}") from None


def _again(start: Start, rounds: Sequence[Round], checkpoint: Path | None) -> Iterator[Compared]:
    """Do again `rounds`, which the node did from `start` on; `checkpoint` is of the same policy, whatever the round."""
    if not rounds:
        return
    try:
        config = parse_config(start.config)
    except UserError as error:
        raise UserError(f"the record was made with settings of another version ({error})") from None
    policy = load_policy(config.policy.model_copy(update={"device": "cpu"}), bf16=False, checkpoint=checkpoint)
    tasks = load_tasks(config.tasks, start.split)
    with ExitStack() as stack:
        uses, life = config.sampling.max_uses, start.limits.life
        buffer = stack.enter_context(GroupBuffer(Path(":memory:"), config.buffer, uses, life))
        buffer.restore(start.buffer)
        again = _Again()
        done = _loop(config, start, policy, tasks, buffer, again).rounds(start.done)
        for recorded in rounds:
            again.now_comes(recorded)
            try:
                next(done)
            except (StopIteration, UserError, LookupError) as error:
                yield Compared(recorded.number, f"it cannot be done again: {str(error) or type(error).__name__}")
                return
            yield Compared(recorded.number, again.difference)


def _loop(
    config: NodeConfig, start: Start, policy: Policy, tasks: TaskSet, buffer: GroupBuffer, again: "_Again"
) -> Loop:
    unwritten = MetricsLog(Path("/nonexistent"))  # rows are written by the trainer's end of a round alone
    exchange, journal = _RecordedExchange(again, tasks, start), _RecordedJournal(again)
    return Loop(config, start.seed, policy, _RecordedEngine(again), tasks, buffer, exchange, unwritten, journal=journal)


class _Again:
    """A round that is done again: what its record says, and what comes of it this time."""

    def __init__(self) -> None:
        self.recorded: Round
        self.times: list[float] = []
        self.measured: list[float] = []
        self.unscorable: list[Sequence[int]] = []
        self.barred: list[Sequence[str]] = []
        self.seen: list[ReadGroup] = []
        self.refused: list[RefusedGroup] = []
        self.digests = (b"", b"")

    def now_comes(self, recorded: Round) -> None:
        """Begin with this round."""
        self.recorded = recorded
        self.times, self.measured = list(recorded.times), list(recorded.measured)
        self.unscorable, self.barred = list(recorded.unscorable), list(recorded.barred)
        self.seen, self.refused = [], []

    @property
    def difference(self) -> str:
        """The ways in which the last round differed from its record."""
        recorded, (admitted, drawn) = self.recorded, self.digests
        if admitted != recorded.admitted:
            was, now = dict(verdicts(recorded.seen, recorded.refused)), dict(verdicts(self.seen, self.refused))
            first = next(key for key in {**was, **now} if was.get(key) != now.get(key))
            reasons = (found if found is None else found or "admitted" for found in (was.get(first), now.get(first)))
            return "item {}: {} then, {} now".format(first.hex()[:12], *reasons)
        if drawn != recorded.drawn:
            return "other rows are trained on, or with other weights"
        return ""


class _RecordedEngine:
    """Returns what was played."""

    def __init__(self, again: _Again) -> None:
        self._again = again

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        """Raise: nothing is sampled again."""
        raise NotImplementedError

    def play(self, episodes: Episodes) -> Groups:
        """Return what was played."""
        return [list(group) for group in self._again.recorded.played]

    def load(self, version: int) -> None:
        """Do nothing."""

    def rest(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class _RecordedExchange(NoExchange):
    """Gives again what peers sent."""

    def __init__(self, again: _Again, tasks: TaskSet, start: Start) -> None:
        self._again = again
        self._reader = GroupReader(tasks, start.limits)

    def receive(self, known: Callable[[bytes], bool]) -> list[ReceivedGroup]:
        """Read again what came in this round."""
        shared = []
        for item in self._again.recorded.seen:
            group, reason = self._reader.read(item.body, item.topic)
            self._again.seen.append(item._replace(reason=reason))
            if group is not None:
                shared.append(ReceivedGroup(item.id, item.sender, item.time, group, item.body))
        return shared


class _RecordedJournal:
    """Says again what was found in the round by the clock, the weights and the swarm."""

    def __init__(self, again: _Again) -> None:
        self._again = again

    def now(self) -> float:
        """Return the next reading of the clock."""
        return self._again.times.pop(0)

    def measured(self, count: int, measure: Callable[[], list[float]]) -> list[float]:
        """Return what was measured."""
        found, self._again.measured = self._again.measured[:count], self._again.measured[count:]
        return found

    def judged(self, judge: Callable[[float], list[MaybeLate]], seconds: float) -> list[MaybeLate]:
        """Judge again, however long it takes; what was unscorable or late then counts as such now."""
        none = self._again.unscorable.pop(0)
        return [
            None if at in none else LATE if -1 - at in none else verdict for at, verdict in enumerate(judge(FOREVER_S))
        ]

    def barred(self, find: Callable[[], Sequence[str]]) -> Sequence[str]:
        """Return the signers that were kept out then."""
        return self._again.barred.pop(0)

    def saw(self, seen: ReadGroup) -> None:
        """Do nothing: what came is read again."""

    def refused(self, group: RefusedGroup) -> None:
        """Note a group that is refused this time."""
        self._again.refused.append(group)

    def end_round(
        self, number: int, played: Sequence[Sequence[Played]], own: Sequence[Group], samples: Sequence[Sample]
    ) -> None:
        """Take the digests of the round as it was done again."""
        self._again.digests = (
            digest_of_verdicts(self._again.seen, self._again.refused),
            digest_of_draw([encode(group) for group in own], samples),
        )
