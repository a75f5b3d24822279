"""What a node sends, on real sockets: peers that do not read, and the owner's upload limit, both counted in bytes."""

import os
import time
from dataclasses import dataclass, field

import psutil
import zmq

from protocol.identity import Identity
from protocol.limits.limits import MIB, Limits
from protocol.wire.envelope import CHUNK_BYTES, MAX_FRAME_BYTES, ItemId, Kind, header_of, kind_of
from protocol.wire.messages import Ack, Want, WantedPart
from tests.protocol_hosts import SWARM, collect, running
from tests.protocol_raw import RawPeer
from tests.waiting import wait_until

LIMITS = Limits()

SILENT_PEERS = 4
# In libzmq 1 MiB under way and one frame sealed; and what the silent peers, in this
# process too, have read of it. One such peer made a node hold 124 MiB.
MIB_A_PEER = 16


def test_peers_that_ask_and_do_not_read_cost_a_bounded_number_of_bytes_and_others_are_served() -> None:
    context = zmq.Context()
    context.rcvhwm = 1
    silent: list[RawPeer] = []
    with running() as (host, address):
        bodies = [os.urandom(MIB) for _ in range(8)]  # more than the queue of a link holds
        ids = [host.publish(body) for body in bodies]
        before = psutil.Process().memory_info().rss
        try:
            for _ in range(SILENT_PEERS):
                peer = RawPeer(Identity.generate(), address, SWARM, context=context)
                silent.append(peer)
                peer.send(peer.hello())
                assert peer.receive(10) is not None
                for item_id in 3 * ids:
                    parts = WantedPart(item_id), WantedPart(item_id, tuple(range(MIB // CHUNK_BYTES)))
                    peer.send(peer.frame(Kind.WANT, Want(parts).encode()))
            with running(address) as (reader, _):
                assert {item.body for item in collect(reader, len(ids), 60)} == set(bodies)
            grown = psutil.Process().memory_info().rss - before
            assert grown < SILENT_PEERS * MIB_A_PEER * MIB + 32 * MIB  # another host and what it got
        finally:
            for peer in silent:
                peer.close()
            context.destroy(linger=0)


@dataclass
class Download:
    """A raw peer that pulls items one after the other, acknowledges each, and counts the bytes that come."""

    peer: RawPeer
    ids: list[ItemId]
    received: int = 0
    began: float = field(default_factory=time.monotonic)

    def take(self) -> int:
        while frame := self.peer.receive(0.01):
            self.received += len(frame)
            if kind_of(frame) == Kind.ITEM:
                self.peer.send(self.peer.frame(Kind.ACK, Ack((WantedPart(header_of(frame).item_id),)).encode()))
        return self.received


def test_an_upload_limit_holds_whoever_asks_and_both_get_their_share() -> None:
    limit = 400_000.0
    limits = Limits(upload_bytes_per_second=limit)
    with running(limits=limits) as (host, address):
        ids = [host.publish(os.urandom(100_000)) for _ in range(40)]
        began = time.monotonic()
        peers = [RawPeer(Identity.generate(), address, SWARM) for _ in range(2)]
        downloads = [Download(peer, ids) for peer in peers]
        try:
            for peer in peers:
                peer.send(peer.hello())
                assert peer.receive(10) is not None
            for greed, peer in zip((40, 14), peers, strict=True):  # both at once: what one got before is no share
                peer.send(peer.frame(Kind.WANT, Want(tuple(map(WantedPart, ids[:greed]))).encode()))
            wait_until(lambda: min(download.take() for download in downloads) >= 800_000, 60, "a share for both")
            received = sum(download.received for download in downloads)
            assert received <= limit * (time.monotonic() - began + LIMITS.upload_burst_s) + MAX_FRAME_BYTES
            one, other = (download.received for download in downloads)
            assert abs(one - other) <= 500_000  # of a socket's worth under way
        finally:
            for peer in peers:
                peer.close()
