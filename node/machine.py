"""What depends on the operating system: how many processors there are to use, and what is defended on Linux alone."""

import os
import sys
from collections.abc import Iterator


def usable_cores() -> int:
    """Return how many processors this process may use: fewer than the machine's where somebody says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def undefended(system: str = sys.platform) -> Iterator[str]:
    """Yield a line for each defence that a node lacks on this system."""
    if system != "linux":
        yield "connections are counted and not measured here: a stranger's message that never ends is not cut"
        yield "bounds on the memory of tasks' own processes may not hold here"
