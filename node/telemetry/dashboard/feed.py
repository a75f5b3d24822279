"""The page's data, read from the folders of one node or of many: a stream of small JSON events.

    rows      {"node": ..., "reset": bool, "rows": [...]}      finished rounds; `reset`: forget what came before
    scores    {"node": ..., "rows": [...]}                     evaluations on held-out questions
    rollouts  [{"node": ..., "round": ..., "text": ..., ...}]  what models said, own and peers'

The files are the source, and not the running node: a page that is opened late, or after a kill, has everything that
is kept. The first poll of a long run is thinned to `MAX_POINTS` rounds a node, each the mean of its neighbours.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from node.metrics import Display, recent, shown_in
from node.telemetry.evaluations import EVALUATIONS_FILE
from node.telemetry.metrics_file import MetricsTail, Row
from node.telemetry.rollout_log import ROLLOUTS_FILE

MAX_POINTS = 500  # rounds of a node in the first poll: about as many as a plot has pixels
MAX_ROLLOUTS = 200  # completions in the first poll, and of a node in a later one
SHOWN = shown_in(Display.DASHBOARD)
SCORES = "eval/"  # a metric of this beginning is read from the evaluations, which have one before the first round, too
KEPT = ("round", *(metric.name for metric in SHOWN))

Event = tuple[str, Any]


class Feed:
    """One reader's place in the files of `folders`, by name. Not thread-safe."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._nodes = {name: _NodeFiles(folder) for name, folder in folders.items()}
        self._first = True

    def poll(self) -> list[Event]:
        """Return what is new; the first time, what there is, thinned."""
        events: list[Event] = []
        rollouts: list[Row] = []
        for name, files in self._nodes.items():
            events += files.events(name)
            rollouts += files.new_rollouts(name)
        if self._first:
            rollouts = sorted(rollouts, key=lambda row: row["round"])[-MAX_ROLLOUTS:]
        if rollouts:
            events.append(("rollouts", rollouts))
        self._first = False
        return events


class _NodeFiles:
    def __init__(self, folder: Path) -> None:
        self._rows = MetricsTail(folder / "metrics.jsonl", KEPT)
        self._scores = MetricsTail(folder / EVALUATIONS_FILE)
        self._rollouts = MetricsTail(folder / ROLLOUTS_FILE)
        self._last_round = 0
        self._begun = False

    def events(self, name: str) -> Iterator[Event]:
        rows = [row for row in self._rows.poll() if "reward" in row]  # a relay's are of no round
        if rows:
            reset = not self._begun or rows[0]["round"] <= self._last_round  # a node that resumed writes anew
            self._begun = True
            self._last_round = rows[-1]["round"]
            yield "rows", {"node": name, "reset": reset, "rows": list(thinned(rows, MAX_POINTS))}
        scores = self._scores.poll()
        if scores:
            yield "scores", {"node": name, "rows": [_scores(row) for row in scores]}

    def new_rollouts(self, name: str) -> list[Row]:
        return [{**row, "node": name} for row in self._rollouts.poll()[-MAX_ROLLOUTS:]]


def thinned(rows: Sequence[Row], points: int) -> Iterator[Row]:
    """Yield at most `points` rows for those of as many or more rounds: each the mean of neighbours, by its last round.

    Tables of counts, as of who taught whom, are summed, so that no group is lost from them.
    """
    step = -(-len(rows) // points) or 1
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        means = {metric.name: recent(metric, part) for metric in SHOWN}
        yield {"round": part[-1]["round"], **{name: value for name, value in means.items() if value is not None}}


def _scores(row: Row) -> Row:
    """Return an evaluation's scores under their metrics' names."""
    names = [metric.name for metric in SHOWN if metric.name.startswith(SCORES)]
    return {"round": row["round"], **{name: row.get(name.removeprefix(SCORES)) for name in names}}


def curves() -> list[dict[str, Any]]:
    """Return the plots of the page: each a title, and the metrics that it draws, the first one's line whole.

    A metric is drawn in the plot of the one that it stands `beside`.
    """
    drawn = [metric for metric in SHOWN if not metric.label]
    return [
        {
            "title": _titled("; dashed: ".join(metric.caption for metric in together)),
            "keys": [metric.name for metric in together],
            "scores": first.name.startswith(SCORES),
        }
        for first in drawn
        if not first.beside
        for together in [[first, *(metric for metric in drawn if metric.beside == first.name)]]
    ]


def _titled(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"
