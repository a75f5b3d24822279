"""The status server of a running node: a page, /status (JSON), /metrics for Prometheus, /healthz.

`observe.json` in the node's folder says where: host, port, token, the process's id. `ask` reads it and asks.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import psutil
import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from node.config import ObserveConfig
from node.errors import UserError, for_shell
from node.metrics import METRICS, Combine, Metric, Row, recent, total
from node.state_folder import is_held
from node.swarm.peering import Network, agent, other_form, release
from node.swarm.sharing import traffic_row
from node.telemetry.dashboard.app import Site
from node.telemetry.dashboard.server import serve
from node.telemetry.names import short_name
from protocol.errors import NetworkFailed
from protocol.limits.limits import Limits
from protocol.storage import write_atomically

OBSERVE_FILE = "observe.json"
PREFIX = "gossamer_"  # of the metrics' names for Prometheus
TIMEOUT_S = 10.0  # a node that loads its model holds its interpreter for seconds at a time
MAX_ANSWER = 8 << 20
Tree = dict[str, Any]

log = structlog.get_logger()


def describe(
    network: Network,
    rows: Sequence[Row],
    rounds: int | None,
    *,
    evaluations: Sequence[Row] = (),
    trains: bool = True,
) -> Tree:
    """Return the node's state as JSON values.

    Args:
        network: the running network.
        rows: the metrics of the newest finished rounds; none before the first, and on a node that does not train.
        rounds: how many rounds the node will train for, None if until it is stopped.
        evaluations: all that there were.
        trains: whether it does; else it relays only.
    """
    row = rows[-1] if rows else {}
    counters = network.host.counters()
    manifest = network.manifest
    process = psutil.Process()
    memory, uptime = process.memory_info().rss, time.time() - process.create_time()
    now = {"process/memory": memory, "process/uptime": uptime, **traffic_row(counters)}
    metrics = {metric.name: recent(metric, [*rows, now]) for metric in METRICS.values() if metric.exported}
    return {
        "swarm": {"id": network.swarm.hex(), "name": manifest.name if manifest else None},
        "policy": str(manifest.policy) if manifest else None,
        "node": network.identity.node_id,
        "short_name": short_name(network.identity.node_id),
        "failure": _failure(network),
        "agent": agent(),
        "address": str(network.address) if network.address else None,
        "addresses": [str(address) for address in network.host.addresses],
        "seen_at": network.host.standing.seen_at or None,
        "dialable": network.host.standing.dialable,
        "dialable_asked": network.host.standing.answers,
        "unreached": [
            {"endpoint": str(failure.endpoint), "tried_from": failure.tried_from}
            for failure in network.host.standing.failures
        ],
        "router": network.mapping.said.failure or None if network.mapping and network.mapping.said else None,
        "round": row.get("round"),
        "rounds": rounds,
        "trains": trains,
        "reward": metrics["reward"],
        "rewards": metrics["rewards/*/mean"] or {},
        "held_out": [
            {key: row[key] for key in ("round", "questions", "accuracy", "accuracy_low", "accuracy_high")}
            for row in (*evaluations[:1], *evaluations[1:][-1:])  # the first and the last
        ],
        "round_s": metrics["time/round"],
        "buffer": metrics["swarm/buffer"],
        "groups": {whose: total(METRICS[f"groups_{whose}"], rows) for whose in ("local", "external")},
        "weights": {key: row[f"weights/{key}"] for key in ("members", "revision") if f"weights/{key}" in row},
        "memory_bytes": memory,
        "uptime_s": uptime,
        "refusal": network.host.refusal or None,
        "grant_expires": network.grant_expires,
        "twin": network.host.twin or None,
        "other_form": other_form([peer.agent for peer in network.host.peers()]),
        "least_score": Limits().graylist_score,  # below it a peer is refused for a while
        "peers": [
            {
                "node": peer.node_id,
                "short_name": short_name(peer.node_id),
                "endpoint": peer.endpoint or None,
                "agent": release(peer.agent),
                "state": "well" if peer.state == "pinged" else peer.state,  # a question on its way is no doubt
                "rtt_s": peer.rtt_s,
                "age_s": peer.age_s,
                "bytes_sent": peer.bytes_sent,
                "bytes_received": peer.bytes_received,
                "score": peer.score,
            }
            for peer in network.host.peers()
        ],
        "counters": {
            "live_peers": counters.peers,
            "known_peers": counters.known,
            "dialable_members": counters.dialable,
            "bytes_sent": counters.bytes_sent,
            "bytes_received": counters.bytes_received,
            "items_sent": counters.items_sent,
            "items_received": counters.items_received,
            "duplicates": counters.duplicates,
        },
        "rejected": dict(counters.rejected),
        "metrics": metrics,
        "time": time.time(),
        "pid": os.getpid(),
    }


def _failure(network: Network) -> str | None:
    try:
        network.host.check()
    except NetworkFailed as error:
        return str(error)
    return None


class NodeCollector(Collector):
    """The same as Prometheus metrics; every counter starts again from 0 with the process."""

    def __init__(self, state: Callable[[], Tree]) -> None:
        self._state = state

    def collect(self) -> Iterable[Family]:
        """Yield the exported metrics of this moment, as far as they are known."""
        state = self._state()
        info = {"node": state["node"], "swarm": state["swarm"]["id"], "agent": state["agent"]}
        yield InfoMetricFamily(f"{PREFIX}node", "Who this is", value=info)
        for name, value in state["metrics"].items():
            if value is not None:
                yield family(METRICS[name], value)


def family(metric: Metric, value: Any) -> Family:
    """Return an exported metric as Prometheus has it; `value` is a number, or a table of numbers by its label."""
    kind = CounterMetricFamily if metric.combine is Combine.COUNTER else GaugeMetricFamily
    text = f"{metric.meaning[0].upper()}{metric.meaning[1:]}"
    exported = kind(PREFIX + metric.exported, text, labels=[metric.label] if metric.label else [])
    for label, number in sorted(value.items()) if metric.label else [("", value)]:
        exported.add_metric([label] if metric.label else [], number)
    return exported


@contextmanager
def observe(config: ObserveConfig, folder: Path, state: Callable[[], Tree]) -> Iterator[None]:
    """Answer HTTP requests for as long as the block lasts, from a thread of its own.

    Raises:
        UserError: the host or the port cannot be listened on.
    """
    if not config.enabled:
        yield
        return
    registry = CollectorRegistry()
    registry.register(NodeCollector(state))
    name = folder.resolve().name
    site = Site(
        {name: folder},
        state,
        lambda: {"title": name, "nodes": [{"name": name, "state": "running", "status": state()}]},
        lambda: generate_latest(registry),
        lambda: not state()["failure"],
    )
    path = folder / OBSERVE_FILE
    with serve(config, site) as served:
        place = {"host": config.host, "port": served.port, "token": served.token, "pid": os.getpid()}
        log.info("dashboard", link=served.link)
        try:
            write_atomically(path, json.dumps(place).encode(), 0o600)
            yield
        finally:
            path.unlink(missing_ok=True)


def ask(folder: Path, timeout: float = TIMEOUT_S) -> Tree:
    """Return the state of the node that runs in `folder`; `UserError` if none does, or none within `timeout` s."""
    place = folder / OBSERVE_FILE
    down = UserError(f"no node is running in {folder}: start one with `gossamer node --state {for_shell(folder)}`")
    try:
        recorded = json.loads(place.read_text())
        host, port, token = str(recorded["host"]), int(recorded["port"]), str(recorded.get("token", ""))
    except FileNotFoundError:
        if is_held(folder):
            raise UserError(
                f"the node in {folder} is starting: ask again in a moment "
                "(with observe.enabled = false it never answers)"
            ) from None
        raise down from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{place} cannot be read: start the node again") from None
    connection = HTTPConnection(host, port, timeout=timeout)
    try:
        connection.request("GET", "/status", headers={"Authorization": f"Bearer {token}"} if token else {})
        tree = json.loads(connection.getresponse().read(MAX_ANSWER))
    except ConnectionError:
        if is_held(folder):
            raise UserError(
                f"a node runs in {folder}, but {host}:{port} cannot be reached from here: ask in its own "
                "container or network namespace"
            ) from None
        raise down from None  # the file was left behind by a node that was killed
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(f"the node in {folder} does not answer ({error}): is it stopped, or very busy?") from None
    finally:
        connection.close()
    if not isinstance(tree, dict) or tree.get("pid") != recorded.get("pid"):
        raise down  # the port is another program's by now
    return tree
