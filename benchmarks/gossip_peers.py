"""Hosts of ours in a child process of `benchmarks.gossip`; see `benchmarks.child` for what they are told.

python -m benchmarks.gossip_peers SWARM_HEX
"""

import os
import sys
from collections import Counter

from benchmarks.child import serve
from protocol.credentials.records import Address
from protocol.host import Host
from protocol.identity import Identity
from protocol.limits.timing import LOCAL

NUMBER_BYTES = 8
RECEIVE_LIMIT = 4096


class Hosts:
    """Implements `child.Peers` with `Host`."""

    def __init__(self, swarm: bytes) -> None:
        self._swarm = swarm
        self._hosts: list[Host] = []
        self._held: list[Counter[int]] = []

    def start(self, nodes: int, seeds: list[str]) -> list[str]:
        """See `Peers.start`."""
        addresses: list[str] = []
        for _ in range(nodes):
            known = [Address.parse(text) for text in seeds or addresses[:1]]
            host = Host(Identity.generate(), self._swarm, "tcp://127.0.0.1:0", known, timing=LOCAL)
            addresses.append(str(host.start()))
            self._hosts.append(host)
            self._held.append(Counter())
        return addresses

    def peers(self) -> int:
        """See `Peers.peers`."""
        return min(host.counters().peers for host in self._hosts)

    def bodies(self, number: int, size: int) -> list[bytes]:
        """See `Peers.bodies`."""
        return [number.to_bytes(NUMBER_BYTES, "big") + os.urandom(size - NUMBER_BYTES) for _ in self._hosts]

    def publish(self, number: int, bodies: list[bytes]) -> None:
        """See `Peers.publish`."""
        for host, held, body in zip(self._hosts, self._held, bodies, strict=True):
            host.publish(body)
            held[number] += 1

    def held(self, number: int, enough: int, patience: float) -> list[int]:
        """See `Peers.held`."""
        lacking = [node for node, held in enumerate(self._held) if held[number] < enough]
        for node in lacking:
            least = enough - self._held[node][number]
            for item in self._hosts[node].receive(RECEIVE_LIMIT, patience / len(lacking), least):
                self._held[node][int.from_bytes(item.body[:NUMBER_BYTES], "big")] += 1
        return [held[number] for held in self._held]

    def sent(self) -> int:
        """See `Peers.sent`."""
        return sum(host.counters().bytes_sent for host in self._hosts)

    def stop(self) -> None:
        """See `Peers.stop`."""
        for host in self._hosts:
            host.stop()


if __name__ == "__main__":
    serve(Hosts(bytes.fromhex(sys.argv[1])))
