"""Slow texts: each signer has a quota of seconds a round, and its groups are set aside if it exceeds that twice.

Some texts take a verifier as long as it lets them, and whoever sends one spends nothing. So each signer has a quota of
seconds in a round (`RoundQuotas`), by how long this node's own texts take where peers' are scored (`Yardstick`). A
peer's claims and texts have no part in it. A signer chooses the seed of its question, too: making the question here is
charged to the same quota, by how long this node's own questions take.

A round in which a signer exceeds its quota is a strike (`SlowSigners`). `OWED` rounds within its quota pay for it; a
second strike before that sets the signer's groups aside for `ASIDE` rounds. A round in which this machine was slow for
its own texts is no strike for anybody.

Identities are free. So all signers without standing have together what `NEWCOMERS` of them have, and their texts are
scored after those of the others. A signer has standing once a round used a group of it, within its quota.

All of it is forgotten when the node stops.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TypeVar

from node.rollouts.group_buffer import OWN
from node.tasks.scoring.time_quota import TimeQuota
from node.tasks.scoring.verdicts import Answer, Verdict, submit_of

BASE_S = 2.0  # of a signer's quota, however few its texts: a busy machine may pause for as long
TIMES = 4.0  # what a text of a peer may take, in times of what an own one does: answers differ in length
LEAST_TEXT_S = 1 / 16  # taken as an own text's time where it takes less: more than a cage does on two busy cores
NEWCOMERS = 2.0  # one hostile newcomer exceeds its own quota before it has spent what all of them have
OWED = 8  # rounds: so one strike in nine rounds is the most that goes on unpunished
ASIDE = 64  # rounds: with two strikes before, a signer slows 2 rounds of 66
MEASURED = 8  # of this node's own texts, by task: a median of so many holds against a slow one
MOST_SIGNERS = 4096  # that are remembered in each way: identities are free


V = TypeVar("V")


class SlowSigners:
    """Remembers which signers have standing, owe rounds, or are set aside; rounds are numbered from 1. Pure."""

    def __init__(self) -> None:
        self._standing: dict[str, None] = {}
        self._owes: dict[str, int] = {}  # rounds within the quota
        self._until: dict[str, int] = {}  # the first round that scores the signer's groups again

    def has_standing(self, signer: str) -> bool:
        """Tell whether a signer's texts need not share one quota with others'. This node itself has standing."""
        return signer in self._standing or signer == OWN

    def set_aside(self, round_number: int) -> frozenset[str]:
        """Return the signers whose groups this round does not score."""
        self._until = {signer: until for signer, until in self._until.items() if round_number < until}
        return frozenset(self._until)

    def settle(self, round_number: int, exceeded: Collection[str], used: Iterable[str]) -> None:
        """Take note of the signers that exceeded their quota in a round, and of those whose groups it used."""
        for signer in exceeded:
            self._standing.pop(signer, None)
            if self._owes.pop(signer, 0):
                _keep(self._until, signer, round_number + 1 + ASIDE)
            else:
                _keep(self._owes, signer, OWED)
        for signer in set(used).difference(exceeded):
            owed = self._owes.pop(signer, 0) - 1
            if owed > 0:
                _keep(self._owes, signer, owed)
            else:
                _keep(self._standing, signer, None)


def _keep(kept: dict[str, V], signer: str, value: V) -> None:
    """Put the newest last, and forget the oldest beyond `MOST_SIGNERS`."""
    kept.pop(signer, None)
    kept[signer] = value
    if len(kept) > MOST_SIGNERS:
        del kept[next(iter(kept))]


class RoundQuotas:
    """The quotas of the signers of one round's texts.

    Args:
        has_standing: tells whether a signer has standing.
        yardstick: says what own texts take where peers' are scored, and own questions. Texts of a task of which it says
            nothing have no quota.
    """

    def __init__(self, has_standing: Callable[[str], bool], yardstick: "Yardstick") -> None:
        self._has_standing = has_standing
        self._usual = yardstick.usual
        self._making = yardstick.making
        self._clock = yardstick.clock
        self._newcomers = TimeQuota(0.0)
        self._quotas: dict[str, TimeQuota] = {}

    def of(self, signer: str, task: str, texts: int) -> TimeQuota:
        """Return the quota of a signer, raised by what so many more texts of a task may take."""
        return self._raised(signer, texts * TIMES * max(self._usual.get(task, math.inf), LEAST_TEXT_S))

    @contextmanager
    def making(self, signer: str) -> Iterator[None]:
        """Charge the making of a question to its signer; nothing while it is not known what own ones take."""
        if self._making is None:
            yield
            return
        quota = self._raised(signer, TIMES * self._making)
        quota.begin(self._clock())
        try:
            yield
        finally:
            quota.end(self._clock())

    def _raised(self, signer: str, seconds: float) -> TimeQuota:
        if signer not in self._quotas:
            self._quotas[signer] = TimeQuota(BASE_S, None if self._has_standing(signer) else self._newcomers)
        quota = self._quotas[signer]
        quota.seconds += seconds
        if quota.within is not None:
            quota.within.seconds = max(quota.within.seconds, NEWCOMERS * quota.seconds)
        return quota

    def spent(self, signers: Iterable[str]) -> list[str]:
        """Return those of `signers` of whom no further text is begun in this round."""
        now = self._clock()
        newcomers = any(quota.within for quota in self._quotas.values()) and self._newcomers.is_spent(now)
        return [
            signer
            for signer in signers
            if (signer in self._quotas and self._quotas[signer].is_spent(now))
            or (newcomers and not self._has_standing(signer))
        ]

    def exceeded(self) -> set[str]:
        """Return the signers that have spent their own quota."""
        now = self._clock()
        return {signer for signer, quota in self._quotas.items() if quota.is_exceeded(now)}


class Yardstick:
    """Measures how long this node's own texts take where peers' are scored, and how long its questions take to be made.

    Args:
        clock: that of worker processes, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._seconds: dict[str, deque[float]] = {}
        self._asked: dict[str, tuple[TimeQuota, Future[Verdict]]] = {}
        self._made: deque[float] = deque(maxlen=MEASURED)

    @property
    def making(self) -> float | None:
        """The seconds that making a question takes; None while none was made."""
        return statistics.mean(self._made) if self._made else None

    @contextmanager
    def own_questions(self, count: int) -> Iterator[None]:
        """Measure the making of so many of this node's own questions."""
        began = self.clock()
        yield
        self._made.append((self.clock() - began) / max(1, count))

    @property
    def usual(self) -> dict[str, float]:
        """The seconds that a text takes, by task, of each task of which one was measured."""
        return {task: statistics.median(seconds) for task, seconds in self._seconds.items()}

    def measure(self, answers: Mapping[str, Answer]) -> None:
        """Have an answer of each of these tasks scored as peers' are, unless the one before still waits.

        It is asked twice: what is asked first of a new worker may wait for what is imported then.
        """
        for task, answer in answers.items():
            submit = submit_of(answer.task)
            if submit is not None and task not in self._asked:
                quota = TimeQuota()
                with suppress(Exception):  # then nothing is measured; a peer's text will say what fails
                    _, second = submit([answer.asked, answer.asked._replace(quota=quota)], False)
                    self._asked[task] = quota, second

    def is_slow(self) -> bool:
        """Take what was measured; tell whether a text took longer than a peer's might have."""
        is_slow, now, usual = False, self.clock(), self.usual
        for task, (quota, future) in list(self._asked.items()):
            seconds = quota.spent(now)
            is_slow |= seconds > BASE_S + TIMES * max(usual.get(task, math.inf), LEAST_TEXT_S)
            if future.done():
                del self._asked[task]
                if seconds:
                    self._seconds.setdefault(task, deque(maxlen=MEASURED)).append(seconds)
        return is_slow
