"""`report.html`: a run as one page that stands alone, readable at any moment of the run.

Everything comes from the run's folder. A file that is missing or torn leaves its part
of the page out, never the page.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from node.metrics import Display, shown_in
from node.rollouts.rule import is_right
from node.telemetry import plots
from node.telemetry.evaluations import EVALUATIONS_FILE, evaluation_curve
from node.telemetry.metrics_file import Row, number, read_metrics
from node.telemetry.rollout_log import OWN, ROLLOUTS_FILE, texts_of
from node.telemetry.summary import Summary, gain, summarise_nodes, summarise_swarm
from protocol.storage import write_atomically

ALONE = "alone"  # in a run's folder: a run of one node without peers to compare it with
MAX_TASKS = 8  # of which samples are shown
SAMPLES = 2  # early ones of each task, and as many late ones


class NodeRecords(NamedTuple):
    """A node's records: its rows of metrics, evaluations and rollouts."""

    metrics: Sequence[Row]
    evaluations: Sequence[Row] = ()
    rollouts: Sequence[Row] = ()


class ShownQuestion(NamedTuple):
    """A model's answers to one question: the best and the worst of its completions."""

    node: str
    round: int
    question: str
    completions: Sequence[Mapping[str, Any]]


def write_report(out: Path, alone: Path | None = None) -> Path:
    """Write the report of the run in `out` and return its path.

    `alone` is the folder of the run to compare it with; where it is not given, the folder `alone` in `out`.
    """
    control = alone or out / ALONE
    page = render_report(out.resolve().name, read_nodes(out), _read_object(out / "swarm.json"), read_nodes(control))
    path = out / "report.html"
    write_atomically(path, page.encode())
    return path


def read_nodes(out: Path) -> dict[str, NodeRecords]:
    """Return what the nodes of the run in `out` left, n2 before n10."""
    folders = [path for path in (out / "nodes").glob("*") if path.is_dir()]
    folders.sort(key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)])
    return {
        folder.name: NodeRecords(
            read_metrics(folder / "metrics.jsonl"),
            read_metrics(folder / EVALUATIONS_FILE),
            read_metrics(folder / ROLLOUTS_FILE),
        )
        for folder in folders
    }


def render_report(
    title: str, nodes: Mapping[str, NodeRecords], run: Mapping[str, Any], alone: Mapping[str, NodeRecords] | None = None
) -> str:
    """Return the page.

    Args:
        title: the run's name.
        nodes: what each node left.
        run: what swarm.json holds, or nothing.
        alone: the same of a run to compare this one with, if there is one.
    """
    metrics = {name: node.metrics for name, node in nodes.items()}
    summaries, swarm = _summaries(nodes)
    rejected = _total_rejected(summaries.values())
    started = any(metrics.values())
    # The page escapes everything but the plots, which are SVG of our own making.
    page = Environment(
        loader=PackageLoader("node.telemetry", ""),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
    ).get_template("report.html.j2")
    return page.render(
        title=title,
        run=run,
        swarm=swarm,
        times=gain(swarm),
        nodes=summaries,
        rejected=rejected,
        reward_plot=Markup(plots.plot_reward(metrics)) if started else "",
        evaluation_plot=_evaluation_plot(nodes),
        comparison_plot=_comparison_plot(nodes, alone or {}),
        compared={"this run": swarm, ALONE: _summaries(alone)[1]} if alone else {},
        tasks_plot=Markup(plots.plot_tasks(metrics)) if plots.tasks_asked(metrics) else "",
        samples=pick_samples(nodes),
        signals_plot=Markup(plots.plot_signals(metrics)) if started else "",
        groups_plot=Markup(plots.plot_groups(summaries)) if started else "",
        rejects_plot=Markup(plots.plot_rejects(rejected)) if rejected else "",
        time_plot=Markup(plots.plot_time(metrics)) if started else "",
        settings=_settings(run),
    )


def pick_samples(nodes: Mapping[str, NodeRecords]) -> dict[str, tuple[list[ShownQuestion], list[ShownQuestion]]]:
    """Return the earliest and the latest own groups of each task that any node kept; of the tasks kept most often."""
    by_task: dict[str, list[ShownQuestion]] = {}
    for node, files in nodes.items():
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in files.rollouts:
            if row.get("whose") == OWN:
                groups.setdefault((row["round"], str(row.get("task")), row.get("seed")), []).append(row)
        for (round_number, task, _), rows in groups.items():
            by_task.setdefault(task, []).append(
                ShownQuestion(node, round_number, str(rows[0].get("question")), _shown(rows))
            )
    often = sorted(by_task, key=lambda task: -len(by_task[task]))[:MAX_TASKS]
    ordered = {task: sorted(by_task[task], key=lambda question: question.round) for task in sorted(often)}
    return {task: (samples[:SAMPLES], samples[SAMPLES:][-SAMPLES:]) for task, samples in ordered.items()}


def _shown(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        {
            "texts": texts_of(row),
            "reward": number(row, "reward"),
            "right": is_right(number(row, "reward")),
            "finished": bool(row.get("finished")),
        }
        for row in rows
    ]


def _summaries(nodes: Mapping[str, NodeRecords]) -> tuple[dict[str, Summary], Summary]:
    evaluated = {name: node.evaluations for name, node in nodes.items()}
    each = summarise_nodes({name: node.metrics for name, node in nodes.items()}, evaluated)
    return each, summarise_swarm(list(each.values()), list(evaluated.values()))


def _evaluation_plot(nodes: Mapping[str, NodeRecords]) -> str:
    files = [(node.metrics, node.evaluations) for node in nodes.values()]
    scores = {
        metric.title: metric.name.removeprefix("eval/")
        for metric in shown_in(Display.REPORT)
        if metric.name.startswith("eval/")
    }
    curves = {title: curve for title, key in scores.items() if (curve := evaluation_curve(files, key))}
    return Markup(plots.plot_evaluations(curves)) if curves else ""


def _comparison_plot(nodes: Mapping[str, NodeRecords], alone: Mapping[str, NodeRecords]) -> str:
    curves = {
        label: evaluation_curve([(node.metrics, node.evaluations) for node in run.values()], "accuracy")
        for label, run in (("this run", nodes), (ALONE, alone))
    }
    return Markup(plots.plot_comparison(curves)) if all(curves.values()) else ""


def _total_rejected(summaries: Iterable[Summary]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for summary in summaries:
        total.update(summary["rejected"])
    return {reason: count for reason, count in total.most_common() if count}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _settings(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what every node went by, and after it what each part of them did, where they differ."""
    if not run.get("parts"):
        return _flat(run["config"]) if isinstance(run.get("config"), dict) else []
    parts = {name: dict(_flat(part["config"])) for name, part in run["parts"].items()}
    keys = dict.fromkeys(key for settings in parts.values() for key in settings)
    common = {key for key in keys if len({settings.get(key) for settings in parts.values()}) == 1}
    own = [
        (f"{name}: {key}", settings[key]) for name, settings in parts.items() for key in settings if key not in common
    ]
    return [*((key, next(iter(parts.values()))[key]) for key in keys if key in common), *own]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return dotted keys and their values as JSON text."""
    rows = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, json.dumps(value)))
    return rows
