"""Scores on held-out questions: the rows of `evaluations.jsonl`, and what a run makes of them.

    {"round": rounds done, "compute": tokens spent until then (`node.training.budget`), without evaluations,
     "time": ..., "seconds": ..., "questions": ..., "completions": ...,
     "accuracy": ..., "accuracy_low": ..., "accuracy_high": ...,    greedy, temperature 0
     "reward": ..., "finished": ..., "mean_length": ...,            greedy
     "pass@1": ..., ..., "pass@8": ..., "pass@8_low": ..., "pass@8_high": ...,    sampled
     "entropy": ..., "right_entropy": ..., sampled: nats a token; of the right answers to a question, where it has some
     "tasks": {"builtin/sums": {"questions": ..., "accuracy": ..., "pass@8": ...}, ...},
     "described": {"loss": ..., ...}}     sampled: TRL's metrics (`node.grpo_metrics`), in a run of `GRPOTrainer`

Intervals are at 95 % and count questions alone. A question's result lies between 0 and 1
whether it is one answer, an estimate of pass@k or a mean over nodes that were asked the same
question, and no such quantity varies more than one answer does: Wilson's interval is exact
enough for the first and on the wide side for the others, however alike the nodes are.
"""

import statistics
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any, NamedTuple

from node.telemetry.metrics_file import Row, number

EVALUATIONS_FILE = "evaluations.jsonl"
PASS = "pass@8"  # the one that summaries speak of
Z_95 = statistics.NormalDist().inv_cdf(0.975)  # two-sided, 95 %
Interval = tuple[float, float]


def wilson_interval(successes: float, trials: int) -> Interval:
    """Return the 95 % interval of a rate from `successes` in `trials` (Wilson, 1927)."""
    rate = successes / trials
    square = Z_95**2 / trials
    centre = (rate + square / 2) / (1 + square)
    margin = sqrt(square * (rate * (1 - rate) + square / 4)) / (1 + square)
    return max(0.0, centre - margin), min(1.0, centre + margin)


def first_and_last(nodes: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Return `accuracy_first`, `pass8_first`, ..., `pass8_last_interval`: means over the nodes' evaluation rows.

    None where nothing was measured; a node's only evaluation is its first, not its last.
    """
    firsts = [rows[0] for rows in nodes if rows]
    lasts = [rows[-1] for rows in nodes if len(rows) > 1]
    figures: dict[str, Any] = {}
    for name, key in (("accuracy", "accuracy"), ("pass8", PASS)):
        for when, rows in (("first", firsts), ("last", lasts)):
            mean, interval = mean_over_nodes(rows, key)
            figures |= {f"{name}_{when}": mean, f"{name}_{when}_interval": interval}
    return figures


def mean_over_nodes(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[float | None, Interval | None]:
    """Return the mean of `key` over one row of each node, all on the same questions, and its interval."""
    measured = [row for row in rows if isinstance(row.get(key), int | float) and row.get("questions")]
    if not measured:
        return None, None
    mean = statistics.fmean(row[key] for row in measured)
    questions = min(int(row["questions"]) for row in measured)
    return mean, wilson_interval(mean * questions, questions)


class EvaluationPoint(NamedTuple):
    """A swarm's evaluation after `round` rounds: tokens that its nodes generated until then, mean rate, interval."""

    round: int
    tokens: int
    rate: float
    low: float
    high: float


def evaluation_curve(nodes: Sequence[tuple[Sequence[Row], Sequence[Row]]], key: str) -> list[EvaluationPoint]:
    """Return the mean of `key` at each evaluation that at least half of the nodes have done.

    Args:
        nodes: each node's metrics rows and evaluation rows.
        key: of an evaluation row, "accuracy", say.
    """
    at: dict[int, list[Row]] = {}
    for _, evaluated in nodes:
        for row in evaluated:
            at.setdefault(row["round"], []).append(row)
    curve = []
    for done, rows in sorted(at.items()):
        rate, interval = mean_over_nodes(rows, key)
        if rate is not None and interval is not None and 2 * len(rows) >= len(nodes):
            before = [row for metrics, _ in nodes for row in metrics if row["round"] <= done]
            tokens = int(sum(number(row, "tokens_generated") for row in before))
            curve.append(EvaluationPoint(done, tokens, rate, *interval))
    return curve
