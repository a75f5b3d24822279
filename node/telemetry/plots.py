"""The report's plots: from metrics rows to SVG text, drawn without pyplot's global state."""

import io
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import cycle
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from node.metrics import METRICS, Display, shown_in
from node.rollouts.screening import BLAMELESS
from node.telemetry.evaluations import EvaluationPoint
from node.telemetry.metrics_file import Row, number

Nodes = Mapping[str, Sequence[Row]]
Line = tuple[list[int], list[float]]  # rounds, rewards

INK = "#1f2430"
MUTED = "#667085"
GRID = "#e4e7ec"
OWN = "#3b6fb6"
EXTERNAL = "#e08a2c"
WARNING = "#b5473c"
# Eight hues that stay apart for most colour-blind readers (after Okabe and Ito, the yellow darkened).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b0559a", "#56b4e9", "#c9a100", "#7a5195", "#8c6d46")
PARTS = {  # of a round's time, each the sum of some metrics
    part: [metric.name for metric in METRICS.values() if metric.part == part]
    for part in dict.fromkeys(metric.part for metric in METRICS.values() if metric.part)
}
PART_COLOURS = ("#3b6fb6", "#8fb3dd", "#e08a2c", "#4a9d7c", "#9a7fc0", "#7a5195", "#c9a100", "#8c6d46")
OTHER = ("other", "#c4c9d2")

# What is plotted of a round beside its reward, where a node measures it.
SIGNALS = [
    metric
    for metric in shown_in(Display.REPORT)
    if not (metric.label or metric.part or metric.name == "reward" or metric.name.startswith("eval/"))
]
TASKS = METRICS["rewards/*/mean"]

WIDTH = 8.6  # inches
MAX_POINTS = 240  # of a line
MAX_NAMED = len(PALETTE)  # nodes that get a colour and a name of their own
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, sharp, searchable
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}


