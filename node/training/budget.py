"""Counts what a node has spent: `rounds`, or a `[budget]` in tokens, ends its run.

    generated    tokens of its own completions
    trained      tokens of completions, own and peers', that an update was computed on, once for each iteration
    scored       tokens whose likelihood was computed for `sampling.max_surprise`
    compute      generated + scored + 3 x trained

A token passes forward through the model to be generated or scored, and forward and backward to be trained on; the
backward pass costs two forward ones (Kaplan et al., arXiv 2001.08361, section 2.1). Prompts and evaluations
are left out, and completions that `trainer.trl.mask_truncated_completions` takes out of an update count all the same.

A node ends with the round that reaches its budget, so it may spend up to one round more. What it has spent is
the sum over the rows of its metrics.jsonl, which a restart cuts back to the checkpoint: the rounds that are done again
count once, and a run that was killed ends with the same round as one that was not.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from node.config import BudgetConfig, NodeConfig

TRAINED_COST = 3  # forward passes that training on a token costs: one, and a backward pass of two


class Spent(NamedTuple):
    """Tokens that a node has generated, trained on and scored."""

    generated: int = 0
    trained: int = 0
    scored: int = 0

    @property
    def compute(self) -> int:
        """All, in tokens that pass forward through the model."""
        return self.generated + self.scored + TRAINED_COST * self.trained

    def after(self, row: Mapping[str, Any]) -> "Spent":
        """Return what is spent after one more round, of metrics `row`."""
        return Spent(
            self.generated + row.get("tokens_generated", 0),
            self.trained + row.get("tokens_trained", 0),
            self.scored + row.get("tokens_scored", 0),
        )


def spent_by(node: Mapping[str, Any]) -> Spent:
    """Return what a node has spent, by its part of a run's summary, of which older ones lack the tokens scored."""
    return Spent(node["tokens_generated"], node["tokens_trained"], node.get("tokens_scored", 0))


def spent_in(rows: Iterable[Mapping[str, Any]]) -> Spent:
    """Return what the rounds of these metrics rows have spent."""
    spent = Spent()
    for row in rows:
        spent = spent.after(row)
    return spent


def is_reached(budget: BudgetConfig, spent: Spent) -> bool:
    """Tell whether one of the bounds of `budget` is reached."""
    bounds = ((budget.generated_tokens, spent.generated), (budget.compute, spent.compute))
    return any(bound is not None and bound <= so_far for bound, so_far in bounds)


def is_done(config: NodeConfig, rounds: int, spent: Spent) -> bool:
    """Tell whether a node that has done `rounds` rounds and spent that much is at its end."""
    return rounds >= config.last_round or is_reached(config.budget, spent)
