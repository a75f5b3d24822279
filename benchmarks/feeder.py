"""Peers in a child process: real identities, links and signatures, and groups made beforehand.

    python -m benchmarks.feeder ADDRESS SWARM FILE EXTERNAL

`FILE` is a MessagePack list: for each peer, for each round, the topics and bodies it publishes. Every
line on standard input is one round. The end of input is the end. Each asks for what a node does that draws `EXTERNAL`
groups a round. With `-` for an address they have a node that they all join among themselves, which publishes nothing.
"""

import sys
import time
from pathlib import Path

import msgpack

from node.swarm.sharing import Demand
from protocol.credentials.records import Address
from protocol.host import Host
from protocol.identity import Identity


def main(address: str, swarm: str, file: str, external: str) -> None:
    """Join the node at `address` once for each peer, and publish a round of each at every line."""
    peers = msgpack.unpackb(Path(file).read_bytes())
    demand = Demand(int(external))
    hosts: list[Host] = []

    def start(seeds: list[Address]) -> Address | None:
        host = Host(Identity.generate(), bytes.fromhex(swarm), "tcp://127.0.0.1:0", seeds)
        hosts.append(host)
        found = host.start()
        host.subscribe(None, demand.told)
        return found

    seed = Address.parse(address) if address != "-" else start([])
    for _ in peers:
        start([seed] if seed else [])
    for number, _ in enumerate(sys.stdin):
        demand.drew(int(external), int(external))
        if demand.next_round(time.monotonic()):
            for host in hosts:
                host.subscribe(None, demand.told)
        for host, rounds in zip(hosts[-len(peers) :], peers, strict=True):
            for topic, body in rounds[number]:
                host.publish(body, topic)
    for host in hosts:
        host.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