def plot_reward(nodes: Nodes) -> str:
    """Draw reward over rounds, smoothed, a line for each node and a heavy one for their mean."""
    with _style("reward"):
        figure, axes = _figure(3.6)
        lines = {name: _key_line(rows, "reward") for name, rows in nodes.items() if rows}
        named = len(lines) <= MAX_NAMED
        for index, (name, line) in enumerate(lines.items()):
            label = name if named else f"each of {len(lines)} nodes" if index == 0 else None
            color, alpha = (PALETTE[index], 0.85) if named else (MUTED, 0.35)
            marker = "o" if len(line[0]) == 1 else None  # one point makes no line
            axes.plot(*_thin(line), color=color, alpha=alpha, linewidth=1.2, marker=marker, label=label)
        if len(lines) > 1:
            axes.plot(*_thin(_mean_line(list(lines.values()))), color=INK, linewidth=2.6, label="swarm mean")
        last = max(rounds[-1] for rounds, _ in lines.values())
        axes.set(xlabel="round", ylabel="mean reward", xlim=(0, 1.01 * max(last, 10)), ylim=(_floor(axes), None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)
        return _svg(figure)


def plot_evaluations(curves: Mapping[str, Sequence[EvaluationPoint]]) -> str:
    """Draw the swarm's rates on held-out questions over rounds, each with its interval as a band."""
    with _style("evaluations"):
        figure, axes = _figure(3.2)
        for index, (label, curve) in enumerate(curves.items()):
            _band(axes, [point.round for point in curve], curve, PALETTE[index], label)
        last = max(point.round for curve in curves.values() for point in curve)
        axes.set(
            xlabel="rounds done", ylabel="share of held-out questions", ylim=(0, 1), xlim=(0, 1.01 * max(last, 10))
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)
        return _svg(figure)


def plot_comparison(curves: Mapping[str, Sequence[EvaluationPoint]]) -> str:
    """Draw greedy accuracy over generated tokens, a line with its band for each of some runs."""
    with _style("comparison"):
        figure, axes = _figure(3.2)
        for index, (label, curve) in enumerate(curves.items()):
            _band(axes, [point.tokens for point in curve], curve, PALETTE[index], label)
        axes.set(xlabel="tokens generated, all nodes together", ylabel="held-out accuracy", ylim=(0, 1), xlim=(0, None))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _legend(axes)
        return _svg(figure)


def plot_tasks(nodes: Nodes) -> str:
    """Draw reward over rounds by task, mean over nodes, smoothed; those that are asked most."""
    with _style("tasks"):
        lines = {task: _task_line(nodes, task) for task in tasks_asked(nodes)[:MAX_NAMED]}
        figure, axes = _figure(3.2)
        for index, (task, line) in enumerate(lines.items()):
            marker = "o" if len(line[0]) == 1 else None
            axes.plot(*_thin(line), color=PALETTE[index], linewidth=1.4, marker=marker, label=_plain(task))
        last = max(rounds[-1] for rounds, _ in lines.values())
        axes.set(xlabel="round", ylabel="mean reward", xlim=(0, 1.01 * max(last, 10)), ylim=(_floor(axes), None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)
        return _svg(figure)


def tasks_asked(nodes: Nodes) -> list[str]:
    """Return the names of the tasks that were asked, most often asked first."""
    counts = Counter(task for rows in nodes.values() for row in rows for task in TASKS.found_in(row))
    return [task for task, _ in counts.most_common()]


def plot_signals(nodes: Nodes) -> str:
    """Draw small plots, side by side, of what tells whether training is healthy: means over nodes, smoothed."""
    lines = {metric.caption: [_key_line(rows, metric.name) for rows in nodes.values()] for metric in SIGNALS}
    means = {caption: _mean_line([line for line in lines[caption] if line[0]]) for caption in lines}
    signals = [caption for caption in lines if means[caption][0]]
    with _style("signals"):
        columns = 3
        height = -(-len(signals) // columns)
        figure = Figure(figsize=(WIDTH, 0.4 + 1.75 * height), layout="constrained")
        for place, caption in enumerate(signals):
            axes = figure.add_subplot(height, columns, place + 1)
            rounds, values = means[caption]
            axes.plot(*_thin((rounds, values)), color=OWN, linewidth=1.4, marker="o" if len(rounds) == 1 else None)
            axes.set_title(caption, fontsize=9, loc="left", color=INK)
            axes.set_ylim(min(0, *values), 1.1 * max(values) or 1)
            axes.tick_params(labelsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(3))
        return _svg(figure)


def plot_groups(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw the groups that each node trained on: its own and its peers'."""
    with _style("groups"):
        own = [node["groups_local"] for node in summaries.values()]
        external = [node["groups_external"] for node in summaries.values()]
        parts = [("own", OWN, own), ("external", EXTERNAL, external)]
        return _stacked_bars(list(summaries), parts, "groups trained on")


def plot_time(nodes: Nodes) -> str:
    """Draw where the time of a node's mean round goes."""
    with _style("time"):
        columns = [_time_split(rows) for rows in nodes.values()]
        labels = [*zip(PARTS, cycle(PART_COLOURS), strict=False), OTHER]
        parts = [(label, color, [column[i] for column in columns]) for i, (label, color) in enumerate(labels)]
        return _stacked_bars(list(nodes), parts, "seconds a round")


def plot_rejects(reasons: Mapping[str, int]) -> str:
    """Draw how many items were rejected, by reason, the most frequent on top; grey what is nobody's fault."""
    with _style("rejects"):
        ordered = sorted(reasons.items(), key=lambda item: item[1])
        figure, axes = _figure(0.7 + 0.34 * max(len(ordered), 2))
        colors = [MUTED if reason in BLAMELESS else WARNING for reason, _ in ordered]
        bars = axes.barh([reason for reason, _ in ordered], [count for _, count in ordered], 0.6, color=colors)
        axes.bar_label(bars, padding=4, color=INK)
        axes.set(xlabel="items rejected, all nodes")
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08, y=0.05)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure)


def _style(salt: str) -> AbstractContextManager[None]:
    """Return the report's style; `salt` keeps the ids of one plot apart from another's on the same page."""
    style: Any = STYLE | {"svg.hashsalt": salt}
    return mpl.rc_context(style)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), handlelength=1.4)


