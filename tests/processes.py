"""Other processes: whether one is still there."""

import psutil


def alive(pid: int) -> bool:
    """A dead process that its parent has not asked after yet counts as dead."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
