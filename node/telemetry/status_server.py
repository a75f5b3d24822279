"""What a running node says of itself over HTTP: /status (JSON) for a person, /metrics for Prometheus.

The server reads counters and answers; it takes nothing in. It listens on loopback unless the
configuration says otherwise, and `observe.json` in the node's folder names its port.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from socketserver import TCPServer
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from node.config import ObserveConfig
from node.errors import UserError
from node.peering import Network, agent
from protocol.storage import write_atomically

OBSERVE_FILE = "observe.json"
PATIENCE_S = 5.0  # for one request; requests are answered one at a time
STOP_S = 0.2  # how late it may notice that the node ends
Row = Mapping[str, Any]
Tree = dict[str, Any]


def describe(network: Network, row: Row, rounds: int | None, *, trains: bool = True) -> Tree:
    """Return the node's state as JSON values.

    Args:
        network: the running network.
        row: the newest finished round's metrics; empty before the first, and on a node that does not train.
        rounds: how many rounds the node will train for, None if until it is stopped.
        trains: whether it does; else it relays only.
    """
    counters = network.host.counters()
    manifest = network.manifest
    return {
        "swarm": {"id": network.swarm.hex(), "name": manifest.name if manifest else None},
        "policy": str(manifest.policy) if manifest else None,
        "node": network.identity.node_id,
        "agent": agent(),
        "address": str(network.address) if network.address else None,
        "round": row.get("round"),
        "rounds": rounds,
        "trains": trains,
        "reward": row.get("reward"),
        "refusal": network.host.refusal or None,
        "grant_expires": network.grant_expires,
        "peers": [
            {
                "node": peer.node_id,
                "endpoint": peer.endpoint or None,
                "agent": peer.agent,
                "state": peer.state,
                "rtt_s": peer.rtt_s,
            }
            for peer in network.host.peers()
        ],
        "counters": {
            "live_peers": counters.peers,
            "known_peers": counters.known,
            "bytes_sent": counters.bytes_sent,
            "bytes_received": counters.bytes_received,
            "items_sent": counters.items_sent,
            "items_received": counters.items_received,
            "duplicates": counters.duplicates,
        },
        "rejected": dict(counters.rejected),
        "time": time.time(),
        "pid": os.getpid(),
    }


class NodeCollector(Collector):
    """The same as Prometheus metrics; every counter starts again from 0 with the process."""

    def __init__(self, state: Callable[[], Tree]) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics of this moment."""
        state = self._state()
        counters = state["counters"]
        info = {"node": state["node"], "swarm": state["swarm"]["id"], "agent": state["agent"]}
        yield InfoMetricFamily("gossamer_node", "Who this is", value=info)
        yield GaugeMetricFamily("gossamer_peers", "Live peers", value=counters["live_peers"])
        yield GaugeMetricFamily("gossamer_known_peers", "Peers whose record is known", value=counters["known_peers"])
        for name, text in (
            ("bytes_sent", "Bytes of frames sent"),
            ("bytes_received", "Bytes of frames received"),
            ("items_sent", "Shared groups sent, each time they are"),
            ("items_received", "Shared groups received, each one once"),
            ("duplicates", "Shared groups received again"),
        ):
            yield CounterMetricFamily(f"gossamer_{name}", text, value=counters[name])
        rejected = CounterMetricFamily("gossamer_rejected", "What was refused, by reason", labels=["reason"])
        for reason, count in sorted(state["rejected"].items()):
            rejected.add_metric([reason], count)
        yield rejected
        for name, text in (("round", "The last finished round"), ("reward", "Its mean reward")):
            if state[name] is not None:
                yield GaugeMetricFamily(f"gossamer_{name}", text, value=state[name])


@contextmanager
def observe(config: ObserveConfig, folder: Path, state: Callable[[], Tree]) -> Iterator[None]:
    """Answer HTTP requests for as long as the block lasts, from a thread of its own.

    Raises:
        UserError: the host or the port cannot be listened on.
    """
    if not config.enabled:
        yield
        return
    try:
        server = make_server(config.host, config.port, _application(state), _Server, _Handler)
    except OSError as error:
        raise UserError(
            f"cannot listen on {config.host}:{config.port} ({error.strerror}): set observe.port=0, or another"
        ) from None
    path = folder / OBSERVE_FILE
    place = {"host": config.host, "port": server.server_port, "pid": os.getpid()}
    thread = Thread(target=server.serve_forever, args=(STOP_S,), name="gossamer-observe", daemon=True)
    thread.start()
    try:
        write_atomically(path, json.dumps(place).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        server.shutdown()
        server.server_close()
        thread.join()


def _application(state: Callable[[], Tree]) -> WSGIApplication:
    registry = CollectorRegistry()
    registry.register(NodeCollector(state))
    metrics = make_wsgi_app(registry)

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "GET":
            return reply(start, HTTPStatus.METHOD_NOT_ALLOWED, b"{}")
        if environ["PATH_INFO"] == "/metrics":
            return metrics(environ, start)
        if environ["PATH_INFO"] == "/status":
            return reply(start, HTTPStatus.OK, json.dumps(state()).encode())
        return reply(start, HTTPStatus.NOT_FOUND, b'{"paths": ["/status", "/metrics"]}')

    def reply(start: StartResponse, status: HTTPStatus, body: bytes) -> Iterable[bytes]:
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        start(f"{status.value} {status.phrase}", headers)
        return [body]

    return answer


class _Server(WSGIServer):
    def server_bind(self) -> None:
        # As the base classes do, without a look-up of the host's name, which may take seconds.
        TCPServer.server_bind(self)
        host, self.server_port = self.server_address[:2]
        self.server_name = str(host)
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that went away is no event."""


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE_S

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
        """Write no access log."""
