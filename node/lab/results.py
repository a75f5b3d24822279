"""The results of an experiment: from run folders to figures with intervals. No run is started here.

The figures of a run, each a mean over its nodes:

    cumulative    the sum over rounds of the mean reward of a round's own completions
    first, last   that reward in the first and the last tenth of the rounds
    best          the highest reward, smoothed over `WINDOW` rounds
    compute       what a node spent, generated and scored tokens + 3 x trained ones (`node.training.budget`)
    by_compute    the mean of the reward over what was spent: this compares arms that are given the same compute
    reach         what the baseline of the same seed spent until its best reward, over what this run spent until the
                  same reward; 0 if it never got there
    accuracy, graded, pass@1, pass@k, entropy, right_entropy    on held-out questions at the end, if it was evaluated
                  then; graded is the mean reward of the likeliest answers, if that differs from their accuracy
    equal_...     pass@k and right_entropy at the moment when pass@1 was the baseline's best, less what the baseline had
                  then; interpolated between two evaluations, for runs that got there and were evaluated on the way
    gain          its accuracy less the baseline's under the same seed; the figures of a part of a run are of its nodes
                  alone, and its gain is over the arm that it is compared with

An interval is Student's at 95 % over seeds. A ratio or a difference is of runs of one seed. Cumulative rewards are put
in a ratio only if both runs have equally many rounds.
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from node.errors import UserError
from node.lab.plan import Lab, LabConfig, Run, as_given
from node.telemetry.evaluations import EVALUATIONS_FILE, Z_95
from node.telemetry.metrics import Row, number, read_metrics
from node.telemetry.summary import LEAST_COMPARED
from node.training.budget import Spent

# Two-sided 95 % quantiles of Student's t by degrees of freedom; `student_95` has those beyond.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
WINDOW = 20  # rounds that a reward is smoothed over
PASS_1, RIGHT_ENTROPY = "pass@1", "right_entropy"


@dataclass(frozen=True)
class RunResult:
    """One run's figures (see the module); None where nothing was measured.

    `rewards` and `spent` are by round: its mean reward, and what a node had spent when it was over.
    """

    base: str
    arm: str
    seed: int
    rounds: int
    cumulative: float
    first: float
    last: float
    best: float
    compute: float
    external: float  # groups of peers a round
    kib_sent: float  # a round
    accuracy: float | None
    passes: Mapping[str, float]  # pass@1 and the largest k that was measured
    entropy: float | None
    rewards: tuple[float, ...]
    spent: tuple[float, ...]
    held_out: tuple[Mapping[str, float], ...] = ()  # by evaluation: what was sampled
    nodes: int = 0  # that are measured; 0: an earlier record does not say
    curve: tuple[tuple[float, float], ...] = ()  # a node's compute, greedy accuracy
    graded: float | None = None
    part: str = ""  # the part of the run that is measured; empty: all of it
    beside: str = ""  # the arm that it is compared with; empty: the file's baseline

    @property
    def name(self) -> str:
        """What it is called beside others."""
        return named(self.arm, self.part)


def named(arm: str, part: str) -> str:
    """Return what an arm, or a part of it, is called in tables and plots."""
    return f"{arm}: {part}" if part else arm


class Estimate(NamedTuple):
    """A mean with its 95 % interval, `half` to each side; nan from a single run."""

    mean: float
    half: float

    def __str__(self) -> str:
        if not self.half > 0:
            mean = f"{round(self.mean):,}" if abs(self.mean) >= 1000 else f"{self.mean:.3g}"
            return mean if math.isnan(self.half) else f"{mean} ± 0"
        digits = min(1 - math.floor(math.log10(self.half)), 3)  # two of the interval's, and three decimals at most
        return " ± ".join(f"{round(one, digits):,.{max(digits, 0)}f}" for one in self)


class ArmLine(NamedTuple):
    """A row of the table: an arm over all seeds, or a part of it, by the names of its figures."""

    base: str
    arm: str
    seeds: int
    figures: Mapping[str, Estimate]
    part: str = ""
    beside: str = ""  # as in `RunResult`


def read_run(folder: Path, base: str, arm: str, seed: int, only: Sequence[str] = ()) -> RunResult:
    """Read the folder of a finished run.

    Args:
        folder: the run's.
        base: as the result names it.
        arm: likewise.
        seed: likewise.
        only: the names of the nodes that are looked at; default: all.

    Raises:
        UserError: there is none.
    """
    paths = [path for path in sorted(folder.glob("nodes/*/metrics.jsonl")) if not only or path.parent.name in only]
    nodes = [read_metrics(path) for path in paths]
    if not nodes or not all(nodes):
        raise UserError(f"{folder} is no run that has trained a round")
    rounds = min(map(len, nodes))
    rewards = _by_round(nodes, lambda row: number(row, "reward"), rounds)
    tenth = max(rounds // 10, 1)
    each = [[one.compute for one in accumulate(rows, Spent.after, initial=Spent())][1:] for rows in nodes]
    spent = tuple(statistics.fmean(values) for values in zip(*(one[:rounds] for one in each), strict=True))
    evaluated = [rows for path in paths if (rows := read_metrics(path.with_name(EVALUATIONS_FILE)))]
    lasts = [rows[-1] for rows in evaluated]
    on_the_way = zip(*(rows[:-1] for rows in evaluated), strict=False)  # nodes that end sooner have fewer
    return RunResult(
        base=base,
        arm=arm,
        seed=seed,
        rounds=rounds,
        cumulative=sum(rewards),
        first=statistics.fmean(rewards[:tenth]),
        last=statistics.fmean(rewards[-tenth:]),
        best=max(smooth(rewards)),
        compute=spent[-1],
        external=statistics.fmean(_by_round(nodes, lambda row: number(row, "groups_external"), rounds)),
        kib_sent=statistics.fmean(number(rows[-1], "swarm/bytes_sent") / len(rows) / 1024 for rows in nodes),
        accuracy=_mean(lasts, "accuracy"),
        passes={key: one for key, one in _sampled(lasts).items() if _is_pass(key)},
        entropy=_mean(lasts, "entropy"),
        rewards=rewards,
        spent=spent,
        held_out=tuple(map(_sampled, [*on_the_way, lasts])),
        graded=_mean(lasts, "reward") if any(row.get("reward") != row.get("accuracy") for row in lasts) else None,
        nodes=len(nodes),
        curve=_curve(evaluated, [one[-1] for one in each]),
    )


def _curve(evaluated: Sequence[Sequence[Row]], spent: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Return greedy accuracy over what a node spent until then: means over the nodes that were evaluated in one round.

    The last point is of all nodes at their ends, which may be in different rounds, and of what all have spent.
    """
    by_round: dict[int, list[Row]] = {}
    for row in itertools.chain.from_iterable(rows[:-1] for rows in evaluated):
        by_round.setdefault(row["round"], []).append(row)
    points = [(_mean(rows, "compute"), _mean(rows, "accuracy")) for _, rows in sorted(by_round.items())]
    points.append((statistics.fmean(spent), _mean([rows[-1] for rows in evaluated], "accuracy")))
    known = tuple((compute, accuracy) for compute, accuracy in points if compute is not None and accuracy is not None)
    return known if len(known) == len(points) else ()


