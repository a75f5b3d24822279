"""Waiting for another process or thread: poll a condition until a deadline, never sleep for a guess."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_INTERVAL = 0.02


def wait_until(condition: Callable[[], T], timeout: float, what: str = "") -> T:
    """Poll `condition` until it returns something true, and return that.

    Raises `AssertionError` naming `what` (or the condition) after `timeout` seconds. An
    exception from the condition ends the wait at once: a condition that is not yet met
    must say so by returning something false.
    """
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() >= deadline:
            name = what or getattr(condition, "__name__", "the condition")
            raise AssertionError(f"waited {timeout:g} s for {name}; last seen: {value!r}")
        time.sleep(POLL_INTERVAL)
    return value
