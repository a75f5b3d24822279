"""hivemind's DHT in a child process of `benchmarks.gossip`, used as rl-swarm uses it.

A round is a key; each peer stores its rollout under a subkey, its own id, and asks for the key
until all subkeys are there. Runs under an interpreter that has hivemind and need not have us:

    VENV/bin/python -m benchmarks.hivemind_peers
"""

import os
import time
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

import hivemind
from hivemind.utils import get_dht_time

from benchmarks.child import serve

PAUSE_S = 0.04  # from an answer to the next question: to be asked all the time makes hivemind slower
LOOK_S = 0.004  # between two looks at whom to ask
LIFE_S = 600.0  # of a stored rollout
START_TIMEOUT_S = 60.0


class Dhts:
    """Implements `child.Peers` with `hivemind.DHT`."""

    def __init__(self) -> None:
        self._dhts: list[Any] = []
        self._asked: list[Any] = []
        self._next: list[float] = []  # when each may be asked again
        self._held: list[int] = []

    def start(self, nodes: int, seeds: list[str]) -> list[str]:
        """See `Peers.start`."""
        addresses: list[str] = []
        for _ in range(nodes):
            known = (seeds or addresses[:1] or [""])[0]
            dht = hivemind.DHT(
                start=True,
                initial_peers=known.split(",") if known else [],
                host_maddrs=["/ip4/127.0.0.1/tcp/0"],
                cache_locally=False,
                cache_on_store=False,
                startup_timeout=START_TIMEOUT_S,
            )
            addresses.append(",".join(map(str, dht.get_visible_maddrs())))
            self._dhts.append(dht)
        return addresses

    def peers(self) -> int:
        """See `Peers.peers`: a DHT that has started has joined."""
        return 1 << 30

    def bodies(self, number: int, size: int) -> list[bytes]:
        """See `Peers.bodies`."""
        return [os.urandom(size) for _ in self._dhts]

    def publish(self, number: int, bodies: list[bytes]) -> None:
        """See `Peers.publish`."""
        expiry = get_dht_time() + LIFE_S
        for dht, body in zip(self._dhts, bodies, strict=True):
            dht.store(key(number), body, expiry, subkey=str(dht.peer_id), return_future=True)
        self._asked = [None] * len(self._dhts)
        self._next = [time.monotonic() + PAUSE_S] * len(self._dhts)
        self._held = [0] * len(self._dhts)

    def held(self, number: int, enough: int, patience: float) -> list[int]:
        """See `Peers.held`. Each DHT has one question at a time on its way."""
        patience = min(patience, LOOK_S)
        lacking = [node for node, held in enumerate(self._held) if held < enough]
        for node in lacking:
            if self._asked[node] is None and time.monotonic() >= self._next[node]:
                self._asked[node] = self._dhts[node].get(key(number), latest=True, return_future=True)
        asked = {self._asked[node]: node for node in lacking if self._asked[node] is not None}
        if not asked:
            time.sleep(patience)
        for answered in wait(asked, patience, FIRST_COMPLETED).done:
            node = asked[answered]
            self._asked[node], self._next[node] = None, time.monotonic() + PAUSE_S
            answer = answered.result() if answered.exception() is None else None
            self._held[node] = len(answer.value) if answer is not None else 0
        return list(self._held)

    def sent(self) -> None:
        """See `Peers.sent`: its daemon does not tell."""

    def stop(self) -> None:
        """See `Peers.stop`."""
        for dht in self._dhts:
            dht.shutdown()


def key(number: int) -> str:
    """Return the round's key."""
    return f"round {number}"


if __name__ == "__main__":
    serve(Dhts())
