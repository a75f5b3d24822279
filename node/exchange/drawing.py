"""A round's draw of peers' groups: what is drawn is screened, lies are reported, and uses are remembered.

    buffer -> candidates -> screened (node.rollouts.screening) -> refused: buried, and its signer reported if it lied
                                                               -> usable: a use of it is recorded, once it is taken

A round begins, fills and takes. It may fill several times before it takes, as groups come. A round that is not taken
has used nothing.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from node.rollouts.own_results import OwnResults
from node.rollouts.replay_buffer import ReplayBuffer
from node.rollouts.rule import Candidate, Draw, Rule
from node.rollouts.screening import Barred, RefusedGroup, Screening, ScreeningContext
from node.rollouts.slow_texts import RoundBudgets, SlowSigners, Yardstick
from node.swarm.sharing import GroupExchange
from node.tasks import TaskKey


@dataclass(frozen=True, slots=True)
class PeerDraw:
    """The parts that every round's draw needs.

    Args:
        context: of the screening.
        buffer: that holds peers' groups.
        exchange: that is told of refused groups and of the demand.
        now: the time, Unix seconds.
        find_barred: calls its argument, which returns signers that are kept out.
        note_refused: is told of each refused group.
        slow_signers: remembers whose texts took too long.
        yardstick: says how long a text of this node's own takes.
    """

    context: ScreeningContext
    buffer: ReplayBuffer
    exchange: GroupExchange
    now: Callable[[], float] = time.time
    find_barred: Barred = lambda find: find()
    note_refused: Callable[[RefusedGroup], None] = lambda refused: None
    slow_signers: SlowSigners = field(default_factory=SlowSigners)
    yardstick: Yardstick = field(default_factory=Yardstick)

    def begin(self, rule: Rule, asked: Draw) -> Screening:
        """Return the screening of a new round, with nothing drawn yet."""
        budgets = RoundBudgets(self.slow_signers.has_standing, self.yardstick.usual)
        return Screening(self.context, rule, asked, len(self.buffer.signers), budgets)

    def candidates(self, screening: Screening, round_number: int) -> list[Candidate]:
        """Return the groups that the round may draw, and tell the screening which signers are kept out."""
        if not screening.asked.count:
            return []
        signers = {*self.buffer.signers, *screening.signers_drawn}
        set_aside = self.slow_signers.set_aside(round_number)
        screening.set_aside = frozenset(self.find_barred(lambda: list(signers & set_aside)))
        screening.revoked = frozenset(self.find_barred(lambda: self.exchange.revoked(signers)))
        return self.buffer.candidates(self.now(), round_number)

    def fill(self, screening: Screening, round_number: int, own: OwnResults, seconds: float) -> list[Candidate]:
        """Fill the round's slots from what the buffer holds, within `seconds`; return what could be drawn.

        What is refused is buried and reported, and so are the groups of signers that are set aside. The liars' other
        groups are buried.
        """
        screening.signers = len(self.buffer.signers)
        candidates = self.candidates(screening, round_number)
        screening.fill(candidates, own, seconds)
        self._refuse(screening, round_number)
        return candidates

    def take(
        self, screening: Screening, round_number: int, now: float, candidates: Sequence[Candidate]
    ) -> list[Candidate]:
        """Record a use of each usable group at `now` (Unix s), and return them; `candidates` are what could be drawn.

        The exchange is told how much was drawn and how much is left: the demand follows. Signers whose texts took too
        long are noted, unless this node's own did, too.
        """
        used = screening.used
        self.buffer.use(used, round_number, now)
        if not self.yardstick.is_slow():
            self.slow_signers.settle(round_number, screening.budgets.exceeded(), {group.peer for group in used})
        left = sum(one.informative for one in screening.left(candidates))
        self.exchange.drew(len(used), left, self._asks_for_easy(screening))
        return used

    def _refuse(self, screening: Screening, round_number: int) -> None:
        aside = self.buffer.of_signers(screening.set_aside)
        refused = screening.newly_refused() + [RefusedGroup(group.id, group.peer, "slow_signer") for group in aside]
        buried = [group.id for group in refused]
        if screening.liars:
            buried += [group.id for group in self.buffer.of_signers(screening.liars)]
        if buried:
            self.buffer.bury(buried, round_number)
        for group in refused:
            self.exchange.report(group.id, group.reason)
            self.note_refused(group)

    def _asks_for_easy(self, screening: Screening) -> frozenset[TaskKey]:
        """Return the tasks of which this node draws groups that are all right."""
        own, tasks = self.buffer.own_results, self.context.tasks.tasks
        return frozenset(task.key for task in tasks if own.reward(task.key.name) < screening.rule.easy_below)
