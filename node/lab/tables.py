"""What people read of an experiment: its table, its JSON and the comparison of two runs. No run is started."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from node.errors import UserError
from node.lab.figures import UNTRAINED, ArmLine, figures
from node.lab.plan import Lab
from node.lab.results import RunResult, named, read_run
from node.lab.statistics import estimate, finite, rounded
from node.lab.worth import Pooling

COLUMNS = {
    "reward": "reward",
    "accuracy": "accuracy",
    "less_central": "accuracy less {central}'s at equal total compute",
    "gain": "accuracy gained",
    "graded": "graded reward",
    "pass@": "pass@{k}",
    "pass_gain@": "pass@{k} gained",
    "sent": "MiB sent",
}


def to_markdown(lines: Sequence[ArmLine], lab: Lab) -> str:
    """Return the table. The reward in training stands in it only if nothing else was measured; JSON has all figures."""
    known = list(dict.fromkeys(key for line in lines for key in line.figures))
    if "accuracy" in known:
        known.remove("reward")
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
    """Return what the file says of a line."""
    if line.arm == UNTRAINED:
        return ""
    arm = lab.config.arms[line.arm]
    return arm.parts[line.part].note if line.part else arm.note


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
