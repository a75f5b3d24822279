"""The plots of an experiment.

Held-out accuracy, if it was measured: at the end, an arm a row, and over compute, if it was measured on the way.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from node.lab.results import RunResult
from node.lab.statistics import estimate
from node.lab.worth import mean_curve, pairs_at_equal_compute

MARKERS = "osD^v<>P"  # in turn, so that ten colours tell more than ten arms apart
ENDS = 2  # points that every curve of accuracy has


def plot(results: Sequence[RunResult], folder: Path, name: str, central: str = "") -> list[str]:
    """Draw the plots of an experiment called `name` into `folder`; return the names of their files.

    Curves are of arms that spent as much as the arm `central`, all nodes together; of all arms where there is none.
    """
    if all(result.accuracy is None for result in results):
        return []
    plot_accuracy(results, folder / f"{name}.svg")
    curved = [
        result
        for result in results
        if len(result.curve) > ENDS and (not central or _is_beside(result, results, central))
    ]
    if not curved:
        return [f"{name}.svg"]
    plot_curves(curved, folder / f"{name}-curves.svg")
    return [f"{name}.svg", f"{name}-curves.svg"]


def _is_beside(result: RunResult, results: Sequence[RunResult], central: str) -> bool:
    """Tell whether a run is the central node's, or one that is compared with it."""
    others = [other for other in results if (other.base, other.arm) == (result.base, central)]
    return not result.part and bool(pairs_at_equal_compute([result], others))


def plot_accuracy(results: Sequence[RunResult], path: Path) -> None:
    """Draw held-out accuracy at the end, a panel for each base: a dot for each seed, and the mean with its interval."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    bases = list(dict.fromkeys(result.base for result in results))
    arms = list(dict.fromkeys(result.name for result in results))
    size = (2.0 + 3.2 * len(bases), 1.2 + 0.42 * len(arms))
    with mpl.rc_context({"svg.hashsalt": "gossamer"}):
        figure, panels = pyplot.subplots(1, len(bases), figsize=size, layout="constrained", squeeze=False, sharey=True)
        for axes, base in zip(panels[0], bases, strict=True):
            for row, arm in enumerate(arms):
                runs = [result for result in results if (result.base, result.name) == (base, arm)]
                values = [run.accuracy for run in runs if run.accuracy is not None]
                if not values:
                    continue
                mean, half = estimate(values)
                axes.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.35, markersize=4)
                half = 0.0 if math.isnan(half) else half
                axes.errorbar([mean], [row], xerr=[half], fmt="D", color="tab:blue", markersize=5, capsize=3)
            axes.set_title(base)
            axes.set_xlabel("accuracy on held-out questions")
            axes.set_yticks(range(len(arms)), arms)
            axes.set_xlim(0, 1)
            axes.grid(axis="x", alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0][0].set_ylim(len(arms) - 0.5, -0.5)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def plot_curves(results: Sequence[RunResult], path: Path) -> None:
    """Draw held-out accuracy over the compute of all nodes together: a panel for each base, a line for each arm.

    A point is the mean over seeds at a mark, on the way of a swarm's first node, at the end of all, with its interval.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    bases = list(dict.fromkeys(result.base for result in results))
    arms = list(dict.fromkeys(result.name for result in results))
    size = (8 if len(bases) == 1 else 5 * len(bases), 4.6)
    with mpl.rc_context({"svg.hashsalt": "gossamer"}):
        figure, panels = pyplot.subplots(1, len(bases), figsize=size, layout="constrained", squeeze=False, sharey=True)
        for axes, base in zip(panels[0], bases, strict=True):
            for at, arm in enumerate(arms):
                runs = [result for result in results if (result.base, result.name) == (base, arm)]
                if not runs:
                    continue
                curve = mean_curve(runs)
                color, marker = f"C{at % 10}", MARKERS[at % len(MARKERS)]
                places, values = [point.compute for point in curve], [point.accuracy for point in curve]
                axes.plot(places, values, color=color, marker=marker, markersize=4, linewidth=1.6, label=arm)
                half = estimate([run.curve[-1][1] for run in runs]).half
                if half > 0:
                    axes.errorbar(places[-1:], values[-1:], yerr=[half], color=color, capsize=3)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(EngFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_title(base)
            axes.set_xlabel("compute of all nodes together, tokens")
            axes.set_ylim(0, 1)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0][0].set_ylabel("accuracy on held-out questions")
        labelled = [axes.get_legend_handles_labels() for axes in panels[0]]
        handles = {label: line for lines, labels in labelled for line, label in zip(lines, labels, strict=True)}
        figure.legend(handles.values(), handles, frameon=False, loc="outside right center")
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
