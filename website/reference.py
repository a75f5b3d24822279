"""The reference, made from the code: what the commands, the settings and the metrics say of themselves.

Each function returns a page in Markdown. To add a page, write one and name it in `PAGES`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import typer.main
from pydantic import BaseModel

from node.cli.app import app
from node.config import COMMON_KEYS, NodeConfig, Section, TrlOptions
from node.metrics import METRICS, Combine, Metric
from node.telemetry.refusals import MEANINGS
from node.telemetry.status_server import PREFIX


def commands() -> str:
    """Every verb with its help."""
    root = typer.main.get_command(app)
    lines = ["# Commands", "", "What `gossamer VERB --help` says. `gossamer --version` prints the version.", ""]
    for name, command in _commands("gossamer", root):
        with click_context(command, name) as context:
            lines += [f"## {name}", "", "```text", command.get_help(context).strip(), "```", ""]
    return "\n".join(lines)


def click_context(command: Any, name: str) -> Any:
    """Return a context of 100 columns in which `command` says its help."""
    return command.make_context(name, [], resilient_parsing=True, max_content_width=100, terminal_width=100)


def _commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    for name, child in getattr(command, "commands", {}).items():
        if hasattr(child, "commands"):
            yield from _commands(f"{path} {name}", child)
        else:
            yield f"{path} {name}", child


def settings() -> str:
    """Every key of a configuration: its default, its bounds, what it means."""
    lines = [
        "# Settings",
        "",
        "In a TOML file, or by `--set KEY=VALUE`. `gossamer node --dry-run` prints such a file: what would run, and",
        "where each value comes from; with `--all` it shows every key.",
        "",
        "Most people set only these:",
        "",
        *(f"- `{key}`" for key in sorted(COMMON_KEYS)),
        "",
    ]
    for path, section in (*_sections(NodeConfig, ""), ("trainer.trl", TrlOptions)):
        lines += [f"## {path or 'the top'}", ""]
        lines += [text, ""] if (text := _first_line(section)) else []
        lines += ["| key | default | | |", "|---|---|---|---|"]
        for name, field in section.model_fields.items():
            if not _is_section(field.annotation):
                shown = (f"`{name}`", _default(field), _cell(_type(field)), _cell(field.description or ""))
                lines.append(f"| {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines)


def _sections(section: type[Section], path: str) -> Iterator[tuple[str, type[Section]]]:
    yield path, section
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            yield from _sections(field.annotation, f"{path}.{name}".strip("."))
        elif path == "":  # a list of tables; that of `eval` is the same
            for inner in filter(_is_section, getattr(field.annotation, "__args__", ())):
                yield from _sections(inner, f"[{name}]")


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _first_line(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().partition("\n")[0]


def _default(field: Any) -> str:
    if field.is_required():
        return "needed"
    default = field.default
    if isinstance(default, list) and default and isinstance(default[0], BaseModel):
        return _cell(f"`{[one.model_dump(exclude_defaults=True) for one in default]}`")
    return "none" if default is None else _cell(f"`{default!r}`")


def _type(field: Any) -> str:
    """Return a field's type in words, with its bounds."""
    bounds = []
    for one in field.metadata:
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            if (bound := getattr(one, name, None)) is not None:
                bounds.append(f"{sign} {bound}")
    return ", ".join([_words(field.annotation), *bounds])


def _words(kind: Any) -> str:
    """Return a type in words; one that may be missing is as one that is there."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is Annotated:
        return _words(parts[0])
    if origin is list:
        return f"list of {_words(parts[0])}"
    if origin is dict:
        return "table"
    if parts:  # a union
        return " or ".join(_words(part) for part in parts if part is not type(None))
    return str(getattr(kind, "__name__", kind))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def metrics() -> str:
    """Every metric: its unit and meaning, how rounds are combined, where it is shown, its name for Prometheus."""
    lines = [
        "# Metrics",
        "",
        "Each round of a node is a line of `metrics.jsonl` in its folder, by the names on the left. Those with a name",
        f"`{PREFIX}...` are at `/metrics`, too, of the address in the node's `observe.json`.",
        "",
        "| combined | over rounds |",
        "|---|---|",
        "| mean | the mean of the rounds that have it |",
        "| sum | the sum over a run; curves and `/metrics` show the mean |",
        "| last | the newest value |",
        "| counter | counts up, from 0 again with each process |",
        "",
        "| metric | unit | meaning | combined | shown in | for Prometheus |",
        "|---|---|---|---|---|---|",
        *map(_metric, METRICS.values()),
        "",
        f"`{PREFIX}node_info` says who a node is, by its labels `node`, `swarm` and `agent`.",
    ]
    lines += [
        "",
        "## What is refused",
        "",
        "The reasons of `gossamer_rejected_total`, which `gossamer status` and the page say, too.",
    ]
    lines += [
        "",
        "| reason | which is |",
        "|---|---|",
        *(f"| `{name}` | {_cell(text)} |" for name, text in MEANINGS.items()),
    ]
    return "\n".join([*lines, ""])


def _metric(metric: Metric) -> str:
    shown = ", ".join(str(place.name).lower() for place in metric.places)
    suffix = "_total" if metric.combine is Combine.COUNTER else ""
    exported = f"`{PREFIX}{metric.exported}{suffix}`" if metric.exported else ""
    label = f", by `{metric.label}`" if metric.label else ""
    name = metric.name.replace("*", metric.label.upper())
    cells = (
        f"`{name}`",
        metric.unit,
        _cell(metric.meaning),
        metric.combine.value,
        shown,
        f"{exported}{label}".strip(", "),
    )
    return f"| {' | '.join(cells)} |"


PAGES: Mapping[str, Callable[[], str]] = {
    "reference/commands.md": commands,
    "reference/settings.md": settings,
    "reference/metrics.md": metrics,
}
