"""A node's rounds with its swarm: ask, score, publish, receive, draw. Its loop goes by this, and `Exchange` does.

    own      ask -> (answered by whoever holds this) -> score -> publish
    peers'   receive -> buffer -> candidates -> screened (node.rollouts.screening)
                 -> refused: buried, and its signer reported if it lied
                 -> usable: a use of it is recorded, once it is taken

A draw begins, fills and takes. It may fill several times before it takes, as groups come. A draw that is not taken has
used nothing. Nothing here waits, but for verdicts. One thread owns it.
"""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from node.rollouts.group import EncodedGroup, Group
from node.rollouts.group_buffer import GroupBuffer, as_received
from node.rollouts.own_results import own_result
from node.rollouts.rule import Candidate, DrawRequest, Rule, Scale
from node.rollouts.rules import RULES
from node.rollouts.screening import Barred, RefusedGroup, Screening, ScreeningContext
from node.rollouts.slow_texts import RoundQuotas, SlowSigners, Yardstick
from node.swarm.sharing import GroupExchange, published_form, traffic_row
from node.tasks import TaskKey, derive_seed
from node.tasks.scoring.verdicts import Answer, MaybeLate, Scoring
from node.tasks.task_set import TrainingQuestion


@dataclass(slots=True)
class SwarmRounds:
    """A node's side of its swarm, or of none.

    Args:
        seed: the node's: from it follow the questions that it asks, and what it draws.
        context: of the screening, with the tasks and the bounds on what a peer may teach.
        buffer: that holds peers' groups.
        exchange: that carries groups, and is told of refused ones and of the demand.
        now: the time, Unix seconds.
        find_barred: calls its argument, which returns signers that are kept out.
        note_refused: is told of each refused group.
        slow_signers: remembers whose texts took too long.
        yardstick: says how long a text of this node's own takes.
    """

    seed: int
    context: ScreeningContext
    buffer: GroupBuffer
    exchange: GroupExchange
    now: Callable[[], float] = time.time
    find_barred: Barred = lambda find: find()
    note_refused: Callable[[RefusedGroup], None] = lambda refused: None
    slow_signers: SlowSigners = field(default_factory=SlowSigners)
    yardstick: Yardstick = field(default_factory=Yardstick)

    def ask(self, number: int) -> TrainingQuestion | None:
        """Return question `number` (from 0) of this node, never a held-out one; None if none that fits is found.

        Raises:
            UserError: the task whose turn it is raises for every seed.
        """
        return self.context.tasks.ask(self.seed, number, lambda item: self.context.encode_prompt(item) is not None)

    def score(self, answers: Sequence[Answer], seconds: float = math.inf) -> list[MaybeLate]:
        """Return the verdict on each own answer, or that it is late, within `seconds`."""
        return self.context.judged(Scoring(answers, is_own=True).wait, seconds)

    def publish(self, groups: Sequence[Group]) -> int:
        """Offer own groups to the swarm, none of a task that is not shared; return how many were sent."""
        return self.exchange.publish([group for group in groups if self.context.tasks.shared(group.task) is not None])

    def receive(self, round_number: int, own: Sequence[Group] = ()) -> None:
        """Put what came from peers into the buffer, to be drawn from this round on.

        Where `sampling.source` says so, this round's `own` groups take their place, from the next round on.
        """
        received = self.exchange.receive(self.buffer.__contains__)
        now, sampling = self.now(), self.context.sampling
        if sampling.source == "self":
            mine = [as_received(shared, now) for group in own if (shared := published_form(group, self.context.tasks))]
            self.buffer.add(mine, now, first_round=round_number + 1)
        elif sampling.external:
            self.buffer.add(received, now, first_round=round_number)

    def begin(
        self, round_number: int, count: int, completions: int, scale: Scale, rule: Rule | None = None
    ) -> Screening:
        """Return the screening of a new round's draw of at most `count` groups; nothing is drawn yet.

        They are drawn by `rule`, or else by the one of the configuration.
        """
        self.exchange.begin_round(count if self.context.sampling.source == "peers" else 0)
        rng = random.Random(derive_seed(self.seed, "draw", round_number - 1))
        asked = DrawRequest(count, completions, scale, rng, self.buffer.own_results.reward)
        quotas = RoundQuotas(self.slow_signers.has_standing, self.yardstick.usual)
        rule = rule or RULES[self.context.sampling.rule]
        return Screening(self.context, rule, asked, len(self.buffer.signers), quotas)

    def candidates(self, screening: Screening, round_number: int) -> list[Candidate]:
        """Return the groups that the round may draw, and tell the screening which signers are kept out."""
        if not screening.asked.count:
            return []
        signers = {*self.buffer.signers, *screening.signers_drawn}
        set_aside = self.slow_signers.set_aside(round_number)
        screening.set_aside = frozenset(self.find_barred(lambda: list(signers & set_aside)))
        screening.revoked = frozenset(self.find_barred(lambda: self.exchange.revoked(signers)))
        return self.buffer.candidates(self.now(), round_number)

    def record_own(self, round_number: int, own: Sequence[EncodedGroup]) -> None:
        """Record how long and how good the answers of this round's own groups are: peers' are measured by them."""
        self.buffer.record_own_results(
            round_number,
            [
                own_result(
                    encoded.group.task.name,
                    [encoded.completions[index].sampled for index in range(len(encoded.group.completions))],
                    encoded.group.rewards,
                )
                for encoded in own
            ],
        )

    def fill(self, screening: Screening, round_number: int, seconds: float) -> list[Candidate]:
        """Fill the round's slots from what the buffer holds, within `seconds`; return what could be drawn.

        What is refused is buried and reported, and so are the groups of signers that are set aside. The liars' other
        groups are buried.
        """
        screening.signers = len(self.buffer.signers)
        candidates = self.candidates(screening, round_number)
        screening.fill(candidates, self.buffer.own_results, seconds)
        self._refuse(screening, round_number)
        return candidates

    def take(self, screening: Screening, round_number: int, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Record a use of each usable group now, and return them; `candidates` are what could be drawn.

        The exchange is told how much was drawn and how much is left: the demand follows. Signers whose texts took too
        long are noted, unless this node's own did, too.
        """
        used = screening.used
        screening.taken_at = self.now()
        self.buffer.use(used, round_number, screening.taken_at)
        if not self.yardstick.is_slow():
            self.slow_signers.settle(round_number, screening.quotas.exceeded(), {group.peer for group in used})
        left = sum(candidate.informative for candidate in screening.left(candidates))
        self.exchange.drew(len(used), left, self._asks_for_easy(screening))
        return used

    def figures(self) -> dict[str, Any]:
        """Return the swarm's part of a round's row of metrics."""
        taught = self.exchange.taught()
        counts = {"swarm/buffer": len(self.buffer), **traffic_row(self.exchange.traffic())}
        return counts | ({"swarm/taught": taught} if taught else {})

    def finish(self, row: Mapping[str, Any], model: str) -> None:
        """Note that a round of `model` is done, with its metrics: a report to the swarm may be due."""
        self.exchange.finished(row, model)

    def _refuse(self, screening: Screening, round_number: int) -> None:
        aside = self.buffer.of_signers(screening.set_aside)
        refused = screening.newly_refused() + [RefusedGroup(group.id, group.peer, "slow_signer") for group in aside]
        buried = [group.id for group in refused]
        if screening.liars:
            buried += [group.id for group in self.buffer.of_signers(screening.liars)]
        if buried:
            self.buffer.bury(buried, round_number)
        for group in refused:
            self.exchange.refuse(group.id, group.reason)
            self.note_refused(group)

    def _asks_for_easy(self, screening: Screening) -> frozenset[TaskKey]:
        """Return the tasks of which this node draws groups that are all right."""
        own, tasks = self.buffer.own_results, self.context.tasks.tasks
        return frozenset(task.key for task in tasks if own.reward(task.key.name) < screening.rule.easy_below)
