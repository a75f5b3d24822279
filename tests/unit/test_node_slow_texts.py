"""A slow text costs its signer, and nobody else for long. Workers are fakes, and time passes when they say so."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from node.config import SamplingConfig
from node.processes.worker_process import Message, WorkerTimeoutError
from node.rollouts.draw import Draws
from node.rollouts.group import EncodedGroup, Group, Question, Tokens, content_id, encode, one_turn
from node.rollouts.rule import Candidate, mean_advantages
from node.rollouts.rules import RULES
from node.rollouts.screening import BLAMELESS
from node.rollouts.slow_texts import (
    ASIDE,
    BASE_S,
    LEAST_TEXT_S,
    MOST_SIGNERS,
    NEWCOMERS,
    OWED,
    TIMES,
    SlowSigners,
    Yardstick,
)
from node.tasks import Item, TaskKey
from node.tasks.questions import Split, question_id
from node.tasks.scoring import verdicts
from node.tasks.scoring.time_quota import TimeQuota
from node.tasks.scoring.verdicts import Answer, Scoring, Submission, Verdict, Workers
from node.tasks.task_set import TaskSet
from tests.fakes.offers import Offers
from tests.locks import WatchedLock, watched
from tests.swarms import UNBOUNDED

LATER = 60.0  # real seconds that a test waits at most
SLOTS = 16
LIMIT_S = 20.0  # what workers give a text


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Scorer:
    """A fake worker's side: a text "1.5 right" takes 1.5 s, and earns 1 as it is "right"."""

    clock: Clock
    start_s: float = 0.0
    asked: list[str] = field(default_factory=list)
    loads: threading.Event | None = None  # until then no worker is ready

    def worker(self, command: Sequence[str], environment: object) -> SimpleNamespace:
        def call(message: Message, timeout: float, most: int = 0, patience: float = 0.0) -> Message:
            if "text" not in message:
                assert self.loads is None or self.loads.wait(LATER)
                self.clock.now += self.start_s
                return {}
            self.asked.append(message["text"])
            seconds, _, text = message["text"].partition(" ")
            self.clock.now += min(float(seconds), timeout)
            if float(seconds) > timeout:
                raise WorkerTimeoutError("no answer")
            return {"reward": float(text == "right")}

        return SimpleNamespace(call=call, kill=lambda: None, dropped=0)


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch) -> Scorer:
    scorer = Scorer(Clock())
    monkeypatch.setattr(verdicts, "time", SimpleNamespace(monotonic=scorer.clock))
    monkeypatch.setattr(verdicts, "WorkerProcess", scorer.worker)
    monkeypatch.setattr(verdicts, "usable_cores", lambda: 1)
    return scorer


class Timed:
    """A task that is scored by fake workers."""

    key = TaskKey("timed", 1, "c")

    def __init__(self) -> None:
        self.own, self.apart = (Workers("timed", "m", {}, LIMIT_S) for _ in range(2))
        self.on_make: Callable[[int], None] = lambda seed: None

    def make(self, seed: int) -> Item:
        self.on_make(seed)
        return Item(f"question {seed}", "0.01 right")

    def verify(self, item: Item, text: str) -> Verdict:
        raise NotImplementedError

    def submit(self, batch: Sequence[Submission], is_own: bool) -> "list[Future[Verdict]]":
        workers = self.own if is_own else self.apart
        return [workers.submit({"text": answer.text}, is_own, answer.quota) for answer in batch]


class Told(NamedTuple):
    """What a round came to: the seconds that all scoring took, the signers of used groups, and who was slow."""

    seconds: float
    used: Counter[str]
    refused: set[str]


