"""`gossamer found`: the first node of a new swarm."""

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.cli.options import Config, Debug, Folder, Listen, Model, Rounds, Seed, Settings
from node.cli.running import print_invite, run
from node.config import NodeConfig, TaskConfig
from node.errors import for_shell
from node.operations.given import task_config
from node.operations.settling import settle
from node.state_folder import check_free, gone_if_new

if TYPE_CHECKING:
    from node.swarm.peering import Network

REPORTS_S = 300


class PolicyName(StrEnum):
    """The manifest's policies, by their names; spelt out here to keep the protocol out of --help."""

    OPEN = "open"
    ALLOWLIST = "allowlist"


Name = Annotated[str, typer.Argument(help="The swarm's name: letters, digits, '.', '_' and '-'.", show_default=False)]
Who = Annotated[PolicyName, typer.Option("--policy", help="Who may join: everybody, or only listed and invited nodes.")]
Allow = Annotated[
    list[str] | None, typer.Option("--allow", metavar="NODE_ID", help="Admit this node without an invite; repeatable.")
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="A task of the swarm, with options from CONFIG; default: CONFIG's; may be repeated.",
    ),
]
HeldOut = Annotated[
    float,
    typer.Option(min=1e-6, max=0.5, metavar="SHARE", help="Share of questions held out for evaluation."),
]
Salt = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Salt of the hash that chooses these questions.")
]
Reports = Annotated[
    bool,
    typer.Option(
        "--reports/--no-reports",
        help="Nodes report rewards and teachers every five minutes, for `gossamer board`.",
    ),
]
Archive = Annotated[
    bool,
    typer.Option(
        "--archive/--no-archive",
        help="Members may keep what is shared for good (`gossamer archive`); joiners are told so.",
    ),
]
NoStart = Annotated[bool, typer.Option("--no-start", help="Write the manifest and the configuration, and stop.")]


def found(  # noqa: PLR0913  # one parameter for each option of the command
    name: Name,
    config: Config = None,
    model: Model = None,
    folder: Folder = Path("node-state"),
    policy: Who = PolicyName.OPEN,
    allow: Allow = None,
    task: Tasks = None,
    listen: Listen = None,
    rounds: Rounds = None,
    settings: Settings = None,
    seed: Seed = None,
    held_out: HeldOut = 0.125,
    salt: Salt = 0,
    reports: Reports = False,
    archive: Archive = False,
    no_start: NoStart = False,
    debug: Debug = False,
) -> int:
    """Found a swarm, print an invite, and start its first node.

    The manifest is signed here and never changes. It has the tasks with their versions, the choice of held-out
    questions, the limits, the rule of admission, and whether archives are allowed. `gossamer node --state FOLDER`
    starts the node again.

    \b
    Example:
      gossamer found riddles --task builtin --listen tcp://0.0.0.0:4001 --state n0
    """
    named = {"rounds": rounds, "seed": seed, "policy.model": model, "network.listen": listen or None}
    check_free(folder)
    remembered = settle(config, settings, named, folder=folder)
    settled = remembered.config if not task else _with_tasks(remembered.config, task)

    from node.swarm import agreed_tasks, founding, inviting, swarm_folder
    from node.swarm.peering import check_endpoint
    from node.tasks.questions import Split
    from node.telemetry.logs import setup_logs
    from protocol.credentials import manifest

    if not no_start:
        check_endpoint(settled.network)
    allowed = [inviting.parse_node_id(text) for text in allow or []]
    is_known: list[bool] = []

    def listening(network: "Network") -> None:
        is_known.append(True)
        print_invite(inviting.make_invite(folder, [], own=network.host.addresses))
        if policy is PolicyName.ALLOWLIST:
            who = "only the listed nodes" if allowed else "nobody"
            more = f"gossamer invite {for_shell(folder)} --uses N"
            print(f"note: this line admits {who}: `{more}` admits others", file=sys.stderr)

    with gone_if_new(folder, keep=lambda _: bool(is_known)):  # nobody can have heard of a swarm that never listened
        split, reports_s = Split(held_out, salt), REPORTS_S if reports else 0
        founded = founding.found(
            settled, folder, name, manifest.JoinPolicy(policy), allowed, split, reports_s=reports_s, archive=archive
        )
        if archive:
            print(f"note: {swarm_folder.lasting(founded)}", file=sys.stderr)
        for line in agreed_tasks.words_needed(founded):
            print(f"note: who joins is told: {line}", file=sys.stderr)
        for line in _proposals(settled, policy):
            print(f"note: {line} (docs/sharing.md)", file=sys.stderr)
        if no_start:
            print(
                f"swarm {name} is founded: start it with `gossamer node --state {for_shell(folder)}`, "
                f"then `gossamer invite {for_shell(folder)}`"
            )
            return 0
        setup_logs(folder, debug=debug)
        remembered.say(config)
        return run(settled, folder, listening=listening)


def _proposals(config: NodeConfig, policy: PolicyName) -> list[str]:
    """Return what members had better set, by the results in docs/results."""
    lines = []
    if config.sampling.rule == "positive":
        lines.append("where answers are right or wrong, a member learns faster with --set sampling.rule=rft")
    if policy is PolicyName.ALLOWLIST and config.weights.mode == "off":
        lines.append("members that trust each other learn faster with --set weights.mode=average --set weights.every=5")
    return lines


def _with_tasks(config: NodeConfig, names: Sequence[str]) -> NodeConfig:
    listed = {task.name: task for task in config.tasks}
    chosen = [listed.get(name) or TaskConfig.model_validate(task_config(name)) for name in names]
    return config.model_copy(update={"tasks": chosen})
