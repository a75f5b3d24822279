"""Archived groups judged: each question is made again, each answer is scored here. No claim of a signer counts.

A group is refused for the reasons for which a node refuses a peer's (`node.rollouts.screening`). One that lies is
refused whole. A group on a held-out question is refused by the question that it claims, and by the one that its seed
makes. Groups of tasks with environments are left out, as `Exchange` leaves them out.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

from node.archive.store import ArchivedGroup
from node.config import TaskConfig
from node.rollouts.group import GroupError, Question
from node.rollouts.screening import compare, read, rebuild, says_nothing_else
from node.swarm.agreed_tasks import adopt_tasks
from node.swarm.swarm_folder import split_of
from node.tasks import load_tasks
from node.tasks.environments.episodes import start_of
from node.tasks.quotations import Quotations
from node.tasks.scoring.time_quota import TimeQuota
from node.tasks.scoring.verdicts import LATE, Answer, MaybeLate, Scoring, Verdict
from node.tasks.task_set import TaskSet, unshared
from protocol.credentials.manifest import SwarmManifest

SIGNER_SHARE = 0.25  # of the seconds that judging some groups may take: slow texts of one signer do not take all


class JudgedGroup(NamedTuple):
    """A group, its question made here, and its answers' rewards as found here; None for one that was not scored.

    `reason` says why it is of no use, "" if it is of use. Only then `question` is there.
    """

    archived: ArchivedGroup
    reason: str
    question: Question | None = None
    rewards: Sequence[Verdict] = ()


class GroupJudge:
    """Judges groups of a swarm by its tasks, as this machine builds them.

    Args:
        manifest: the swarm's.
        own: what the owner of this machine says of the tasks (`node.swarm.agreed_tasks.adopt_tasks`).
        allowed: tasks that are taken with all that the founder chose.

    Raises:
        UserError: a task cannot be built here, or none is shared.
    """

    def __init__(self, manifest: SwarmManifest, own: Sequence[TaskConfig] = (), allowed: Sequence[str] = ()) -> None:
        self._limits = manifest.limits
        loaded = load_tasks(adopt_tasks(manifest, own, allowed), split_of(manifest))
        self.tasks: TaskSet = loaded.only(lambda task: start_of(task) is None and not unshared(task))

    def judge(self, groups: Sequence[ArchivedGroup], seconds: float) -> list[JudgedGroup]:
        """Return the verdict on each group, in order; one that is not scored within `seconds` is "unscorable"."""
        judged_groups = [self.read(archived) for archived in groups]
        quotas: defaultdict[str, TimeQuota] = defaultdict(lambda: TimeQuota(SIGNER_SHARE * seconds))
        answers = [
            Answer(judged.question.task, judged.question.item, episode.text, quota=quotas[judged.archived.signer])
            for judged in judged_groups
            if judged.question is not None
            for episode in judged.archived.group.completions
        ]
        verdicts = iter(Scoring(answers, is_own=False).wait(seconds))
        return [judged if judged.question is None else _compared(judged, verdicts) for judged in judged_groups]

    def quotes_held_out(self, judged: JudgedGroup, place: int) -> bool:
        """Tell whether an answer gives away a held-out question with its answer."""
        episode = judged.archived.group.completions[place]
        if judged.question is None or says_nothing_else(judged.question, episode):
            return False
        return self._held_out.are_in(episode.text)

    @cached_property
    def _held_out(self) -> Quotations:
        return self.tasks.quotations(0)

    def read(self, archived: ArchivedGroup) -> JudgedGroup:
        """Make a group's question again, and score no answer."""
        try:
            group = read(archived.body, self.tasks, self._limits.max_completions, self._limits.max_group_bytes)
            return JudgedGroup(archived, "", rebuild(group, self.tasks, lambda item: ()))
        except GroupError as error:
            return JudgedGroup(archived, error.reason)


def _compared(judged: JudgedGroup, verdicts: Iterator[MaybeLate]) -> JudgedGroup:
    """Return a group with its verdicts, which are the next ones; answers that cannot be scored here are left out."""
    group = judged.archived.group
    rewards: list[Verdict] = []
    is_late = False
    for _ in group.completions:
        verdict = next(verdicts)
        is_late |= verdict == LATE
        rewards.append(None if verdict == LATE else verdict)
    scored = [(place, reward) for place, reward in enumerate(rewards) if reward is not None]
    if reason := compare(group, scored) or ("unscorable" if is_late or not scored else ""):
        return JudgedGroup(judged.archived, reason)
    return judged._replace(rewards=rewards)
