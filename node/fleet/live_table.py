"""Shows a running swarm: a live table in a terminal, a line now and then elsewhere."""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from node.fleet.progress import NodeProgress
from node.fleet.supervisor import NodeProcess, NodeState
from node.rollouts.screening import BLAMELESS
from node.telemetry.metrics_file import RECENT, number

BLOCKS = "▁▂▃▄▅▆▇█"
TREND_WIDTH = 12
WIDE = 92  # columns that the table needs with its trend
LEFT = ("node", "trend", "state")  # columns of words
LEAST = ("trend", "got", "sent", "peers", "external", "own", "rejects", "state")  # what is left out first, if need be
REFRESH = 0.5  # seconds
LINE_EVERY = 10.0  # seconds
MOST_READ = 4096  # bytes of a log: its last line

STYLES = {
    NodeState.RUNNING: "green",
    NodeState.DONE: "bold green",
    NodeState.FAILED: "bold red",
    NodeState.RESTARTING: "yellow",
}


@contextmanager
def live_table(console: Console) -> Iterator[Callable[[Sequence[NodeProcess]], None]]:
    """Yield what shows the children: a table that refreshes in place."""
    began = time.monotonic()
    shown = 0.0
    with Live(console=console, auto_refresh=False) as live:

        def show(children: Sequence[NodeProcess]) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown >= REFRESH or not any(child.alive for child in children):
                live.update(render(children, now - began, console.width), refresh=True)
                shown = now

        yield show


@contextmanager
def progress_lines(console: Console, every: float = LINE_EVERY) -> Iterator[Callable[[Sequence[NodeProcess]], None]]:
    """Yield what shows the children: a plain line every few seconds, and one when a state changes for the worse."""
    began = time.monotonic()
    shown = -every
    latest: dict[str, str] = {}

    def show(children: Sequence[NodeProcess]) -> None:
        nonlocal shown
        now = time.monotonic()
        alive = any(child.alive for child in children)  # else the end is near, and says it
        for child in children:
            worse = child.state is NodeState.RESTARTING or (child.state is NodeState.FAILED and alive)
            news = describe(child) if worse else ""
            if news and latest.get(child.name) != news:
                console.print(f"{clock(now - began)}  {news}", highlight=False, soft_wrap=True)
            latest[child.name] = news
        if now - shown >= every:
            console.print(line(children, now - began), highlight=False, soft_wrap=True)
            shown = now

    yield show


def render(children: Sequence[NodeProcess], elapsed: float, width: int) -> Group:
    """Return a line, and the table of all nodes with as many columns as fit: node, round and reward always do."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    rows = [_row(child) for child in children]
    shown = {name: max(len(name), *(len(row[name]) for row in rows)) + 1 for name in rows[0]}
    if width < WIDE:
        del shown["trend"]
    for name in LEAST:
        if sum(shown.values()) > width:
            shown.pop(name, None)
    for name in shown:
        table.add_column(name, justify="left" if name in LEFT else "right", no_wrap=True)
    for child, row in zip(children, rows, strict=True):
        styles = {"state": STYLES.get(child.state, "dim")}
        table.add_row(*(Text(row[name], styles.get(name, "")) for name in shown))
    return Group(Text(line(children, elapsed), "bold"), table)


def _row(child: NodeProcess) -> dict[str, str]:
    progress = child.progress
    last = progress.last
    point = progress.points[-1] if progress.points else None
    return {
        "node": child.name,
        "round": f"{progress.round}/{progress.rounds}" if progress.rounds else str(progress.round),
        "reward": f"{progress.reward():.3f}" if point else "",
        "trend": trend(progress),
        "own": str(point.local) if point else "",
        "external": str(point.external) if point else "",
        "peers": f"{number(last, 'swarm/peers'):.0f}" if point else "",
        "sent": size(number(last, "swarm/bytes_sent")) if point else "",
        "got": size(number(last, "swarm/bytes_received")) if point else "",
        "rejects": str(refused(progress).rejected) if point else "",
        "state": f"{child.state}{f' ↻{child.restarts}' if child.restarts else ''}",
    }


def line(children: Sequence[NodeProcess], elapsed: float) -> str:
    """Return the swarm in one line."""
    rounds = [child.progress.round for child in children]
    rewards = [child.progress.reward() for child in children if child.progress.points]
    local = sum(child.progress.points[-1].local for child in children if child.progress.points)
    external = sum(child.progress.points[-1].external for child in children if child.progress.points)
    reward = f"{statistics.fmean(rewards):.3f} (last {RECENT} rounds)" if rewards else "-"
    last = children[0].progress.rounds
    end = f" of {last}" if last else ""
    counts = [refused(child.progress) for child in children]
    young = next((child for child in children if child.alive and not child.progress.points), None)
    outside = sum(number(child.progress.last, "rewards_outside") for child in children)
    beside = f", {outside:.0f} rewards out of range" if outside else ""
    starts = f", {young.name}: {doing(young.folder)}" if young else ""
    return (
        f"{clock(elapsed)}  {sum(child.alive for child in children)} of {len(children)} nodes up{starts}, "
        f"round {min(rounds)} to {max(rounds)}{end}, reward {reward}, "
        f"groups {local} own {external} external, {sum(count.unfit for count in counts)} not fit to teach, "
        f"{sum(count.rejected for count in counts)} rejected{beside}"
    )


def doing(folder: Path) -> str:
    """Return what a node that has no round yet said last in its log, such as "loading the model"."""
    try:
        with (folder / "log.jsonl").open("rb") as log:  # of a node that goes on it may be long
            log.seek(max(0, log.seek(0, os.SEEK_END) - MOST_READ))
            *_, last = log.read().splitlines()
        event = json.loads(last)["event"]
    except (OSError, ValueError, KeyError, TypeError):
        return "starting"
    return "loading the model" if event == "loading" else str(event)


def describe(child: NodeProcess) -> str:
    """Return what happened to a node that is not running."""
    again = f" ({child.restarts} restart{'s' if child.restarts > 1 else ''})" if child.restarts else ""
    what = f"{child.name} {child.state}{again} at round {child.progress.round}"
    return f"{what}: {child.error} (see {child.folder / 'log.jsonl'})" if child.error else what


def trend(progress: NodeProgress, width: int = TREND_WIDTH) -> str:
    """Return the rewards so far as `width` blocks, from 0 or the lowest to the highest, at least 0.1 above."""
    points = progress.points
    if not points:
        return ""
    count = min(width, len(points))
    edges = [index * len(points) // count for index in range(count + 1)]
    means = [statistics.fmean(p.reward for p in points[a:b]) for a, b in pairwise(edges)]
    low = min(*means, 0.0)
    top = max(*means, low + 0.1)
    levels = [min(int((mean - low) / (top - low) * len(BLOCKS)), len(BLOCKS) - 1) for mean in means]
    return "".join(BLOCKS[level] for level in levels)


class RefusedCounts(NamedTuple):
    """How many items a node did not take: those that are no fault of their signers, and all others."""

    unfit: int
    rejected: int


def refused(progress: NodeProgress) -> RefusedCounts:
    """Return what the node's present process did not take, over all reasons."""
    reasons = progress.last.get("swarm/rejected")
    if not isinstance(reasons, dict):
        return RefusedCounts(0, 0)
    unfit = sum(int(number(reasons, reason)) for reason in reasons if reason in BLAMELESS)
    return RefusedCounts(unfit, sum(int(number(reasons, reason)) for reason in reasons) - unfit)


def clock(seconds: float) -> str:
    """Return minutes:seconds, with hours in front when there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Return a number of bytes with a unit, to three digits or so."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
