"""What people read of an experiment: its table, its JSON, prices and the comparison of two runs. No run is started."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from node.errors import UserError
from node.lab.figures import UNTRAINED, ArmLine, by_compute, cost_of, figures, reach
from node.lab.plan import Lab
from node.lab.results import RunResult, named, read_run
from node.lab.statistics import estimate, finite, rounded
from node.lab.worth import Pooling
from node.telemetry.summary import LEAST_COMPARED

COLUMNS = {
    "cumulative": "cumulative reward",
    "ratio": "against {baseline}",
    "by_compute": "reward, mean over compute",
    "reach": "compute to the best of {baseline}, times less",
    "first": "first tenth",
    "last": "last tenth",
    "accuracy": "accuracy",
    "less_central": "accuracy less {central}'s at equal total compute",
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
    "weights_kib": "KiB of weights sent in all",
    "compute": "compute",
}
TRAINED = {"cumulative", "ratio", "by_compute", "reach", "first", "last"}  # figures of rewards in training
SAMPLED = {"entropy"}  # of answers that are sampled: the JSON has it


def to_markdown(lines: Sequence[ArmLine], lab: Lab) -> str:
    """Return the table; a figure that no arm has, or that is 0 for all, is left out.

    Accuracy is not. If it is known, figures of training rewards are left out, too.
    """
    known = list(
        dict.fromkeys(
            key
            for line in lines
            for key, figure in line.figures.items()
            if figure.mean or figure.half > 0 or key == "accuracy"
        )
    )
    if "accuracy" in known:
        known = [key for key in known if key not in TRAINED | SAMPLED]
    keys = [key for column in COLUMNS for key in known if column == _column(key)]
    words = {"baseline": lab.baseline, "central": lab.config.central}
    titles = [COLUMNS[_column(key)].format(**words, k=key.partition("@")[2]) for key in keys]
    pooled = any(line.pooling for line in lines)
    bases = any(line.base for line in lines)
    head = [*(["base"] if bases else []), "arm", "", "seeds", *(["pooling efficiency"] if pooled else []), *titles]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        cells = [str(line.figures.get(key, "")) for key in keys]
        who = [named(line.arm, line.part), _note(line, lab), str(line.seeds or "")]
        pooling = [str(line.pooling or "")] if pooled else []
        rows.append([*([line.base] if bases else []), *who, *pooling, *cells])
    return _table(rows)


def _note(line: ArmLine, lab: Lab) -> str:
    """Return what the table says of a line; of a part also the arm that it is compared with, if it names one."""
    if line.arm == UNTRAINED:
        return ""
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
                "figures": {
                    key: {"mean": figure.mean, "half": finite(figure.half)} for key, figure in line.figures.items()
                },
                **({"pooling": _pooling(line.pooling)} if line.pooling else {}),
            }
            for line in lines
        ],
        "runs": [rounded(asdict(result)) for result in results],
    }
    return json.dumps(tree, separators=(",", ":")) + "\n"


def _pooling(pooling: Pooling) -> dict[str, object]:
    """Return pooling efficiency for JSON, where null stands for what is not a number; `said` is how to read it."""
    return {"said": str(pooling), **{key: finite(value) for key, value in pooling._asdict().items()}}


def price(results: Sequence[RunResult], overhead: Sequence[float]) -> str:
    """Return a table of each arm's mean reward if a round costs something beside its compute.

    A run's rewards do not depend on what its rounds cost, so none is done again: all runs on a base are compared up to
    the cost at which the first of them ended.

    Args:
        results: of an experiment.
        overhead: what a round costs, in tokens of compute; a line on each base for each.
    """
    arms = list(dict.fromkeys(result.name for result in results))
    rows = [["base", "a round beside its compute", *arms], ["---"] * (len(arms) + 2)]
    for base, cost in itertools.product(dict.fromkeys(result.base for result in results), overhead):
        runs = [result for result in results if result.base == base]
        until = min(cost_of(run, cost) for run in runs)
        by_arm = [[by_compute(run, cost, until) for run in runs if run.name == arm] for arm in arms]
        rows.append([base, f"{cost:g}", *(str(estimate(values)) if values else "" for values in by_arm)])
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
    values = [(figures(left), figures(right)) for left, right in pairs]
    keys = [key for key in values[0][0] if all(key in left and key in right for left, right in values)]
    rows = [["", *_short_names(a, b), "difference"]]
    for key in keys:
        of = [estimate([pair[side][key] for pair in values]) for side in (0, 1)]
        difference = estimate([right[key] - left[key] for left, right in values])
        rows.append([COLUMNS.get(key, key), *map(str, of), str(difference)])
    title = COLUMNS["reach"].format(baseline=_short_names(a, b)[0])
    weak = any(left.best < LEAST_COMPARED for left, _ in pairs)
    ratio = "too little signal" if weak else str(estimate([reach(right, left) for left, right in pairs]))
    rows.append([title, "1", ratio, ""])
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [f"{len(pairs)} pair{'s' if len(pairs) > 1 else ''} of runs", *lines]


def _short_names(a: Path, b: Path) -> tuple[str, str]:
    """Return the ends of two paths, as much of them as tells them apart."""
    left, right = a.resolve().parts, b.resolve().parts
    shared = next((at for at, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), 0)
    return "/".join(left[shared:]) or a.name, "/".join(right[shared:]) or b.name


def _read_side(folder: Path) -> dict[str, RunResult]:
    """Return the runs in a folder by their seeds' folders, those that have ended; a run's own is one without a seed."""
    if (folder / "nodes").is_dir():
        return {"": read_run(folder, "", str(folder), 0)}
    folders = {path.name: path for path in sorted(folder.glob("seed*")) if (path / "summary.json").exists()}
    if not folders:
        raise UserError(f"{folder} is no run of a swarm, nor an arm of an experiment with a finished run")
    return {name: read_run(path, "", str(folder), 0) for name, path in folders.items()}


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _column(key: str) -> str:
    """Return the column of a figure: all pass@k have one."""
    return "".join(key.partition("@")[:2])
