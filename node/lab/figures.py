"""The figures of an experiment's runs, and what comes of them over seeds: a line for each arm.

The figures of a run, each a mean over its nodes:

    cumulative    the sum over rounds of the mean reward of a round's own completions
    first, last   that reward in the first and the last tenth of the rounds
    best          the highest reward, smoothed over `WINDOW` rounds
    compute       what a node spent (`node.training.budget`)
    by_compute    the mean of the reward over what was spent: this compares arms that are given the same compute
    reach         what the baseline of the same seed spent until its best reward, over what this run spent until the
                  same reward; 0 if it never got there
    accuracy, graded, pass@1, pass@k, entropy, right_entropy    on held-out questions at the end, if it was evaluated
                  then; graded is the mean reward of the likeliest answers, if that differs from their accuracy
    equal_...     pass@k and right_entropy at the moment when pass@1 was the baseline's best, less what the baseline had
                  then; interpolated between two evaluations, for runs that got there and were evaluated on the way
    less_central  its accuracy less the central node's, at equal total compute (`node.lab.worth`)
    gain          its accuracy less the baseline's under the same seed; the figures of a part of a run are of its nodes
                  alone, and its gain is over the arm that it is compared with

An interval is Student's at 95 % over seeds. A ratio or a difference is of runs of one seed. Cumulative rewards are put
in a ratio only if both runs have equally many rounds.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from node.lab.results import PASS_1, RIGHT_ENTROPY, RunResult
from node.lab.statistics import Estimate, estimate, smooth
from node.lab.worth import Pooling, pairs_at_equal_compute, pooling_efficiency

ALIKE = 0.002  # greedy accuracies less far apart are of one policy: JSON has four digits
PLAIN = ("cumulative", "first", "last", "compute", "external", "kib_sent")


UNTRAINED = "untrained"  # the line of what all arms on a base begin with


class ArmLine(NamedTuple):
    """A row of the table: an arm over all seeds, or a part of it, by the names of its figures."""

    base: str
    arm: str
    seeds: int
    figures: Mapping[str, Estimate]
    part: str = ""
    beside: str = ""  # as in `RunResult`
    pooling: Pooling | None = None


def reach(result: RunResult, baseline: RunResult) -> float:
    """Return how many times less compute `result` took to the baseline's best smoothed reward; 0 if it never did."""
    theirs, ours = (_spent_until(run, baseline.best) for run in (baseline, result))
    return theirs / ours if theirs and ours else 0.0


def at_equal(result: RunResult, baseline: RunResult) -> dict[str, float]:
    """Return pass@k and the entropy of right answers where pass@1 is the baseline's best, less the baseline's.

    Empty where the run never got there, or either was not evaluated on the way: of its ends alone nothing follows.
    """
    ours, theirs = ([point for point in run.held_out if PASS_1 in point] for run in (result, baseline))
    if min(len(ours), len(theirs)) < 3:
        return {}
    best = max(theirs, key=lambda point: point[PASS_1])
    for before, after in pairwise(ours):
        if before[PASS_1] <= best[PASS_1] <= after[PASS_1]:
            part = (best[PASS_1] - before[PASS_1]) / ((after[PASS_1] - before[PASS_1]) or 1.0)
            keys = [key for key in best if key != PASS_1 and key in before and key in after]
            return {f"equal_{key}": before[key] + part * (after[key] - before[key]) - best[key] for key in keys}
    return {}


def by_compute(result: RunResult, overhead: float = 0.0, until: float = math.inf) -> float:
    """Return the mean reward, each round's counted by what it cost.

    Args:
        result: a run.
        overhead: what a round costs that its compute does not count, such as the update itself, in tokens of compute.
        until: the cost of all rounds that are looked at; the last of them counts in part.
    """
    total, left = 0.0, min(until, cost_of(result, overhead))
    spent = left
    for reward, (before, after) in zip(result.rewards, pairwise((0.0, *result.spent)), strict=True):
        part = min(after - before + overhead, left)
        total += reward * part
        left -= part
    return total / spent if spent else 0.0


def cost_of(result: RunResult, overhead: float) -> float:
    """Return what a run cost: what it spent, and `overhead` tokens of compute more for each round."""
    return result.spent[-1] + overhead * result.rounds


