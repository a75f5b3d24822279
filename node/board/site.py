"""A board's paths. All are public, read without JavaScript, and the same for everybody.

    /                       the page                    /swarm.json     everything, JSON
    /nodes/ID               one node's page             /nodes.csv      a line a node
    /nodes/ID.json          the same, JSON              /history.csv    the swarm's curve
    /nodes/ID/history.csv   its curve                   /taught.csv     who taught whom
    /nodes/ID/badge.svg     to be shown elsewhere       /rollouts.csv   a line an answer
    /healthz                200 while all is well       /board.css

What peers wrote is data: the templates escape all of it, in CSV a cell that a spreadsheet would take for a formula gets
a quote in front, and the content security policy allows no script at all, nor anything from elsewhere. An answer is
made once for each `BoardView` and path, and kept; readers may keep it for `FRESH_S`.

The CSV files are for people's spreadsheets and notebooks, the badge is for pages elsewhere. Nothing here reads them.
"""

import asyncio
import csv
import io
import json
import unicodedata
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from threading import Lock
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from node.board import svg
from node.board.history import CurvePoint, Remembered
from node.board.standing import weighted_median
from node.board.view import BoardView, ago, day, moment, rewards_by_task
from node.telemetry.names import short_name
from protocol.lru import Recent

FRESH_S = 30
MAX_KEPT = 256  # answers, some tens of kB each
PART_BYTES = 1 << 16  # of an answer that wait for a reader
ANSWER_S = 120.0  # for a reader to take an answer: a slow one holds its bytes, up to 9 MB for a full table's
SHOWN = 100  # nodes in a table; JSON and CSV have all
LESSONS_SHOWN = 40
DRAWN = 24  # nodes in the graph
HTML, SVG, CSV, JSON = "text/html", "image/svg+xml", "text/csv", "application/json"
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; img-src 'self'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": f"public, max-age={FRESH_S}",
}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet computes

Look = Callable[[], BoardView]
CurveOf = Callable[[str], Sequence[CurvePoint]]


def make_site(look: Look, curve_of: CurveOf, well: Callable[[], bool]) -> Starlette:
    """Return the ASGI application.

    Args:
        look: returns what is shown now.
        curve_of: returns a node's curve by its id.
        well: tells whether all is well.
    """
    pages = _Pages(look, curve_of)
    css = (files("node.board") / "board.css").read_bytes()

    def style(_: Request) -> Response:
        return Response(css, media_type="text/css", headers=HEADERS)

    def healthz(_: Request) -> Response:
        is_well = well()
        text = "ok\n" if is_well else "the network failed\n"
        return PlainTextResponse(text, 200 if is_well else 503, {"cache-control": "no-store"})

    def of_swarm(make: Callable[[BoardView], str], kind: str) -> Callable[[Request], Response]:
        return lambda request: pages.answer(request.url.path, kind, make)

    def of_node(make: Callable[[BoardView, Remembered], str], kind: str) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            node = request.path_params["node"]
            return pages.answer(request.url.path, kind, lambda view: make(view, _find(view, node)))

        return answer

    routes = [
        Route("/", of_swarm(pages.swarm, HTML)),
        Route("/board.css", style),
        Route("/healthz", healthz),
        Route("/swarm.json", of_swarm(lambda view: _json(view.tree()), JSON)),
        Route("/nodes.csv", of_swarm(_nodes_csv, CSV)),
        Route("/history.csv", of_swarm(lambda view: _curve_csv(view.curve), CSV)),
        Route("/taught.csv", of_swarm(lambda view: _csv("teacher,learner,groups,weight", view.lessons), CSV)),
        Route("/rollouts.csv", of_swarm(_rollouts_csv, CSV)),
        Route("/nodes/{node}.json", of_node(lambda view, node: _json(view.node_tree(node)), JSON)),
        Route("/nodes/{node}/history.csv", of_node(lambda _, node: _curve_csv(curve_of(node.id)), CSV)),
        Route("/nodes/{node}/badge.svg", of_node(_badge, SVG)),
        Route("/nodes/{node}", of_node(pages.node, HTML)),
    ]
    return Starlette(routes=routes)


async def in_parts(answer: bytes) -> AsyncIterator[bytes]:
    """Yield an answer as it is taken; a reader who has not taken it in `ANSWER_S` gets no more."""
    clock = asyncio.get_running_loop().time
    until = clock() + ANSWER_S
    for at in range(0, len(answer), PART_BYTES):
        if clock() > until:
            return
        yield answer[at : at + PART_BYTES]