@dataclass
class Node:
    """The rounds of a node, as its loop does them, over a buffer of 60 groups that 16 signers made."""

    clock: Clock
    own_text: str = "0.01 right"
    task: Timed = field(default_factory=Timed)
    slow: SlowSigners = field(default_factory=SlowSigners)
    number: int = 0

    def __post_init__(self) -> None:
        self.offers = Offers()
        self.draws = Draws(
            0,
            SamplingConfig(**UNBOUNDED),
            TaskSet([(self.task, 1.0)], Split(1e-6)),
            self.offers,
            self.offers,
            lambda item: (1,),
            lambda prompt, made: Tokens((1, 2)),
            lambda rows: [0.0] * len(rows),
            slow_signers=self.slow,
            yardstick=Yardstick(self.clock),
        )

    def round(
        self, signers: Sequence[str], text_of: Callable[[str], str], *, has_own: bool = True, takes: bool = True
    ) -> Told:
        self.number += 1
        if has_own:
            self.record_own()
        self.offers.groups, self.offers.offered = {}, []
        for at in range(60):
            seed, signer = 100 * self.number + at, signers[at % len(signers)]
            made = (one_turn(text_of(signer), True, 1.0), one_turn("0.01 wrong", True, 0.0))
            group = Group(self.task.key, seed, self.task.make(seed).question, made, "p", 1)
            key = content_id(encode(group))
            self.offers.groups[key] = group
            question = question_id("timed", group.question)
            self.offers.offered.append(Candidate(key, signer, "timed", question, key, 0.0, 1, group.rewards))
        draw = self.draws.begin(self.number, SLOTS, 8, mean_advantages, RULES["positive"])
        began = self.clock.now
        draw.prepare()
        draw.fill(LATER)
        used = Counter(candidate.peer for candidate in (draw.take() if takes else draw.used))
        assert not draw.liars
        return Told(self.clock.now - began, used, {group.sender for group in draw.refused})

    def record_own(self) -> None:
        """Have a group of this node's own, whose texts take as long as `own_text` says."""
        item = self.task.make(0)
        made = (one_turn(self.own_text, True, 1.0), one_turn("0.01 wrong", True, 0.0))
        group = Group(self.task.key, 0, item.question, made, "p", 1)
        tokens = {place: Tokens((1, 2)) for place in range(2)}
        self.draws.record_own(self.number, [EncodedGroup(group, Question(self.task, 0, item, (1,)), tokens)])


def swarm(hostile: int, mark: str = "") -> list[str]:
    return [f"hostile {mark}{at}" if at < hostile else f"honest {at}" for at in range(16)]


def slow_if_hostile(signer: str) -> str:
    return "600 right" if signer.startswith("hostile") else "0.01 right"


def test_a_round_of_honest_signers_is_full_and_none_of_them_pays(scorer: Scorer) -> None:
    node = Node(scorer.clock)
    for _ in range(3):
        told = node.round(swarm(0), slow_if_hostile)
        assert told.used.total() == SLOTS and not told.refused and told.seconds < 1
    assert all(map(node.slow.has_standing, told.used))


@pytest.mark.parametrize("hostile", [1, 2])
def test_a_signer_of_slow_texts_costs_a_few_rounds_its_quota_and_then_nothing(hostile: int, scorer: Scorer) -> None:
    node = Node(scorer.clock)
    told = [node.round(swarm(hostile), slow_if_hostile) for _ in range(12)]
    most = hostile * (BASE_S + 4 * TIMES * LEAST_TEXT_S) + 1.0  # each drew four groups at most, of one text
    assert all(outcome.seconds < most for outcome in told[1:]), "the first round has measured nothing yet"
    assert [outcome.used.total() for outcome in told[1:]] == [SLOTS] * 11, "honest groups fill the slots"
    assert sum(bool(one.refused) for one in told) <= 1 + 2 * hostile
    assert all(outcome.seconds < 1 and not outcome.refused for outcome in told[6:])
    assert node.slow.set_aside(node.number + 1) == set(swarm(hostile)[:hostile])


