"""A draw: which of peers' groups a round trains on. This file owns the whole of it, for a node's loop and `Exchange`.

    receive    what came from peers enters the group buffer
    begin      a round's draw; the swarm is told how many groups it wants
    prepare    groups are drawn for all slots, and worker processes score them while the node generates
    fill       by the verdicts, what lies or is of no use is refused, and its slot is drawn anew, until all are full
    take       a use of each usable group is on disk before anybody trains on it

A draw may fill several times before it takes, as groups come. One that is not taken has used nothing. Nothing here
waits, but for verdicts. One thread owns it.

A drawn group goes through these states, and no other:

    drawn -> pending -> usable        its rewards are true, and one of its completions may be trained on
                     -> refused       it is a lie, or of no use here (`node.rollouts.screening`): it is buried, and its
                                      signer reported if it lied
                     -> late          its verdicts did not come in time, or its signer's quota of seconds was spent
                                      (`node.rollouts.slow_texts`): it may be drawn in another round
          -> refused                  its question is not the one it claims, or of no use here

Invariants of a draw, which has a slot for each group that it may use:
- At most `MAX_DRAWN_PER_SLOT` groups are drawn for each slot, and of no signer more than its share.
- No group is drawn of a signer whose quota is spent, or who is revoked or set aside.
- No group is drawn twice. A slot that a refused group leaves is filled from the groups not drawn yet.
- A group is usable only if its verdicts were found here, and only while its signer is neither found to lie nor revoked.
- What a signer's texts took counts for it, whether the draw is taken or not.
"""

import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from node.config import SamplingConfig
from node.rollouts.group import EncodedGroup, Episode, Group, GroupError, Question, Tokens
from node.rollouts.group_buffer import GroupBuffer, ReceivedGroup
from node.rollouts.own_results import own_result
from node.rollouts.rule import Candidate, DrawRequest, Pick, Place, Rule, Scale
from node.rollouts.rules import RULES
from node.rollouts.screening import (
    BLAMELESS,
    EncodePrompt,
    RefusedGroup,
    answer_of,
    compare,
    rebuild,
    says_nothing_else,
)
from node.rollouts.slow_texts import RoundQuotas, SlowSigners, Yardstick
from node.tasks import TaskKey, derive_seed
from node.tasks.scoring.time_quota import TimeQuota
from node.tasks.scoring.verdicts import LATE, Answer, Scoring, submit_of
from node.tasks.task_set import TaskSet

MAX_DRAWN_PER_SLOT = 4  # groups drawn for each slot of a round, at most: that bounds what a flood costs
# A draw waits for peers' verdicts so many seconds, or as long as the node's own part of the round took in the fastest
# of the last `OWN_PARTS` rounds: what peers slow down does not lengthen the wait.
PEERS_S, OWN_PARTS = 5.0, 8

EncodeEpisode = Callable[[Sequence[int], Episode], Tokens | None]
"""Returns the tokens of an episode after a prompt, or None where it is longer than one of this node's may be."""
ScoredRow = tuple[Sequence[int], Tokens]  # the tokens of a prompt, and of an episode
Surprises = Callable[[Sequence[ScoredRow]], list[float]]


class GroupSource(Protocol):
    """What a draw needs of the swarm. No method waits."""

    def begin_round(self, external: int) -> None:
        """Note that a round begins that draws so many of peers' groups: the demand follows."""
        ...

    def receive(self, known: Callable[[bytes], bool]) -> list[ReceivedGroup]:
        """Return the groups that came since the last call, read and not verified; none whose id is `known`."""
        ...

    def revoked(self, signers: Collection[str]) -> list[str]:
        """Return those of `signers` that the swarm's owner has revoked."""
        ...

    def refuse(self, group_id: bytes, reason: str) -> None:
        """Say why a drawn group cannot be used: a reason of `node.rollouts.screening`."""
        ...

    def drew(self, groups: int, left: int, easy: Collection[TaskKey]) -> None:
        """Say how many groups a round drew, and how many of differing rewards it left: the demand follows.

        Groups that are all right are wanted of the tasks `easy` alone.
        """
        ...


