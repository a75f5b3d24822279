"""Running whole nodes and swarms from tests: small policies, few rounds, real processes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from node.config import NodeConfig, parse_config
from node.telemetry.metrics_file import read_metrics

ROOT = Path(__file__).parents[1]

UNBOUNDED = {"max_surprise": 0, "max_length_ratio": 0, "max_signer_share": 0}
"""What a peer may teach where its texts are a test's and no policy's."""


GRADED = [{"name": "builtin", "options": {"partial": True}}]
"""Tasks on which an untrained policy now and then earns part of a reward: something to share in every round."""


def small_config(rounds: int | None, **tables: Any) -> NodeConfig:
    """A node on the built-in policy with small groups and frequent checkpoints."""
    tree: dict[str, Any] = {
        "seed": 1,
        "rounds": rounds,
        "threads": 1,
        "sampling": {"local": 4, "external": 4, "completions": 8},
        "trainer": {"save_steps": 5},
        "eval": {"every": 0},
    }
    for name, table in tables.items():
        tree[name] = tree.get(name, {}) | table if isinstance(table, dict) else table
    return parse_config(tree)


def gossamer(*arguments: str | int | Path) -> subprocess.Popen[str]:
    """Start the command line in a process group of its own."""
    return subprocess.Popen(
        [Path(sys.executable).with_name("gossamer"), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """A node's metrics so far."""
    return read_metrics(folder / "metrics.jsonl")


def events_of(folder: Path, event: str) -> list[dict[str, Any]]:
    """The node's log entries named `event`, of all its processes."""
    try:
        lines = (folder / "log.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [entry for entry in map(json.loads, lines) if entry.get("event") == event]


def numbers(rows: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What a round computed, without what the clock and the network say."""
    keys = ("round", "policy_version", "reward", "groups_local", "loss", "grad_norm", "entropy", "generated")
    return [tuple(row.get(key) for key in keys) for row in rows]


def vllm_workers(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Those of `processes` that are a vLLM engine's child."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it ended while we looked
            if any(part.endswith("vllm_worker.py") for part in process.cmdline()):
                found.add(process)
    return found
