"""A member of `benchmarks.unlike_lines`: it reduces by the algorithm that it is told."""

from typing import Any
from unittest.mock import patch

import torch

from benchmarks import allreduce_rank
from benchmarks.rank_commands import serve
from benchmarks.unlike_lines import GROUP, MEMBERS
from collectives import Op
from collectives.reduce.topology import TRIED, SumPlan
from protocol.identity import Identity

DIGITS = "234567abcdefghijklmnopqrstuvwxyz"  # of an id, in the order in which ids are sorted


class Rank(allreduce_rank.Rank):
    """See `rank_commands`."""

    def identity(self, listen: str) -> Identity:
        """Return a key whose id is in the part of all ids that is this rank's."""
        number = int(listen.rpartition(":")[0].rpartition(".")[2]) - 1
        while True:
            identity = Identity.generate()
            if DIGITS.index(identity.node_id[0]) * MEMBERS // len(DIGITS) == number:
                return identity

    def steps(self, rank: int) -> dict[str, Any]:
        """Take steps until all lines are measured and both ways were tried."""
        group = self._groups[GROUP]
        with patch("collectives.reduce.topology.MEASURE_AFTER", 1):
            for _ in range(1 + 2 * TRIED):
                group.run(lambda comm: comm.all_reduce(self._values, op=Op.SUM, out=self._buffer, timeout=60.0))
        self._measured = group._known.plan  # nobody else needs it
        tour = [group.members.index(member) for member in self._measured.tour]
        return {"tour": tour, "chose": "ring, measured" if group.ring else "direct, measured"}

    def reduce(self, impl: str, codec: str) -> None:
        """Sum up, in place."""
        group = self._groups[GROUP]
        known = self._measured
        group._known.plan = {
            "direct": SumPlan(),
            "direct, measured": SumPlan(tour=known.tour, capacity=known.capacity),
            "ring": SumPlan(tour=group.members, by_ring=True),
            "ring, measured": SumPlan(tour=known.tour, by_ring=True),
        }[impl]
        super().reduce(GROUP, codec)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Rank())
