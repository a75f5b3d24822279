"""Every metric, declared once: its name, its unit, its meaning, how it is combined, and where it is shown.

A metric is a key in a round's row of `metrics.jsonl`. All that shows metrics goes by this table:

    summary.json                  `Display.SUMMARY`     the report, a small plot each    `Display.REPORT`
    the dashboard, a curve each   `Display.DASHBOARD`   a swarm's board                  `Display.BOARD`
    /metrics for Prometheus, and a panel of examples/grafana.json                      `exported`
    the reference, reference/metrics.md                                                all of them

A board shows what nodes report in a fixed form (node/swarm/reports.py), so `Display.BOARD` needs a field there.

To add a metric: declare it in `DECLARED`, and put its value into the row of a round under its name, as
`metrics_of_own` in node/telemetry/round_metrics.py does. If it is `exported`, run `python -m website.grafana` as well,
which writes examples/grafana.json anew.
"""

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, Flag, auto
from functools import cache
from typing import Any

Row = Mapping[str, Any]


class Combine(Enum):
    """How the values of several rounds become one."""

    MEAN = "mean"  # the mean over rounds that have it
    SUM = "sum"  # a run's total is the sum; a curve shows the mean
    LAST = "last"  # the newest value
    COUNTER = "counter"  # counts up, from 0 again with each process; a run's total is what all processes counted


class Display(Flag):
    """Where a metric is shown, beside Prometheus and the reference."""

    NOWHERE = 0
    SUMMARY = auto()
    REPORT = auto()
    DASHBOARD = auto()
    BOARD = auto()


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric.

    `name` may hold one `*`, as "rewards/*/mean" does: then there is one for each value of `label`. Without a `*`, a
    metric with a `label` has a table of numbers as its value, by values of the label.
    """

    name: str
    title: str  # a few words, on plots
    unit: str  # "" for a number without one
    meaning: str
    combine: Combine
    places: Display = Display.NOWHERE
    exported: str = ""  # its name for Prometheus, after "gossamer_"; "": it is not exported
    label: str = ""
    beside: str = ""  # the metric in whose plot it is drawn, too
    part: str = ""  # of the time of a round, as the report divides it

    @property
    def caption(self) -> str:
        """Its title with its unit, unless the title says that."""
        return f"{self.title}, {self.unit}" if self.unit and self.unit not in self.title.split() else self.title

    def is_in(self, row: Row) -> bool:
        """Tell whether `row` has a value of it."""
        if "*" in self.name:
            return any(map(_pattern(self.name).fullmatch, row))
        return row.get(self.name) is not None

    def found_in(self, row: Row) -> dict[str, Any]:
        """Return the values in `row`: by the label's values where it has a label, else under its name."""
        if "*" in self.name:
            pattern = _pattern(self.name)
            return {match[1]: row[key] for key in row if (match := pattern.fullmatch(key))}
        value = row.get(self.name)
        if self.label:
            return dict(value) if isinstance(value, Mapping) else {}
        return {self.name: value}


def _traffic(
    name: str, title: str, unit: str, meaning: str, beside: str = "", places: Display = Display.NOWHERE
) -> Metric:
    return Metric(f"swarm/{name}", title, unit, meaning, Combine.COUNTER, places, exported=name, beside=beside)


def _seconds(step: str, part: str, meaning: str) -> Metric:
    return Metric(f"time/{step}", part, "s", meaning, Combine.SUM, Display.REPORT, part=part)


