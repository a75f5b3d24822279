"""A node's group for weights: which one it is, and how the node comes to take part.

    average        the mean of the members' weights: outer learning rate 1, no momentum
    diloco         an outer Nesterov step on their mean change (arXiv 2311.08105), taken up once it is there
    async-diloco   the same, taken up at the next exchange: a delay that does not depend on the network

A group is nodes of one swarm with one architecture, the same trained parameters and the same way of
stepping; its name is a hash of these. Where its members are is not gossiped: `weights.seeds` names
one of them, and a node whose list is empty founds the group. A running node writes where it can be
reached to `weights_address` in its folder, which is where `gossamer swarm` finds the seeds of its others.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from collectives import Communicator
from collectives.outer import trained
from node.checkpoint import Checkpoint
from node.config import NodeConfig, WeightsConfig
from node.errors import UserError
from node.network import swarm_id
from node.policy.load import Policy
from node.weight_exchange import WeightExchange, outer_of
from protocol.errors import ProtocolError
from protocol.identity import Identity

ADDRESS_FILE = "weights_address"
JOIN_TIMEOUT = 120.0  # seconds to wait to be let in, before asking anew: members do so once in `every` rounds


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
    config: NodeConfig, folder: Path, policy: Policy, checkpoint: Checkpoint | None
) -> Iterator[Weights]:
    """Take part in the group for as long as the block lasts, as `config.weights` says.

    Args:
        config: of the node.
        folder: the node's; its key is who it is in the group.
        policy: loaded, not yet trained.
        checkpoint: what training goes on from.

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

    def connect() -> Communicator:
        return Communicator.connect(
            group,
            weights.seeds,
            weights.listen,
            identity=identity,
            encrypt=weights.encrypt,
            streams=weights.streams,
            timeout=JOIN_TIMEOUT,
        )

    address = folder / ADDRESS_FILE
    address.unlink(missing_ok=True)  # of an earlier process
    exchange = WeightExchange(weights, policy, connect, address)
    if checkpoint is not None:
        exchange.resume(checkpoint.path)
    try:
        yield exchange
    finally:
        exchange.close()