def figures(result: RunResult) -> dict[str, float]:
    """Return the figures of one run that are numbers, by their names."""
    plain = {key: getattr(result, key) for key in (*PLAIN, "weights_kib")}
    plain["by_compute"] = by_compute(result)
    last = result.held_out[-1].get(RIGHT_ENTROPY) if result.held_out else None
    scores = {"accuracy": result.accuracy, "graded": result.graded, **result.passes}
    held_out = {**scores, "entropy": result.entropy, RIGHT_ENTROPY: last}
    return plain | {key: value for key, value in held_out.items() if value is not None}


def tabulate(results: Sequence[RunResult], baseline: str, central: str = "") -> list[ArmLine]:
    """Return a line for each arm on each base, and for each part of it, in the order of their first runs.

    Before them is one for the policy that all on a base begin with, if all runs have evaluated the same one.

    Args:
        results: of runs, and of parts of them.
        baseline: the arm that others are compared with, if they name none.
        central: the arm of one node with a swarm's whole compute, which arms that spent as much are compared with.
    """
    whole = {(result.base, result.arm, result.seed): result for result in results if not result.part}
    lines = []
    untrained = {base: _untrained(base, results) for base in dict.fromkeys(result.base for result in results)}
    for base, arm, part in dict.fromkeys((result.base, result.arm, result.part) for result in results):
        if (line := untrained.pop(base, None)) is not None:
            lines.append(line)
        mine = [result for result in results if (result.base, result.arm, result.part) == (base, arm, part)]
        beside = mine[-1].beside
        against = {run.seed: whole.get((base, beside or baseline, run.seed)) for run in mine}
        paired = [(run, compared) for run in mine if (compared := against[run.seed]) is not None]
        values = [figures(run) for run in mine]
        estimates = {key: estimate([value[key] for value in values if key in value]) for key in values[0]}
        if paired:
            ratios = [
                run.cumulative / compared.cumulative
                for run, compared in paired
                if compared.cumulative and run.rounds == compared.rounds
            ]
            estimates |= {"ratio": estimate(ratios)} if len(ratios) == len(paired) else {}
            estimates["reach"] = estimate([reach(run, compared) for run, compared in paired])
            equal = [differences for run, compared in paired if (differences := at_equal(run, compared))]
            if len(equal) == len(paired):
                common = [key for key in equal[0] if all(key in point for point in equal)]
                estimates |= {key: estimate([point[key] for point in equal]) for key in common}
        for key, name in (("accuracy", "gain"), ("graded", "graded_gain")):
            both = [(getattr(run, key), getattr(compared, key)) for run, compared in paired if run is not compared]
            gains = [ours - theirs for ours, theirs in both if ours is not None and theirs is not None]
            if gains:
                estimates[name] = estimate(gains)
        centrals = [
            result for result in results if (result.base, result.arm) == (base, central) and not part and arm != central
        ]
        pairs = pairs_at_equal_compute(mine, centrals)
        less = [
            pair.swarm.accuracy - pair.central_accuracy
            for pair in pairs
            if pair.swarm.accuracy is not None and pair.central_accuracy is not None
        ]
        if less:
            estimates["less_central"] = estimate(less)
        pooling = pooling_efficiency(pairs)
        lines.append(ArmLine(base, arm, len(mine), estimates, part, beside, pooling))
    return lines


def _untrained(base: str, results: Sequence[RunResult]) -> ArmLine | None:
    """Return the line of the policy that the runs on a base begin with; None if it is not one, or was not evaluated."""
    begun = [
        {"accuracy": run.curve[0][1], **run.held_out[0]}
        for run in results
        if run.base == base and run.curve and run.curve[0][0] == 0 and run.held_out
    ]
    if not begun or any(abs(other["accuracy"] - begun[0]["accuracy"]) > ALIKE for other in begun):
        return None
    return ArmLine(base, UNTRAINED, 0, {key: Estimate(value, math.nan) for key, value in begun[0].items()})


def _spent_until(result: RunResult, reward: float) -> float | None:
    """Return what a node had spent when the smoothed reward got to `reward`; None if it never did."""
    curve = smooth(result.rewards)
    return next((spent for value, spent in zip(curve, result.spent, strict=True) if value >= reward), None)
