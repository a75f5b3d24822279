"""How the verbs that start a node run it to its end."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from node.config import NodeConfig
from node.operations.preflight import check_first
from node.operations.presets import check_model
from node.processes.machine import undefended
from node.processes.signals import interrupting_signals
from node.state_folder import exclusive, first_start

if TYPE_CHECKING:
    from node.swarm.peering import Network
    from protocol.credentials.invite import Invite

log = structlog.get_logger()


def run(
    config: NodeConfig,
    folder: Path,
    listening: Callable[["Network"], None] = lambda network: None,
    **more: Any,
) -> int:
    """Run the node in `folder` until a signal to stop or its last round; return the exit status.

    `more` goes to `run_node` or `run_relay`. The caller has set the logs up, since libraries log while they load.
    """
    try:
        with interrupting_signals():  # while it still starts; later the node ends its round first
            # Another start in this folder fails at once, while this one still loads.
            with exclusive(folder), first_start(config, folder) as before:
                check_first(config, folder)
                if config.role != "relay":  # which runs no model
                    check_model(config, sharers(more.get("processes"), more.get("accelerate")))
                log.info("starting", folder=str(folder), role=config.role)
                for line in undefended():
                    log.warning(line)
                run_it: Callable[..., None]
                if config.role == "relay":
                    from node.relay import run_relay

                    run_it = run_relay
                else:
                    from node.run import run_node

                    run_it = run_node
            run_it(config, folder, listening, before=before, **more)  # which holds the folder itself
    except KeyboardInterrupt:
        log.info("stopped while starting")
    return 0


def sharers(processes: int | None, accelerate: Path | None) -> int:
    """Return among how many cards FSDP2 shares the weights out, by these options or a launcher; 1 without it.

    Raises:
        UserError: accelerate's file cannot be used.
    """
    if not (accelerate or "WORLD_SIZE" in os.environ):
        return 1
    from node.training.processes import sharers_of  # which imports torch

    return sharers_of(processes, accelerate)


def print_invite(invite: "Invite") -> None:
    """Print the line, alone on stdout, and on stderr what should be known about it."""
    from node.swarm.inviting import reach
    from protocol.limits.networks import Scope

    print(invite, flush=True)
    notes = {
        Scope.LOOPBACK: "only this machine can use it; a node with --listen tcp://0.0.0.0:PORT serves others",
        Scope.PRIVATE: "only machines of this network can use it; ask `gossamer invite` again once `gossamer status` "
        "says that everybody reaches this node",
    }
    if (note := notes.get(reach(invite))) is not None:
        print(f"note: {note}", file=sys.stderr)
