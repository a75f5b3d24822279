"""Other processes: whether one is still there."""

import psutil


def alive(pid: int) -> bool:
    """Tell whether a process lives; one that its parent has not waited for yet (a zombie) counts as dead."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
