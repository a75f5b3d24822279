"""Error feedback: what a lossy codec loses of a member's contribution is added to its next one.

Whatever error a member put into the sum (when it encoded its values, a partial sum, or as owner
the result) it adds, in units of its own contribution, to what it contributes next time. So errors
do not pile up over steps: with steps small against values, the mean of the results tends to that
of the exact ones (1-bit SGD, Seide et al. 2014; Karimireddy et al. 2019, "Error feedback fixes SignSGD").

The caller holds one object for each tensor that it reduces again and again, with SUM or AVG.
"""

import torch

from collectives.errors import BadArgument
from collectives.types import Op


class Feedback:
    """The residual of one tensor, kept across calls. It changes only when an operation commits."""

    def __init__(self) -> None:
        self.residual: torch.Tensor | None = None
        self._next: torch.Tensor | None = None

    def start(self, flat: torch.Tensor, op: Op, work: torch.dtype) -> torch.Tensor:
        """Return the values plus the residual, and begin to collect the next.

        Raises:
            BadArgument: there is no such thing for this operation, or the tensor had another size before.
        """
        if op not in (Op.SUM, Op.AVG):
            raise BadArgument(f"error feedback with {op.name}: it is for SUM and AVG only")
        if self.residual is not None and self.residual.numel() != flat.numel():
            raise BadArgument(
                f"error feedback of {self.residual.numel()} values for a tensor of {flat.numel()}: "
                "keep one Feedback for each tensor"
            )
        self._next = torch.zeros(flat.numel(), dtype=work)
        return flat.to(work) if self.residual is None else flat.to(work) + self.residual.to(work)

    def lost(self, first: int, wanted: torch.Tensor, got: torch.Tensor, factor: float = 1.0) -> None:
        """Note that `got` was used in place of `wanted`, from value `first` on; `factor` makes it our units."""
        if self._next is not None:
            # NaN and infinity arrive as they are: there is nothing to make good.
            error = torch.nan_to_num((wanted - got).mul_(factor), nan=0.0, posinf=0.0, neginf=0.0)
            self._next[first : first + wanted.numel()] += error

    def commit(self) -> None:
        """The operation counted: keep what it lost for the next."""
        if self._next is not None:
            self.residual, self._next = self._next, None

    def abort(self) -> None:
        """The operation did not count: the residual stays."""
        self._next = None