def _sampled(rows: Sequence[Row]) -> dict[str, float]:
    """Return the means over nodes of what an evaluation sampled: pass@1, the largest k, and `right_entropy`."""
    passes = sorted({key for row in rows for key in row if _is_pass(key)}, key=lambda key: int(key.partition("@")[2]))
    found = {key: _mean(rows, key) for key in dict.fromkeys([*passes[:1], *passes[-1:], RIGHT_ENTROPY])}
    return {key: one for key, one in found.items() if one is not None}


def read_runs(runs: Sequence[Run]) -> list[RunResult]:
    """Read what these runs of an experiment left: of each all nodes together, then each of its parts."""
    results = []
    for run in runs:
        results.append(read_run(run.folder, run.base, run.arm, run.seed))
        first = 0
        for part in run.parts:
            names = [f"n{index}" for index in range(first, first + part.nodes)]
            found = read_run(run.folder, run.base, run.arm, run.seed, names)
            results.append(replace(found, part=part.name, beside=part.baseline))
            first += part.nodes
    return results


def read_known(path: Path) -> tuple[LabConfig, list[RunResult]]:
    """Read the file and the runs of a JSON that `to_json` made, whose numbers have four digits.

    Raises:
        UserError: it is none.
    """
    try:
        tree = json.loads(path.read_text())
        return LabConfig.model_validate(tree["file"]), list(map(_result, tree["runs"]))
    except FileNotFoundError:
        raise UserError(f"no file {path}: check the path") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no JSON of an experiment: {error!r}") from None