@dataclass(slots=True)
class Draws:
    """A node's draws from its peers' groups, one a round.

    Args:
        seed: the node's: from it follows what is drawn.
        sampling: the bounds on what a peer may teach.
        tasks: those that this node verifies.
        buffer: that holds peers' groups.
        peers: the swarm.
        encode_prompt, encode: return a question's and an episode's tokens under the local policy.
        surprises: returns how surprising completions are under the local policy, in nats.
        quotes_held_out: tells whether a text gives away a held-out question and its answer.
        slow_signers: remembers whose texts took too long.
        yardstick: says how long a text of this node's own takes.
    """

    seed: int
    sampling: SamplingConfig
    tasks: TaskSet
    buffer: GroupBuffer
    peers: GroupSource
    encode_prompt: EncodePrompt
    encode: EncodeEpisode
    surprises: Surprises
    quotes_held_out: Callable[[str], bool] = lambda text: False
    slow_signers: SlowSigners = field(default_factory=SlowSigners)
    yardstick: Yardstick = field(default_factory=Yardstick)
    _measurable: dict[str, Answer] = field(default_factory=dict)  # by task: an answer that this node trusts
    _own_parts: deque[float] = field(default_factory=lambda: deque(maxlen=OWN_PARTS))  # in seconds
    _prepared: float | None = None  # when the newest draw was, on the monotonic clock
    _newest: "Draw | None" = None

    def begin(self, round_number: int, count: int, completions: int, scale: Scale, rule: Rule | None = None) -> "Draw":
        """Return the draw of a round of at most `count` groups; nothing is drawn yet.

        They are drawn by `rule`, or else by the one of the configuration.
        """
        if self._newest is not None:
            self._newest.settle()
        self.peers.begin_round(count if self.sampling.source == "peers" else 0)
        rng = random.Random(derive_seed(self.seed, "draw", round_number - 1))
        asked = DrawRequest(count, completions, scale, rng, self.buffer.own_results.reward)
        quotas = RoundQuotas(self.slow_signers.has_standing, self.yardstick)
        self._newest = Draw(self, round_number, rule or RULES[self.sampling.rule], asked, quotas)
        return self._newest

    def receive(self, round_number: int, own: Sequence[ReceivedGroup] = ()) -> None:
        """Put what came from peers into the buffer, to be drawn from this round on.

        Where `sampling.source` says so, this node's `own` groups take their place, from the next round on.
        """
        received = self.peers.receive(self.buffer.__contains__)
        if self.sampling.source == "self":
            self.buffer.add(own, time.time(), first_round=round_number + 1)
        elif self.sampling.external:
            self.buffer.add(received, time.time(), first_round=round_number)

    def record_own(self, round_number: int, own: Sequence[EncodedGroup]) -> None:
        """Record this round's own groups: peers' answers are measured by their length, their reward and their time."""
        if self._prepared is not None:
            self._own_parts.append(time.monotonic() - self._prepared)
            self._prepared = None
        results = [
            own_result(
                encoded.group.task.name,
                [encoded.completions[index].sampled for index in range(len(encoded.group.completions))],
                encoded.group.rewards,
            )
            for encoded in own
        ]
        self.buffer.record_own_results(round_number, results)
        for encoded in own:
            if self.tasks.shared(encoded.group.task) is not None:
                answer = answer_of(encoded.question, encoded.group.completions[0])
                self._measurable[encoded.group.task.name] = answer

    def note_prepared(self) -> None:
        """Note that the node's own part of a round begins, which ends with `record_own`."""
        self._prepared = time.monotonic()

    def patience(self) -> float:
        """Return for how many seconds a draw waits for verdicts."""
        return max(min(self._own_parts, default=0.0), PEERS_S)

    def measure(self) -> None:
        """Have an answer of each task scored as peers' are, to see how long that takes here.

        It is one of this node's own, or before there is one the answer that the task itself gives.
        """
        self.yardstick.measure(self._measurable)

    def note_question(self, question: Question) -> None:
        """Note a question that was made here: its own answer can be measured."""
        answer = Answer(question.task, question.item, question.item.solution or question.item.answer)
        self._measurable.setdefault(question.task.key.name, answer)


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
        answers = (answer_of(self.question, self.group.completions[place]) for place in self.places)
        return [answer._replace(quota=self.quota) for answer in answers]


