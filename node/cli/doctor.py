"""`gossamer doctor`: can this machine run a node?"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import psutil
import typer

from node.cli.options import Debug

MIN_PYTHON = (3, 11)
MIN_MEMORY = 1.5e9  # bytes available: one node on the built-in policy, with room to start
MIN_DISK = 2e9
EXTRAS = {"vllm": "vllm", "reasoning-gym": "reasoning_gym", "tensorboard": "tensorboard", "wandb": "wandb"}

Port = Annotated[int, typer.Option(min=0, max=65535, help="Port that a node should listen on; 0 tries any.")]
Folder = Annotated[Path, typer.Option("--folder", "--state", help="Where the node's state would go.")]


class Check(NamedTuple):
    """One finding; only one that is needed makes the command fail."""

    name: str
    ok: bool
    text: str
    needed: bool = True


def doctor(port: Port = 0, folder: Folder = Path(), debug: Debug = False) -> int:
    """Check this machine: Python, torch and its devices, extras, cores, memory, disk, port.

    \b
    Example:
      gossamer doctor --port 4001 --state /var/lib/gossamer
    """
    checks = list(examine(port, folder))
    for check in checks:
        mark = "ok  " if check.ok else "FAIL" if check.needed else "-   "
        print(f"{mark}  {check.name:14} {check.text}")
    return 0 if all(check.ok for check in checks if check.needed) else 1


def examine(port: int, folder: Path) -> Iterator[Check]:
    """Yield what was found, one thing at a time."""
    yield Check("python", sys.version_info >= MIN_PYTHON, platform.python_version())
    yield from _torch()
    for extra, module in EXTRAS.items():
        present = importlib.util.find_spec(module) is not None
        text = importlib.metadata.version(extra) if present else f"not installed: pip install 'gossamer[{extra}]'"
        yield Check(extra, present, text, needed=False)
    yield Check("cores", True, str(len(os.sched_getaffinity(0))))
    memory = psutil.virtual_memory()
    yield Check(
        "memory", memory.available >= MIN_MEMORY, f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    )
    yield from _disk(folder)
    yield _port(port)


def _torch() -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield Check("torch", False, f"{error}: pip install torch")
        return
    yield Check("torch", True, torch.__version__)
    count = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    yield Check("gpu", count > 0, names or "none that torch sees: the CPU is used", needed=False)


def _disk(folder: Path) -> Iterator[Check]:
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    yield Check("disk", free >= MIN_DISK, f"{free / 1e9:.1f} GB free at {existing}")
    writable = os.access(existing, os.W_OK | os.X_OK)
    yield Check("state folder", writable, f"{existing} is {'' if writable else 'not '}writable")


def _port(port: int) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))  # as a node that others shall reach would
        except OSError as error:
            return Check("port", False, f"cannot listen on {port}: {error.strerror}")
        return Check("port", True, f"{probe.getsockname()[1]} can be bound")
