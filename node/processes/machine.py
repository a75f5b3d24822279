"""The parts that depend on the operating system: processors to use, memory, and the defences that Linux alone has."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Return how many processors this process may use: fewer than the machine's where somebody says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Return how many bytes this process may still take: of the machine's, or of its container's."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(counts["inactive_file"]))  # which the kernel gives back at once
    except (OSError, ValueError, KeyError):  # in no container, or in one without a limit ("max")
        return free


def return_freed_memory() -> None:
    """Give the system what the C library keeps of freed memory: glibc's `malloc_trim`; elsewhere nothing.

    glibc raises what it keeps at the end of its heap with the blocks that it sees freed, to 64 MiB at most
    (`M_TRIM_THRESHOLD` in mallopt(3)), and gives back nothing that lies below a block in use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error means that memory was wanted which is not there, of the GPU or of this machine.

    torch raises a class of its own for the one, and a RuntimeError for the other and in some libraries of the GPU.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


def free_memory() -> None:
    """Give back what this process holds and does not use, torch's cache of a GPU included.

    A caught error keeps alive all that it refers to: call this outside of its `except`.
    """
    gc.collect()
    torch = sys.modules.get("torch")  # imported or not: where nobody has, it caches nothing
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return_freed_memory()


def undefended(system: str = sys.platform) -> Iterator[str]:
    """Yield a line for each defence that a node lacks on this system."""
    if system != "linux":
        yield "connections are counted and not measured here: a stranger's message that never ends is not cut"
        yield "bounds on the memory of tasks' own processes may not hold here"