def _result(tree: Mapping[str, Any]) -> RunResult:
    """Return a run of a JSON; its best reward is that of the rounded rewards, so that `reach` finds it."""
    rewards = tuple(tree["rewards"])
    also = {"spent": tuple(tree["spent"]), "held_out": tuple(tree.get("held_out", ()))}
    also["curve"] = tuple(map(tuple, tree.get("curve", ())))
    return RunResult(**{**tree, **also, "rewards": rewards, "best": max(smooth(rewards))})


def with_known(lab: Lab, known: LabConfig, results: Sequence[RunResult]) -> Lab:
    """Return `lab` without the runs that are among `results`, and with the seeds, arms and bases that only those have.

    Args:
        lab: an experiment.
        known: the file of the experiment that the results are of.
        results: what came of it.

    Raises:
        UserError: a run of both has other settings there.
    """
    done = {(one.base, one.arm, one.seed) for one in results}
    missing = []
    for run in lab.runs:
        if (run.base, run.arm, run.seed) not in done:
            missing.append(run)
        elif as_given(known, run.base, run.arm) != as_given(lab.config, run.base, run.arm):
            raise UserError(f"{run.arm!r} on base {run.base!r} was run with other settings: leave --known out")
    arms, bases = lab.config.arms | known.arms | lab.config.arms, lab.config.bases | known.bases | lab.config.bases
    seeds = sorted({one.seed for one in results} | {run.seed for run in lab.runs})
    config = lab.config.model_copy(update={"arms": arms, "bases": bases, "seeds": seeds})
    return lab._replace(config=config, runs=missing)


def in_order(results: Sequence[RunResult], lab: Lab) -> list[RunResult]:
    """Return the results base by base and arm by arm, as the file names them, and by seed."""
    bases, arms = list(lab.config.bases), list(lab.config.arms)
    return sorted(results, key=lambda one: (bases.index(one.base), arms.index(one.arm), one.seed))


