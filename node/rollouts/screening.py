"""Screening: what a peer's group must pass, from the moment it comes to the round that trains on it.

Most of what comes is never drawn. So what enters the replay buffer is only read: its layout, its bounds, whether its
task is ours, and that its question is none of the evaluation's (`read`). Whether it is true is found out when a round
draws it (`Screening`).

Ground truth is regenerated, never received. The seed gives the question and the answer, and the texts that the draw
uses are scored here. A claimed question or reward that differs is a lie: it costs its signer, whose other groups are
drawn no more either. A task that this node does not run, a question that its policy has no room for, and a text that
cannot be scored here (`node.tasks.verdicts`) are nobody's fault.

A drawn group goes through these states, and no other:

    drawn -> pending -> usable        its verdicts agree, and a completion of it may be trained on
                     -> refused       it is a lie, or of no use here: it is not drawn again
                     -> late          its verdicts took too long: it may be drawn in another round

Invariants of a round:
- Never more groups are drawn than `LOOKED_AT` times those it has places for, and of no signer more than its share.
- No group is drawn twice, and a place that a refused group leaves is filled from those not drawn yet.
- Nothing is usable whose verdict was not found here.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from node.config import SamplingConfig
from node.errors import UserError
from node.rollouts.group import MAX_GROUP_BYTES, Completion, EncodedGroup, Group, GroupError, Question, decode
from node.rollouts.own_results import OwnResults
from node.rollouts.sampling import RIGHT, Candidate, Draw, Pick, Place, Rule
from node.tasks import Item
from node.tasks.prompting import takes_more
from node.tasks.task_set import TaskSet
from node.tasks.verdicts import Answer, Beside, Verdict, many_of, score

REWARD_TOLERANCE = 1e-6
LOOKED_AT = 4  # groups drawn in a round for each of its places: a flood costs no more

# Reasons that an honest peer can give: its groups are set aside at no cost to it.
BLAMELESS = frozenset(
    {
        "unknown_task",
        "unverifiable",
        "unscorable",
        "prompt_too_long",
        "other_content",
        "too_long",
        "over_long",
        "too_surprising",
    }
)

EncodePrompt = Callable[[Item], Sequence[int] | None]
"""Returns the tokens that ask an item, or None where the local policy has no room for them."""
EncodeCompletion = Callable[[Completion], Sequence[int] | None]
"""Returns the tokens of a completion, or None where it is longer than one of this node's may be."""
Row = tuple[Sequence[int], Sequence[int]]  # the tokens of a prompt, and of a completion
Surprises = Callable[[Sequence[Row]], list[float]]
Judged = Callable[[Callable[[float], list[Verdict] | None], float], list[Verdict] | None]
"""Calls the first argument with the seconds that it may take, and returns what it found: a journal's (`judged`)."""


class Seen(NamedTuple):
    """An item from a peer as it was read: when it was looked at (Unix seconds); no reason where it was taken."""

    id: bytes
    sender: str
    topic: bytes
    body: bytes
    time: float
    reason: str


class Refused(NamedTuple):
    """A group that a round drew, whose it is, and why it was of no use."""

    id: bytes
    sender: str
    reason: str


class Limits(NamedTuple):
    """What a peer's group may have at most."""

    completions: int
    bytes: int


class Verified(NamedTuple):
    """Either a usable group, or why there is none."""

    group: Group | None
    reason: str


def read(body: bytes, tasks: TaskSet, max_completions: int, max_bytes: int = MAX_GROUP_BYTES) -> Group:
    """Return the group that a peer sent, of which nothing is verified yet.

    Raises:
        GroupError: it is none, or too large, of a task that is not ours, or on a question of the evaluation's.
    """
    group = decode(body, max_bytes)
    task = tasks.get(group.task)
    if task is None:
        raise GroupError("unknown_task", group.task.name)
    if not 2 <= len(group.completions) <= max_completions:
        raise GroupError("group_size", str(len(group.completions)))
    if tasks.is_held_out(task, group.question):
        raise GroupError("held_out", group.task.name)
    return group


def rebuild(group: Group, tasks: TaskSet, encode_prompt: EncodePrompt) -> Question:
    """Make the group's question again; return it as the local policy is asked it.

    Raises:
        GroupError: its question is another one, or of no use here.
    """
    task = tasks.get(group.task)
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


