"""Processes that train one node together, forked from the tests as a launcher would start them."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState

from tests.commands import FORK

# A launcher's configuration, which divides a model over the ranks.
FSDP2 = """\
distributed_type: FSDP
num_machines: 1
num_processes: 4
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
"""


def start_ranks(count: int, target: Callable[..., Any], *args: Any, **variables: str) -> list[Any]:
    """Start `count` processes that run `target(*args)`, each with the variables that a launcher sets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    found = []
    for number in range(count):
        given = {
            **dict.fromkeys(("RANK", "LOCAL_RANK"), str(number)),
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }
        child = FORK.Process(target=_run, args=(given | variables, target, args))
        child.start()
        found.append(child)
    return found


def in_ranks(count: int, target: Callable[..., Any], *args: Any, **variables: str) -> None:
    """Run `target(*args)` in `count` processes to their ends, which must be good ones."""
    children = start_ranks(count, target, *args, **variables)
    for child in children:
        child.join(100)
    codes = [child.exitcode for child in children]
    for child in children:
        if child.exitcode is None:
            child.kill()
            child.join()
    assert codes == [0] * count


def forget_process() -> None:
    """Forget, in a forked process, what an earlier test has left of accelerate's: it is of one process alone."""
    AcceleratorState._reset_state(reset_partial_state=True)


def _run(variables: dict[str, str], target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(variables)
    forget_process()
    torch.set_num_threads(1)
    target(*args)
