"""A node that trains nothing: it introduces peers, relays what they share and serves the manifest.

It loads no model and does not import torch. It checks signatures, sizes and rates as every node
does, but not what is in a group: that is for those who train on it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import structlog

from node.config import NodeConfig
from node.errors import UserError
from node.processes.signals import stop_signals
from node.state_folder import Before, exclusive, first_start, full_disk_is_clear, keep_config, resolve_seed
from node.swarm.peering import Network, open_network
from node.swarm.reports import REPORTS_TOPIC
from node.swarm.sharing import SEED_DEMAND, traffic_row
from node.telemetry.metrics_file import MAX_BYTES, MetricsLog
from node.telemetry.status_server import describe, observe
from protocol.host import Host, Received

METRICS_INTERVAL_S = 10.0
DRAIN_INTERVAL_S = 0.5  # while fewer items wait than are taken at once
DRAIN = 64  # a signal to stop waits for as many, and a kill loses no more of what was taken

log = structlog.get_logger()


Take = Callable[[Sequence[Received]], None]


@contextmanager
def _drop(_: Network) -> Iterator[Take]:
    yield lambda items: None


def run_relay(
    config: NodeConfig,
    folder: Path,
    listening: Callable[[Network], None] = lambda network: None,
    looking: Callable[[Network], AbstractContextManager[Take]] = _drop,
    before: Before | None = None,
) -> None:
    """Relay until a signal to stop; `listening` is called once, when the node can be dialled.

    `looking` opens a function that takes the items that came, at most `DRAIN` at a time: it is called twice a second,
    also without items.
    `before` is as for `first_start`.

    Raises:
        UserError: the configuration, the folder or the machine needs a person.
    """
    if not config.network.enabled:
        raise UserError("a node that only relays needs its network: set network.enabled=true")
    with ExitStack() as stack:
        stack.enter_context(full_disk_is_clear(folder))
        stack.enter_context(exclusive(folder))
        stack.enter_context(first_start(config, folder, before))
        stopping = stack.enter_context(stop_signals())
        seed = resolve_seed(config, folder)
        network = stack.enter_context(open_network(config, folder, relays=True))
        stack.enter_context(observe(config.observe, folder, lambda: describe(network, (), None, trains=False)))
        keep_config(config, seed, folder)
        has_reports = network.manifest is not None and network.manifest.limits.reports_s > 0
        network.host.subscribe(None, SEED_DEMAND, frozenset({REPORTS_TOPIC} if has_reports else ()))
        listening(network)
        take = stack.enter_context(looking(network))
        metrics = MetricsLog(folder / "metrics.jsonl", MAX_BYTES)
        due = time.monotonic() + METRICS_INTERVAL_S
        counters = network.host.counters()
        while not stopping:
            items = network.host.receive(DRAIN)
            take(items)
            if len(items) < DRAIN:
                time.sleep(DRAIN_INTERVAL_S)
            if time.monotonic() >= due:
                due += METRICS_INTERVAL_S
                metrics.append(_row(network.host))
                now = network.host.counters()
                if (now.peers, now.items_received) != (counters.peers, counters.items_received):
                    log.info("relaying", peers=now.peers, known=now.known, items=now.items_received)
                    counters = now
        metrics.append(_row(network.host))
        log.info("finished")


def _row(host: Host) -> dict[str, object]:
    """Return the same counts as a round's row has; a row without "round" is no round to those who read them."""
    return {"time": time.time(), **traffic_row(host.counters())}
