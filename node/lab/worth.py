"""What a swarm is worth: its accuracy less that of one node with the whole compute, and pooling efficiency.

The runs of a pair have one seed, and are compared when all nodes of the swarm together have spent what the central node
has: at its end, or at a mark on its way. So one central node serves swarms of several sizes.

    less_central          the swarm's accuracy at the end, a mean over its nodes, less the central node's
    pooling efficiency    the compute with which the central node has the swarm's accuracy, over the swarm's whole
                          compute; 1: eight machines are worth one machine with the compute of eight

The central node's curve has the mean accuracy over seeds at each mark (`eval.every = "marks"`). It is fitted by the
closest curve that never falls: isotonic regression by pool-adjacent-violators (Ayer, Brunk, Ewing, Reid and Silverman,
"An Empirical Distribution Function for Sampling with Incomplete Information", 1955). Between two marks it is a line
over the logarithm of compute. The interval comes from a bootstrap over seeds, which draws central node and swarm
together, by percentiles (Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979). With five seeds it is rather
too narrow.

What cannot be said is not said. A central node that never gets there bounds the efficiency from below only. An interval
has no number if its ends are more than `TOLD_APART` apart, or if one of them is such a bound. A single seed has none.
"""

import math
import random
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from node.lab.results import RunResult

TOLD_APART = 2  # ends of an interval: their ratio, at most
RESAMPLES = 2000  # of the bootstrap: the ends of an interval at 95 % come from 50 on each side
EQUAL = 0.05  # amounts less far apart are one budget: a run ends with the round that reaches it
STEPS = 2  # of marks for a factor of 2 in compute


class RunPair(NamedTuple):
    """Two runs of one seed, and what the central node's accuracy was when it had spent as much; None: not measured."""

    swarm: RunResult
    central: RunResult
    central_accuracy: float | None


class MeanPoint(NamedTuple):
    """Greedy accuracy when `compute` was spent by all nodes together, a mean over `seeds`."""

    compute: float
    accuracy: float
    seeds: int


class Pooling(NamedTuple):
    """Pooling efficiency with its 95 % interval, nan from a single seed.

    Infinity stands for a central node that never had the accuracy, 0 for one that had it at its first mark.
    `least` and `most` are the parts of the compute that it was measured at.
    """

    value: float
    low: float
    high: float
    least: float
    most: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return "one seed"
        if self.low == math.inf:
            return f"> {self.most:.2g}"
        if self.high == 0:
            return f"< {self.least:.2g}"
        if self.high > TOLD_APART * self.low:
            return "not told apart"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return the sequence that never falls and is closest to `values` in weighted squares."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, how many values
    for value, weight in zip(values, weights, strict=True):
        blocks.append((value, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (mean, heavy, many), (other, light, more) = blocks[-2:]
            blocks[-2:] = [((mean * heavy + other * light) / (heavy + light), heavy + light, many + more)]
    return [mean for mean, _, count in blocks for _ in range(count)]


def mean_curve(runs: Sequence[RunResult]) -> list[MeanPoint]:
    """Return accuracy by the compute of all nodes together: a mean over runs of one arm at each of its marks."""
    marks: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        for compute, accuracy in run.curve:
            if compute > 0:
                mark = round(STEPS * math.log2(compute / run.curve[-1][0]))
                marks.setdefault(mark, []).append((compute * run.nodes, accuracy))
    return [
        MeanPoint(statistics.geometric_mean(spent), statistics.fmean(accuracies), len(points))
        for _, points in sorted(marks.items())
        for spent, accuracies in [zip(*points, strict=True)]
    ]


def compute_until(curve: Sequence[MeanPoint], accuracy: float) -> float:
    """Return the compute at which a curve first has `accuracy`: infinity if never, 0 if at its first point."""
    fitted = isotonic([point.accuracy for point in curve], [point.seeds for point in curve])
    at = bisect_left(fitted, accuracy)
    if at in (0, len(fitted)):
        return math.inf if at else 0.0
    part = (accuracy - fitted[at - 1]) / (fitted[at] - fitted[at - 1])
    before, after = (math.log(curve[place].compute) for place in (at - 1, at))
    return math.exp(before + part * (after - before))


def pooling_efficiency(pairs: Sequence[RunPair]) -> Pooling | None:
    """Return the pooling efficiency of a swarm's runs, each beside the central node's of its seed.

    None where a run of the central node has no marks on the way.
    """
    if not pairs or not all(len(pair.central.curve) > 2 for pair in pairs):
        return None

    def efficiency(pairs: Sequence[RunPair]) -> float:
        target = statistics.fmean(pair.swarm.curve[-1][1] for pair in pairs)
        return compute_until(mean_curve([pair.central for pair in pairs]), target) / total_of(pairs)

    def total_of(pairs: Sequence[RunPair]) -> float:
        return statistics.fmean(pair.swarm.nodes * pair.swarm.compute for pair in pairs)

    curve = mean_curve([pair.central for pair in pairs])
    measured = (curve[0].compute / total_of(pairs), curve[-1].compute / total_of(pairs))
    if len(pairs) == 1:
        return Pooling(efficiency(pairs), math.nan, math.nan, *measured)
    rng = random.Random(0)
    resampled = sorted(efficiency(rng.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    out = RESAMPLES // 40  # 2.5 % on each side
    return Pooling(efficiency(pairs), resampled[out], resampled[-1 - out], *measured)


def pairs_at_equal_compute(swarm: Sequence[RunResult], central: Sequence[RunResult]) -> list[RunPair]:
    """Return the runs of two arms seed by seed; none if the central node was not measured at the swarm's total compute.

    Nodes that took nothing from others are no swarm: they are compared with the end of the central node alone.
    """
    by_seed = {run.seed: run for run in central}
    pairs = []
    for run in swarm:
        if (other := by_seed.get(run.seed)) is None:
            continue
        total = run.nodes * run.compute
        moments = [(other.nodes * other.compute, other.accuracy)]
        if run.external or run.weights_kib:
            moments += [(other.nodes * compute, accuracy) for compute, accuracy in other.curve[1:-1]]
        compute, accuracy = min(moments, key=lambda moment: abs(moment[0] - total))
        if not math.isclose(compute, total, rel_tol=EQUAL):
            return []
        pairs.append(RunPair(run, other, accuracy))
    return pairs
