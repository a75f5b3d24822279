"""Screening: what a peer's group must pass, from its arrival to the round that trains on it.

Most groups that arrive are never drawn. So a group is only read before it enters the group buffer (`read`): its
layout, its bounds, whether its task is ours, and that its question is not held out. Whether it is true is checked when
a round draws it (`Screening`).

Ground truth is regenerated, never received. The seed gives the question and the answer, and the episodes that the draw
rests on are scored here; those of several turns are played again (`node.tasks.environments.episodes`). A claimed
question or reward that differs is a lie. It costs its signer, and the signer's other groups are not drawn any more.
Nobody is at fault for a task that this node does not run or cannot check, a question that its policy has no room for,
or an episode that cannot be scored here (`node.tasks.scoring.verdicts`). Nor is anybody at fault for a held-out
question: nodes of an earlier release, or with fewer test questions, do not hold it out.

A drawn group goes through these states, and no other:

    drawn -> pending -> usable        its rewards are true, and one of its completions may be trained on
                     -> refused       it is a lie, or of no use here: it is not drawn again
                     -> late          its verdicts did not come in time, or its signer's quota of seconds was spent
                                      (`node.rollouts.slow_texts`): it may be drawn in another round
          -> refused                  its question is not the one it claims, or of no use here

Invariants of a round, which has a slot for each group that it may use:
- At most `MAX_DRAWN_PER_SLOT` groups are drawn for each slot, and of no signer more than its share.
- No group is drawn of a signer whose quota is spent.
- No group is drawn twice. A slot that a refused group leaves is filled from the groups not drawn yet.
- A group is usable only if its verdicts were found here, and only while its signer is neither found to lie nor revoked.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from node.config import SamplingConfig
from node.errors import UserError
from node.rollouts.group import MAX_GROUP_BYTES, EncodedGroup, Episode, Group, GroupError, Question, Tokens, decode
from node.rollouts.own_results import OwnResults
from node.rollouts.rule import Candidate, DrawRequest, Pick, Place, Rule, is_right
from node.rollouts.slow_texts import RoundQuotas
from node.tasks import Item
from node.tasks.environments.episodes import start_of
from node.tasks.prompting import takes_more
from node.tasks.scoring.time_quota import TimeQuota
from node.tasks.scoring.verdicts import LATE, Answer, Scoring, Verdict, score, submit_of
from node.tasks.task_set import TaskSet

REWARD_TOLERANCE = 1e-6
MAX_DRAWN_PER_SLOT = 4  # groups drawn for each slot of a round, at most: that bounds what a flood costs

# Reasons that cost the signer no points: the group is set aside.
BLAMELESS = frozenset(
    {
        "unknown_task",
        "held_out",
        "unverifiable",
        "unscorable",
        "prompt_too_long",
        "other_content",
        "too_long",
        "over_long",
        "too_surprising",
        "quotes_held_out",
        "early_report",
        "slow_signer",
    }
)

EncodePrompt = Callable[[Item], Sequence[int] | None]
"""Returns the tokens that ask an item, or None where the local policy has no room for them."""
EncodeEpisode = Callable[[Sequence[int], Episode], Tokens | None]
"""Returns the tokens of an episode after a prompt, or None where it is longer than one of this node's may be."""
ScoredRow = tuple[Sequence[int], Tokens]  # the tokens of a prompt, and of an episode
Surprises = Callable[[Sequence[ScoredRow]], list[float]]


class RefusedGroup(NamedTuple):
    """A group that a round drew and refused, its signer, and why."""

    id: bytes
    sender: str
    reason: str


class GroupBounds(NamedTuple):
    """The bounds of a peer's group."""

    completions: int
    bytes: int
    life: float = 0.0  # seconds from when it is signed to when it can come no more


class ReadResult(NamedTuple):
    """Either a group, or why it is refused."""

    group: Group | None
    reason: str


