"""How much processor time and memory a network may cost a node, by the kind of frame.

    python -m tests.frame_costs [--seconds 5] [--only NAME ...]

The node is a child process. A raw peer sends the dearest frames of one kind, as many as nine tenths of its network's
quota pay for (`protocol.limits.quotas`). A row is a JSON object: the node's processor seconds, bytes sent and bytes
taken a second, how much its memory grew in MiB, and the sender's score at the end. `links` is 0 where the sender was
refused. Then the figures are spread over a time in which little came.
"""

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import structlog

from protocol.credentials.records import Address, Endpoint
from protocol.host import Host
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.limits.quotas import price
from protocol.limits.timing import WAN
from protocol.wire.envelope import CHUNK_BYTES, ItemId, Kind, control_frame, read_control
from protocol.wire.messages import (
    MAX_IDS,
    MAX_TOPICS,
    AskManifest,
    AskRevocations,
    Body,
    Busy,
    Cancel,
    Digest,
    DontHave,
    Entry,
    Have,
    Interest,
    ItemChunk,
    Ping,
    Pong,
    Want,
    WantedPart,
)
from tests.protocol_raw import RawPeer, raw_peer

SWARM = b"frame cost bench"
ITEM_BYTES = 5_000_000  # that the node has published
NOBODY = Address(Endpoint("127.0.0.1", 9), Identity.generate().curve_key)
SHARE = 0.9  # of a network's quota
SMALL_BYTES, LARGE_BYTES = 200, 60_000

Frames = Iterator[bytes]