MEAN, SUM, LAST, COUNTER = Combine
SUMMARY, REPORT, DASHBOARD, BOARD = Display.SUMMARY, Display.REPORT, Display.DASHBOARD, Display.BOARD
DECLARED = (
    # The round.
    Metric("round", "round", "", "rounds done", LAST, exported="round"),
    Metric("policy_version", "policy version", "", "the policy that generated: rounds done before", LAST),
    Metric("began", "began", "Unix s", "when the round began", LAST),
    Metric("time", "time", "Unix s", "when the row was written", LAST),
    # What the policy earned.
    Metric(
        "reward", "reward", "", "mean reward of own completions", MEAN, REPORT | DASHBOARD | BOARD, exported="reward"
    ),
    Metric("reward_std", "spread of rewards", "", "standard deviation of own completions' rewards", MEAN),
    Metric(
        "rewards/*/mean",
        "reward by task",
        "",
        "mean reward of a task that was asked, or of a reward function of a task that has several",
        MEAN,
        REPORT | BOARD,
        exported="task_reward",
        label="task",
    ),
    Metric(
        "rewards/*/std",
        "spread by task",
        "",
        "standard deviation of the rewards that are in its mean",
        MEAN,
        label="task",
    ),
    Metric(
        "eval/accuracy",
        "held-out accuracy",
        "",
        "share of held-out questions answered right, greedily, where the round ended in an evaluation",
        LAST,
        REPORT | DASHBOARD | BOARD,
    ),
    Metric("eval/reward", "held-out reward", "", "mean reward of greedy answers to held-out questions", LAST),
    Metric("eval/pass@1", "held-out pass@1", "", "chance that a sampled answer is right", LAST),
    Metric("eval/pass@8", "held-out pass@8", "", "chance that one of eight sampled answers is right", LAST, REPORT),
    # What was generated.
    Metric("generated", "completions", "", "own completions", SUM),
    Metric("unscorable", "unscorable", "", "own completions that could not be scored here", SUM),
    Metric(
        "out_of_time", "out of time", "", "own completions that took their scorer too long, twice, and earned 0", SUM
    ),
    Metric("tokens_generated", "generated", "tokens", "tokens of own completions", SUM, SUMMARY),
    Metric(
        "completions/mean_length",
        "length of a completion",
        "tokens",
        "mean length of own completions",
        MEAN,
        REPORT | DASHBOARD,
    ),
    Metric(
        "completions/finished",
        "completions finished",
        "share",
        "own completions that ended of themselves",
        MEAN,
        REPORT,
    ),
    Metric("completions/turns", "turns", "", "mean turns of an own episode", MEAN),
    Metric(
        "completions/retokenized",
        "retokenized",
        "share",
        "own completions whose text stands for other tokens than were sampled",
        MEAN,
    ),
    # The samples that were trained on.
    Metric(
        "rewards_outside",
        "rewards out of range",
        "",
        "own completions with a reward outside of the range of a shared task: their groups are not shared",
        SUM,
        REPORT,
    ),
    Metric("groups_informative", "informative own groups", "groups", "own groups with differing rewards", SUM, REPORT),
    Metric("groups_local", "own groups", "groups", "own groups that the round trained on", SUM, SUMMARY | DASHBOARD),
    Metric(
        "groups_external",
        "external groups",
        "groups",
        "peers' groups that the round trained on",
        SUM,
        SUMMARY | REPORT | DASHBOARD,
        beside="groups_local",
    ),
    Metric(
        "groups_unusable",
        "unusable groups",
        "groups",
        "peers' groups that were drawn and not fit to teach here, which is nobody's fault",
        SUM,
    ),
    Metric("trained", "completions trained on", "", "completions with an advantage, own and peers'", SUM),
    Metric(
        "tokens_trained",
        "trained on",
        "tokens",
        "tokens of completions with an advantage, once an iteration",
        SUM,
        SUMMARY,
    ),
    Metric(
        "tokens_scored",
        "scored",
        "tokens",
        "tokens whose likelihood was computed for `sampling.max_surprise`",
        SUM,
        SUMMARY,
    ),
    Metric(
        "tokens_prompts",
        "prompts read",
        "tokens",
        "tokens of prompts and observations, as often as they passed through the model: `node.training.budget`",
        SUM,
        SUMMARY,
    ),
    Metric(
        "effective_samples",
        "effective sample size",
        "completions",
        "Kish's effective sample size of the round: (sum of pulls)^2 / (sum of squared pulls)",
        MEAN,
        REPORT,
    ),
    # Peers' groups in the round.
    Metric(
        "swarm/external_share",
        "peers' share of the update",
        "share",
        "peers' part of the round's pull (weight times absolute advantage)",
        MEAN,
        REPORT,
    ),
    Metric(
        "swarm/taught_by",
        "taught by",
        "groups",
        "peers' groups that the round trained on, by who made them",
        SUM,
        DASHBOARD | BOARD,
        label="peer",
    ),
    Metric(
        "swarm/taught",
        "taught",
        "groups",
        "this node's groups that peers have trained on since it started, as their reports say, by peer",
        COUNTER,
        label="peer",
    ),
    Metric("swarm/age_seconds", "age of external groups", "s", "mean time since the drawn groups came", MEAN, REPORT),
    Metric(
        "swarm/age_seconds_max",
        "greatest age of external groups",
        "s",
        "time since the oldest of the drawn groups came",
        MEAN,
    ),
    Metric(
        "swarm/age_rounds",
        "age of external groups",
        "rounds",
        "mean of this node's rounds since the drawn groups came",
        MEAN,
        REPORT,
    ),
    Metric(
        "swarm/age_rounds_max",
        "greatest age of external groups",
        "rounds",
        "rounds since the oldest of the drawn groups came",
        MEAN,
    ),
    Metric(
        "swarm/claimed_lag",
        "claimed lag",
        "rounds",
        "this node's round less what the makers say of theirs, median: a peer's own count, shown and never used",
        MEAN,
    ),
    Metric(
        "swarm/surprise",
        "surprise",
        "nats a token",
        "mean negative log-probability of peers' trained tokens before the round's update",
        MEAN,
    ),
    Metric(
        "swarm/too_surprising",
        "too surprising",
        "completions",
        "peers' completions left out by `sampling.max_surprise`",
        SUM,
    ),
    Metric(
        "swarm/over_long", "over long", "completions", "peers' completions left out by `sampling.max_length_ratio`", SUM
    ),
    Metric(
        "swarm/too_long",
        "too long",
        "completions",
        "peers' completions left out because they are longer than an own one may be",
        SUM,
    ),
    Metric(
        "swarm/quotes_held_out",
        "quotes held out",
        "completions",
        "peers' completions left out because they give away a held-out question and its answer",
        SUM,
    ),
    Metric(
        "swarm/late",
        "late",
        "completions",
        "peers' completions that were not scored in time; their groups may be drawn later",
        SUM,
    ),
    Metric(
        "swarm/buffer",
        "peers' groups kept",
        "groups",
        "peers' groups in the group buffer",
        LAST,
        exported="buffer_groups",
    ),
    # The network.
    Metric("swarm/peers", "live peers", "", "live peers", LAST, exported="peers"),
    Metric(
        "swarm/known",
        "known peers",
        "",
        "peers whose record is known",
        LAST,
        exported="known_peers",
        beside="swarm/peers",
    ),
    _traffic("bytes_sent", "sent", "bytes", "bytes of frames sent", places=SUMMARY),
    _traffic("bytes_received", "received", "bytes", "bytes of frames received", "swarm/bytes_sent", SUMMARY),
    _traffic("items_sent", "groups sent", "groups", "shared groups sent, each time they are"),
    _traffic(
        "items_received", "groups received", "groups", "shared groups received, each one once", "swarm/items_sent"
    ),
    _traffic("duplicates", "groups received again", "groups", "shared groups received again", "swarm/items_sent"),
    Metric(
        "swarm/rejected",
        "refused",
        "",
        "what was refused, by reason",
        COUNTER,
        SUMMARY,
        exported="rejected",
        label="reason",
    ),
    # Averaged weights, in rounds that took some up.
    Metric("weights/revision", "revision", "", "revision of the group's weights", LAST),
    Metric("weights/members", "averages with", "", "members whose weights were averaged", LAST),
    Metric("weights/joined", "joined", "", "whether this node was new to the group, or behind it", LAST),
    Metric("weights/seconds", "exchange", "s", "how long the exchange took", MEAN),
    Metric("weights/bytes_sent", "sent", "bytes", "bytes that this node sent in the exchange", SUM),
    Metric("weights/bytes_received", "received", "bytes", "bytes that this node received in the exchange", SUM),
    Metric("weights/nonfinite", "not finite", "", "1: weights were not finite and not exchanged", SUM),
    # Where a round's time goes. What no step has is waiting, and writing.
    Metric(
        "time/round",
        "time of a round",
        "s",
        "time from the round's beginning to its row",
        SUM,
        DASHBOARD,
        exported="round_seconds",
    ),
    Metric("time/load", "handing over", "s", "handing the weights to the engine", SUM),
    _seconds("generate", "generating", "generating completions"),
    _seconds("verify", "verifying", "scoring completions"),
    _seconds("questions", "verifying", "making questions"),
    _seconds("share", "sharing", "publishing groups and receiving peers'"),
    _seconds("draw", "sharing", "drawing peers' groups"),
    _seconds("train", "training", "the update"),
    _seconds("eval", "evaluating", "the evaluation after the round"),
    # The update, as TRL names it.
    Metric("loss", "loss", "", "loss of the update", MEAN),
    Metric("grad_norm", "gradient norm", "", "norm of the gradient before it is clipped", MEAN, REPORT),
    Metric("learning_rate", "learning rate", "", "learning rate of the update", LAST),
    Metric(
        "entropy",
        "entropy",
        "nats a token",
        "mean entropy of the policy over completions' tokens",
        MEAN,
        REPORT | DASHBOARD,
    ),
    Metric("clip_ratio/*", "clipped", "share", "tokens whose ratio was clipped, by side", MEAN, label="side"),
    Metric("cispo_clip_ratio", "clipped", "share", "tokens whose ratio was clipped, under `cispo`", MEAN),
    Metric("vespo/*", "weights", "", "weights of sequences under `vespo`", MEAN, label="of"),
    Metric(
        "sampling/*",
        "sampler and trainer",
        "",
        "how a sampler's log-probabilities differ from the trainer's: differences and importance ratios",
        MEAN,
        label="of",
    ),
    Metric("step_time", "step", "s", "TRL's time of a step", SUM),
    Metric("epoch", "epoch", "", "TRL's count of epochs", LAST),
    Metric("aux_loss", "router loss", "", "load-balancing loss of a mixture of experts", MEAN),
    Metric("nonfinite", "not finite", "", "1: an update was left out, as it was not finite", SUM),
    # The process. These are measured when they are asked for, and not by a round.
    Metric(
        "process/memory", "memory", "bytes", "resident memory of the process", LAST, exported="resident_memory_bytes"
    ),
    Metric("process/uptime", "up", "s", "time since the process started", LAST, exported="uptime_seconds"),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in DECLARED}