def test_a_signer_of_questions_that_take_long_to_be_made_costs_two_of_them_and_then_nothing(scorer: Scorer) -> None:
    node = Node(scorer.clock)

    def on_make(seed: int) -> None:
        scorer.clock.now += 4.0 if seed % 100 % 16 == 0 else 0.05

    node.task.on_make = on_make
    with node.draws.yardstick.own_questions(2):
        assert node.task.make(1) and node.task.make(2)
    told = [node.round(swarm(1), lambda signer: "0.01 right") for _ in range(12)]
    assert sum(outcome.seconds > 4.0 for outcome in told) == 2 and max(outcome.seconds for outcome in told) < 8.0
    assert [outcome.used.total() for outcome in told] == [SLOTS] * 12
    assert node.slow.set_aside(node.number + 1) == {"hostile 0"}


def test_a_member_without_own_texts_measures_the_answers_that_its_tasks_give(scorer: Scorer) -> None:
    node = Node(scorer.clock)
    for _ in range(8):
        told = node.round(swarm(2), slow_if_hostile, has_own=False)
    assert told.used.total() == SLOTS and told.seconds < 4 * BASE_S
    assert node.slow.set_aside(node.number + 1) == set(swarm(2)[:2])


def test_what_texts_took_in_a_draw_that_was_not_taken_counts_for_their_signers(scorer: Scorer) -> None:
    node = Node(scorer.clock)
    node.round(swarm(0), slow_if_hostile)
    for _ in range(8):
        node.round(swarm(2), slow_if_hostile, takes=False)
    assert node.slow.set_aside(node.number + 1) == set(swarm(2)[:2])


def test_all_newcomers_together_have_a_quota_and_honest_signers_gain_standing_beside_them(scorer: Scorer) -> None:
    node = Node(scorer.clock)
    node.round(swarm(0), slow_if_hostile)
    for number in range(6):  # half of all signers are hostile, and new in each round
        told = node.round(swarm(8, f"{number} "), slow_if_hostile)
        assert told.seconds < NEWCOMERS * (BASE_S + SLOTS * TIMES * LEAST_TEXT_S) + 1
        assert len(told.refused) <= 3, "once the quota is spent no newcomer's text is begun"
        assert all(signer.startswith("honest") for signer in told.used) and told.used.total() >= SLOTS // 2


def test_no_signer_pays_where_this_nodes_own_texts_are_slow_too(scorer: Scorer) -> None:
    node = Node(scorer.clock)
    node.round(swarm(0), lambda signer: "0.01 right")
    node.own_text = "19 right"
    for _ in range(4):
        node.round(swarm(0), lambda signer: "9 right")
    assert node.slow.set_aside(node.number + 1) == set()
    assert sum(map(node.slow.has_standing, swarm(0))) > 8


def test_texts_of_a_task_that_are_all_slow_are_scored(scorer: Scorer) -> None:
    node = Node(scorer.clock, own_text="5 right")
    for _ in range(4):
        told = node.round(swarm(0), lambda signer: "6 right")
    assert told.used.total() == SLOTS and node.slow.set_aside(node.number + 1) == set()


def test_the_start_of_a_worker_and_its_first_text_are_charged_to_nobody(scorer: Scorer) -> None:
    scorer.start_s = 60.0
    workers, quota = Workers("timed", "m", {}, LIMIT_S), TimeQuota(4.0)
    assert workers.submit({"text": "9 right"}, False, quota).result(LATER) == 1.0
    assert quota.spent(scorer.clock.now) == 0.0
    assert workers.submit({"text": "3 right"}, False, quota).result(LATER) == 1.0
    assert quota.spent(scorer.clock.now) == 3.0


def test_a_text_is_ended_when_its_quota_is_spent_and_the_next_one_is_not_begun(scorer: Scorer) -> None:
    task, quota = Timed(), TimeQuota(4.0)
    asked = [Answer(task, task.make(0), text, quota=quota) for text in ("0 right", "600 right", "0 right")]
    other = Answer(task, task.make(0), "0 right")
    assert Scoring([*asked, other], is_own=False).wait(LATER) == [1.0, None, verdicts.LATE, 1.0]
    assert scorer.asked == ["0 right", "600 right", "0 right"] and quota.spent(scorer.clock.now) == 4.0


