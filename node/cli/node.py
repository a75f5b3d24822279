"""`gossamer node`: one node."""

import os
from pathlib import Path
from typing import Any

from node.cli.options import (
    AccelerateConfig,
    Config,
    Debug,
    DryRun,
    EveryKey,
    Folder,
    Forget,
    Listen,
    Model,
    Preset,
    Processes,
    Rewards,
    Rounds,
    Rows,
    Seed,
    Settings,
    Tasks,
    warn,
)
from node.cli.running import run, sharers
from node.config import NodeConfig
from node.errors import UserError
from node.operations.config_text import to_toml
from node.operations.given import check_tasks, tasks_given
from node.operations.preflight import check_first
from node.operations.presets import notes_on_model
from node.operations.settling import settle
from node.state_folder import check_begun, check_free


def node(  # noqa: PLR0913  # one parameter for each option of the command
    config: Config = None,
    model: Model = None,
    folder: Folder = Path("node-state"),
    listen: Listen = None,
    task: Tasks = None,
    reward: Rewards = None,
    data: Rows = None,
    rounds: Rounds = None,
    settings: Settings = None,
    preset: Preset = None,
    seed: Seed = None,
    forget: Forget = None,
    processes: Processes = None,
    accelerate_config: AccelerateConfig = None,
    dry_run: DryRun = False,
    every_key: EveryKey = False,
    debug: Debug = False,
) -> int:
    """Run one node, or start one again from its folder.

    It trains until Ctrl-C or its last round. Its folder has its settings and checkpoints, so --state alone resumes it.
    Options given then override the settings and are remembered; the node says what changed.

    \b
    Example:
      gossamer node --state n0 --model builtin --listen tcp://0.0.0.0:4001
      gossamer node --state n0 --task ./riddles.py
      gossamer node --state n0 --reward ./rewards.py:accuracy --reward trl:think_format_reward --data rows.jsonl
      gossamer node --state n1 --model Qwen/Qwen3-0.6B --set "network.seeds=['$(cat n0/address)']"
      gossamer node --state n2 --model Qwen/Qwen3-8B --processes 4 --accelerate-config fsdp2.yaml
      gossamer node --state relay --set role=relay --listen tcp://0.0.0.0:4002
    """
    if processes or accelerate_config or "RANK" in os.environ:
        # Read when torch is imported: it would warn in each process that it looks for weights without gradients.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if int(os.environ.get("RANK", "0")):
        return _follow()
    if not dry_run:
        check_free(folder)
    training: dict[str, Any] = {
        "processes": processes,
        "accelerate": accelerate_config,
    }
    training = {key: value for key, value in training.items() if value is not None}
    named = {
        "rounds": rounds,
        "seed": seed,
        "policy.model": model,
        "network.listen": listen or None,
        "tasks": tasks_given(task, reward, data) or None,
    }

    def look(given: NodeConfig) -> None:
        if config is None and (folder.exists() or not dry_run):
            check_begun(given, folder)
        if not dry_run:
            check_first(given, folder)

    settled = settle(
        config,
        settings,
        named,
        folder=folder,
        forget=forget or [],
        preset=preset,
        look=look,
        sharers=lambda: sharers(processes, accelerate_config),
    )
    if dry_run:
        notes = [*check_tasks(settled.config), *notes_on_model(settled.config, sharers(processes, accelerate_config))]
        print(to_toml(settled.config, settled.notes, every_key=every_key), end="")
        warn(settled.config, notes)
        return 0

    if training and settled.config.role == "relay":
        raise UserError("a relay trains nothing: leave out --processes and --accelerate-config")

    from node.swarm.peering import check_endpoint
    from node.telemetry.logs import setup_logs

    check_endpoint(settled.config.network)
    setup_logs(folder, debug=debug)
    settled.say(config)
    return run(settled.config, folder, **training)


def _follow() -> int:
    """Train with the process that a launcher has started as number 0, with the same command."""
    from node.telemetry.logs import setup_logs
    from node.training.follower import follow_launched

    setup_logs(None, stderr=False)  # number 0 logs
    return follow_launched()