def compare(group: Group, places: Iterable[int], verdicts: Iterable[Verdict]) -> str:
    """Return what is wrong with the rewards that a group claims at these places, given what they are; "" if nothing."""
    reason = ""
    for place, verdict in zip(places, verdicts, strict=True):
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
) -> Verified:
    """Read one group and score all of it at once. Never raises: one bad item is one reason."""
    try:
        group = read(body, tasks, max_completions, max_bytes)
        question = rebuild(group, tasks, encode_prompt)
    except GroupError as error:
        return Verified(None, error.reason)
    verdicts = score([Answer(question.task, question.item, one.text) for one in group.completions])
    reason = compare(group, range(len(verdicts)), verdicts)
    return Verified(None, reason) if reason else Verified(group, "")


@dataclass(frozen=True, slots=True)
class Screen:
    """What a round's screening goes by.

    Args:
        sampling: the bounds on what a peer may teach, and how many groups a round takes.
        tasks: that this node verifies.
        read: returns groups of the replay buffer by their ids.
        encode_prompt, encode: under the local policy.
        surprises: how surprising completions are under the local policy, in nats.
        judged: what waits for verdicts.
    """

    sampling: SamplingConfig
    tasks: TaskSet
    read: Callable[[Iterable[bytes]], Mapping[bytes, Group]]
    encode_prompt: EncodePrompt
    encode: EncodeCompletion
    surprises: Surprises
    judged: Judged


@dataclass(slots=True)
class _Pending:
    """A drawn group whose verdicts are awaited: `places` are scored, and `picks` may be trained on."""

    candidate: Candidate
    group: Group
    question: Question
    picks: Sequence[Pick]
    places: Sequence[int]


