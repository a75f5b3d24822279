"""Counts what a node has spent: `rounds`, or a `[budget]` in tokens, ends its run.

    generated    tokens of its own completions
    trained      tokens of completions, own and peers', that an update was computed on, once for each iteration
    scored       tokens whose likelihood was computed for `sampling.max_surprise`
    prompts      tokens that are read and not trained on, of prompts and observations: once for a question that is
                 asked and for a text that is scored, three times for a group that is trained on, in each iteration
    compute      generated + scored + prompts + 3 x trained

A token passes forward through the model to be generated or scored, and forward and backward to be trained on; the
backward pass costs two forward ones (Kaplan et al., arXiv 2001.08361, section 2.1). A prompt counts once for all
completions to it, as engines with a prefix cache and our update compute it. Evaluations are left out, and completions
that `trainer.trl.mask_truncated_completions` takes out of an update count all the same.

A node ends with the round that reaches its budget, so it may spend up to one round more. What it has spent is
the sum over the rows of its metrics.jsonl that count: rounds that are done again count once, and a run that was killed
ends with the same round as one that was not.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from node.config import NodeConfig

COUNTED = ("round", "tokens_generated", "tokens_trained", "tokens_scored", "tokens_prompts")  # keys of a row
TRAINED_COST = 3  # forward passes that training on a token costs: one, and a backward pass of two


class Spent(NamedTuple):
    """Tokens that a node has generated, trained on and scored, and those of prompts, as often as they were read."""

    generated: int = 0
    trained: int = 0
    scored: int = 0
    prompts: int = 0

    @property
    def compute(self) -> int:
        """All, in tokens that pass forward through the model."""
        return self.generated + self.scored + self.prompts + TRAINED_COST * self.trained

    def after(self, row: Mapping[str, Any]) -> "Spent":
        """Return what is spent after one more round, of metrics `row`."""
        return Spent(
            self.generated + row.get("tokens_generated", 0),
            self.trained + row.get("tokens_trained", 0),
            self.scored + row.get("tokens_scored", 0),
            self.prompts + row.get("tokens_prompts", 0),
        )

    def before(self, row: Mapping[str, Any]) -> "Spent":
        """Return what was spent one round earlier, if the newest round has metrics `row`."""
        return Spent(*(now - then for now, then in zip(self, Spent().after(row), strict=True)))


def spent_by(node: Mapping[str, Any]) -> Spent:
    """Return what a node has spent, by its part of a run's summary, of which older ones lack some."""
    return Spent().after(node)


def spent_in(rows: Iterable[Mapping[str, Any]]) -> Spent:
    """Return what the rounds of these metrics rows have spent."""
    spent = Spent()
    for row in rows:
        spent = spent.after(row)
    return spent


def part_done(config: NodeConfig, rounds: int, spent: Spent) -> float:
    """Return which part of its run lies behind a node, by the bound that it is nearest to; 1 or more at its end."""
    parts = [rounds / config.last_round]
    if config.budget.generated_tokens is not None:
        parts.append(spent.generated / config.budget.generated_tokens)
    if config.budget.compute is not None:
        parts.append(spent.compute / config.budget.compute)
    return max(parts)


class RunProgress(NamedTuple):
    """How far a run has come: rounds done, which part of it that is, which part it was a round ago, compute spent."""

    rounds: int
    before: float
    part: float
    compute: int

    @property
    def at_an_end(self) -> bool:
        """Whether this is before the first round, or after the last."""
        return self.rounds == 0 or self.part >= 1


def progress(config: NodeConfig, rounds: int, spent: Spent, newest: Mapping[str, Any]) -> RunProgress:
    """Return how far a node is that has done `rounds` rounds, the last with metrics `newest`, and spent that much."""
    before = part_done(config, rounds - 1, spent.before(newest))
    return RunProgress(rounds, before, part_done(config, rounds, spent), spent.compute)


def is_done(config: NodeConfig, rounds: int, spent: Spent) -> bool:
    """Tell whether a node that has done `rounds` rounds and spent that much is at its end."""
    return part_done(config, rounds, spent) >= 1