def _band(axes: Axes, at: Sequence[int], curve: Sequence[EvaluationPoint], color: str, label: str) -> None:
    low, high = [point.low for point in curve], [point.high for point in curve]
    axes.fill_between(at, low, high, color=color, alpha=0.16, linewidth=0)
    axes.plot(at, [point.rate for point in curve], color=color, linewidth=1.8, marker="o", markersize=4, label=label)


def _svg(figure: Figure) -> str:
    """Return the figure with the page's own colours for ink and grid, which differ between light and dark."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for color, name in ((INK, "--ink"), (MUTED, "--muted"), (GRID, "--grid")):
        text = text.replace(color, f"var({name}, {color})")
    return text[text.index("<svg") :]


def _plain(text: str) -> str:
    """Return a name without what matplotlib would read as mathematics."""
    return text.replace("$", r"\$")


def _floor(axes: Any) -> float:
    """Return where rewards begin: at 0, or below it at the lowest."""
    return min(0.0, float(axes.dataLim.ymin))


def _key_line(rows: Sequence[Row], key: str) -> Line:
    """Return one figure of a node over its rounds, smoothed; rounds without it are left out."""
    having = [row for row in rows if isinstance(row.get(key), int | float)]
    return [row["round"] for row in having], _smooth([row[key] for row in having], max(len(having) // 25, 1))


def _task_line(nodes: Nodes, task: str) -> Line:
    """Return a task's mean reward over nodes: smoothed as a whole, since a node asks it in some rounds only."""
    at: dict[int, list[float]] = {}
    for rows in nodes.values():
        for row in rows:
            if isinstance(reward := TASKS.found_in(row).get(task), int | float):
                at.setdefault(row["round"], []).append(reward)
    means = [statistics.fmean(at[number]) for number in sorted(at)]
    return sorted(at), _smooth(means, max(len(means) // 25, 1))


def _thin(line: Line) -> Line:
    """Return at most about `MAX_POINTS` points of a line, its last among them."""
    rounds, rewards = line
    step = max(-(-len(rounds) // MAX_POINTS), 1)
    picked = sorted({*range(0, len(rounds), step), *range(len(rounds))[-1:]})
    return [rounds[i] for i in picked], [rewards[i] for i in picked]


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the mean over `window` values on either side of each, fewer at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    edges = [(max(i - window, 0), min(i + window + 1, len(values))) for i in range(len(values))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in edges]


def _mean_line(lines: Sequence[Line]) -> Line:
    """Return the mean over nodes, of the rounds that at least half of them have done."""
    at: dict[int, list[float]] = {}
    for rounds, rewards in lines:
        for round_number, reward in zip(rounds, rewards, strict=True):
            at.setdefault(round_number, []).append(reward)
    rounds = [round_number for round_number in sorted(at) if 2 * len(at[round_number]) >= len(lines)]
    return rounds, [statistics.fmean(at[round_number]) for round_number in rounds]


def _time_split(rows: Sequence[Row]) -> list[float]:
    """Return mean seconds a round for each of `PARTS`, and for the rest of the round."""
    if not rows:
        return [0.0] * (len(PARTS) + 1)
    parts = [statistics.fmean(sum(number(row, key) for key in keys) for row in rows) for keys in PARTS.values()]
    whole = statistics.fmean(number(row, "time/round") for row in rows)
    return [*parts, max(whole - sum(parts), 0.0)]


def _stacked_bars(names: Sequence[str], parts: Sequence[tuple[str, str, Sequence[float]]], ylabel: str) -> str:
    figure, axes = _figure(2.9)
    below = [0.0] * len(names)
    for label, color, values in parts:
        axes.bar(range(len(names)), values, 0.62, bottom=below, color=color, label=label)
        below = [low + value for low, value in zip(below, values, strict=True)]
    step = -(-len(names) // 16)  # more names than this would run into each other
    shown = range(0, len(names), step)
    axes.set_xticks(list(shown), [names[i] for i in shown])
    axes.set_xlim(-0.6, max(len(names), 4) - 0.4)
    axes.set(ylabel=ylabel)
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), handlelength=1.0, reverse=True)
    return _svg(figure)
