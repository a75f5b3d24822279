"""What came of the experiment: from run folders to a table with intervals and a plot. No run is started here."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
BASELINE = "8/0"
WINDOW = 20  # rounds averaged in the plot


@dataclass(frozen=True)
class Run:
    """One swarm's result, averaged over its nodes; `curve` is the mean reward of each round."""

    arm: str
    seed: int
    cumulative: float
    first: float
    last: float
    external: float  # external groups a node and round
    kib_sent: float  # a node and round
    curve: tuple[float, ...]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, `half` to each side; nan from a single run."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if math.isnan(self.half) else f"{self.mean:.2f} ± {self.half:.2f}"


@dataclass(frozen=True)
class Line:
    """A row of the table: one arm over all seeds."""

    arm: str
    seeds: int
    cumulative: Estimate
    ratio: Estimate
    first: float
    last: float
    external: float
    kib_sent: float


def read_run(folder: Path, arm: str, seed: int) -> Run:
    """Read a finished run folder of `gossamer swarm`."""
    nodes = list(json.loads((folder / "summary.json").read_text())["nodes"].values())
    rounds = max(node["rounds"] for node in nodes)
    rewards = [_rewards(path) for path in sorted(folder.glob("nodes/*/metrics.jsonl"))]
    return Run(
        arm=arm,
        seed=seed,
        cumulative=fmean(node["reward_cumulative"] for node in nodes),
        first=fmean(node["reward_first"] for node in nodes),
        last=fmean(node["reward_last"] for node in nodes),
        external=fmean(node["groups_external"] / rounds for node in nodes),
        kib_sent=fmean(node["bytes_sent"] / rounds / 1024 for node in nodes),
        curve=tuple(fmean(values) for values in zip(*rewards, strict=True)),
    )


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent `values` and Student's 95 % interval of it."""
    if len(values) < 2:
        return Estimate(fmean(values), math.nan)
    return Estimate(fmean(values), T95[len(values) - 1] * stdev(values) / math.sqrt(len(values)))


def tabulate(runs: Sequence[Run]) -> list[Line]:
    """Return a line for each arm, in the order of its first run.

    A ratio compares runs of one seed: the arm's cumulative reward over the baseline's.
    """
    baseline = {run.seed: run.cumulative for run in runs if run.arm == BASELINE}
    lines = []
    for arm in dict.fromkeys(run.arm for run in runs):
        mine = [run for run in runs if run.arm == arm]
        ratios = [run.cumulative / baseline[run.seed] for run in mine if baseline.get(run.seed)]
        lines.append(
            Line(
                arm=arm,
                seeds=len(mine),
                cumulative=estimate([run.cumulative for run in mine]),
                ratio=estimate(ratios) if ratios else Estimate(math.nan, math.nan),
                first=fmean(run.first for run in mine),
                last=fmean(run.last for run in mine),
                external=fmean(run.external for run in mine),
                kib_sent=fmean(run.kib_sent for run in mine),
            )
        )
    return lines


def to_markdown(lines: Sequence[Line], notes: Mapping[str, str]) -> str:
    """Return the table; `notes` says what each arm is."""
    rows = [
        "| arm | | cumulative reward | against 8/0 | first tenth | last tenth | external groups | KiB sent |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {line.arm} | {notes.get(line.arm, '')} | {line.cumulative} | {line.ratio} | {line.first:.3f} "
        f"| {line.last:.3f} | {line.external:.2f} | {line.kib_sent:.2f} |"
        for line in lines
    ]
    return "\n".join(rows) + "\n"


def smooth(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Return the mean of the last `window` values at each place (fewer at the start)."""
    return [fmean(values[max(0, at - window + 1) : at + 1]) for at in range(len(values))]


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw reward over rounds by arm: the mean over seeds, and the range between them as a band."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "gossamer"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    for arm in dict.fromkeys(run.arm for run in runs):
        curves = [smooth(run.curve) for run in runs if run.arm == arm]
        by_round = list(zip(*curves, strict=False))
        rounds = range(1, len(by_round) + 1)
        (line,) = axes.plot(rounds, [fmean(values) for values in by_round], label=arm, linewidth=1.8)
        low, high = [min(values) for values in by_round], [max(values) for values in by_round]
        axes.fill_between(rounds, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("round")
    axes.set_ylabel(f"mean reward, last {WINDOW} rounds")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="own/external groups", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _rewards(path: Path) -> list[float]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["reward"] for row in rows]
