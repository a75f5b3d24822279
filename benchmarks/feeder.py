"""Peers in a child process: real identities, links and signatures, and groups made beforehand.

    python -m benchmarks.feeder ADDRESS SWARM FILE

`FILE` is a MessagePack list: for each peer, for each round, the topics and bodies it publishes. Every
line on standard input is one round. The end of input is the end.
"""

import sys
from pathlib import Path

import msgpack

from protocol.credentials.records import Address
from protocol.host import Host
from protocol.identity import Identity


def main(address: str, swarm: str, file: str) -> None:
    """Join the node at `address` once for each peer, and publish a round of each at every line."""
    peers = msgpack.unpackb(Path(file).read_bytes())
    hosts = [
        Host(Identity.generate(), bytes.fromhex(swarm), "tcp://127.0.0.1:0", [Address.parse(address)]) for _ in peers
    ]
    for host in hosts:
        host.start()
    for number, _ in enumerate(sys.stdin):
        for host, rounds in zip(hosts, peers, strict=True):
            for topic, body in rounds[number]:
                host.publish(body, topic)
    for host in hosts:
        host.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