def smooth(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Return the mean of the last `window` values at each place (fewer at the start)."""
    sums, total = [], 0.0
    for at, value in enumerate(values):
        total += value - (values[at - window] if at >= window else 0.0)
        sums.append(total / min(at + 1, window))
    return sums


def reach(result: RunResult, baseline: RunResult) -> float:
    """Return how many times less compute `result` took to the baseline's best smoothed reward; 0 if it never did."""
    theirs, ours = (_spent_until(one, baseline.best) for one in (baseline, result))
    return theirs / ours if theirs and ours else 0.0


def at_equal(result: RunResult, baseline: RunResult) -> dict[str, float]:
    """Return pass@k and the entropy of right answers where pass@1 is the baseline's best, less the baseline's.

    Empty where the run never got there, or either was not evaluated on the way: of its ends alone nothing follows.
    """
    ours, theirs = ([one for one in run.held_out if PASS_1 in one] for run in (result, baseline))
    if min(len(ours), len(theirs)) < 3:
        return {}
    there = max(theirs, key=lambda one: one[PASS_1])
    for before, after in pairwise(ours):
        if before[PASS_1] <= there[PASS_1] <= after[PASS_1]:
            part = (there[PASS_1] - before[PASS_1]) / ((after[PASS_1] - before[PASS_1]) or 1.0)
            keys = [key for key in there if key != PASS_1 and key in before and key in after]
            return {f"equal_{key}": before[key] + part * (after[key] - before[key]) - there[key] for key in keys}
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


def figures(result: RunResult) -> dict[str, float]:
    """Return the figures of one run that are numbers, by their names."""
    plain = {key: getattr(result, key) for key in ("cumulative", "first", "last", "compute", "external", "kib_sent")}
    plain["by_compute"] = by_compute(result)
    last = result.held_out[-1].get(RIGHT_ENTROPY) if result.held_out else None
    scores = {"accuracy": result.accuracy, "graded": result.graded, **result.passes}
    held_out = {**scores, "entropy": result.entropy, RIGHT_ENTROPY: last}
    return plain | {key: value for key, value in held_out.items() if value is not None}


def tabulate(results: Sequence[RunResult], baseline: str) -> list[ArmLine]:
    """Return a line for each arm on each base, and for each part of it, in the order of their first runs."""
    whole = {(one.base, one.arm, one.seed): one for one in results if not one.part}
    lines = []
    for base, arm, part in dict.fromkeys((one.base, one.arm, one.part) for one in results):
        mine = [one for one in results if (one.base, one.arm, one.part) == (base, arm, part)]
        beside = mine[-1].beside
        against = {one.seed: whole.get((base, beside or baseline, one.seed)) for one in mine}
        paired = [(one, other) for one in mine if (other := against[one.seed]) is not None]
        values = [figures(one) for one in mine]
        estimates = {key: estimate([one[key] for one in values if key in one]) for key in values[0]}
        if paired:
            ratios = [
                one.cumulative / other.cumulative
                for one, other in paired
                if other.cumulative and one.rounds == other.rounds
            ]
            estimates |= {"ratio": estimate(ratios)} if len(ratios) == len(paired) else {}
            estimates["reach"] = estimate([reach(one, other) for one, other in paired])
            equal = [found for one, other in paired if (found := at_equal(one, other))]
            if len(equal) == len(paired):
                common = [key for key in equal[0] if all(key in one for one in equal)]
                estimates |= {key: estimate([one[key] for one in equal]) for key in common}
        for key, name in (("accuracy", "gain"), ("graded", "graded_gain")):
            both = [(getattr(one, key), getattr(other, key)) for one, other in paired if one is not other]
            gains = [ours - theirs for ours, theirs in both if ours is not None and theirs is not None]
            if gains:
                estimates[name] = estimate(gains)
        lines.append(ArmLine(base, arm, len(mine), estimates, part, beside))
    return lines


COLUMNS = {
    "cumulative": "cumulative reward",
    "ratio": "against {baseline}",
    "by_compute": "reward, mean over compute",
    "reach": "compute to the best of {baseline}, times less",
    "first": "first tenth",
    "last": "last tenth",
    "accuracy": "accuracy",
    "gain": "accuracy gained",
    "graded": "graded reward",
    "graded_gain": "graded reward gained",
    "pass@": "pass@{k}",
    "equal_pass@": "pass@{k} less {baseline}'s at its best pass@1",
    "entropy": "entropy",
    "right_entropy": "entropy of right answers",
    "equal_right_entropy": "that less {baseline}'s at its best pass@1",
    "external": "external groups",
    "kib_sent": "KiB sent",
    "compute": "compute",
}


TRAINED = {"cumulative", "ratio", "by_compute", "reach", "first", "last"}  # figures of rewards in training
SAMPLED = {PASS_1, "entropy"}  # of answers that are sampled: what they add to accuracy is in the JSON


def to_markdown(lines: Sequence[ArmLine], lab: Lab) -> str:
    """Return the table; a figure that no arm has, or that is 0 for all, is left out.

    If held-out accuracy is known, figures of training rewards and of single sampled answers are left out, too.
    """
    known = list(dict.fromkeys(key for line in lines for key, one in line.figures.items() if one != (0.0, 0.0)))
    if "accuracy" in known:
        known = [key for key in known if key not in TRAINED | SAMPLED]
    keys = [key for column in COLUMNS for key in known if column == _column(key)]
    titles = [COLUMNS[_column(key)].format(baseline=lab.baseline, k=key.partition("@")[2]) for key in keys]
    bases = any(line.base for line in lines)
    head = [*(["base"] if bases else []), "arm", "", "seeds", *titles]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        cells = [str(line.figures.get(key, "")) for key in keys]
        rows.append(
            [*([line.base] if bases else []), named(line.arm, line.part), _note(line, lab), str(line.seeds), *cells]
        )
    return _table(rows)


def _note(line: ArmLine, lab: Lab) -> str:
    """Return what the table says of a line; of a part also the arm that it is compared with, if it names one."""
    arm = lab.config.arms[line.arm]
    if not line.part:
        return arm.note
    note = arm.parts[line.part].note
    beside = f"against {line.beside}" if line.beside else ""
    return ", ".join(filter(None, [note, beside]))


def to_json(results: Sequence[RunResult], lines: Sequence[ArmLine], lab: Lab) -> str:
    """Return all of it: what was run, every run's figures and curves, and the estimates."""
    tree = {
        "name": lab.name,
        "baseline": lab.baseline,
        "file": lab.config.model_dump(mode="json"),
        "arms": [
            {
                "base": line.base,
                "arm": line.arm,
                **({"part": line.part} if line.part else {}),
                "seeds": line.seeds,
                "figures": {key: {"mean": one.mean, "half": finite(one.half)} for key, one in line.figures.items()},
            }
            for line in lines
        ],
        "runs": [rounded(asdict(one)) for one in results],
    }
    return json.dumps(tree, separators=(",", ":")) + "\n"


def price(results: Sequence[RunResult], overhead: Sequence[float]) -> str:
    """Return a table of each arm's mean reward if a round costs something beside its compute.

    A run's rewards do not depend on what its rounds cost, so none is done again: all runs on a base are compared up to
    the cost at which the first of them ended.

    Args:
        results: of an experiment.
        overhead: what a round costs, in tokens of compute; a line on each base for each.
    """
    arms = list(dict.fromkeys(one.name for one in results))
    rows = [["base", "a round beside its compute", *arms], ["---"] * (len(arms) + 2)]
    for base, cost in itertools.product(dict.fromkeys(one.base for one in results), overhead):
        here = [one for one in results if one.base == base]
        until = min(cost_of(one, cost) for one in here)
        found = [[by_compute(one, cost, until) for one in here if one.name == arm] for arm in arms]
        rows.append([base, f"{cost:g}", *(str(estimate(values)) if values else "" for values in found)])
    return _table(rows)


def compare(a: Path, b: Path) -> list[str]:
    """Return lines that hold two runs, or two arms, side by side.

    Args:
        a: a run's folder, or an arm's with a folder for each seed.
        b: likewise; where both are arms, runs of one seed are compared.

    Raises:
        UserError: there is no run, or both have no seed in common.
    """
    first, second = _read_side(a), _read_side(b)
    if len(first) == len(second) == 1:
        pairs = [(*first.values(), *second.values())]
    else:
        pairs = [(first[seed], second[seed]) for seed in first if seed in second]
    if not pairs:
        raise UserError(f"{a} and {b} have no seed in common")
    values = [(figures(one), figures(two)) for one, two in pairs]
    keys = [key for key in values[0][0] if all(key in one and key in two for one, two in values)]
    rows = [["", *_short_names(a, b), "difference"]]
    for key in keys:
        of = [estimate([pair[side][key] for pair in values]) for side in (0, 1)]
        difference = estimate([two[key] - one[key] for one, two in values])
        rows.append([COLUMNS.get(key, key), *map(str, of), str(difference)])
    title = COLUMNS["reach"].format(baseline=_short_names(a, b)[0])
    weak = any(one.best < LEAST_COMPARED for one, _ in pairs)
    ratio = "too little signal" if weak else str(estimate([reach(two, one) for one, two in pairs]))
    rows.append([title, "1", ratio, ""])
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [f"{len(pairs)} pair{'s' if len(pairs) > 1 else ''} of runs", *lines]


def _short_names(a: Path, b: Path) -> tuple[str, str]:
    """Return the ends of two paths, as much of them as tells them apart."""
    one, two = a.resolve().parts, b.resolve().parts
    shared = next((at for at, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]), 0)
    return "/".join(one[shared:]) or a.name, "/".join(two[shared:]) or b.name


