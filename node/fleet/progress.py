"""How far a running node is, kept up to date from the metrics rows that it writes."""

from collections.abc import Iterable
from typing import NamedTuple

from node.telemetry.metrics_file import RECENT, Row, number
from node.training.budget import Spent


class RoundPoint(NamedTuple):
    """One round as a display needs it, with running totals of the groups trained on and of tokens."""

    round: int
    reward: float
    local: int
    external: int
    spent: Spent


class NodeProgress:
    """Figures of one node; small, so that a long run does not fill the supervisor's memory."""

    def __init__(self, rounds: int | None) -> None:
        """Start before the first of `rounds` rounds; None for a node without a last one."""
        self.rounds = rounds
        self.points: list[RoundPoint] = []
        self.last: Row = {}

    @property
    def round(self) -> int:
        """The last finished round, 0 before the first."""
        return self.points[-1].round if self.points else 0

    @property
    def spent(self) -> Spent:
        """The tokens that the finished rounds have spent."""
        return self.points[-1].spent if self.points else Spent()

    def update(self, rows: Iterable[Row]) -> None:
        """Take new rows; one of round r replaces what is known from r on (a node resumed there)."""
        for row in rows:
            while self.points and self.points[-1].round >= row["round"]:
                self.points.pop()
            local, external = self.points[-1][2:4] if self.points else (0, 0)
            self.points.append(
                RoundPoint(
                    row["round"],
                    number(row, "reward"),
                    local + int(number(row, "groups_local")),
                    external + int(number(row, "groups_external")),
                    self.spent.after(row),
                )
            )
            self.last = row

    def reward(self, window: int = RECENT) -> float:
        """Return the mean reward of the last `window` rounds, 0 before the first."""
        recent = self.points[-window:]
        return sum(point.reward for point in recent) / len(recent) if recent else 0.0
