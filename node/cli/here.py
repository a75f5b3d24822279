"""`gossamer` without a verb, on a terminal: the nodes of this folder, and the commands that make sense next."""

from collections.abc import Sequence
from pathlib import Path

from node.errors import UserError, for_shell, printable
from node.state_folder import SETTINGS_FILE, is_held
from node.swarm.swarm_folder import load_manifest
from node.telemetry.evaluations import EVALUATIONS_FILE
from node.telemetry.metrics_file import read_metrics

PLACES = (SETTINGS_FILE, f"*/{SETTINGS_FILE}", f"runs/*/nodes/*/{SETTINGS_FILE}")
SHOWN = 12  # nodes
_SCORE = ("eval {}", "its held-out accuracy")
_OF_RUNNING = ("status {}", "its peers, scores and counts")
FIRST = (
    ("gossamer demo", "four nodes learn on this machine, in 3 minutes"),
    ("gossamer join @invite.txt", "join a swarm that invited you"),
    ("gossamer node --model Qwen/Qwen3-0.6B --task builtin/sums", "train alone; `gossamer tasks` lists tasks"),
)


def here(folder: Path) -> list[str]:
    """Return the lines that tell a person where they are, `folder` being the current one."""
    nodes = sorted({file.parent for place in PLACES for file in folder.glob(place)})
    if not nodes:
        return ["no node is in this folder", *_commands(FIRST)]
    lines = [f"{'nodes in this folder' if len(nodes) > 1 else 'a node in this folder'}:"]
    names = [str(node.relative_to(folder)) for node in nodes]
    lines += [f"  {name}: {_state(node)}" for name, node in zip(names[:SHOWN], nodes, strict=False)]
    if len(nodes) > SHOWN:
        lines.append(f"  and {len(nodes) - SHOWN} more")
    running = [name for name, node in zip(names, nodes, strict=True) if is_held(node)]
    at = folder / (running or names)[0]
    name = for_shell(at.relative_to(folder))
    if not running:
        verbs = ("node --state {}", "go on"), _SCORE, ("export {} my-model", "an ordinary model folder")
    elif load_manifest(at) is not None:
        verbs = _OF_RUNNING, ("inspect {} --watch", "what it answers"), ("invite {}", "let others join")
    else:
        verbs = _OF_RUNNING, ("inspect {} --watch", "what it answers"), _SCORE
    return [*lines, *_commands([(f"gossamer {verb.format(name)}", what) for verb, what in verbs])]


def _commands(commands: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(command) for command, _ in commands)
    return ["next:", *(f"  {command:{width}}   {what}" for command, what in commands), "all verbs: gossamer --help"]


def _state(node: Path) -> str:
    parts = ["running" if is_held(node) else "stopped"]
    try:
        manifest = load_manifest(node)
        if manifest is not None:
            parts.append(f"swarm {printable(manifest.name)}")
    except UserError as error:
        parts.append(str(error))
    if rows := read_metrics(node / "metrics.jsonl", ["round"]):
        parts.append(f"round {rows[-1]['round']}")
    if scores := read_metrics(node / EVALUATIONS_FILE, ["round", "accuracy"]):
        parts.append(f"held-out accuracy {scores[0]['accuracy']:.3f} at first, {scores[-1]['accuracy']:.3f} last")
    return ", ".join(parts)
