"""Checks that need neither torch, whose import takes seconds, nor a loaded model.

Each check is as cheap as it can be. One that passes promises nothing: what needs the thing says so later.
"""

import importlib.util
import json
import shutil
import socket
import struct
import subprocess
from math import prod
from pathlib import Path

from node.config import NodeConfig, ObserveConfig
from node.engines.missing import LOOK_S, missing
from node.errors import UserError
from node.policy.detection import check_bits, check_policy, check_trackers, has_bitsandbytes, has_gpu, main_memory
from node.policy.memory import frozen_bytes, trained_bytes

LEAST_DISK = 16 << 20  # bytes: the built-in policy's checkpoints and some metrics
PACKAGES = ("gossamer", "node", "collectives", "protocol")
MAX_HEADER = 100_000_000  # bytes, as safetensors has it


def check_first(config: NodeConfig, folder: Path) -> None:
    """Look for what would end a node in `folder` anyway, in well under a second.

    Raises:
        UserError: a full disk, a busy port, no such GPU, no vLLM, no bitsandbytes, no tracker that is named, no server
            that answers, or a model without weights.
    """
    check_place(config, folder)
    if config.role != "relay":
        check_means(config)


def check_place(config: NodeConfig, folder: Path) -> None:
    """Raise `UserError` for a full disk, or a busy port of the page."""
    _check_disk(folder)
    _check_page(config.observe)


def check_means(config: NodeConfig) -> None:
    """Raise `UserError` where this machine lacks what training takes: a GPU, a library, a server, weights."""
    check_policy(config.policy)
    check_bits(config.policy.dtype, config.trainer.options.optim)
    check_trackers(config.trainer.options.report_to)
    if lacks := missing(config.engine.kind, config.engine):
        raise UserError(lacks)


def _check_disk(folder: Path) -> None:
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    usage = shutil.disk_usage(existing)
    if usage.total and usage.free < LEAST_DISK:  # what is no disk has no size either
        raise UserError(
            f"the disk that holds {folder} is full ({usage.free / 1e6:.0f} MB are free): free some space, or choose "
            "another folder"
        )


def _check_page(config: ObserveConfig) -> None:
    if not config.enabled or not config.port:
        return
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        socket.create_server((config.host, config.port), family=family).close()
    except OSError as error:
        raise UserError(
            f"cannot listen on {config.host}:{config.port} ({error.strerror}): set observe.port=0, or another"
        ) from None


def check_unhidden(folder: Path) -> None:
    """Raise `UserError` where Python, started in `folder`, would import something else than our packages."""
    for name in PACKAGES:
        ours = importlib.util.find_spec(name)
        for path in (folder / f"{name}.py", folder / name / "__init__.py"):
            if path.is_file() and ours and ours.origin and not path.samefile(ours.origin):
                raise UserError(
                    f"{path} hides Gossamer's package {name!r} there: rename it, or start from another folder"
                )


def check_size(config: NodeConfig, sharers: int = 1) -> None:
    """Raise `UserError` where a folder's model needs more memory than there is, by its weights alone.

    With FSDP2, `sharers` processes share the weights out among GPUs. On a processor all parts are in one memory.
    """
    policy = config.policy
    if config.role == "relay" or not Path(policy.model).is_dir():
        return
    weights = weights_in(Path(policy.model))
    on_gpu = policy.device in ("auto", "cuda") and has_gpu()
    sharers = sharers if on_gpu else 1
    need = weights * (frozen_bytes(policy.dtype, sharers) if policy.lora.r else trained_bytes(sharers))
    memory = gpu_memory() if on_gpu else main_memory()
    if memory is not None and need > memory:
        raise UserError(
            f"policy.model has {weights / 1e9:.3g} G weights, which take {need / 1e9:.0f} GB before any activation; "
            f"{'the GPU' if on_gpu else 'this machine'} has {memory / 1e9:.0f} GB: "
            f"{_smaller(config, weights, memory, sharers)}choose a smaller model"
        )


def _smaller(config: NodeConfig, weights: int, memory: int, sharers: int) -> str:
    """Return what to set for this model to fit after all; "" if nothing will do."""
    dtypes = ["bfloat16"]
    if has_bitsandbytes() and config.engine.kind == "hf" and sharers == 1:
        dtypes.append("nf4")
    fits = [dtype for dtype in dtypes if weights * frozen_bytes(dtype, sharers) <= memory]
    if not fits:
        return ""
    settings = [] if config.policy.lora.r else ["policy.lora.r=16"]
    if config.policy.lora.r or fits[0] == "nf4":  # otherwise the preset chooses 16 bits
        settings.append(f"policy.dtype={fits[0]}")
    return f"set {' and '.join(settings)} to train adapters, or "


def weights_in(folder: Path) -> int:
    """Return how many numbers the safetensors files in `folder` hold, by their headers; 0 for what cannot be read."""
    try:
        return sum(map(_count, folder.glob("*.safetensors")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return 0


def _count(file: Path) -> int:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(min(length, MAX_HEADER)))
    return sum(prod(one["shape"]) for name, one in header.items() if name != "__metadata__")


def gpu_memory() -> int | None:
    """Return the bytes of the largest NVIDIA GPU here; None where its own tool does not say."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, timeout=LOOK_S, capture_output=True, text=True, check=True).stdout
        return max(int(line) << 20 for line in said.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
