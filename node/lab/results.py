"""The results of runs, each read from its folder, or from the JSON of an experiment. No run is started here."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from node.errors import UserError
from node.lab.plan import Lab, Run
from node.telemetry.evaluations import EVALUATIONS_FILE
from node.telemetry.metrics_file import Row, number, read_metrics
from node.training.budget import spent_in


@dataclass(frozen=True)
class RunResult:
    """One run's figures (`node.lab.figures` says what they are); None where nothing was measured."""

    base: str
    arm: str
    seed: int
    rounds: int
    reward: float
    compute: float
    external: float  # groups of peers a round
    groups_kib: float  # that a node sent, in all
    accuracy: float | None
    passes: Mapping[str, float]  # pass@1 and the largest k that was measured
    held_out: tuple[Mapping[str, float], ...] = ()  # by evaluation: what was sampled
    nodes: int = 0  # that are measured; 0: an earlier record does not say
    curve: tuple[tuple[float, float], ...] = ()  # a node's compute, greedy accuracy
    graded: float | None = None
    weights_kib: float = 0.0  # that a node sent to average weights, in all
    part: str = ""  # the part of the run that is measured; empty: all of it

    @property
    def name(self) -> str:
        """What it is called beside others."""
        return named(self.arm, self.part)


def named(arm: str, part: str) -> str:
    """Return what an arm, or a part of it, is called in tables and plots."""
    return f"{arm}: {part}" if part else arm


def read_run(
    folder: Path, base: str, arm: str, seed: int, only: Sequence[str] = (), gone: Sequence[str] = ()
) -> RunResult:
    """Read the folder of a finished run.

    Args:
        folder: the run's.
        base: as the result names it.
        arm: likewise.
        seed: likewise.
        only: the names of the nodes that are looked at; default: all.
        gone: the names of those that left before the end: what they were evaluated at is left out.

    Raises:
        UserError: there is none.
    """
    paths = [path for path in sorted(folder.glob("nodes/*/metrics.jsonl")) if not only or path.parent.name in only]
    nodes = [read_metrics(path) for path in paths]
    if not nodes or not all(nodes):
        raise UserError(f"{folder} is no run that has trained a round")
    rounds = min(map(len, nodes))
    rewards = _by_round(nodes, lambda row: number(row, "reward"), rounds)
    spent = [spent_in(rows).compute for rows in nodes]
    there = [path for path in paths if path.parent.name not in gone]
    evaluated = [rows for path in there if (rows := read_metrics(path.with_name(EVALUATIONS_FILE)))]
    lasts = [rows[-1] for rows in evaluated]
    on_the_way = zip(*(rows[:-1] for rows in evaluated), strict=False)  # nodes that end sooner have fewer
    return RunResult(
        base=base,
        arm=arm,
        seed=seed,
        rounds=rounds,
        reward=statistics.fmean(rewards[-max(rounds // 10, 1) :]),
        compute=statistics.fmean(spent),
        external=statistics.fmean(_by_round(nodes, lambda row: number(row, "groups_external"), rounds)),
        groups_kib=statistics.fmean(number(rows[-1], "swarm/bytes_sent") / 1024 for rows in nodes),
        weights_kib=statistics.fmean(sum(number(row, "weights/bytes_sent") for row in rows) / 1024 for rows in nodes),
        accuracy=_mean(lasts, "accuracy"),
        passes=_sampled(lasts),
        held_out=tuple(map(_sampled, [*on_the_way, lasts])),
        graded=_mean(lasts, "reward") if any(row.get("reward") != row.get("accuracy") for row in lasts) else None,
        nodes=len(nodes),
        curve=_curve(evaluated, spent),
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
    """Return the means over nodes of what an evaluation sampled: pass@1 and that of the largest k."""
    passes = sorted({key for row in rows for key in row if _is_pass(key)}, key=lambda key: int(key.partition("@")[2]))
    means = {key: _mean(rows, key) for key in dict.fromkeys([*passes[:1], *passes[-1:]])}
    return {key: mean for key, mean in means.items() if mean is not None}


def read_runs(runs: Sequence[Run]) -> list[RunResult]:
    """Read what these runs of an experiment left: of each all nodes together, then each of its parts."""
    results = []
    for run in runs:
        names = iter(range(run.nodes))
        parts = [(part, [f"n{index}" for index in itertools.islice(names, part.nodes)]) for part in run.parts]
        gone = [name for part, names_of_part in parts if part.leaves for name in names_of_part]
        results.append(read_run(run.folder, run.base, run.arm, run.seed, gone=gone))
        for part, names_of_part in parts:
            result = read_run(run.folder, run.base, run.arm, run.seed, names_of_part)
            results.append(replace(result, part=part.name))
    return results


def in_order(results: Sequence[RunResult], lab: Lab) -> list[RunResult]:
    """Return the results base by base and arm by arm, as the file names them, and by seed."""
    bases, arms = list(lab.config.bases), list(lab.config.arms)
    return sorted(results, key=lambda result: (bases.index(result.base), arms.index(result.arm), result.seed))


def _by_round(nodes: Sequence[Sequence[Row]], figure: Callable[[Row], float], rounds: int) -> tuple[float, ...]:
    return tuple(statistics.fmean(map(figure, rows)) for rows in zip(*(node[:rounds] for node in nodes), strict=True))


def _mean(rows: Sequence[Row], key: str) -> float | None:
    values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    return statistics.fmean(values) if values else None


def _is_pass(key: str) -> bool:
    return key.startswith("pass@") and key.partition("@")[2].isdigit()