def test_newcomers_texts_are_scored_after_those_of_signers_with_standing(scorer: Scorer) -> None:
    task, loads = Timed(), threading.Event()
    scorer.loads = loads
    quotas = {"new": TimeQuota(9.0, TimeQuota(9.0)), "old": TimeQuota(9.0)}
    asked = [Answer(task, task.make(0), f"0 {who}", quota=quotas[who]) for who in ("new", "old", "new", "old")]
    scoring = Scoring(asked, is_own=False)
    loads.set()
    scoring.wait(LATER)
    _, *rest = scorer.asked
    assert rest == sorted(rest, key=lambda text: text == "0 new"), "the first was taken before the others came"
    assert sorted(scorer.asked) == sorted(answer.text for answer in asked)


class WatchedTime(float):
    """A time whose sum with another says whether this thread holds a lock."""

    held: list[bool]
    lock: WatchedLock

    def __neg__(self) -> "WatchedTime":
        return _watched_time(-float(self), self.lock, self.held)

    def __radd__(self, other: float) -> float:
        self.held.append(self.lock.is_mine)
        return other + float(self)


def _watched_time(seconds: float, lock: WatchedLock, held: list[bool]) -> WatchedTime:
    time = WatchedTime(seconds)
    time.held, time.lock = held, lock
    return time


def test_a_quota_is_charged_under_its_lock() -> None:
    held: list[bool] = []
    with watched() as lock:
        quota = TimeQuota(9.0)
    quota.begin(_watched_time(1.0, lock, held))
    quota.end(_watched_time(3.0, lock, held))
    assert held == [True, True] and quota.left(9.0) == 7.0


def test_a_quota_is_charged_while_a_text_runs_and_so_is_the_one_that_it_lies_within() -> None:
    whole = TimeQuota(5.0)
    one, other = TimeQuota(4.0, whole), TimeQuota(4.0, whole)
    one.begin(10.0)
    assert (one.spent(12.0), one.left(12.0), other.left(12.0)) == (2.0, 2.0, 3.0)
    one.end(13.0)
    assert (one.spent(99.0), whole.spent(99.0), other.left(99.0)) == (3.0, 3.0, 2.0)
    assert not one.is_exceeded(99.0) and not one.is_spent(99.0)
    other.begin(99.0)
    assert other.is_spent(101.0) and not other.is_exceeded(101.0) and one.is_spent(101.0)


@pytest.mark.parametrize(
    ("rounds", "aside"),
    [
        ("s", False),
        ("ss", True),
        ("s.......s", True),  # seven rounds within the quota
        ("s........s", False),  # eight pay
        ("s........ss", True),
        ("s s", True),  # a round without it
    ],
)
def test_two_strikes_set_a_signer_aside_unless_it_has_paid_for_the_first(rounds: str, aside: bool) -> None:
    slow = SlowSigners()
    for number, kind in enumerate(rounds, 1):
        slow.settle(number, {"one"} if kind == "s" else set(), {"one"} if kind == "." else set())
    last = len(rounds)
    assert OWED == 8
    assert [bool(slow.set_aside(last + after)) for after in (1, ASIDE)] == [aside, aside]
    assert not slow.set_aside(last + 1 + ASIDE), "it is for a while"
    assert not slow.has_standing("one"), "and it comes back as a newcomer"


def test_a_signer_gains_standing_by_a_group_that_a_round_used_and_loses_it_by_a_strike() -> None:
    slow = SlowSigners()
    assert not slow.has_standing("one") and slow.has_standing("self")
    slow.settle(1, set(), ["one"])
    assert slow.has_standing("one")
    slow.settle(2, {"one"}, ["one"])
    assert not slow.has_standing("one")


def test_as_many_signers_are_remembered_as_may_be_the_newest() -> None:
    slow = SlowSigners()
    slow.settle(1, set(), map(str, range(MOST_SIGNERS + 5)))
    assert sum(slow.has_standing(str(number)) for number in range(MOST_SIGNERS + 5)) == MOST_SIGNERS


def test_set_aside_is_blameless() -> None:
    assert "slow_signer" in BLAMELESS