def _read_side(folder: Path) -> dict[str, RunResult]:
    """Return the runs in a folder by their seeds' folders, those that have ended; a run's own is one without a seed."""
    if (folder / "nodes").is_dir():
        return {"": read_run(folder, "", str(folder), 0)}
    found = {path.name: path for path in sorted(folder.glob("seed*")) if (path / "summary.json").exists()}
    if not found:
        raise UserError(f"{folder} is no run of a swarm, nor an arm of an experiment with a finished run")
    return {name: read_run(path, "", str(folder), 0) for name, path in found.items()}


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _spent_until(result: RunResult, reward: float) -> float | None:
    """Return what a node had spent when the smoothed reward got to `reward`; None if it never did."""
    curve = smooth(result.rewards)
    return next((spent for value, spent in zip(curve, result.spent, strict=True) if value >= reward), None)


def _by_round(nodes: Sequence[Sequence[Row]], figure: Callable[[Row], float], rounds: int) -> tuple[float, ...]:
    return tuple(statistics.fmean(map(figure, rows)) for rows in zip(*(one[:rounds] for one in nodes), strict=True))


def _mean(rows: Sequence[Row], key: str) -> float | None:
    values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    return statistics.fmean(values) if values else None


def _column(key: str) -> str:
    """Return the column of a figure: all pass@k have one."""
    return "".join(key.partition("@")[:2])


def _is_pass(key: str) -> bool:
    return key.startswith("pass@") and key.partition("@")[2].isdigit()


def finite(value: float) -> float | None:
    """Return a number as JSON may have it: None for one that is infinite, or none."""
    return value if math.isfinite(value) else None


def rounded(value: Any) -> Any:
    """Return a tree with its numbers to four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, tuple | list):
        return [rounded(one) for one in value]
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    return value
