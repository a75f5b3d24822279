"""What depends on the operating system: processors to use, freed memory, and what is defended on Linux alone."""

import ctypes
import os
import sys
from collections.abc import Iterator


def usable_cores() -> int:
    """Return how many processors this process may use: fewer than the machine's where somebody says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def return_freed_memory() -> None:
    """Give the system what the C library keeps of freed memory: glibc's `malloc_trim`; elsewhere nothing.

    glibc raises what it keeps at the end of its heap with the blocks that it sees freed, to 64 MiB at most
    (`M_TRIM_THRESHOLD` in mallopt(3)), and gives back nothing that lies below a block in use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def undefended(system: str = sys.platform) -> Iterator[str]:
    """Yield a line for each defence that a node lacks on this system."""
    if system != "linux":
        yield "connections are counted and not measured here: a stranger's message that never ends is not cut"
        yield "bounds on the memory of tasks' own processes may not hold here"