@cache
def _pattern(name: str) -> re.Pattern[str]:
    before, _, after = name.partition("*")
    return re.compile(f"{re.escape(before)}(.+){re.escape(after)}")


def is_declared(key: str) -> bool:
    """Tell whether the key of a row is a metric's name."""
    return key in METRICS or any("*" in name and _pattern(name).fullmatch(key) for name in METRICS)


def shown_in(place: Display) -> list[Metric]:
    """Return the metrics that are shown there, in the table's order."""
    return [metric for metric in DECLARED if place in metric.places]


def recent(metric: Metric, rows: Sequence[Row]) -> Any:
    """Return what `rows` of neighbouring rounds say together: their mean, or the newest value; None if nothing.

    Tables of counts by a label are summed where they are of a round, and the newest where they count up.
    """
    numbers = [_numbers(metric.found_in(row)) for row in rows if metric.is_in(row)]
    if not numbers:
        return None
    if metric.combine in (Combine.LAST, Combine.COUNTER):
        values: Mapping[str, Any] = numbers[-1]
    elif metric.label and "*" not in metric.name:
        values = _summed(numbers)
    else:
        values = {key: statistics.fmean(row[key] for row in numbers if key in row) for key in _keys(numbers)}
    return values if metric.label else values.get(metric.name)


def total(metric: Metric, rows: Sequence[Row]) -> Any:
    """Return what all `rows` of a node come to: a sum, what its processes counted, a mean, or the newest value.

    0 where there is nothing, and no entries of a label.
    """
    numbers = [_numbers(metric.found_in(row)) for row in rows]
    values: Mapping[str, Any]
    if metric.combine is Combine.SUM:
        values = _summed(numbers)
    elif metric.combine is Combine.COUNTER:
        values = {key: counted(row.get(key, 0) for row in numbers) for key in sorted(_keys(numbers))}
    else:
        return recent(metric, rows) or ({} if metric.label else 0)
    return values if metric.label else values.get(metric.name, 0)


def counted(values: Iterable[float]) -> float:
    """Return how far a counter went that starts again from 0 whenever its process does."""
    so_far, before = 0.0, 0.0
    for value in values:
        so_far += value - before if value >= before else value
        before = value
    return so_far


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def _keys(found: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for values in found for key in values))


def _summed(found: Iterable[Mapping[str, float]]) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for values in found:
        counts.update(values)
    return dict(counts)
