"""A round's draw of peers' groups: what is drawn is screened, lies are reported, and uses are remembered.

    buffer -> candidates -> screened (node.rollouts.screening) -> refused: buried, and its signer reported if it lied
                                                               -> usable: a use of it is recorded, once it is taken

A round begins, fills and takes. It may fill several times before it takes, as groups come. A round that is not taken
has used nothing.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from node.rollouts.own_results import OwnResults
from node.rollouts.replay_buffer import ReplayBuffer
from node.rollouts.sampling import Candidate, Draw, Rule
from node.rollouts.screening import RefusedGroup, Screening, ScreeningContext
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
        find_revoked: calls its argument, which returns the revoked signers.
        note_refused: is told of each refused group.
    """

    context: ScreeningContext
    buffer: ReplayBuffer
    exchange: GroupExchange
    now: Callable[[], float] = time.time
    find_revoked: Callable[[Callable[[], Sequence[str]]], Sequence[str]] = lambda find: find()
    note_refused: Callable[[RefusedGroup], None] = lambda refused: None

    def begin(self, rule: Rule, asked: Draw) -> Screening:
        """Return the screening of a new round, with nothing drawn yet."""
        return Screening(self.context, rule, asked, len(self.buffer.signers))

    def candidates(self, screening: Screening, round_number: int) -> list[Candidate]:
        """Return the groups that the round may draw, and tell the screening which nodes the owner has revoked."""
        if not screening.asked.count:
            return []
        signers = {*self.buffer.signers, *screening.signers_drawn}
        screening.revoked = frozenset(self.find_revoked(lambda: self.exchange.revoked(signers)))
        return self.buffer.candidates(self.now(), round_number)

    def fill(self, screening: Screening, round_number: int, own: OwnResults, seconds: float) -> list[Candidate]:
        """Fill the round's slots from what the buffer holds, within `seconds`; return what could be drawn.

        What is refused is buried and reported, and so are the liars' other groups buried.
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

        The exchange is told how much was drawn and how much is left: the demand follows.
        """
        used = screening.used
        self.buffer.use(used, round_number, now)
        left = sum(one.informative for one in screening.left(candidates))
        self.exchange.drew(len(used), left, self._asks_for_easy(screening))
        return used

    def _refuse(self, screening: Screening, round_number: int) -> None:
        refused = screening.newly_refused()
        buried = [one.id for one in refused]
        if screening.liars:
            buried += [one.id for one in self.buffer.of_signers(screening.liars)]
        if buried:
            self.buffer.bury(buried, round_number)
        for one in refused:
            self.exchange.report(one.id, one.reason)
            self.note_refused(one)

    def _asks_for_easy(self, screening: Screening) -> frozenset[TaskKey]:
        """Return the tasks of which this node draws groups that are all right."""
        own, tasks = self.buffer.own_results, self.context.tasks.tasks
        return frozenset(task.key for task in tasks if own.reward(task.key.name) < screening.rule.easy_below)
