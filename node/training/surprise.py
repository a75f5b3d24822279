"""Surprise: how unlikely peers' completions are under this node's policy, in nats a token.

A peer's completion is trained on as if this policy had sampled it, though another one did; no peer's own probability
is known (one that a peer stated could not be checked, and would set its own weight), so no ratio corrects for it. Its
mean negative log-probability here says how far off it is: about the policy's entropy for one of our own, and more the
older or the stranger its maker. The bound `sampling.max_surprise` goes by a completion's least likely token, not by
a mean: see `likelihood.surprise`.
"""

from collections.abc import Callable

import torch


class Surprise:
    """The mean over peers' tokens that a round trains on, under the policy as the round finds it."""

    def __init__(self) -> None:
        self._nats: list[torch.Tensor] = []
        self._tokens: list[torch.Tensor] = []

    def note(self, logps: torch.Tensor, mask: torch.Tensor, external: torch.Tensor) -> None:
        """Add a micro-batch: log-probabilities and mask (B, T), and which rows are peers' (B,)."""
        theirs = mask * external[:, None]
        self._nats.append(-(logps * theirs).sum())
        self._tokens.append(theirs.sum())

    def take(self, total: Callable[[list[float]], list[float]] = list) -> dict[str, float]:
        """Return the round's mean under its metric's name, if there is one, and begin anew.

        `total` sums over the ranks that train the node.
        """
        nats, tokens = total([float(sum(parts)) for parts in (self._nats, self._tokens)])
        self._nats.clear()
        self._tokens.clear()
        return {"swarm/surprise": nats / tokens} if tokens else {}