def read(body: bytes, tasks: TaskSet, max_completions: int, max_bytes: int = MAX_GROUP_BYTES) -> Group:
    """Return the group that a peer sent; nothing in it is verified yet.

    Raises:
        GroupError: it is malformed or too large, has too many completions or turns, its task is not ours, or
            its question is held out. A task whose groups are not shared counts as not ours.
    """
    group = decode(body, max_bytes)
    task = tasks.shared(group.task)
    if task is None:
        raise GroupError("unknown_task", group.task.name)
    if len(group.completions) > max_completions:
        raise GroupError("group_size", str(len(group.completions)))
    if start_of(task) is None and any(len(completion.texts) > 1 for completion in group.completions):
        raise GroupError("turns", group.task.name)
    if tasks.is_held_out(task, group.question):
        raise GroupError("held_out", group.task.name)
    return group


def rebuild(group: Group, tasks: TaskSet, encode_prompt: EncodePrompt) -> Question:
    """Make the group's question again; return it with the prompt that asks the local policy.

    Raises:
        GroupError: its question is not the one that it claims, or is of no use here.
    """
    task = tasks.shared(group.task)
    if task is None:
        raise GroupError("unknown_task", group.task.name)
    try:
        item = task.make(group.seed)
        prompt = encode_prompt(item)
    except Exception as error:  # a third party's task may raise anything; its failure is not the round's
        raise GroupError("unverifiable", type(error).__name__) from error
    if item.content != group.content:  # another edition of the same task set: nobody's fault
        raise GroupError("other_content", group.task.name)
    if item.question != group.question:
        raise GroupError("false_question")
    if tasks.is_held_out(task, item.question):
        raise GroupError("held_out", group.task.name)
    if prompt is None:
        raise GroupError("prompt_too_long")
    return Question(task, group.seed, item, prompt)


def compare(group: Group, verdicts: Iterable[tuple[int, Verdict]]) -> str:
    """Compare the rewards that a group claims with verdicts, each with the place of its completion.

    Returns what is wrong, "" if nothing is.
    """
    reason = ""
    for place, verdict in verdicts:
        if verdict is None:
            reason = "unscorable"
        elif abs(verdict - group.rewards[place]) > REWARD_TOLERANCE:
            return "false_reward"
    return reason


def check(
    body: bytes,
    tasks: TaskSet,
    max_completions: int,
    max_bytes: int = MAX_GROUP_BYTES,
    encode_prompt: EncodePrompt = lambda item: (),
) -> ReadResult:
    """Read one group and score all of its completions. Never raises: a bad group is a reason."""
    try:
        group = read(body, tasks, max_completions, max_bytes)
        question = rebuild(group, tasks, encode_prompt)
    except GroupError as error:
        return ReadResult(None, error.reason)
    verdicts = score([_answer(question, completion) for completion in group.completions])
    reason = compare(group, enumerate(verdicts))
    return ReadResult(None, reason) if reason else ReadResult(group, "")


@dataclass(frozen=True, slots=True)
class ScreeningContext:
    """The parts that the screening of every round needs.

    Args:
        sampling: the bounds on what a peer may teach, and how many groups a round takes.
        tasks: those that this node verifies.
        read: returns groups of the group buffer by their ids.
        encode_prompt, encode: return a question's and an episode's tokens under the local policy.
        surprises: returns how surprising completions are under the local policy, in nats.
        quotes_held_out: tells whether a text gives away a held-out question and its answer.
    """

    sampling: SamplingConfig
    tasks: TaskSet
    read: Callable[[Iterable[bytes]], Mapping[bytes, Group]]
    encode_prompt: EncodePrompt
    encode: EncodeEpisode
    surprises: Surprises
    quotes_held_out: Callable[[str], bool] = lambda text: False


