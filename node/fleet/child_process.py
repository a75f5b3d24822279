"""One supervised node process: how it is started, and what it does before the node runs.

Children are forked from a server that has imported the heavy libraries once, so N
nodes share the cost in time and in memory. The server is started with SIGINT, SIGTERM, SIGHUP and
SIGUSR1 blocked, and its children inherit that. A Ctrl-C in the terminal, or the terminal's end,
reaches the whole process group, but only the supervisor reacts. It asks its children to stop
by SIGTERM, and to save by SIGUSR1, which each of them unblocks for itself.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

import structlog

from node.config import NodeConfig
from node.errors import PassingError, UserError
from node.telemetry.logs import flush_logs, setup_logs

HEAVY = ("node.run",)  # imports torch, transformers and trl with it
# A thread does not survive a fork: keep OpenBLAS and Arrow (its allocator) from starting one while they are imported.
NO_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
# Nor does CUDA: if a package asked CUDA whether there is a GPU, the children could not use it. NVML tells as well.
NO_CUDA = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
# The server is started with `python -c`: a user's node.py in the current folder must not be imported in place of ours.
NO_FOLDER_OF_THE_USER = {"PYTHONSAFEPATH": "1"}
MOST_SAID = 4096  # characters of a reason: nobody reads the pipe before the child's end, and it holds 64 KiB
EXIT_DEFECT = 1
EXIT_USER_ERROR = 2
LOST = 255  # what multiprocessing reports when the fork server died, and its child perhaps lives on

Target = Callable[[NodeConfig, Path], None]
NOTHING_ELSE: Mapping[str, str] = MappingProxyType({})

log = structlog.get_logger()


class Ending(NamedTuple):
    """How a node's process ended: its exit status, negative for a signal's number, and why in words."""

    code: int
    reason: str


class Running(Protocol):
    """A node's process, on this machine or another. Only `ending` waits. All may be called after its end."""

    @property
    def sentinel(self) -> int:
        """A file descriptor that is ready to be read once the process has ended."""
        ...

    def is_alive(self) -> bool:
        """Tell whether the process has not ended; if it has, all its rows are in the node's folder."""
        ...

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        ...

    def ending(self) -> Ending:
        """Wait for its end, and return how that was; called once."""
        ...


class Started(NamedTuple):
    """A child process, and the pipe on which it says why it ends, if it can: a `Running` of this machine."""

    process: ForkServerProcess
    reason: Connection

    @property
    def sentinel(self) -> int:
        """As `Running` has it."""
        return self.process.sentinel

    def is_alive(self) -> bool:
        """As `Running` has it."""
        return self.process.is_alive()

    def signal(self, number: signal.Signals) -> None:
        """As `Running` has it."""
        if self.process.pid:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def ending(self) -> Ending:
        """As `Running` has it."""
        self.process.join()
        code = self.process.exitcode or 0
        if code == LOST:
            self.signal(signal.SIGKILL)
        reason = f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        with self.reason, suppress(EOFError):  # a killed process says nothing
            if self.reason.poll():  # else a process that it started holds the pipe open
                reason = self.reason.recv()
        return Ending(code, reason)


def start_server(preload: Sequence[str] = HEAVY) -> ForkServerContext:
    """Start the fork server, which begins to import `preload` at once, and return its context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    resource_tracker.ensure_running()  # else the fork server starts it, which unblocks the other two
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    outside = dict(os.environ)
    os.environ.update(NO_THREADS | NO_CUDA | NO_FOLDER_OF_THE_USER)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(outside)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def start_child(
    context: ForkServerContext,
    target: Target,
    config: NodeConfig,
    folder: Path,
    *,
    environment: Mapping[str, str] = NOTHING_ELSE,
    debug: bool = False,
) -> Started:
    """Start one node process on `folder`; `target` must be picklable by reference.

    `environment` is set over that of the fork server before anything runs.
    """
    reading, writing = context.Pipe(duplex=False)
    given = (target, config, folder, dict(environment), debug, writing)
    process = context.Process(target=_main, args=given, name=folder.name)
    process.start()
    writing.close()
    return Started(process, reading)


def run_real_node(config: NodeConfig, folder: Path) -> None:
    """The target of a real swarm: run a node; its libraries are imported in the child alone."""
    from node.run import run_node

    run_node(config, folder)


def _main(
    target: Target, config: NodeConfig, folder: Path, environment: dict[str, str], debug: bool, reason: Connection
) -> None:
    os.environ.update(environment)
    threading.Thread(target=_die_with_supervisor, name="supervisor-watch", daemon=True).start()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to save
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})
    _redirect_output(folder / "output.log")
    setup_logs(folder, stderr=False, debug=debug)
    try:
        target(config, folder)
    except UserError as error:
        log.exception("stopped")
        reason.send(str(error)[:MOST_SAID])
        sys.exit(EXIT_DEFECT if isinstance(error, PassingError) else EXIT_USER_ERROR)
    except Exception as error:  # whatever it was, the supervisor decides what comes next
        log.exception("failed")
        reason.send(f"{type(error).__name__}: {error}"[:MOST_SAID])
        sys.exit(EXIT_DEFECT)
    finally:
        flush_logs()


def _die_with_supervisor() -> None:
    """Wait for the supervisor's end of the pipe to close, as it does even on kill -9, and end at once."""
    supervisor = multiprocessing.parent_process()
    assert supervisor is not None
    wait([supervisor.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _redirect_output(path: Path) -> None:
    """Send what libraries print to a file, so that N nodes do not write over the live table."""
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