@dataclass(slots=True)
class Screening:
    """One round's draw from peers' groups; see the module's states.

    `draw` and then `settle` fill the round's places once; `fill` does so until they are full or nothing is left.
    """

    screen: Screen
    rule: Rule
    asked: Draw
    signers: int  # that have a group in the buffer
    usable: dict[bytes, EncodedGroup] = field(default_factory=dict)  # with the tokens of what is picked of each
    picks: list[Pick] = field(default_factory=list)  # from usable groups
    refused: list[Refused] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # completions of drawn groups, by why they are left out
    _drawn: dict[bytes, Candidate] = field(default_factory=dict)
    _pending: list[_Pending] = field(default_factory=list)
    _scoring: Beside | None = None
    _is_late: bool = False
    _usual: dict[str, float] = field(default_factory=dict)  # length of an answer, by task

    @property
    def used(self) -> list[Candidate]:
        """The candidates that became usable."""
        return [self._drawn[key] for key in self.usable]

    @property
    def liars(self) -> set[str]:
        """Who signed a group that claims what is not so."""
        return {one.sender for one in self.refused if one.reason not in BLAMELESS}

    def left(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return those that may still be drawn: of no liar, and on no question that was drawn."""
        liars, drawn = self.liars, {one.question for one in self._drawn.values()}
        return [one for one in candidates if one.peer not in liars and one.question not in drawn]

    def draw(self, candidates: Sequence[Candidate]) -> bool:
        """Draw for the places that are free; tell whether anything was drawn.

        What is scored in other processes begins to be.
        """
        asked = self._asked_now()
        left = self.left(candidates) if asked.count else []
        of_group: dict[bytes, list[Pick]] = {}
        for pick in self.rule.peers(left, asked):
            of_group.setdefault(pick.id, []).append(pick)
        self._drawn |= {one.id: one for one in left if one.id in of_group}
        for key, group in self.screen.read(of_group).items():
            one = self._drawn[key]
            try:
                question = rebuild(group, self.screen.tasks, self.screen.encode_prompt)
            except GroupError as error:
                self.refused.append(Refused(key, one.peer, error.reason))
                continue
            places = sorted({place for pick in of_group[key] for place in pick.rests_on})
            self._pending.append(_Pending(one, group, question, of_group[key], places))
        answers = self._answers()
        if any(many_of(one.task) is not None for one in answers):
            self._scoring = Beside(answers)
        return bool(of_group)

    def settle(self, own: OwnResults, seconds: float) -> None:
        """Decide on what was drawn, once it is scored; what is not within `seconds` is late."""
        pending, scoring, answers = self._pending, self._scoring, self._answers()
        self._pending, self._scoring = [], None
        if not pending:
            return
        verdicts = self.screen.judged(lambda limit: score(answers) if scoring is None else scoring.wait(limit), seconds)
        if verdicts is None:
            self.left_out["late"] += sum(len(one.picks) for one in pending)
            self._is_late = True
            return
        found = iter(verdicts)
        true: list[_Pending] = []
        for one in pending:
            reason = compare(one.group, one.places, [next(found) for _ in one.places])
            if reason:
                self.refused.append(Refused(one.candidate.id, one.candidate.peer, reason))
            else:
                true.append(one)
        self._take(true, own)

    def fill(self, candidates: Sequence[Candidate], own: OwnResults, seconds: float) -> None:
        """Settle what was drawn, and draw again until the round's places are full or nothing is left to be drawn.

        Once verdicts were late no more are asked for: a round waits for them no longer than `seconds`.
        """
        self.settle(own, seconds)
        while not self._is_late and self.draw(candidates):
            self.settle(own, seconds)

    def _asked_now(self) -> Draw:
        """Return what the rule is asked for: as many groups as places are free, within the round's bounds."""
        free = self.asked.count - len(self.usable) - len(self._pending)
        room = LOOKED_AT * self.asked.count - len(self._drawn)
        share, most = self.screen.sampling.max_signer_share, None
        if share and self.signers:
            most = math.ceil(share * self.screen.sampling.external / self.signers)
        taken = Counter(one.peer for one in self._drawn.values())
        return replace(self.asked, count=max(min(free, room), 0), per_signer=most, taken=taken)

    def _answers(self) -> list[Answer]:
        return [
            Answer(one.question.task, one.question.item, one.group.completions[place].text)
            for one in self._pending
            for place in one.places
        ]

    def _take(self, true: Sequence[_Pending], own: OwnResults) -> None:
        """Take what may be trained on of true groups.

        A group is refused, for the first reason, where nothing of it is left, or none of what it shows as good.
        """
        tokens: dict[Place, Sequence[int]] = {}
        why: dict[Place, str] = {}
        asked: list[tuple[Place, Row]] = []
        for one in true:
            for pick in one.picks:
                place = (pick.id, pick.index)
                made = one.group.completions[pick.index]
                encoded = self.screen.encode(made)
                bare = says_nothing_else(one.question, made)
                why[place] = "too_long" if encoded is None else self._over_long(one, encoded, bare, own)
                if encoded is not None and not why[place]:
                    tokens[place] = encoded
                    if encoded and not bare:
                        asked.append((place, (one.question.prompt, encoded)))
        self._bound_surprise(asked, why)
        self.left_out.update(filter(None, why.values()))
        for one in true:
            good = [pick for pick in one.picks if not why[pick.id, pick.index]]
            right = [pick for pick in one.picks if pick.advantage > 0]  # of a large group none may be drawn
            reasons = [why[pick.id, pick.index] for pick in right or one.picks]
            if all(reasons):
                self.refused.append(Refused(one.candidate.id, one.candidate.peer, reasons[0]))
                continue
            key = one.candidate.id
            picked = {pick.index: tokens[pick.id, pick.index] for pick in good}
            self.usable[key] = EncodedGroup(one.group, one.question.prompt, picked, id=key)
            self.picks += good

    def _over_long(self, one: _Pending, encoded: Sequence[int], bare: bool, own: OwnResults) -> str:
        sampling = self.screen.sampling
        if not sampling.max_length_ratio or sampling.source != "peers" or bare:
            return ""
        task = one.group.task.name
        if task not in self._usual:
            self._usual[task] = own.usual_length(task)
        usual = self._usual[task]
        return "over_long" if usual and len(encoded) > sampling.max_length_ratio * usual else ""

    def _bound_surprise(self, asked: Sequence[tuple[Place, Row]], why: dict[Place, str]) -> None:
        bound = self.screen.sampling.max_surprise
        if not bound or self.screen.sampling.source != "peers":
            return
        found = self.screen.surprises([row for _, row in asked])
        why |= {place: "too_surprising" for (place, _), one in zip(asked, found, strict=True) if not one <= bound}


def says_nothing_else(question: Question, made: Completion) -> bool:
    """Tell whether a completion is the bare right answer to a task that takes no other: it has room for nothing."""
    if made.reward < RIGHT or made.text != question.item.answer:
        return False
    if many_of(question.task) is not None:  # it would be scored once more, in another process
        return False
    try:
        return not takes_more(question.task, question.item)
    except UserError:  # a third party's task may fail at any text: then nobody knows
        return False
