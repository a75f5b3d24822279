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

from node.cli.options import Debug, Model
from node.cli.status import reachability
from node.config import NodeConfig, fill, parse_config
from node.errors import UserError
from node.footprint import ModelSize, footprint, peak
from node.presets import Machine, preset

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


def doctor(port: Port = 0, folder: Folder = Path(), model: Model = None, debug: Debug = False) -> int:
    """Check this machine, and what a model needs of it.

    Python, torch and its devices, extras, cores, memory, disk, port.

    Where a node runs in the folder: how its peers see it, and whether they can dial it.

    With a model: what a node takes with it, by part, whether that fits here, and what to set.

    \b
    Example:
      gossamer doctor --port 4001 --state /var/lib/gossamer
      gossamer doctor --model HuggingFaceTB/SmolLM2-360M-Instruct
    """
    checks = [*examine(port, folder), *(examine_model(model) if model is not None else [])]
    for check in checks:
        mark = "ok  " if check.ok else "FAIL" if check.needed else "-   "
        print(f"{mark}  {check.name:20} {check.text}")
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
    yield from _reachability(folder)


def examine_model(model: str) -> Iterator[Check]:
    """Yield what a node takes with `model` on each device here; `UserError` when there is no such model."""
    from node.detection import detect_machine, measure_model

    size = measure_model(model)
    yield Check(
        "model", True, f"{size.parameters / 1e6:.4g} M parameters in {size.layers} layers, {size.vocabulary} words"
    )
    machines = [detect_machine("cpu")]
    if (gpu := detect_machine()).gpu:
        machines.insert(0, gpu)
    for machine in machines:
        yield from _fit(model, size, machine)


def _fit(model: str, size: ModelSize, machine: Machine) -> Iterator[Check]:
    device = "gpu" if machine.gpu else "cpu"
    choices = preset(size, machine)
    config = fill(parse_config({"policy": {"model": model}}), {key: choice.value for key, choice in choices.items()})
    parts = footprint(size, config, bf16=machine.bf16, gpu_memory=machine.memory if machine.gpu else 0)
    for part in parts:
        yield Check(f"{device} {part.name}", True, f"{part.bytes / 1e9:6.2f} GB  {part.why}")
    need = peak(parts)
    fits = need <= machine.memory
    what = "adapters" if config.policy.lora.r else "all weights"
    advice = "" if fits else f": {_advice(config)}"
    text = f"{need / 1e9:6.2f} GB  of {machine.memory / 1e9:.1f} GB, training {what} as --model sets it{advice}"
    yield Check(f"{device} together", fits, text, needed=False)
    for key, choice in choices.items():
        yield Check(f"{device} set", True, f"{key}={choice.value}  # {choice.reason}")


def _advice(config: NodeConfig) -> str:
    """Return what to try first where a node with `config`, a preset, does not fit."""
    trainer = config.trainer
    if trainer.gradient_checkpointing:
        return "choose a smaller model"
    return (
        f"set trainer.gradient_checkpointing=true and trainer.tokens_per_batch={trainer.tokens_per_batch // 2}, "
        "or choose a smaller model"
    )


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


def _reachability(folder: Path) -> Iterator[Check]:
    """Ask the node that runs in `folder`, if one does: only others know whether it can be dialled."""
    from node.telemetry.status_server import ask

    try:
        tree = ask(folder)
    except UserError:
        return
    yield Check("seen by peers", bool(tree["dialable"]), reachability(tree), needed=False)


def _port(port: int) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))  # as a node that others shall reach would
        except OSError as error:
            return Check("port", False, f"cannot listen on {port}: {error.strerror}")
        return Check("port", True, f"{probe.getsockname()[1]} can be bound")