def node() -> None:
    """Run a node, and answer each line with what it has used so far."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    limits = Limits(network_burst_s=0.1)  # or it lasts for longer than the measurement
    host = Host(Identity.generate(), SWARM, "tcp://127.0.0.1:0", (), limits, timing=WAN)
    print(host.start(), flush=True)
    host.publish(os.urandom(ITEM_BYTES))
    process = psutil.Process()
    for _ in sys.stdin:
        used, counters = resource.getrusage(resource.RUSAGE_SELF), host.counters()
        answer = {
            "cpu": used.ru_utime + used.ru_stime,
            "memory": process.memory_info().rss / (1 << 20),
            "sent": counters.bytes_sent,
            "received": counters.bytes_received,
            "links": counters.peers,
            "score": min((peer.score for peer in host.peers()), default=None),
            "rejected": dict(counters.rejected),
        }
        host.receive(1000, 0.0)
        print(json.dumps(answer), flush=True)
    host.stop()


def message(body: Body) -> bytes:
    """Return the frame of a message."""
    return control_frame(body.kind, body.encode())


def frames_of(peer: RawPeer, item: ItemId) -> dict[str, Frames]:
    """Return, for each kind of frame, those that the peer sends."""
    rng = random.Random(1)

    def ids(count: int) -> list[ItemId]:
        return [ItemId(rng.randbytes(32)) for _ in range(count)]

    def again(body: Body) -> Frames:
        return itertools.repeat(message(body))

    def fresh(make: Callable[[], Body]) -> Frames:
        return (message(make()) for _ in itertools.count())

    def items(size: int) -> Frames:
        return (peer.frame(Kind.ITEM, rng.randbytes(size)) for _ in itertools.count())

    chunks = tuple(range(16))
    unknown = ids(MAX_IDS)
    return {
        "nothing": iter(()),
        "PING": again(Ping(1)),
        "PONG that nobody waits for": again(Pong(1)),
        "HAVE, 512 new items": fresh(lambda: Have(tuple(Entry(name, 1000) for name in ids(MAX_IDS)))),
        "HAVE, one new item": fresh(lambda: Have((Entry(ids(1)[0], 1000),))),
        "HAVE, the same 512": again(Have(tuple(Entry(name, 1000) for name in unknown))),
        "WANT, 512 unknown": again(Want(tuple(map(WantedPart, unknown)))),
        "WANT, 512 x 16 unknown chunks": again(Want(tuple(WantedPart(name, chunks) for name in unknown))),
        "WANT, the outline again and again": again(Want((WantedPart(item),))),
        "WANT, 16 chunks again and again": again(Want((WantedPart(item, chunks),))),
        "CANCEL, 512 x 16 unknown chunks": again(Cancel(tuple(WantedPart(name, chunks) for name in unknown))),
        "DONT_HAVE, 512 unknown": again(DontHave(tuple(unknown))),
        "BUSY, 512 unknown": again(Busy(tuple(unknown))),
        "INTEREST, 64 new topics": fresh(lambda: Interest(frozenset(rng.randbytes(8) for _ in range(MAX_TOPICS)))),
        "DIGEST of nothing": again(Digest(())),
        "ASK_MANIFEST": again(AskManifest()),
        "ASK_REVOCATIONS": again(AskRevocations(0)),
        "CHUNK that nobody asked for": fresh(lambda: ItemChunk(unknown[0], 0, bytes(CHUNK_BYTES), bytes(32))),
        f"ITEM of {SMALL_BYTES} bytes that nobody asked for": items(SMALL_BYTES),
        f"ITEM of {LARGE_BYTES} bytes that nobody asked for": items(LARGE_BYTES),
        "HELLO": (peer.hello() for _ in itertools.count()),
        "a kind of a later version": itertools.repeat(control_frame(99, b"")),
        "noise of 100 bytes": (rng.randbytes(100) for _ in itertools.count()),
    }


def measure(name: str, seconds: float) -> dict[str, Any]:
    """Send frames of one kind to a new node for so long; return what it used."""
    command = [sys.executable, "-m", "tests.frame_costs", "--node"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        address = Address.parse(child.stdout.readline().strip())

        def used() -> dict[str, Any]:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            answer: dict[str, Any] = json.loads(child.stdout.readline())
            return answer

        try:
            with raw_peer(address, SWARM) as peer:
                peer.send(peer.hello())
                frames = frames_of(peer, first_item(peer))[name]
                before = used()
                sizes = send(peer, frames, seconds)
                after = used()
        finally:
            child.kill()
    return {
        "bench": "frame_costs",
        "frame": name,
        "frames_per_s": round(len(sizes) / seconds, 1),
        "kB_per_s": round(sum(sizes) / seconds / 1000, 1),
        "cores": round((after["cpu"] - before["cpu"]) / seconds, 3),
        "MB_out_per_s": round((after["sent"] - before["sent"]) / seconds / 1e6, 2),
        "MB_in_per_s": round((after["received"] - before["received"]) / seconds / 1e6, 2),
        "MiB_grown": round(after["memory"] - before["memory"], 1),
        "links": after["links"],
        "score": after["score"],
        "rejected": after["rejected"],
    }


def first_item(peer: RawPeer) -> ItemId:
    """Return the id of the item that the node announces."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        frame = peer.receive(1)
        control = read_control(frame) if frame else None
        if control is not None and control.kind == Kind.HAVE:
            return Have.decode(control.body).items[0].id
    raise TimeoutError("the node announced nothing within 20 s")


def send(peer: RawPeer, frames: Frames, seconds: float) -> list[int]:
    """Send as many frames as are paid for, read what comes, answer pings; return the sizes of those that were taken."""
    sizes: list[int] = []
    began = time.monotonic()
    seconds_left, at = 0.0, began
    waiting = next(frames, None)
    while (now := time.monotonic()) < began + seconds:
        seconds_left += (now - at) * SHARE * Limits().network_cores
        at = now
        while waiting is not None and seconds_left >= price(waiting):
            if not peer.try_send(waiting):
                break
            seconds_left -= price(waiting)
            sizes.append(len(waiting))
            waiting = next(frames, None)
        while (frame := peer.receive(0)) is not None:
            control = read_control(frame)
            if control is not None and control.kind == Kind.PING:
                peer.try_send(control_frame(Kind.PONG, control.body))
        time.sleep(0.002)
    return sizes


def main() -> None:
    """See the module's comment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--only", action="append", default=[], help="only frames whose name begins so")
    parser.add_argument("--node", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.node:
        node()
        return
    with raw_peer(NOBODY, SWARM) as peer:
        names = list(frames_of(peer, ItemId(bytes(32))))
    for name in names:
        if not options.only or any(name.startswith(start) for start in options.only):
            print(json.dumps(measure(name, options.seconds)), flush=True)


if __name__ == "__main__":
    main()
