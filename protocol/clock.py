"""The two clocks that a core is told about, as one value."""

import time
from typing import NamedTuple


class Instant(NamedTuple):
    """A moment on both clocks, in seconds.

    `steady` never steps back and drives every timer. `unix` can be set by a person or by
    NTP and is only compared with the time stamps that peers sign.
    """

    steady: float
    unix: float


# CLOCK_BOOTTIME also counts while the machine sleeps, so a laptop that wakes up knows how long it was away.
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def read_clock() -> Instant:
    """Return the present moment."""
    return Instant(time.clock_gettime(_STEADY), time.time())