class _Pages:
    """Makes each answer once for a view."""

    def __init__(self, look: Look, curve_of: CurveOf) -> None:
        self._look = look
        self._curve_of = curve_of
        self._kept: Recent[str, tuple[float, bytes]] = Recent(MAX_KEPT)
        self._lock = Lock()
        environment = Environment(
            loader=PackageLoader("node.board", ""),
            autoescape=select_autoescape(["html", "j2"]),
            undefined=StrictUndefined,
        )
        environment.filters |= {"moment": moment, "day": day, "share": _share, "value": _value}
        environment.globals |= {"short_name": short_name}
        self._swarm_page = environment.get_template("swarm.html.j2")
        self._node_page = environment.get_template("node.html.j2")

    def answer(self, path: str, kind: str, make: Callable[[BoardView], str]) -> Response:
        """Return what `make` makes of the view of now, or made of it before."""
        view = self._look()
        with self._lock:
            kept = self._kept.get(path)
            if kept is None or kept[0] != view.at:
                try:
                    kept = view.at, make(view).encode(errors="replace")
                except _NoSuchNodeError:
                    return PlainTextResponse("no such node has reported here\n", 404, HEADERS)
                self._kept.set(path, kept)
        size = {"content-length": str(len(kept[1]))}
        return StreamingResponse(in_parts(kept[1]), media_type=kind, headers=HEADERS | size)

    def swarm(self, view: BoardView) -> str:
        """Return the swarm's page."""
        present = [node for node in view.nodes if node.id in view.here]
        gone = [node for node in view.nodes if node.id not in view.here]
        by_task = rewards_by_task(present)
        tasks = [(task, version, weighted_median(by_task.get(task, []))) for task, version in view.swarm.tasks]
        lessons = view.lessons
        drawn = present[:DRAWN]
        ids = {node.id for node in drawn}
        edges = [
            (lesson.teacher, lesson.learner, lesson.weight)
            for lesson in lessons
            if lesson.weight > 0 and lesson.teacher in ids and lesson.learner in ids
        ]
        return self._swarm_page.render(
            view=view,
            here=present[:SHOWN],
            gone=gone[:SHOWN],
            counts=(len(present), len(gone)),
            tasks=tasks,
            curves=_plots(view.curve),
            reward=_last(view.curve, "reward"),
            accuracy=_last(view.curve, "accuracy"),
            rounds=weighted_median([(node.rounds, node.standing) for node in present]),
            lessons=lessons[:LESSONS_SHOWN],
            lesson_count=len(lessons),
            graph=svg.graph([(node.id, short_name(node.id), node.standing) for node in drawn], edges) if edges else "",
            ago={node.id: ago(view.at - node.last) for node in view.nodes},
            standing={node.id: node.standing for node in view.nodes},
        )

    def node(self, view: BoardView, node: Remembered) -> str:
        """Return one node's page."""
        learned = sorted(node.taught_by.items(), key=lambda pair: -pair[1])
        taught = [(lesson.learner, lesson.groups) for lesson in view.lessons if lesson.teacher == node.id]
        return self._node_page.render(
            view=view,
            node=node,
            is_here=node.id in view.here,
            learned=learned,
            taught=taught[:SHOWN],
            known={other.id for other in view.nodes},
            curves=_plots(self._curve_of(node.id)),
            ago=ago(view.at - node.last),
        )


class _NoSuchNodeError(Exception):
    pass


def _find(view: BoardView, node: str) -> Remembered:
    for remembered in view.nodes:
        if remembered.id == node:
            return remembered
    raise _NoSuchNodeError


def _plots(curve: Sequence[CurvePoint]) -> Mapping[str, str]:
    """Return a plot of each figure of a curve that has any."""
    figures = {
        "Reward": [(float(point.at), point.reward) for point in curve if point.reward is not None],
        "Held-out accuracy": [(float(point.at), point.accuracy) for point in curve if point.accuracy is not None],
    }
    return {label: svg.plot(points, label) for label, points in figures.items() if points}


def _last(curve: Sequence[CurvePoint], key: str) -> float | None:
    return getattr(curve[-1], key) if curve else None


def _badge(view: BoardView, node: Remembered) -> str:
    return str(svg.badge(short_name(node.id), f"standing {_share(node.standing)} in {view.swarm.name}"))


def _json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, separators=(",", ":"), allow_nan=False)


def _nodes_csv(view: BoardView) -> str:
    head = "id,name,here,standing,first_report,last_report,says_model,says_agent,says_rounds,says_reward,says_accuracy"
    return _csv(
        head,
        (
            (
                *(node.id, short_name(node.id), int(node.id in view.here), node.standing, node.first, node.last),
                *(node.model, node.agent, node.rounds, node.reward, node.accuracy),
            )
            for node in view.nodes
        ),
    )


def _curve_csv(curve: Sequence[CurvePoint]) -> str:
    return _csv("time,seconds,nodes,reward,accuracy", curve)


def _rollouts_csv(view: BoardView) -> str:
    return _csv(
        "time,node,model,task,question,before,answer,reward,finished",
        (
            (
                *(rollout.at, rollout.node, rollout.model, rollout.task, rollout.question),
                *("\n".join(answer.before), answer.text, answer.reward, int(answer.finished)),
            )
            for rollout in view.rollouts
            for answer in rollout.answers
        ),
    )


def _csv(head: str, rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head.split(","))
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    begin = unicodedata.normalize("NFKC", value.lstrip()[:1])  # a spreadsheet passes over blanks, and takes a wide "="
    return f"'{value}" if begin.startswith(FORMULA) or value.startswith(FORMULA) else value


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _value(number: float | None) -> str:
    return "–" if number is None else f"{number:.3f}"
