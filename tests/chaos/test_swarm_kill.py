"""A node of four dies by SIGKILL at a chosen moment: the others never pause, and it comes back as itself.

Nothing here depends on how fast the machine is: the nodes have no last round, the victim is held back until
each of the others has done some rounds without it, and the run is stopped when it has gone on past its death.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from node.config import NodeConfig
from node.fleet.child_process import run_real_node
from node.fleet.local_swarm import make_plan, run_swarm
from node.fleet.supervisor import NodeProcess
from tests.swarms import GRADED, events_of, rows_of, small_config
from tests.waiting import wait_until

KILL_AT = 23  # not a round with a checkpoint: some work is lost and done again
STOP_AT = KILL_AT + 10  # the victim's last round, or one soon after
MEANWHILE = 3  # rounds that each of the others does before the victim comes back
VICTIM = "n1"
OTHERS = ("n0", "n2", "n3")


def die_in(owner: type, method: str, folder: Path, armed: Callable[..., bool]) -> None:
    """Let the first call of `owner.method` for which `armed` holds end this process."""
    original = getattr(owner, method)

    def dying(self: Any, *arguments: Any, **options: Any) -> Any:
        marker = folder / "killed"
        if not marker.exists() and armed(self, *arguments):
            marker.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments, **options)

    setattr(owner, method, dying)


def past(folder: Path) -> Callable[..., bool]:
    return lambda *_: len(rows_of(folder)) >= KILL_AT


def rounds_since_death(victim: Path, name: str) -> int:
    died = float((victim / "killed").read_text())
    return sum(row["time"] > died for row in rows_of(victim.with_name(name)))


def run_node_later(config: NodeConfig, folder: Path) -> None:
    """Run the node; one that was killed waits until the others have gone on without it."""
    if (folder / "killed").exists():
        wait_until(lambda: all(rounds_since_death(folder, name) >= MEANWHILE for name in OTHERS), 120, "the others")
    run_real_node(config, folder)


def stop_when_the_victim_is_past_its_death() -> Callable[[Sequence[NodeProcess]], None]:
    asked: list[int] = []

    def look(children: Sequence[NodeProcess]) -> None:
        (victim,) = [child for child in children if child.name == VICTIM]
        if not asked and victim.restarts and victim.progress.round >= STOP_AT:
            asked.append(victim.progress.round)
            os.kill(os.getpid(), signal.SIGINT)  # as a person does, once: each node ends its round

    return look


def dies_generating(config: NodeConfig, folder: Path) -> None:
    if folder.name == VICTIM:
        from transformers import LlamaForCausalLM

        passes = iter(range(10**9))  # in the third token of a generation
        die_in(
            LlamaForCausalLM,
            "forward",
            folder,
            lambda self, *_: not self.training and past(folder)() and next(passes) == 2,
        )
    run_node_later(config, folder)


def dies_training(config: NodeConfig, folder: Path) -> None:
    if folder.name == VICTIM:
        from torch.optim import AdamW

        die_in(AdamW, "step", folder, past(folder))
    run_node_later(config, folder)


def dies_checkpointing(config: NodeConfig, folder: Path) -> None:
    if folder.name == VICTIM:
        from node.training.trainer import SwarmTrainer

        die_in(SwarmTrainer, "_save_rng_state", folder, past(folder))
    run_node_later(config, folder)


def dies_sharing(config: NodeConfig, folder: Path) -> None:
    if folder.name == VICTIM:
        from protocol.host import Host

        calls = iter(range(10**9))  # some of the round's groups are out, some are not
        die_in(Host, "publish", folder, lambda *_: past(folder)() and next(calls) == 2)
    run_node_later(config, folder)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "target",
    [
        dies_generating,
        pytest.param(dies_training, marks=pytest.mark.long),
        dies_checkpointing,
        pytest.param(dies_sharing, marks=pytest.mark.long),
    ],
)
def test_the_others_never_pause_and_the_victim_returns_as_itself(
    target: Callable[[NodeConfig, Path], None], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    plan = make_plan(out, 4, small_config(None, tasks=GRADED))
    outcome = run_swarm(
        plan, stop_when_the_victim_is_past_its_death(), started=time.time(), target=target, preload=("node.run",)
    )
    victim = out / "nodes" / VICTIM
    others = [out / "nodes" / name for name in OTHERS]

    died = float((victim / "killed").read_text())
    (child,) = [child for child in outcome.children if child.name == VICTIM]
    assert child.restarts == 1
    assert [child.state.value for child in outcome.children] == ["stopped"] * 4

    starts = events_of(victim, "listening")
    assert len(starts) == 2
    assert starts[0]["node"] == starts[1]["node"]
    resumed = events_of(victim, "training")[1]["round"]
    assert resumed in (KILL_AT - KILL_AT % 5, KILL_AT - KILL_AT % 5 + 5)  # the newest whole checkpoint
    assert events_of(victim, "training")[1]["buffer"] > 0

    rows = rows_of(victim)
    assert [row["round"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= STOP_AT
    back = next(row for row in rows if row["began"] > died)
    assert back["policy_version"] == resumed
    for folder in others:
        theirs = rows_of(folder)
        assert [row["round"] for row in theirs] == list(range(1, len(theirs) + 1))
        meanwhile = [row for row in theirs if died < row["time"] < back["began"]]
        assert len(meanwhile) >= MEANWHILE
        usual = sorted(row["time/round"] for row in theirs)[len(theirs) // 2]
        longest = max(row["time/round"] for row in meanwhile)
        assert longest < max(20 * usual, 2.0), (usual, longest)
