"""The page of a swarm: all its nodes' states at once, as their supervisor sees them.

A thread asks each running node for its state in turn, so that opening the page waits for nobody: one that hangs is
shown with what it said last, and when that was.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from node.config import ObserveConfig
from node.errors import UserError
from node.fleet.supervisor import NodeProcess, NodeState
from node.telemetry.dashboard.app import Site
from node.telemetry.dashboard.server import Served, serve
from node.telemetry.status_server import ask

ASK_S = 1.0  # between two rounds of questions
PATIENCE_S = 2.0  # for one answer

Ask = Callable[[Path, float], dict[str, Any]]
"""Returns the state of the node of a folder within so many seconds; raises `UserError` if it does not answer."""


class SwarmPage:
    """What is known of the nodes: their processes, from the supervisor's thread; what they said, from another."""

    def __init__(self, title: str, folders: Mapping[str, Path], ask: Ask) -> None:
        self._title = title
        self._ask = ask
        self._folders = folders
        self._processes: Mapping[str, dict[str, Any]] = {}
        self._statuses: dict[str, dict[str, Any]] = {}

    def show(self, children: Sequence[NodeProcess]) -> None:
        """Take the supervisor's news; cheap, and called a few times a second."""
        self._processes = {
            child.name: {"state": str(child.state), "error": child.error, "restarts": child.restarts}
            for child in children
        }

    def ask_all(self) -> None:
        """Ask every node that runs."""
        for name, folder in self._folders.items():
            if self._processes.get(name, {}).get("state") in (NodeState.STARTING, NodeState.RUNNING):
                try:
                    self._statuses[name] = self._ask(folder, PATIENCE_S)
                except UserError:  # it begins, ends or is stopped: what it said last has its time with it
                    continue

    def state(self) -> dict[str, Any]:
        """Return what the page shows."""
        processes, statuses = self._processes, dict(self._statuses)
        nodes = [
            {"name": name, **processes.get(name, {"state": NodeState.WAITING}), "status": statuses.get(name)}
            for name in self._folders
        ]
        return {"title": self._title, "time": time.time(), "nodes": nodes}


@contextmanager
def swarm_page(
    config: ObserveConfig, out: Path, folders: Mapping[str, Path], ask: Ask = ask
) -> Iterator[tuple[Served, Callable[[Sequence[NodeProcess]], None]]]:
    """Serve the page while the block lasts; yield where, and what takes the supervisor's news.

    Raises:
        UserError: the host or the port cannot be listened on.
    """
    board = SwarmPage(out.resolve().name, folders, ask)
    ended = Event()

    def keep_asking() -> None:
        while not ended.wait(ASK_S):
            board.ask_all()

    thread = Thread(target=keep_asking, name="gossamer-board", daemon=True)
    site = Site(folders, board.state, board.state, None, lambda: True)
    with serve(config, site) as served:
        thread.start()
        try:
            yield served, board.show
        finally:
            ended.set()
            thread.join(PATIENCE_S)
