"""The figures of an experiment's runs, and what comes of them over seeds: a line for each arm.

The figures of a run, each a mean over its nodes:

    reward        of a round's own completions, in the last tenth of the rounds
    compute       what a node spent (`node.training.budget`)
    accuracy, graded, pass@1, pass@k    on held-out questions at the end, if it was evaluated then; graded is the mean
                  reward of the likeliest answers, if that differs from their accuracy
    groups_kib, weights_kib, sent    what a node sent in the whole run: of groups, of weights, and both in MiB;
                  one node alone sends nothing
    less_central  its accuracy less the central node's, at equal total compute (`node.lab.worth`)
    gain, graded_gain, pass_gain@k    accuracy, graded and pass@k less the baseline's under the same seed

A part of a run has figures of its nodes alone. An interval is Student's at 95 % over seeds. A difference is of runs of
one seed. Where there are several bases, an arm that ran on all of them has a line for "all": a run of it has the means
over the bases of the runs of one seed.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from node.lab.results import RunResult
from node.lab.statistics import Estimate, estimate
from node.lab.worth import Pooling, pairs_at_equal_compute, pooling_efficiency

ALIKE = 0.002  # greedy accuracies less far apart are of one policy: JSON has four digits
PLAIN = ("reward", "compute", "external", "groups_kib", "weights_kib")
UNTRAINED = "untrained"  # the line of what all arms on a base begin with
ALL = "all"  # the base of the means over bases


class ArmLine(NamedTuple):
    """A row of the table: an arm over all seeds, or a part of it, by the names of its figures."""

    base: str
    arm: str
    seeds: int
    figures: Mapping[str, Estimate]
    part: str = ""
    pooling: Pooling | None = None


def figures(result: RunResult) -> dict[str, float]:
    """Return the figures of one run that are numbers, by their names."""
    plain = {key: getattr(result, key) for key in PLAIN}
    if result.nodes != 1 or result.part:
        plain["sent"] = (result.groups_kib + result.weights_kib) / 1024
    held_out = {"accuracy": result.accuracy, "graded": result.graded, **result.passes}
    return plain | {key: value for key, value in held_out.items() if value is not None}


def tabulate(results: Sequence[RunResult], baseline: str, central: str = "") -> list[ArmLine]:
    """Return a line for each arm on each base, and for each part of it, in the order of their first runs.

    Before them is one for the policy that all on a base begin with, if all runs have evaluated the same one.

    Args:
        results: of runs, and of parts of them.
        baseline: the arm that others are compared with.
        central: the arm of one node with a swarm's whole compute, which arms that spent as much are compared with.
    """
    results = [*results, *_over_bases(results)]
    whole = {(result.base, result.arm, result.seed): result for result in results if not result.part}
    lines = []
    untrained = {base: _untrained(base, results) for base in dict.fromkeys(result.base for result in results)}
    for base, arm, part in dict.fromkeys((result.base, result.arm, result.part) for result in results):
        if (line := untrained.pop(base, None)) is not None:
            lines.append(line)
        mine = [result for result in results if (result.base, result.arm, result.part) == (base, arm, part)]
        against = {run.seed: whole.get((base, baseline, run.seed)) for run in mine}
        paired = [(run, compared) for run in mine if (compared := against[run.seed]) is not None]
        values = [figures(run) for run in mine]
        estimates = {key: estimate([value[key] for value in values if key in value]) for key in values[0]}
        both = [(figures(run), figures(compared)) for run, compared in paired if run is not compared]
        for key, name in _gains(values[0]).items():
            gains = [ours[key] - theirs[key] for ours, theirs in both if key in ours and key in theirs]
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
        lines.append(ArmLine(base, arm, len(mine), estimates, part, pooling))
    return lines


def _gains(known: Mapping[str, float]) -> dict[str, str]:
    """Return the names of gains, by those of the figures that they are differences of."""
    passes = {key: key.replace("pass@", "pass_gain@") for key in known if key.startswith("pass@") and key != "pass@1"}
    return {"accuracy": "gain", "graded": "graded_gain", **passes}


def _over_bases(results: Sequence[RunResult]) -> list[RunResult]:
    """Return the means over bases, seed by seed, of each arm that ran on all of several."""
    bases = {result.base for result in results}
    runs: dict[tuple[str, str, int], list[RunResult]] = {}
    for result in results:
        runs.setdefault((result.arm, result.part, result.seed), []).append(result)
    return [_mean_run(alike) for alike in runs.values() if len(bases) > 1 and {run.base for run in alike} == bases]


def _mean_run(runs: Sequence[RunResult]) -> RunResult:
    numbers = {key: [getattr(run, key) for run in runs] for key in (*PLAIN, "accuracy", "graded")}
    means: dict[str, Any] = {
        key: None if None in values else statistics.fmean(values) for key, values in numbers.items()
    }
    common = set.intersection(*(set(run.passes) for run in runs))
    passes = {key: statistics.fmean(run.passes[key] for run in runs) for key in runs[0].passes if key in common}
    return replace(runs[0], base=ALL, curve=(), held_out=(), passes=passes, **means)


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
