"""Drawings of a board's page, as SVG text: a curve over time, who taught whom, a badge.

The page's style sheet colours them by class, so they follow light and dark; a picture of matplotlib has fixed colours.
The page has no script, so uPlot cannot draw it. Every text in them is escaped.
"""

import math
import time
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 26
GRAPH_WIDTH, GRAPH_HEIGHT = 720, 460
BADGE_CHAR = 6.6  # pixels of an ordinary character at 11 px


def plot(points: Sequence[tuple[float, float]], label: str) -> Markup:
    """Draw values over Unix seconds, oldest first; at least one point."""
    first, last = points[0][0], max(points[-1][0], points[0][0] + 60)
    low, high = min(0.0, *(value for _, value in points)), max(value for _, value in points)
    top = nice(high) if high > 0 else 0.0 if low < 0 else 1.0

    def place(at: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (at - first) / (last - first)
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (top - low)
        return f"{x:.1f},{y:.1f}"

    lines = []
    for step in range(5):
        value = low + (top - low) * step / 4
        y = place(first, value).split(",")[1]
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        lines.append(f'<text class="tick" x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    form = "%H:%M" if last - first < 2 * 86400 else "%d %b" if last - first < 300 * 86400 else "%b %Y"
    for step, anchor in ((0, "start"), (1, "middle"), (2, "middle"), (3, "end")):
        at = first + (last - first) * step / 3
        x = place(at, low).split(",")[0]
        shown = time.strftime(form, time.gmtime(at))
        lines.append(f'<text class="tick" x="{x}" y="{HEIGHT - 8}" text-anchor="{anchor}">{shown}</text>')
    path = " ".join(place(at, value) for at, value in points)
    x, y = place(*points[-1]).split(",")
    label_text = escape(f"{label}: {points[-1][1]:.3g} at the end, at most {high:.3g}")
    return Markup(
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label_text}">{"".join(lines)}'
        f'<polyline class="curve" points="{path}"/><circle class="dot" cx="{x}" cy="{y}" r="3"/></svg>'
    )


def nice(value: float) -> float:
    """Return the least of 1, 2, 2.5, 4, 5 or 8 times a power of ten that is not below `value`, which is positive."""
    size = 10.0 ** math.floor(math.log10(value))
    return next(step * size for step in (1, 2, 2.5, 4, 5, 8, 10) if step * size >= value * (1 - 1e-9))


def graph(nodes: Sequence[tuple[str, str, float]], edges: Sequence[tuple[str, str, float]]) -> Markup:
    """Draw nodes on an ellipse and lines between them.

    Args:
        nodes: (id, name, standing) in the order of their places.
        edges: (from, to, weight), of nodes that are drawn.
    """
    middle_x, middle_y = GRAPH_WIDTH / 2, GRAPH_HEIGHT / 2
    places = {}
    for number, (node, _, _) in enumerate(nodes):
        angle = 2 * math.pi * number / len(nodes) - math.pi / 2
        places[node] = (middle_x + 225 * math.cos(angle), middle_y + 185 * math.sin(angle))
    most = max((weight for _, _, weight in edges), default=1.0)
    parts = [
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
        'markerUnits="userSpaceOnUse" orient="auto"><path class="head" d="M0 0 8 4 0 8z"/></marker></defs>'
    ]
    for start, end, weight in sorted(edges, key=lambda edge: edge[2]):
        (x1, y1), (x2, y2) = places[start], places[end]
        long = math.hypot(x2 - x1, y2 - y1) or 1.0
        # Bent towards the middle, so that both directions of a pair show; it ends at the edge of the circle.
        bend_x = (x1 + x2) / 2 + (y2 - y1) * 0.12
        bend_y = (y1 + y2) / 2 - (x2 - x1) * 0.12
        end_x, end_y = x2 - 10 * (x2 - bend_x) / long * 2, y2 - 10 * (y2 - bend_y) / long * 2
        share = weight / most
        parts.append(
            f'<path class="edge" d="M{x1:.1f} {y1:.1f}Q{bend_x:.1f} {bend_y:.1f} {end_x:.1f} {end_y:.1f}" '
            f'stroke-width="{0.6 + 2.4 * share:.2f}" opacity="{0.2 + 0.7 * share:.2f}" marker-end="url(#arrow)"/>'
        )
    for node, name, stands in nodes:
        x, y = places[node]
        side = "middle" if abs(x - middle_x) < 40 else "start" if x > middle_x else "end"
        label_x = x + {"middle": 0, "start": 14, "end": -14}[side]
        label_y = y + (4 if side != "middle" else -14 if y < middle_y else 24)
        parts.append(
            f'<a href="/nodes/{escape(node)}"><circle class="node" cx="{x:.1f}" cy="{y:.1f}" '
            f'r="{5 + 7 * math.sqrt(min(1.0, stands)):.1f}"/>'
            f'<text class="label" x="{label_x:.1f}" y="{label_y:.1f}" text-anchor="{side}">{escape(name)}</text></a>'
        )
    return Markup(
        f'<svg class="graph" viewBox="0 0 {GRAPH_WIDTH} {GRAPH_HEIGHT}" role="group" aria-label="Who taught whom">'
        f"{''.join(parts)}</svg>"
    )


def badge(left: str, right: str) -> Markup:
    """Draw a badge of two words, to be shown on other pages."""
    widths = [BADGE_CHAR * len(text) + 14 for text in (left, right)]
    whole = sum(widths)
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole:.0f}" height="20" role="img" '
        f'aria-label="{escape(f"{left}: {right}")}">'
        f'<rect width="{whole:.0f}" height="20" rx="3" fill="#24292f"/>'
        f'<rect x="{widths[0]:.0f}" width="{widths[1]:.0f}" height="20" rx="3" fill="#0b63b5"/>'
        '<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">'
        f'<text x="{widths[0] / 2:.1f}" y="14">{escape(left)}</text>'
        f'<text x="{widths[0] + widths[1] / 2:.1f}" y="14">{escape(right)}</text></g></svg>'
    )