@dataclass(slots=True)
class _PendingGroup:
    """A drawn group whose verdicts are awaited.

    The completions at `places` are scored; those of `picks` may be trained on. Worker processes charge what they take
    to `quota`, its signer's; None if the task scores in this process.
    """

    candidate: Candidate
    group: Group
    question: Question
    picks: Sequence[Pick]
    places: Sequence[int]
    quota: TimeQuota | None

    @property
    def answers(self) -> list[Answer]:
        """What is scored."""
        answers = (_answer(self.question, self.group.completions[place]) for place in self.places)
        return [answer._replace(quota=self.quota) for answer in answers]


@dataclass(slots=True)
class Screening:
    """One round's draw from peers' groups; see the module's states.

    `draw` and then `settle` try once to fill the round's slots. `fill` goes on until all are full or nothing is left.
    """

    context: ScreeningContext
    rule: Rule
    asked: DrawRequest  # what the rule is asked for where all slots are free
    signers: int  # that have a group in the buffer
    quotas: RoundQuotas = field(default_factory=RoundQuotas)
    usable: dict[bytes, EncodedGroup] = field(default_factory=dict)  # each with the tokens of its picked completions
    picks: list[Pick] = field(default_factory=list)  # from usable groups
    refused: list[RefusedGroup] = field(default_factory=list)
    revoked: frozenset[str] = frozenset()  # signers whose groups the round must not use
    set_aside: frozenset[str] = frozenset()  # signers whose groups the round does not score
    left_out: Counter[str] = field(default_factory=Counter)  # completions of drawn groups, counted by reason
    taken_at: float = 0.0  # when its usable groups were recorded as used, Unix seconds
    _drawn: dict[bytes, Candidate] = field(default_factory=dict)
    _pending: list[_PendingGroup] = field(default_factory=list)
    _scoring: Scoring | None = None
    _is_late: bool = False
    _told: int = 0  # of the refused groups, how many `newly_refused` has returned
    _offered: frozenset[str] = frozenset()  # the signers of all candidates of the last draw
    _spent: set[str] = field(default_factory=set)  # signers of whom no further text is begun
    _usual: dict[str, float] = field(default_factory=dict)  # length of an answer, by task

    @property
    def used(self) -> list[Candidate]:
        """The candidates that became usable."""
        return [self._drawn[key] for key in self.usable]

    @property
    def signers_drawn(self) -> set[str]:
        """The signers of the drawn groups."""
        return {candidate.peer for candidate in self._drawn.values()}

    @property
    def liars(self) -> set[str]:
        """The signers of groups that were refused for a lie."""
        return {group.sender for group in self.refused if group.reason not in BLAMELESS}

    def newly_refused(self) -> list[RefusedGroup]:
        """Return the groups that were refused since the last call."""
        found, self._told = self.refused[self._told :], len(self.refused)
        return found

    @property
    def _distrusted(self) -> set[str]:
        return self.liars | self.revoked

    def left(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates that may still be drawn: their questions were not, and their signers may be."""
        not_drawn = self._distrusted | self.set_aside | self._spent
        drawn = {candidate.question for candidate in self._drawn.values()}
        return [
            candidate for candidate in candidates if candidate.peer not in not_drawn and candidate.question not in drawn
        ]

    def draw(self, candidates: Sequence[Candidate]) -> bool:
        """Draw groups for the free slots; tell whether any was drawn.

        If a task scores in worker processes, scoring begins at once.
        """
        self._offered = frozenset(candidate.peer for candidate in candidates)
        of_group = self._choose(candidates)
        self._drawn |= {candidate.id: candidate for candidate in candidates if candidate.id in of_group}
        for key, group in self.context.read(of_group).items():
            candidate = self._drawn[key]
            try:
                question = rebuild(group, self.context.tasks, self.context.encode_prompt)
            except GroupError as error:
                self.refused.append(RefusedGroup(key, candidate.peer, error.reason))
                continue
            places = sorted({place for pick in of_group[key] for place in pick.rests_on})
            in_workers = submit_of(question.task) is not None
            quota = self.quotas.of(candidate.peer, group.task.name, len(places)) if in_workers else None
            self._pending.append(_PendingGroup(candidate, group, question, of_group[key], places, quota))
        if any(pending.quota is not None for pending in self._pending):
            self._scoring = Scoring(self._answers(), is_own=False)
        return bool(of_group)

    def _choose(self, candidates: Sequence[Candidate]) -> dict[bytes, list[Pick]]:
        """Return the rule's picks by group: no more groups than free slots, and of no signer more than its share.

        Groups count in the rule's order. If the rule goes beyond a signer's share, it is asked again for the rest,
        among the groups of signers who have some of their share left.
        """
        asked = self._asked_now()
        most = math.inf if asked.per_signer is None else asked.per_signer
        taken = Counter(asked.taken)
        offered = self.left(candidates) if asked.count else []
        chosen: dict[bytes, list[Pick]] = {}
        while len(chosen) < asked.count:
            count = asked.count - len(chosen)
            of_group: dict[bytes, list[Pick]] = {}
            for pick in self.rule.peers(offered, replace(asked, count=count, taken=Counter(taken))):
                of_group.setdefault(pick.id, []).append(pick)
            signers = {candidate.id: candidate.peer for candidate in offered}
            drawn = [key for key in of_group if key in signers][:count]
            for key in drawn:
                if taken[signers[key]] < most:
                    taken[signers[key]] += 1
                    chosen[key] = of_group[key]
            if all(key in chosen for key in drawn):
                break
            offered = [
                candidate for candidate in offered if candidate.id not in chosen and taken[candidate.peer] < most
            ]
        return chosen

    def settle(self, own: OwnResults, seconds: float) -> None:
        """Decide on each drawn group by the verdicts that are there after `seconds`; the others are late."""
        if self._pending:
            self._decide(own, seconds)
        self._withdraw()

    def _decide(self, own: OwnResults, seconds: float) -> None:
        drawn, scoring, answers = self._pending, self._scoring, self._answers()
        self._pending, self._scoring = [], None
        verdicts = iter((scoring or Scoring(answers, is_own=False)).wait(seconds))
        if scoring is not None:
            signers = sorted(self._offered.union(pending.candidate.peer for pending in drawn))
            self._spent.update(self.quotas.spent(signers))
        true: list[_PendingGroup] = []
        for pending in drawn:
            signer = pending.candidate.peer
            answered = [next(verdicts) for _ in pending.places]
            if signer in self.revoked:
                continue
            there = [
                (place, verdict) for place, verdict in zip(pending.places, answered, strict=True) if verdict != LATE
            ]
            if reason := compare(pending.group, there):
                self.refused.append(RefusedGroup(pending.candidate.id, signer, reason))
            elif LATE in answered:
                self.left_out["late"] += len(pending.picks)
                self._is_late |= signer not in self._spent
            else:
                true.append(pending)
        self._take(true, own)

    def fill(self, candidates: Sequence[Candidate], own: OwnResults, seconds: float) -> None:
        """Settle what was drawn, and draw again until the round's slots are full or nothing is left to be drawn.

        It waits for `seconds` in all. Once a verdict comes late, nothing more is drawn, unless its signer is at fault.
        """
        deadline = time.monotonic() + seconds
        self.settle(own, seconds)
        while not self._is_late and self.draw(candidates):
            self.settle(own, max(0.0, deadline - time.monotonic()))

    def _withdraw(self) -> None:
        """Give up the usable groups of distrusted signers."""
        distrusted = self._distrusted
        self.usable = {key: group for key, group in self.usable.items() if self._drawn[key].peer not in distrusted}
        self.picks = [pick for pick in self.picks if pick.id in self.usable]

    def _asked_now(self) -> DrawRequest:
        """Return what the rule is asked for now: a group for each free slot, within the round's bounds."""
        free = self.asked.count - len(self.usable) - len(self._pending)
        room = MAX_DRAWN_PER_SLOT * self.asked.count - len(self._drawn)
        share, most = self.context.sampling.max_signer_share, None
        if share and self.signers:
            most = math.ceil(share * self.asked.count / self.signers)
        taken = Counter(candidate.peer for candidate in self._drawn.values())
        return replace(self.asked, count=max(min(free, room), 0), per_signer=most, taken=taken)

    def _answers(self) -> list[Answer]:
        return [answer for pending in self._pending for answer in pending.answers]

    def _take(self, true: Sequence[_PendingGroup], own: OwnResults) -> None:
        """Take the picks of true groups that may be trained on; refuse a group of which none is left.

        If a group has picks with a positive advantage, one of these must be left. The first of them gives the reason.
        """
        tokens: dict[Place, Tokens] = {}
        why: dict[Place, str] = {}
        asked: list[tuple[Place, ScoredRow]] = []
        for pending in true:
            prompt = pending.question.prompt
            for pick in pending.picks:
                place = (pick.id, pick.index)
                episode = pending.group.completions[pick.index]
                encoded = self.context.encode(prompt, episode)
                bare = says_nothing_else(pending.question, episode)
                why[place] = "too_long" if encoded is None else self._over_long(pending.group, encoded, bare, own)
                if not why[place] and not bare and any(map(self.context.quotes_held_out, episode.texts[::2])):
                    why[place] = "quotes_held_out"
                if encoded is not None and not why[place]:
                    tokens[place] = encoded
                    if encoded.sampled and not bare:
                        asked.append((place, (prompt, encoded)))
        self._bound_surprise(asked, why)
        self.left_out.update(filter(None, why.values()))
        for pending in true:
            candidate = pending.candidate
            good = [pick for pick in pending.picks if not why[pick.id, pick.index]]
            right = [
                pick for pick in pending.picks if pick.advantage > 0
            ]  # none, maybe, where a large group is cut down
            reasons = [why[pick.id, pick.index] for pick in right or pending.picks]
            if all(reasons):
                self.refused.append(RefusedGroup(candidate.id, candidate.peer, reasons[0]))
                continue
            picked = {pick.index: tokens[pick.id, pick.index] for pick in good}
            self.usable[candidate.id] = EncodedGroup(pending.group, pending.question.prompt, picked, id=candidate.id)
            self.picks += good

    def _over_long(self, group: Group, encoded: Tokens, bare: bool, own: OwnResults) -> str:
        sampling = self.context.sampling
        if not sampling.max_length_ratio or sampling.source != "peers" or bare:
            return ""
        task = group.task.name
        if task not in self._usual:
            self._usual[task] = own.usual_length(task)
        usual = self._usual[task]
        return "over_long" if usual and encoded.sampled > sampling.max_length_ratio * usual else ""

    def _bound_surprise(self, asked: Sequence[tuple[Place, ScoredRow]], why: dict[Place, str]) -> None:
        bound = self.context.sampling.max_surprise
        if not bound or self.context.sampling.source != "peers":
            return
        surprises = self.context.surprises([row for _, row in asked])
        why |= {
            place: "too_surprising"
            for (place, _), surprise in zip(asked, surprises, strict=True)
            if not surprise <= bound  # nan, too
        }


def _answer(question: Question, episode: Episode) -> Answer:
    return Answer(question.task, question.item, episode.text, episode.texts[:-1])


def says_nothing_else(question: Question, episode: Episode) -> bool:
    """Tell whether a completion is the bare right answer to a task that pays no other text: nothing can hide in it.

    Of an episode with an environment nobody knows.
    """
    if start_of(question.task) is not None or not is_right(episode.reward) or episode.text != question.item.answer:
        return False
    if submit_of(question.task) is not None:  # `takes_more` would score again, in another process
        return False
    try:
        return not takes_more(question.task, question.item)
    except UserError:  # a third party's task may fail at any text: then nobody knows
        return False
