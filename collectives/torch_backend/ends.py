"""How a world that never changes ends: with its program, once the other ranks have what was sent to them."""

import atexit
import os
import sys
import time
from collections.abc import Sequence
from functools import cache
from multiprocessing.util import Finalize
from typing import Protocol

from collectives.logs import Log
from collectives.mesh.data_plane import DataPlane
from protocol.identity import NodeId

log = Log()

QUIET_S = 10.0  # of waiting for other ranks, before the log says for whom


class World(Protocol):
    """A default process group."""

    def shutdown(self) -> None:
        """End it in order."""


worlds: set[World] = set()  # the default groups of those that never change


@cache
def end_worlds_with(process: int) -> None:
    """Let a program that does not call `destroy_process_group` end as if it had, unless it ends by an exception."""

    def end() -> None:
        if os.getpid() == process and not is_failing() and not hasattr(sys, "last_value"):
            for world in list(worlds):
                world.shutdown()

    atexit.register(end)
    Finalize(None, end, exitpriority=0)  # a process of multiprocessing that is forked runs no other


def is_failing() -> bool:
    """Tell whether an exception is on its way."""
    error = sys.exc_info()[1]
    return error is not None and not (isinstance(error, SystemExit) and not error.code)


def wait_until_taken(plane: DataPlane, members: Sequence[NodeId], timeout: float) -> None:
    """Say that this rank has nothing more to do, and wait until all others have what it has sent."""
    until = time.monotonic() + timeout
    plane.finish()
    late = plane.wait_taken(min(until, time.monotonic() + QUIET_S))
    if late:
        ranks = sorted(members.index(member) for member in late)
        log.info("this rank has ended; others have yet to take what it sent", ranks=ranks, at_most_s=timeout)
        plane.wait_taken(until)
