"""A node's group for weights: which one it is, and how the node comes to take part.

    average        the mean of the members' weights: outer learning rate 1, no momentum
    diloco         an outer Nesterov step on their mean change (arXiv 2311.08105), taken up once it is there
    async-diloco   the same, taken up at the next exchange: a delay that does not depend on the network

A group is nodes of one swarm with one architecture, the same trained parameters and the same way of
stepping; its name is a hash of these. Each says in its peer record under that name where it can be
reached, and dials those who say so. A node founds the group by itself, and groups that meet become
one. `weights.seeds` is for members that the swarm's records do not tell of: what a running node writes
to `weights_address` in its folder.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from collectives import Communicator
from collectives.outer import trained
from node.checkpoint import Checkpoint
from node.config import NetworkConfig, NodeConfig, WeightsConfig
from node.errors import UserError
from node.network import is_loopback, listens_at, swarm_id
from node.policy.load import Policy
from node.weight_exchange import WeightExchange, outer_of
from protocol.errors import ProtocolError
from protocol.identity import Identity, NodeId
from protocol.records import Endpoint, Service

ADDRESS_FILE = "weights_address"
JOIN_TIMEOUT = 120.0  # seconds to wait to be let in, before asking anew: members do so once in `every` rounds


class Directory(Protocol):
    """What members of a swarm know of each other: a `protocol.host.Host`."""

    def serve(self, *services: Service) -> None:
        """Say what runs here."""

    def offers(self, name: str) -> list[tuple[NodeId, Endpoint]]:
        """Return who else runs the service of this name."""


class Weights(Protocol):
    """What a node does with its weights besides training them; nothing here waits for the network."""

    def begin(self) -> None:
        """Training begins, from the weights as they are now."""

    def after_round(self, number: int) -> Mapping[str, object]:
        """Round `number` is trained: return what to log."""

    def write(self, folder: Path) -> None:
        """Add to a checkpoint."""


class OwnWeights:
    """Weights that are the node's own."""

    def begin(self) -> None:
        """Nothing to do."""

    def after_round(self, number: int) -> Mapping[str, object]:
        """Nothing to log."""
        return {}

    def write(self, folder: Path) -> None:
        """Nothing to add."""


def group_name(config: WeightsConfig, swarm: bytes, policy: Policy) -> str:
    """Return the name of the group of all nodes that this one can average weights with."""
    settings = outer_of(config)
    shapes = [list(one.shape) for one in trained(policy.model)]
    what = [swarm.hex(), policy.name, shapes, config.mode, settings.lr, settings.momentum, config.codec]
    return f"gossamer/weights/{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}"


@contextmanager
def exchange_weights(
    config: NodeConfig,
    folder: Path,
    policy: Policy,
    checkpoint: Checkpoint | None,
    directory: Directory | None = None,
) -> Iterator[Weights]:
    """Take part in the group for as long as the block lasts, as `config.weights` says.

    Args:
        config: of the node.
        folder: the node's; its key is who it is in the group.
        policy: loaded, not yet trained.
        checkpoint: what training goes on from.
        directory: of the swarm, if the node is in one.

    Raises:
        UserError: the configuration or the checkpoint is of no use.
    """
    weights = config.weights
    if weights.mode == "off":
        yield OwnWeights()
        return
    try:
        identity = Identity.load_or_generate(folder / "identity.key")
    except ProtocolError as error:
        raise UserError(str(error)) from error
    group = group_name(weights, swarm_id(config, folder), policy)

    service = group.removeprefix("gossamer/")

    def connect() -> Communicator:
        member = Communicator.connect(
            group,
            weights.seeds,
            weights.listen or _listen(config.network),
            identity=identity,
            encrypt=weights.encrypt,
            streams=weights.streams,
            timeout=JOIN_TIMEOUT,
        )
        endpoint = Endpoint.parse(member.address)
        if directory is not None and (not is_loopback(endpoint) or _is_on_loopback(config.network)):
            directory.serve(Service(service, endpoint))
        return member

    def find() -> list[str]:
        found = directory.offers(service) if directory is not None else []
        return [f"{endpoint}?id={node}" for node, endpoint in found if node != identity.node_id]

    address = folder / ADDRESS_FILE
    address.unlink(missing_ok=True)  # of an earlier process
    exchange = WeightExchange(weights, policy, connect, address, find)
    if checkpoint is not None:
        exchange.resume(checkpoint.path)
    try:
        yield exchange
    finally:
        exchange.close()


def _listen(network: NetworkConfig) -> str:
    """Where members dial a node that does not say: on the host where its peers do, at any port."""
    listen = listens_at(network)
    return "tcp://127.0.0.1:0" if listen is None else str(replace(listen, port=0))


def _is_on_loopback(network: NetworkConfig) -> bool:
    listen = listens_at(network)
    return listen is not None and is_loopback(listen)
