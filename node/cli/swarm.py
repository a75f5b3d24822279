"""`gossamer swarm`: N real nodes on this machine, or on a cluster."""

import datetime
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.cli.options import (
    Config,
    Debug,
    DryRun,
    EveryKey,
    Model,
    Preset,
    Rewards,
    Rows,
    Seed,
    Settings,
    Tasks,
    command_began,
    warn,
)
from node.config import NodeConfig, parse_config
from node.errors import UserError, for_shell
from node.operations.config_text import to_toml
from node.operations.given import check_tasks, tasks_given
from node.operations.preflight import check_first, check_place
from node.operations.presets import check_model, notes_on_model, with_preset
from node.operations.settling import asked

if TYPE_CHECKING:
    from node.fleet.local_swarm import RunOutcome, RunPlan, Show
    from node.fleet.on_ray import RaySwarm
    from node.telemetry.summary import Summary

Nodes = Annotated[int, typer.Option("-n", "--nodes", min=1, max=1024, help="Number of nodes.")]
DEFAULT_ROUNDS = 300  # a run ends, and leaves its report

Rounds = Annotated[
    int | None,
    typer.Option(
        help=f"Rounds to train for.  [default: CONFIG's, or {DEFAULT_ROUNDS} without a budget]",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Run folder; a run that it holds is resumed.  [default: runs/TIME]", show_default=False),
]
On = Annotated[
    str | None,
    typer.Option(
        metavar="ray[=ADDRESS]",
        help="Run the nodes on this machine's Ray cluster, or on the one at ADDRESS.",
        show_default=False,
    ),
]
NoTable = Annotated[bool, typer.Option("--no-table", help="Print plain lines instead of the live table.")]


def swarm(  # noqa: PLR0913  # one parameter for each option of the command
    config: Config = None,
    model: Model = None,
    nodes: Nodes = 4,
    rounds: Rounds = None,
    out: Out = None,
    task: Tasks = None,
    reward: Rewards = None,
    data: Rows = None,
    settings: Settings = None,
    preset: Preset = None,
    seed: Seed = None,
    on: On = None,
    no_table: NoTable = False,
    dry_run: DryRun = False,
    every_key: EveryKey = False,
    debug: Debug = False,
) -> int:
    """Run N nodes here, or on a cluster, and write a report.

    They train until their last round or Ctrl-C. The first Ctrl-C lets each node finish its round and save a checkpoint;
    the same command with --out then resumes. The second kills them.

    \b
    Example:
      gossamer swarm examples/demo.toml -n 8 --rounds 300 --out runs/a --set sampling.external=2 --seed 1
      gossamer swarm examples/demo.toml -n 32 --on ray=head.example:6379
    """
    tasks = tasks_given(task, reward, data) or None
    named = {"rounds": rounds, "seed": seed, "policy.model": model, "tasks": tasks}
    tree = asked(config, settings, named, preset)
    given = parse_config(tree if tree.get("budget") else {"rounds": DEFAULT_ROUNDS, **tree})
    notes = check_tasks(given)  # a wrong name shows here at once, not in N processes
    if given.role == "relay":
        raise UserError("role=relay trains nothing: leave it out, or start one with `gossamer node --set role=relay`")
    began = command_began()
    with ExitStack() as stack:
        cluster = stack.enter_context(_cluster(on, given, nodes, out or Path(), debug=debug)) if on else None
        if cluster is None and not dry_run:
            check_first(given, out or Path())
        settled, reasons = (cluster.config, cluster.reasons) if cluster else with_preset(given, nodes)
        warn(settled, [*notes, *(notes_on_model(settled) if dry_run and cluster is None else ())])
        if dry_run:
            print(to_toml(settled, reasons, every_key=every_key), end="")
            return 0

        from rich.console import Console

        from node.fleet.live_table import live_table, progress_lines
        from node.fleet.local_swarm import gpus_of, make_folders, make_plan, node_folders, run_swarm
        from node.fleet.swarm_page import swarm_page
        from node.telemetry.status_server import ask

        if cluster is None:
            check_model(settled)
        plan = make_plan(out or _new_folder(), nodes, settled)
        make_folders(plan)
        console = Console()
        if line := cluster.line if cluster else gpus_of(plan):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        display = live_table if console.is_terminal and not no_table else progress_lines
        watchers: list[Show] = []
        if settled.observe.enabled:
            asks = cluster.ask if cluster else ask
            served, news = stack.enter_context(swarm_page(settled.observe, plan.out, node_folders(plan), asks))
            console.print(f"dashboard: {served.link}", highlight=False, markup=False, soft_wrap=True)
            watchers.append(news)
        watchers.append(stack.enter_context(display(console)))
        outcome = run_swarm(
            plan,
            lambda nodes: [watch(nodes) for watch in watchers],
            started=began,
            debug=debug,
            machines=cluster.machines if cluster else None,
        )
    for line in closing_lines(plan, outcome):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return exit_status(outcome)


def _cluster(on: str, given: NodeConfig, nodes: int, out: Path, *, debug: bool) -> AbstractContextManager["RaySwarm"]:
    """Return the nodes of a run on a cluster, of which this machine has the folder and the page."""
    check_place(given, out)

    from node.fleet.on_ray import ray_swarm

    return ray_swarm(on, given, nodes, debug=debug)


def closing_lines(plan: "RunPlan", outcome: "RunOutcome") -> list[str]:
    """Return what a person should know at the end: who failed, how far reward went, where the report is."""
    from node.fleet.live_table import describe
    from node.fleet.supervisor import NodeState

    lines = [describe(child) for child in outcome.children if child.state is NodeState.FAILED]
    swarm = outcome.summary["swarm"]
    lines += reward_lines(outcome.summary)
    lines += evaluation_lines(swarm)
    lines += teaching_lines(outcome.summary)
    if outcome.signal:
        lines.append(f"stopped: the same command with --out {for_shell(plan.out)} goes on")
    return [*lines, f"report: {plan.out / 'report.html'}"]


def reward_lines(summary: "Summary") -> list[str]:
    """Return how far reward went, over tenths of the rounds that were done; none before the first round."""
    from node.telemetry.summary import gain, tenth_of

    swarm = summary["swarm"]
    tenths = sorted(tenth_of(node["rounds"]) for node in summary["nodes"].values() if node["rounds"])
    if not tenths:
        return []
    span = f"{tenths[0]}" if tenths[0] == tenths[-1] else f"{tenths[0]} to {tenths[-1]}"
    first, last, times = swarm["reward_first"], swarm["reward_last"], gain(swarm)
    more = "" if times is None else f" ({times:.1f} times)"
    rounds = "round" if tenths[-1] == 1 else "rounds"
    return [f"mean reward {first:.3f} in the first tenth ({span} {rounds}), {last:.3f} in the last{more}"]


def evaluation_lines(swarm: "Summary") -> list[str]:
    """Return how the swarm answered held-out questions before and after, with intervals at 95 %; none if not asked."""
    lines = []
    for name, title in (("accuracy", "greedy accuracy"), ("pass8", "pass@8")):
        first, last = (_rate(swarm, f"{name}_{when}") for when in ("first", "last"))
        if first:
            lines.append(f"held-out {title} {first} before{f', {last} after' if last else ''}")
    return lines


def teaching_lines(summary: "Summary") -> list[str]:
    """Return how much of the training came from peers; none where nothing did."""
    own, external = (
        sum(node[f"groups_{whose}"] for node in summary["nodes"].values()) for whose in ("local", "external")
    )
    if not external:
        return []
    return [f"{external} of {own + external} groups came from peers; what they did for the reward is not known"]


def _rate(swarm: "Summary", key: str) -> str:
    if swarm[key] is None:
        return ""
    low, high = swarm[f"{key}_interval"]
    return f"{swarm[key]:.3f} ({low:.3f} to {high:.3f})"


def exit_status(outcome: "RunOutcome") -> int:
    """Return 128 plus the signal that ended the run, 1 when a node failed for good, else 0."""
    from node.fleet.supervisor import NodeState

    if outcome.signal:
        return 128 + outcome.signal
    return 1 if any(child.state is NodeState.FAILED for child in outcome.children) else 0


def _new_folder() -> Path:
    return Path("runs") / datetime.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
