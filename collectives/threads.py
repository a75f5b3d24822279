"""Waiting for threads to be gone.

torch ends the process by SIGABRT if a thread computes, or frees a tensor, while Python ends. Whoever starts such
a thread waits for it.
"""

import threading
import time
from collections.abc import Iterable


def join_all(threads: Iterable[threading.Thread], timeout: float) -> None:
    """Wait for all of these but the calling one, at most `timeout` seconds together."""
    until = time.monotonic() + timeout
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, until - time.monotonic()))


def add_thread(running: list[threading.Thread], *threads: threading.Thread) -> list[threading.Thread]:
    """Return those that still run, and these."""
    return [*(known for known in running if known.is_alive()), *threads]
