"""`gossamer doctor`: can this machine run a node, does the node in a folder work, and is a swarm well?"""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.cli.options import AccelerateConfig, Debug, Model, Processes, Settings
from node.errors import UserError
from node.operations.diagnosis import Diagnosis, examine, examine_model, examine_node
from node.operations.given import read_invite
from node.state_folder import of_a_node

if TYPE_CHECKING:
    from rich.console import Console

Folder = Annotated[Path, typer.Option("--state", callback=of_a_node, help="The node's state folder, or its place.")]
Gpu = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Check for a GPU with this memory, e.g. 24GB, instead of those here.", show_default=False
    ),
]
Swarm = Annotated[
    str | None,
    typer.Option(
        metavar="INVITE",
        help="Check only this swarm, from outside; - reads standard input, @FILE a file.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

OF_A_MODEL = "--set, --gpu, --processes and --accelerate-config"
GOOD, WORTH_KNOWING, BAD = ("✓", "green"), ("!", "yellow"), ("✗", "red")
ASCII = {"✓": "ok", "!": "-", "✗": "FAIL", "→": "->"}  # where the terminal cannot show the others


def doctor(  # noqa: PLR0913  # one parameter for each option of the command
    folder: Folder = Path(),
    model: Model = None,
    settings: Settings = None,
    gpu: Gpu = None,
    processes: Processes = None,
    accelerate_config: AccelerateConfig = None,
    swarm: Swarm = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Check this machine, a node, a model or a swarm.

    This machine: packages, torch, GPU, memory, disk.

    A node, by --state: whether its swarm's tasks and protocol match the installed ones. If it runs, also its peers,
    their versions, whether they can dial it, and who does not admit it.

    A model, by --model: the memory of each part of a node, whether it fits this machine or --gpu, and what to set. With
    a file for FSDP2: the memory of the node's own process.

    A swarm, by --swarm: whether each seed answers, whether a stranger gets in and how fast, the number of nodes, and
    their versions. It spends no use of the invite.

    Each finding says what to do. An error (✗) makes it exit with 1, a warning (!) does not.

    \b
    Example:
      gossamer doctor --state n0
      gossamer doctor --model HuggingFaceTB/SmolLM2-360M-Instruct --json
      gossamer doctor --model Qwen/Qwen3-8B --gpu 24GB --set policy.lora.r=16
      gossamer doctor --model Qwen/Qwen3-8B --gpu 80GB --accelerate-config fsdp2.yaml
      gossamer doctor --swarm @invite.txt || mail -s "the swarm is not well" me
    """
    if swarm is not None:
        if model or settings or gpu or processes or accelerate_config:
            raise UserError(f"doctor --swarm looks at a swarm and at no model: leave out --model, {OF_A_MODEL}")
        parts = _of_swarm(swarm, debug=debug)
    else:  # first: a model that is not there ends the command, and is no finding
        of_model = _of_model(model, folder, settings or [], gpu, processes, accelerate_config)
        parts = {"This machine": examine(folder), f"The node in {folder}": examine_node(folder), **of_model}
    if as_json:
        findings = {title: list(checks) for title, checks in parts.items()}
        good = _is_good(check for checks in findings.values() for check in checks)
        tree = {
            title: [finding._replace(do="" if finding.ok else finding.do)._asdict() for finding in findings[title]]
            for title in findings
        }
        print(json.dumps({"ok": good, "checks": tree}))
        return 0 if good else 1
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    checks: list[Diagnosis] = []
    for title, part in parts.items():
        checks += _print(console, title, part)
    bad = [check.name for check in checks if not check.ok and check.needed]
    known = sum(not check.ok for check in checks) - len(bad)
    verdict = f"to be mended: {', '.join(bad)}" if bad else "nothing has to be mended"
    console.print(f"\n{verdict}; {known} worth knowing")
    return 0 if _is_good(checks) else 1


def _of_model(
    model: str | None,
    folder: Path,
    settings: list[str],
    gpu: str | None,
    processes: int | None,
    accelerate: Path | None,
) -> dict[str, Iterable[Diagnosis]]:
    if model is None:
        if settings or gpu or processes or accelerate:
            raise UserError(f"doctor's {OF_A_MODEL} are for a sum of memory: name the model with --model")
        return {}
    sharers = 1
    if accelerate is not None:
        from node.training.processes import sharers_of  # which imports torch

        sharers = sharers_of(processes, accelerate)
    title = f"The model {model}" + (f" on a GPU of {gpu}" if gpu else "")
    return {title: list(examine_model(model, folder, settings, _bytes(gpu) if gpu else 0, sharers))}


def _of_swarm(given: str, *, debug: bool) -> dict[str, Iterable[Diagnosis]]:
    from node.operations.swarm_diagnosis import examine_swarm
    from node.telemetry.logs import setup_logs

    invite = read_invite(given)
    setup_logs(None, stderr=debug, debug=debug)
    return {f"The swarm {invite.name}, from outside": examine_swarm(invite)}


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G|)", size.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UserError(f"--gpu wants the memory of a GPU such as 24GB, got {size!r}")
    return int(float(match[1]) * (1 << 30 if match[2].lower() == "gib" else 10**9))


def _is_good(checks: Iterable[Diagnosis]) -> bool:
    return all(check.ok for check in checks if check.needed)


def _print(console: "Console", title: str, checks: Iterable[Diagnosis]) -> list[Diagnosis]:
    """Print a part, each finding when it is there: some wait for others."""
    from rich.text import Text

    printed: list[Diagnosis] = []
    for check in checks:
        if not printed:
            console.print(Text(title, "bold"))
        printed.append(check)
        sign, colour = GOOD if check.ok else BAD if check.needed else WORTH_KNOWING
        console.print(Text(f"{_shown(sign):4}", colour), f"{check.name:20} {check.text}")
        if check.do and not check.ok:
            console.print(Text(f"{'':25} {_shown('→')} {check.do}", "dim"))
    return printed


def _shown(sign: str) -> str:
    try:
        sign.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return ASCII.get(sign, "")
    return sign