@dataclass(slots=True)
class Draw:
    """One round's draw from peers' groups; see the module's states. `Draws.begin` makes it."""

    draws: Draws
    round_number: int
    rule: Rule
    asked: DrawRequest  # what the rule is asked for where all slots are free
    quotas: RoundQuotas
    usable: dict[bytes, EncodedGroup] = field(default_factory=dict)  # each with the tokens of its picked completions
    picks: list[Pick] = field(default_factory=list)  # from usable groups
    refused: list[RefusedGroup] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # completions of drawn groups, counted by reason
    taken_at: float = 0.0  # when its usable groups were recorded as used, Unix seconds
    tokens_scored: int = 0  # peers' tokens that the policy looked at
    tokens_read: int = 0  # those before and between them
    _candidates: Sequence[Candidate] = ()  # what could be drawn when it filled last
    _drawn: dict[bytes, Candidate] = field(default_factory=dict)
    _pending: list[_PendingGroup] = field(default_factory=list)
    _scoring: Scoring | None = None
    _is_late: bool = False
    _told: int = 0  # of the refused groups, how many were buried and told
    _revoked: frozenset[str] = frozenset()
    _set_aside: frozenset[str] = frozenset()  # signers whose groups the round does not score
    _spent: set[str] = field(default_factory=set)  # signers of whom no further text is begun
    _usual: dict[str, float] = field(default_factory=dict)  # length of an answer, by task
    _is_settled: bool = False

    @property
    def used(self) -> list[Candidate]:
        """The candidates that became usable."""
        return [self._drawn[key] for key in self.usable]

    @property
    def liars(self) -> set[str]:
        """The signers of groups that were refused for a lie."""
        return {group.sender for group in self.refused if group.reason not in BLAMELESS}

    def prepare(self) -> None:
        """Where workers score, draw for all slots, so that they score peers' texts while this node generates."""
        if self.draws.tasks.scores_in_workers:
            if self.draws.buffer.signers:
                self.draws.measure()
            self._draw(self._look())
        self.draws.note_prepared()

    def fill(self, seconds: float | None = None) -> None:
        """Fill the round's slots from what the buffer holds.

        It settles what was drawn, and draws again until all slots are full or nothing is left to be drawn. It waits for
        verdicts for `seconds` in all, or for `Draws.patience`. Once a verdict comes late, nothing more is drawn, unless
        its signer is at fault. What is refused is buried and reported, and so are the groups of signers that are set
        aside. The liars' other groups are buried.
        """
        seconds = self.draws.patience() if seconds is None else seconds
        deadline = time.monotonic() + seconds
        candidates = self._look()
        self._decide(seconds)
        while not self._is_late and self._draw(candidates):
            self._decide(max(0.0, deadline - time.monotonic()))
        self._bury()

    def take(self) -> list[Candidate]:
        """Record a use of each usable group now, and return them.

        The swarm is told how much was drawn and how much is left: the demand follows.
        """
        used = self.used
        self.taken_at = time.time()
        self.draws.buffer.use(used, self.round_number, self.taken_at)
        self.settle()
        own, tasks = self.draws.buffer.own_results, self.draws.tasks.tasks
        easy = frozenset(task.key for task in tasks if own.reward(task.key.name) < self.rule.easy_below)
        left = sum(candidate.informative for candidate in self._left(self._candidates))
        self.draws.peers.drew(len(used), left, easy)
        return used

    def settle(self) -> None:
        """Note once which signers' texts took too long, unless this node's own did, too."""
        if not self._is_settled:
            self._is_settled = True
            if not self.draws.yardstick.is_slow():
                used = {candidate.peer for candidate in self.used} if self.taken_at else set()
                self.draws.slow_signers.settle(self.round_number, self.quotas.exceeded(), used)

    def _look(self) -> list[Candidate]:
        """Return the groups that may be drawn now, and note which signers are kept out."""
        if not self.asked.count:
            return []
        draws = self.draws
        signers = {*draws.buffer.signers, *(candidate.peer for candidate in self._drawn.values())}
        self._set_aside = draws.slow_signers.set_aside(self.round_number) & signers
        self._revoked = frozenset(draws.peers.revoked(signers))
        self._candidates = draws.buffer.candidates(time.time(), self.round_number)
        return list(self._candidates)

    def _left(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates that may still be drawn: their questions were not, and their signers may be."""
        not_drawn = self.liars | self._revoked | self._set_aside | self._spent
        drawn = {candidate.question for candidate in self._drawn.values()}
        return [
            candidate for candidate in candidates if candidate.peer not in not_drawn and candidate.question not in drawn
        ]

    def _draw(self, candidates: Sequence[Candidate]) -> bool:
        """Draw groups for the free slots; tell whether any was drawn.

        If a task scores in worker processes, scoring begins at once.
        """
        of_group = self._choose(candidates)
        self._drawn |= {candidate.id: candidate for candidate in candidates if candidate.id in of_group}
        for key, group in self.draws.buffer.read(of_group).items():
            candidate = self._drawn[key]
            if self.quotas.spent([candidate.peer]):
                self._spent.add(candidate.peer)
                self.left_out["late"] += len(of_group[key])
                continue
            try:
                with self.quotas.making(candidate.peer):
                    question = rebuild(group, self.draws.tasks, self.draws.encode_prompt)
            except GroupError as error:
                self.refused.append(RefusedGroup(key, candidate.peer, error.reason))
                continue
            places = sorted({place for pick in of_group[key] for place in pick.rests_on})
            quota = None
            if submit_of(question.task) is not None:
                quota = self.quotas.of(candidate.peer, group.task.name, len(places))
                self.draws.note_question(question)
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
        offered = self._left(candidates) if asked.count else []
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

    def _asked_now(self) -> DrawRequest:
        """Return what the rule is asked for now: a group for each free slot, within the round's bounds."""
        free = self.asked.count - len(self.usable) - len(self._pending)
        room = MAX_DRAWN_PER_SLOT * self.asked.count - len(self._drawn)
        share, signers, most = self.draws.sampling.max_signer_share, len(self.draws.buffer.signers), None
        if share and signers:
            most = math.ceil(share * self.asked.count / signers)
        taken = Counter(candidate.peer for candidate in self._drawn.values())
        return replace(self.asked, count=max(min(free, room), 0), per_signer=most, taken=taken)

    def _answers(self) -> list[Answer]:
        return [answer for pending in self._pending for answer in pending.answers]

    def _decide(self, seconds: float) -> None:
        """Decide on each drawn group by the verdicts that are there after `seconds`; the others are late."""
        drawn, scoring, answers = self._pending, self._scoring, self._answers()
        self._pending, self._scoring = [], None
        if drawn:
            verdicts = iter((scoring or Scoring(answers, is_own=False)).wait(seconds))
            if scoring is not None:
                offered = [*self._candidates, *(pending.candidate for pending in drawn)]
                self._spent.update(self.quotas.spent({candidate.peer for candidate in offered}))
            true: list[_PendingGroup] = []
            for pending in drawn:
                signer = pending.candidate.peer
                answered = [next(verdicts) for _ in pending.places]
                if signer in self._revoked:
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
            self._admit(true)
        distrusted = self.liars | self._revoked
        self.usable = {key: group for key, group in self.usable.items() if self._drawn[key].peer not in distrusted}
        self.picks = [pick for pick in self.picks if pick.id in self.usable]

    def _admit(self, true: Sequence[_PendingGroup]) -> None:
        """Take the picks of true groups that may be trained on; refuse a group of which none is left.

        If a group has picks with a positive advantage, one of these must be left. The first of them gives the reason.
        """
        draws = self.draws
        tokens: dict[Place, Tokens] = {}
        why: dict[Place, str] = {}
        asked: list[tuple[Place, ScoredRow]] = []
        for pending in true:
            prompt = pending.question.prompt
            for pick in pending.picks:
                place = (pick.id, pick.index)
                episode = pending.group.completions[pick.index]
                encoded = draws.encode(prompt, episode)
                bare = says_nothing_else(pending.question, episode)
                why[place] = "too_long" if encoded is None else self._over_long(pending.group, encoded, bare)
                if not why[place] and not bare and any(map(draws.quotes_held_out, episode.texts[::2])):
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
            self.usable[candidate.id] = EncodedGroup(pending.group, pending.question, picked, id=candidate.id)
            self.picks += good

    def _over_long(self, group: Group, encoded: Tokens, bare: bool) -> str:
        sampling = self.draws.sampling
        if not sampling.max_length_ratio or sampling.source != "peers" or bare:
            return ""
        task = group.task.name
        if task not in self._usual:
            self._usual[task] = self.draws.buffer.own_results.usual_length(task)
        usual = self._usual[task]
        return "over_long" if usual and encoded.sampled > sampling.max_length_ratio * usual else ""

    def _bound_surprise(self, asked: Sequence[tuple[Place, ScoredRow]], why: dict[Place, str]) -> None:
        sampling = self.draws.sampling
        if not sampling.max_surprise or sampling.source != "peers":
            return
        rows = [row for _, row in asked]
        surprises = self.draws.surprises(rows)
        self.tokens_scored += sum(tokens.sampled for _, tokens in rows)
        self.tokens_read += sum(len(prompt) + len(tokens.given) for prompt, tokens in rows)
        why |= {
            place: "too_surprising"
            for (place, _), surprise in zip(asked, surprises, strict=True)
            if not surprise <= sampling.max_surprise  # nan, too
        }

    def _bury(self) -> None:
        """Bury what was refused, groups of signers that are set aside, and those of liars; report it."""
        buffer = self.draws.buffer
        aside = [RefusedGroup(group.id, group.peer, "slow_signer") for group in buffer.of_signers(self._set_aside)]
        refused, self._told = self.refused[self._told :] + aside, len(self.refused)
        buried = [group.id for group in refused]
        if self.liars:
            buried += [group.id for group in buffer.of_signers(self.liars)]
        if buried:
            buffer.bury(buried, self.round_number)
        for group in refused:
            self.draws.peers.refuse(group.id, group.reason)
