"""What the peers of `benchmarks.gossip` are told, a JSON object a line, whichever network they speak.

Only the standard library: the peers of another network run under an interpreter of their own.

    {"start": {"nodes": 2, "seeds": [...]}}                      -> {"addresses": [...]}
    {"peers": {}}                                                -> {"peers": fewest of any node}
    {"round": {"number", "size", "nodes", "at", "timeout"}}      -> {"seconds": [... or null], "held": [...]}
    {"sent": {}}                                                 -> {"sent": bytes so far, or null}

A round: at the unix time `at` each node publishes `size` bytes, made before; then it is watched until it
holds what all `nodes` published, its own included. `seconds` are counted from `at`.
"""

import json
import sys
import time
from typing import Any, Protocol

PATIENCE_S = 0.1  # until all nodes of a process were looked at, where none got all
QUIET_S = 0.05  # before a round is answered: to write and read it takes the processor from those that are not done


class Peers(Protocol):
    """Some nodes in this process."""

    def start(self, nodes: int, seeds: list[str]) -> list[str]:
        """Start nodes that join by `seeds` (or each other) and return how each is joined."""
        ...

    def peers(self) -> int:
        """Return the number of peers of the node that has the fewest."""
        ...

    def bodies(self, number: int, size: int) -> list[bytes]:
        """Return `size` bytes for each node to publish in round `number`."""
        ...

    def publish(self, number: int, bodies: list[bytes]) -> None:
        """Let each node publish its own of `bodies` in round `number`."""
        ...

    def held(self, number: int, enough: int, patience: float) -> list[int]:
        """Return how many nodes' items of the round each node holds.

        It waits up to `patience` seconds, shared among the nodes that lack some of the `enough`.
        """
        ...

    def sent(self) -> int | None:
        """Return the bytes that all nodes sent so far, if that is known."""
        ...

    def stop(self) -> None: ...


def serve(peers: Peers) -> None:
    """Answer commands until the end of input."""
    for line in sys.stdin:
        ((command, options),) = json.loads(line).items()
        print(json.dumps(_answer(peers, command, options)), flush=True)
    peers.stop()


def _answer(peers: Peers, command: str, options: dict[str, Any]) -> dict[str, Any]:
    if command == "start":
        return {"addresses": peers.start(**options)}
    if command == "round":
        return _round(peers, **options)
    return {command: getattr(peers, {"peers": "peers", "sent": "sent"}[command])()}


def _round(peers: Peers, number: int, size: int, nodes: int, at: float, timeout: float) -> dict[str, Any]:
    bodies = peers.bodies(number, size)
    time.sleep(max(0.0, at - time.time()))
    peers.publish(number, bodies)
    seconds: dict[int, float] = {}
    held: list[int] = []
    while not held or (len(seconds) < len(held) and time.time() < at + timeout):
        held = peers.held(number, nodes, PATIENCE_S)
        now = time.time() - at
        for node, count in enumerate(held):
            if count >= nodes:
                seconds.setdefault(node, now)
    time.sleep(QUIET_S)
    return {"seconds": [seconds.get(node) for node in range(len(held))], "held": held}
