"""How the verbs that start a node start it: logs first, then whatever it needs, then the node to its end."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from node.config import NodeConfig

if TYPE_CHECKING:
    from node.network import Network


def run(
    config: NodeConfig,
    folder: Path,
    *,
    seed_only: bool = False,
    listening: Callable[["Network"], None] = lambda network: None,
) -> int:
    """Run the node in `folder` until its last round, Ctrl-C or SIGTERM; return the exit status.

    The caller has set the logs up: the libraries of a node that trains log while they load.
    """
    with contextlib.suppress(KeyboardInterrupt):  # while it still starts; later the node ends its round first
        if seed_only:
            from node.relay import run_relay

            run_relay(config, folder, listening)
        else:
            from node.run import run_node

            run_node(config, folder, listening)
    return 0
