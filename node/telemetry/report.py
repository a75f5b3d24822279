"""`report.html`: a run as one page that stands alone, readable at any moment of the run.

Everything comes from the run's folder. A file that is missing or torn leaves its part
of the page out, never the page.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from node.telemetry.evaluations import EVALUATIONS_FILE
from node.telemetry.metrics import Row, read_metrics
from node.telemetry.plots import plot_groups, plot_rejects, plot_reward, plot_time
from node.telemetry.summary import Summary, summarise_nodes, summarise_swarm
from protocol.files import write_atomically


def write_report(out: Path) -> Path:
    """Write the report of the run in `out` and return its path."""
    path = out / "report.html"
    nodes = {folder.name: read_metrics(folder / "metrics.jsonl") for folder in _node_folders(out)}
    evaluated = {folder.name: read_metrics(folder / EVALUATIONS_FILE) for folder in _node_folders(out)}
    page = render_report(out.resolve().name, nodes, evaluated, _read_object(out / "swarm.json"))
    write_atomically(path, page.encode())
    return path


def render_report(
    title: str, nodes: Mapping[str, Sequence[Row]], evaluated: Mapping[str, Sequence[Row]], run: Mapping[str, Any]
) -> str:
    """Return the page.

    Args:
        title: the run's name.
        nodes: each node's metrics rows.
        evaluated: each node's evaluation rows.
        run: what swarm.json holds, or nothing.
    """
    summaries = summarise_nodes(nodes, evaluated)
    rejected = _total_rejected(summaries.values())
    started = any(nodes.values())
    config = run.get("config")
    # The page escapes everything but the plots, which are SVG of our own making.
    page = Environment(
        loader=PackageLoader("node.telemetry", ""),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
    ).get_template("report.html.j2")
    return page.render(
        title=title,
        run=run,
        swarm=summarise_swarm(list(summaries.values()), list(evaluated.values())),
        nodes=summaries,
        rejected=rejected,
        reward_plot=Markup(plot_reward(nodes)) if started else "",
        groups_plot=Markup(plot_groups(summaries)) if started else "",
        rejects_plot=Markup(plot_rejects(rejected)) if rejected else "",
        time_plot=Markup(plot_time(nodes)) if started else "",
        settings=_flat(config) if isinstance(config, dict) else [],
    )


def _total_rejected(summaries: Iterable[Summary]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for summary in summaries:
        total.update(summary["rejected"])
    return {reason: count for reason, count in total.most_common() if count}


def _node_folders(out: Path) -> list[Path]:
    """Return the nodes' folders, n2 before n10."""
    found = [path for path in (out / "nodes").glob("*") if path.is_dir()]
    return sorted(
        found, key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return dotted keys and their values as JSON text."""
    rows = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, json.dumps(value)))
    return rows
