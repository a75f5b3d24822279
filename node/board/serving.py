"""A board as it runs: a relay that reads what it passes on, remembers it, and serves pages of it."""

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import structlog

from node.board.history import BoardHistory, Remembered
from node.board.site import make_site
from node.board.view import BoardView, Rollouts, ShownSwarm, lessons_of
from node.errors import UserError
from node.relay import Take
from node.rollouts.group import GroupError, decode
from node.rollouts.screening import BLAMELESS
from node.state_folder import HISTORY_FILE
from node.swarm.peering import Network
from node.swarm.reports import REPORTS_TOPIC, ReportError, ReportIntake
from node.telemetry.dashboard.server import serve_app
from protocol.credentials.invite import Invite
from protocol.credentials.manifest import JoinPolicy, SwarmManifest
from protocol.credentials.records import Address
from protocol.errors import NetworkFailed
from protocol.host import Host, ItemVerdict, Received
from protocol.identity import NodeId

TICK_S = 60.0  # between two points of the swarm's curve
LOOK_S = 10.0  # between two views
HERE = 4  # a node is here that has reported within so many times the seconds between two reports
NO_REPORTS_S = 300  # of a swarm whose nodes do not report

log = structlog.get_logger()


@contextmanager
def open_board(
    network: Network,
    folder: Path,
    place: tuple[str, int],
    seeds: Sequence[Address] = (),
    trusted: Sequence[NodeId] = (),
    serving: Callable[[str], None] = lambda link: None,
) -> Iterator[Take]:
    """Serve the pages of the network's swarm while the block lasts; yield what takes the items that come.

    Args:
        network: the board's own, which relays.
        folder: where it remembers.
        place: host and port of the pages.
        seeds: whose reports count from the start, beside the founder's and those that `trusted` ever named.
        trusted: further ones.
        serving: is told the link to the page.

    Raises:
        UserError: there is no manifest, the place cannot be listened on, or the file cannot be used.
    """
    if network.manifest is None:
        raise UserError("a board shows the swarm that it has joined: give it an invite")
    path = folder / HISTORY_FILE
    try:
        with BoardHistory(path, HERE * (network.manifest.limits.reports_s or NO_REPORTS_S)) as history:
            history.name_seeds(trusted)
            swarm = ShownSwarm.of(network.manifest, _invite(network.manifest, network.address))
            board = Board(network.host, network.manifest, swarm, history, seeds)
            app = make_site(board.look, history.curve, lambda: _is_well(network.host))
            with serve_app(app, *place, "choose another --port, or another --host") as (_, link):
                log.info("board", link=link)
                serving(link)
                yield board.take
    except sqlite3.OperationalError as error:
        raise UserError(f"cannot write {path}: {error}; free disk space or fix its permissions") from error
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is damaged ({error}): delete it; only what it showed of the past is lost") from error


class Board:
    """Takes what comes, and makes a `BoardView` of it now and then. `take` is for one thread, `look` for any."""

    def __init__(
        self, host: Host, manifest: SwarmManifest, swarm: ShownSwarm, history: BoardHistory, seeds: Sequence[Address]
    ) -> None:
        self._host = host
        self._manifest = manifest
        self._swarm = swarm
        self._history = history
        self._seeds = seeds
        self._intake = ReportIntake(
            manifest.limits.reports_s or NO_REPORTS_S, {NodeId(node.id): node.last for node in history.nodes()}
        )
        self._rollouts = Rollouts()
        now = time.time()
        self._next_tick = now + LOOK_S  # the first reports are in it
        self._next_look = now + LOOK_S
        self._view = self._make_view(now)

    def look(self) -> BoardView:
        """Return what is shown now."""
        return self._view

    def take(self, items: Sequence[Received]) -> None:
        """Take the items that came; called a few times a second, also without any."""
        now = time.time()
        for item in items:
            if item.topic == REPORTS_TOPIC:
                self._take_report(item, now)
            else:
                self._take_group(item, now)
        if now >= self._next_tick:
            self._history.tick(now, self._roots(self._all_seeds(), self._history.nodes()))
            self._next_tick = now + TICK_S
        if now >= self._next_look:
            self._view = self._make_view(now)
            self._next_look = now + LOOK_S

    def _take_report(self, item: Received, now: float) -> None:
        try:
            report = self._intake.take(item.body, item.sender, item.time)
        except ReportError as error:
            verdict = ItemVerdict.IGNORE if error.reason in BLAMELESS else ItemVerdict.REJECT
            self._host.judge(item.id, verdict, error.reason)
        else:
            self._history.add(item.sender, report, min(now, item.time))

    def _take_group(self, item: Received, now: float) -> None:
        try:
            group = decode(item.body, self._manifest.limits.max_group_bytes)
        except GroupError:  # a relay passes on what it cannot judge
            return
        self._rollouts.add(item.sender, group, now)

    def _make_view(self, now: float) -> BoardView:
        nodes = [node for node in self._history.nodes() if not self._host.is_revoked(NodeId(node.id))]
        lately = self._history.lately
        recent = frozenset(node.id for node in nodes if node.last > now - lately)  # a link alone tells of no round
        seeds, curve = self._all_seeds(), self._history.curve()
        roots = self._roots(seeds, nodes)
        self._rollouts.trusted = seeds | {node.id for node in nodes if node.standing > 0}
        rollouts = self._rollouts.newest(now)
        is_alike = roots != seeds
        return BoardView(
            self._swarm, now, lately, nodes, recent, seeds, is_alike, lessons_of(nodes, roots), curve, rollouts
        )

    def _all_seeds(self) -> frozenset[str]:
        named = {node for seed in self._seeds if (node := self._host.node_at(seed)) is not None}
        return frozenset({self._manifest.founder, *named, *self._history.seeds()})

    def _roots(self, seeds: frozenset[str], nodes: Sequence[Remembered]) -> frozenset[str]:
        """Return whose reports count from the start: the seeds', or where none of them ever reported, everybody's."""
        reporters = frozenset(node.id for node in nodes)
        return seeds if seeds & reporters or self._history.seeds() or not reporters else reporters


def _invite(manifest: SwarmManifest, address: Address | None) -> str:
    """Return the line by which anyone may join, at the board itself: others did not ask to be named on a page.

    "" where joining takes more, or another machine cannot dial it.
    """
    if manifest.policy is not JoinPolicy.OPEN or address is None or address.endpoint.is_loopback:
        return ""
    return str(Invite(manifest.name, manifest.hash, (address,)))


def _is_well(host: Host) -> bool:
    try:
        host.check()
    except NetworkFailed:
        return False
    return True
