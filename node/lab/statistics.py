"""Estimates over seeds: means with intervals, and how numbers are rounded.

An interval is Student's at 95 % over seeds.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from node.telemetry.evaluations import Z_95

# Two-sided 95 % quantiles of Student's t by degrees of freedom; `student_95` has those beyond.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Estimate(NamedTuple):
    """A mean with its 95 % interval, `half` to each side; nan from a single run."""

    mean: float
    half: float

    def __str__(self) -> str:
        if not self.half > 0:
            mean = f"{round(self.mean):,}" if abs(self.mean) >= 1000 else f"{self.mean:.3g}"
            return mean if math.isnan(self.half) else f"{mean} ± 0"
        digits = min(1 - math.floor(math.log10(self.half)), 3)  # two of the interval's, and three decimals at most
        return " ± ".join(f"{round(number, digits):,.{max(digits, 0)}f}" for number in self)


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent `values` and Student's 95 % interval of it."""
    if len(values) < 2:
        return Estimate(statistics.fmean(values), math.nan)
    half = student_95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), half)


def student_95(degrees: int) -> float:
    """Return the two-sided 95 % quantile of Student's t: tabulated, then by its series in 1 / `degrees`.

    From 10 degrees on the series (Abramowitz and Stegun, 26.7.5) is right to three digits after the point.
    """
    if degrees in T95:
        return T95[degrees]
    z = Z_95
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def finite(value: float) -> float | None:
    """Return a number as JSON may have it: None for one that is infinite, or none."""
    return value if math.isfinite(value) else None


def rounded(value: Any) -> Any:
    """Return a tree with its numbers to four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, tuple | list):
        return [rounded(element) for element in value]
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items()}
    return value
