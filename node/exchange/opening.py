"""Opens what stands between a node's folder and its peers: the network, what is shared over it, the group buffer."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from node.config import NodeConfig
from node.errors import UserError
from node.rollouts.group_buffer import LOSES, GroupBuffer
from node.rollouts.screening import GroupBounds
from node.swarm.agreed_tasks import check_rules
from node.swarm.peering import Network, agent, item_life, open_network
from node.swarm.reports import reporter_of
from node.swarm.sharing import GroupExchange, NetworkExchange, NoExchange
from node.swarm.swarm_folder import lasting
from node.tasks.task_set import TaskSet
from node.telemetry.evaluations import EVALUATIONS_FILE
from node.telemetry.metrics_file import MetricsLog, read_metrics
from node.telemetry.status_server import describe, observe
from protocol.credentials.manifest import ManifestLimits

BUFFER_FILE = "pool.sqlite"

log = structlog.get_logger()


class OpenSwarm(NamedTuple):
    """A node's way to its peers, and the bounds of a peer's group; without a network for a node alone."""

    network: Network | None
    exchange: GroupExchange
    bounds: GroupBounds


NO_SWARM = OpenSwarm(None, NoExchange(), GroupBounds(0, 0))


@contextmanager
def open_swarm(
    config: NodeConfig,
    folder: Path,
    tasks: TaskSet,
    metrics: MetricsLog,
    *,
    rounds: int | None,
    external: int,
) -> Iterator[OpenSwarm]:
    """Open the network of the node in `folder` for a block, share groups of `tasks` over it, and serve its status.

    The status tells of `metrics`, and of how many `rounds` are to be done, if that is known. Where rounds draw
    `external` groups, peers are asked at once for as many as can be had; where none does, once one does. A
    configuration without a network opens nothing.

    Raises:
        UserError: no peer would take what the node makes, or the configuration cannot be used.
    """
    if not config.network.enabled:
        yield NO_SWARM
        return
    with open_network(config, folder) as network:
        exchange, bounds = _share(network, config, tasks, external)

        def state() -> dict[str, Any]:
            return describe(network, metrics.recent, rounds, evaluations=read_metrics(folder / EVALUATIONS_FILE))

        with observe(config.observe, folder, state):
            yield OpenSwarm(network, exchange, bounds)


def _share(network: Network, config: NodeConfig, tasks: TaskSet, external: int) -> tuple[NetworkExchange, GroupBounds]:
    """Share groups of `tasks` over a network, by its swarm's rules; return the bounds of a group beside it."""
    limits = ManifestLimits()
    if network.manifest is not None:
        check_rules(network.manifest, tasks, config.sampling.completions)
        limits = network.manifest.limits
        if network.manifest.archive:
            log.warning(lasting(network.manifest))
    exchange = NetworkExchange(
        network.host,
        tasks,
        max_completions=limits.max_completions,
        max_bytes=limits.max_group_bytes,
        external=external,
        reports_s=limits.reports_s,
        reporter=reporter_of(limits.reports_s, config.observe.enabled, agent()),
        node=network.identity.node_id,
    )
    return exchange, GroupBounds(limits.max_completions, limits.max_group_bytes, item_life(limits.max_item_age_s))


@contextmanager
def open_buffer(config: NodeConfig, folder: Path, life: float) -> Iterator[GroupBuffer]:
    """Open the group buffer in `folder` for a block; `life` is how many seconds after its signing an item may come.

    Raises:
        UserError: its file cannot be written, is damaged, or is of another version.
    """
    path = folder / BUFFER_FILE
    try:
        with GroupBuffer(path, config.buffer, life) as buffer:
            yield buffer
    except sqlite3.OperationalError as error:
        raise UserError(f"cannot write {path}: {error}; free disk space or fix its permissions") from error
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is damaged ({error}): {LOSES}") from error
