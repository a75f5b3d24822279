"""The outcome of a run: `summary.json`, computed from the nodes' metrics alone.

    {"nodes": {"n0": {"rounds": ..., "reward_cumulative": ..., "accuracy_first": ..., ...}, ...},
     "swarm": {"reward_first": ..., "reward_last": ..., "reward_cumulative": ..., "ratio": ...,
               "tokens_generated": ..., "tokens_trained": ...,
               "accuracy_first": ..., "accuracy_first_interval": [low, high], "pass8_first": ..., ...},
     "first_round_seconds": {"n0": ...}}

The swarm's figures are means over its nodes, tokens sums. `accuracy_...` (greedy) and `pass8_...` are of held-out
questions, each with an interval at 95 %, see `evaluations`; they are null where nothing was evaluated.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from node.metrics import METRICS, Display, shown_in, total
from node.telemetry.evaluations import first_and_last
from node.telemetry.metrics_file import Row, number
from protocol.storage import write_atomically

Summary = dict[str, Any]

LEAST_COMPARED = 0.05  # a mean reward below it is a few lucky answers, and a ratio to it is chance


Evaluated = Mapping[str, Sequence[Row]]  # each node's evaluation rows


def summarise(nodes: Mapping[str, Sequence[Row]], evaluated: Evaluated, started: float) -> Summary:
    """Return the summary of a run.

    Args:
        nodes: each node's metrics rows, in the order of their rounds.
        evaluated: each node's evaluation rows, likewise; a node may be missing.
        started: when the command was given, Unix seconds.
    """
    each = summarise_nodes(nodes, evaluated)
    return {
        "nodes": each,
        "swarm": summarise_swarm(list(each.values()), list(evaluated.values())),
        "first_round_seconds": {name: _first_round_seconds(rows, started) for name, rows in nodes.items()},
    }


def summarise_nodes(nodes: Mapping[str, Sequence[Row]], evaluated: Evaluated) -> dict[str, Summary]:
    """Return each node's figures."""
    return {name: summarise_node(rows, evaluated.get(name, ())) for name, rows in nodes.items()}


def summarise_node(rows: Sequence[Row], evaluated: Sequence[Row] = ()) -> Summary:
    """Return one node's figures: rewards, and the totals of all metrics of `Display.SUMMARY`.

    `seconds` is the time its rounds took, without pauses between runs.
    """
    rewards = [number(row, "reward") for row in rows]
    tenth = tenth_of(len(rewards))
    return {
        "rounds": len(rows),
        "reward_cumulative": sum(rewards),
        "reward_first": _mean(rewards[:tenth]),
        "reward_last": _mean(rewards[-tenth:]),
        **{metric.name.rpartition("/")[2]: _whole(total(metric, rows)) for metric in shown_in(Display.SUMMARY)},
        "seconds": total(METRICS["time/round"], rows),
        **first_and_last([evaluated]),
    }


def tenth_of(rounds: int) -> int:
    """Return a tenth of the rounds done, at least one: rewards at both ends are means over so many."""
    return max(rounds // 10, 1)


def summarise_swarm(nodes: Sequence[Summary], evaluated: Sequence[Sequence[Row]]) -> Summary:
    """Return the means over nodes that have a round, and `ratio` = last over first (None when first is 0).

    `evaluated` holds the evaluation rows of each node that has some.
    """
    trained = [node for node in nodes if node["rounds"] > 0]
    first = _mean([node["reward_first"] for node in trained])
    last = _mean([node["reward_last"] for node in trained])
    return {
        "reward_first": first,
        "reward_last": last,
        "reward_cumulative": _mean([node["reward_cumulative"] for node in trained]),
        "ratio": last / first if first > 0 else None,
        "tokens_generated": sum(node["tokens_generated"] for node in nodes),
        "tokens_trained": sum(node["tokens_trained"] for node in nodes),
        **first_and_last(evaluated),
    }


def gain(swarm: Summary) -> float | None:
    """Return the last tenth's reward over the first tenth's; None if the first is too small for a ratio."""
    return swarm["ratio"] if swarm["reward_first"] >= LEAST_COMPARED else None


def write_summary(summary: Summary, path: Path) -> None:
    """Write the summary whole or not at all."""
    write_atomically(path, (json.dumps(summary, indent=1) + "\n").encode())


def _whole(value: Any) -> Any:
    """Return counts as whole numbers."""
    return {key: int(count) for key, count in value.items()} if isinstance(value, Mapping) else int(value)


def _first_round_seconds(rows: Sequence[Row], started: float) -> float | None:
    since = [number(row, "began") - started for row in rows]
    return next((seconds for seconds in since if seconds >= 0), None)  # earlier rounds belong to an earlier run


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
