"""`gossamer status`: what a running node says of itself."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.cli.options import Debug
from node.errors import printable
from node.operations.diagnosis import members, reachability
from node.state_folder import of_a_node

if TYPE_CHECKING:
    from rich.console import RenderableType

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", callback=of_a_node, help="The state folder of a running node.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Tree = dict[str, Any]
WIDE = 110  # columns of a terminal on which there is room for the traffic of each peer
SHOWN_SCORE = -0.05  # what is rounded to 0 is none
ID_SHOWN = 12  # of a node's id, as inspect and the dashboard do; --json has all of it


def status(folder: Folder, as_json: Json = False, debug: Debug = False) -> None:
    """Print the state of a running node.

    Prints its swarm, its progress, its peers, and what it refused for which reason. Prometheus reads the same numbers
    at /metrics of the address in FOLDER/observe.json.

    \b
    Example:
      gossamer status n0
      gossamer status n0 --json
    """
    from node.telemetry.status_server import ask

    tree = ask(folder)
    if as_json:
        print(json.dumps(tree, indent=1))
        return
    from rich.console import Console

    console = Console()
    with console.capture() as shown:
        console.print(*render(tree, console.width), sep="\n")
    for line in shown.get().splitlines():
        print(line.rstrip())  # a table fills its last column with blanks


def render(tree: Tree, width: int) -> "list[RenderableType]":
    """Return what a person reads on so many columns: a few lines, the peers, the counts."""
    from rich.table import Table
    from rich.text import Text

    from node.fleet.live_table import clock, size
    from node.swarm.peering import UPDATE
    from node.telemetry.refusals import meaning

    swarm, counters = tree["swarm"], tree["counters"]
    head = Table.grid(padding=(0, 2))
    end = "" if tree["rounds"] is None else f" of {tree['rounds']}"
    progress = f"{tree['round'] or 0}{end}" if tree["trains"] else "relays only"
    for name, value in (
        ("swarm", f"{swarm['name'] or 'without a manifest'} ({tree['policy'] or swarm['id']})"),
        ("node", f"{tree['node']} ({tree['short_name']})"),
        ("address", (tree["address"] or "none: it dials, nobody dials it").partition("?")[0]),
        ("admitted", _admitted(tree)),
        ("reached", reachability(tree)),
        ("round", progress),
        ("reward", "-" if tree["reward"] is None else f"{tree['reward']:.3f}, the mean of the last rounds"),
        ("held out", held_out(tree["held_out"])),
        ("a round", "-" if tree["round_s"] is None else f"{tree['round_s']:.2f} s"),
        ("taught by", _taught_by(tree["groups"]) if tree["trains"] else None),
        ("peers", f"{counters['live_peers']} live, {counters['known_peers']} known{_alone(tree)}"),
        ("members", members(tree)),
        ("sent", f"{size(counters['bytes_sent'])}, {counters['items_sent']} groups"),
        ("got", f"{size(counters['bytes_received'])}, {counters['items_received']} groups"),
        ("got twice", f"{counters['duplicates']} groups"),
    ):
        if value is not None:
            head.add_row(Text(name, "dim"), Text(str(value)))
    others = any(peer["agent"] != tree["agent"] for peer in tree["peers"])
    peers = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    blamed = any(peer["score"] < SHOWN_SCORE for peer in tree["peers"])
    wide = width >= WIDE
    columns = ["name", "node", "endpoint", "state", "round trip", *(["for", "sent", "got"] if wide else [])]
    for name in [*columns, *(["score"] if blamed else []), *(["runs"] if others else [])]:
        peers.add_column(name, overflow="fold")  # on the next line, rather than cut off
    for peer in tree["peers"]:
        delay = "-" if peer["rtt_s"] is None else f"{1000 * peer['rtt_s']:.1f} ms"
        # Text, not markup: a peer chooses what its record says.
        cells = [
            peer["short_name"],
            peer["node"][:ID_SHOWN],
            peer["endpoint"] or "cannot be dialled",
            peer["state"],
            delay,
            *([clock(peer["age_s"]), size(peer["bytes_sent"]), size(peer["bytes_received"])] if wide else []),
            *([f"{peer['score']:.1f}"] if blamed else []),
            *([peer["agent"]] if others else []),
        ]
        peers.add_row(*(Text(printable(cell)) for cell in cells))
    refused = Table("refused for", "times", "which is", box=None, header_style="dim", padding=(0, 2, 0, 0))
    for reason, count in sorted(tree["rejected"].items()):
        refused.add_row(Text(printable(reason)), str(count), meaning(reason))
    parts: list[RenderableType] = [head]
    if tree["other_form"]:
        parts.append(Text(f"{tree['other_form']}: {UPDATE}"))
    if tree["twin"]:
        parts.append(
            Text(f"another process runs with this node's key, at {printable(tree['twin'])}: stop one of the two")
        )
    if tree["peers"]:
        parts += [Text(""), peers]
    if blamed:
        parts.append(Text(f"a score is 0 at best; below {tree['least_score']:g} a peer is refused for a while", "dim"))
    if tree["rejected"]:
        parts += [Text(""), refused]
    return parts


def held_out(rows: Sequence[Tree]) -> str | None:
    """Say what the node scored on held-out questions at first, and what it did last; None before it was asked."""
    if not rows:
        return None
    scores = [
        f"{row['accuracy']:.3f} ({row['accuracy_low']:.3f} to {row['accuracy_high']:.3f}) after round {row['round']}"
        for row in rows
    ]
    return f"{', '.join(scores)}, of {rows[-1]['questions']} questions"


def _taught_by(groups: Tree) -> str:
    """Say how many of the groups of the last rounds came from peers."""
    external, trained = int(groups["external"]), int(sum(groups.values()))
    known = "; what they did for the reward is not known" if external else ""
    return f"{external} of the last {trained} groups came from peers{known}"


def _admitted(tree: Tree) -> str | None:
    """Say until when the node's grant admits it, or that it does no longer; None for a node that needs none."""
    expires = tree.get("grant_expires")
    if expires is None:
        return None
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(expires))
    if expires > tree["time"]:
        return f"until {day}"
    return f"no longer, its grant expired {day}: ask for a newer invite and `gossamer join` with it"


def _alone(tree: Tree) -> str:
    """Say why nobody is there, if somebody gave a reason."""
    return f"; they do not admit this node: {tree['refusal']}" if tree["refusal"] and not tree["peers"] else ""
