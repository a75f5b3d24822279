"""Grafana's board, made from the table of metrics: `python -m website.grafana` writes examples/grafana.json."""

import json
from pathlib import Path
from typing import Any

from node.metrics import METRICS, Combine, Metric
from node.telemetry.status_server import PREFIX

BOARD = Path(__file__).parents[1] / "examples" / "grafana.json"
SOURCE = {"type": "prometheus", "uid": "${source}"}
UNITS = {"s": "s", "bytes": "bytes"}  # as Grafana names them
HEADLINES = ("round", "swarm/peers", "process/uptime")  # on top, as numbers
WHICH = '{instance=~"$instance"}'


def board() -> dict[str, Any]:
    """Return the board: a row of headlines, then a plot of each exported metric and of those that stand beside it."""
    exported = [metric for metric in METRICS.values() if metric.exported]
    headlines = [(METRICS[name].title, [_target(METRICS[name])], _unit(METRICS[name])) for name in HEADLINES]
    headlines.append(("version", [(f"{PREFIX}node_info{WHICH}", "{{instance}} {{agent}}")], "short"))
    panels = [_panel("stat", one, 6 * at, 0, 6, 4) for at, one in enumerate(headlines)]
    plotted = [metric for metric in exported if not metric.beside and metric.name not in ("round", "process/uptime")]
    for at, first in enumerate(plotted):
        together = [first, *(metric for metric in exported if metric.beside == first.name)]
        one = (", ".join(metric.title for metric in together), list(map(_target, together)), _unit(first))
        panels.append(_panel("timeseries", one, 12 * (at % 2), 4 + 8 * (at // 2), 12, 8))
    return {
        "title": "Gossamer",
        "uid": "gossamer",
        "tags": ["gossamer"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                {
                    "name": "instance",
                    "label": "Node",
                    "type": "query",
                    "datasource": SOURCE,
                    "query": {"query": f"label_values({PREFIX}node_info, instance)", "refId": "A"},
                    "refresh": 2,
                    "includeAll": True,
                    "multi": True,
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": [{"id": number, **panel} for number, panel in enumerate(panels, 1)],
    }


def _target(metric: Metric) -> tuple[str, str]:
    """Return what Prometheus is asked, and the legend: rates of counters, and each value of a label over the nodes."""
    legend = f"{{{{{metric.label or 'instance'}}}}}" + (f" {metric.title}" if metric.beside else "")
    if metric.combine is Combine.COUNTER:
        rate = f"rate({PREFIX}{metric.exported}_total{WHICH}[5m])"
        return (f"sum by ({metric.label}) ({rate})" if metric.label else rate), legend
    value = f"{PREFIX}{metric.exported}{WHICH}"
    return (f"avg by ({metric.label}) ({value})" if metric.label else value), legend


def _unit(metric: Metric) -> str:
    if metric.combine is Combine.COUNTER:
        return "Bps" if metric.unit == "bytes" else "ops"
    return UNITS.get(metric.unit, "short")


def _panel(kind: str, one: tuple[str, list[tuple[str, str]], str], x: int, y: int, w: int, h: int) -> dict[str, Any]:
    title, targets, unit = one
    return {
        "type": kind,
        "title": title[0].upper() + title[1:],
        "gridPos": {"x": x, "y": y, "w": w, "h": h},
        "datasource": SOURCE,
        "targets": [
            {"refId": chr(ord("A") + at), "expr": expression, "legendFormat": legend, "datasource": SOURCE}
            for at, (expression, legend) in enumerate(targets)
        ],
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
    }


def text() -> str:
    """Return the board as the file has it."""
    return json.dumps(board(), indent=1) + "\n"


if __name__ == "__main__":
    BOARD.write_text(text())
