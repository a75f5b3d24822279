"""Items of many chunks on real sockets: a holder dies in the middle, and small messages are not kept waiting."""

import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard

from protocol.credentials.records import Address
from protocol.limits.limits import Limits
from protocol.wire.compression import ZSTD
from protocol.wire.envelope import CHUNK_BYTES, Kind
from tests.protocol_hosts import ROOT, SWARM, collect, running
from tests.protocol_raw import raw_peer
from tests.waiting import wait_until

SIZE = 8 << 20
DIES_AFTER = 1 << 20  # bytes that the child has sent: eight of the item's chunks
CHILD = f"""
import os, signal, sys, time
from pathlib import Path
from protocol.core import Core
from protocol.credentials.records import Address
from protocol.host import Host
from protocol.identity import Identity
make_frame = Core.make_frame
def die_in_the_middle(core, *what):
    frame = make_frame(core, *what)
    if core.bytes_sent > {DIES_AFTER}:
        os.kill(os.getpid(), signal.SIGKILL)
    return frame
Core.make_frame = die_in_the_middle
folder = Path(sys.argv[1])
host = Host(Identity.generate(), {SWARM!r}, "tcp://127.0.0.1:0", [Address.parse(sys.argv[2])])
(folder / "address").write_text(str(host.start()))
while not host.receive(1, timeout=60):
    pass
(folder / "holds").touch()
time.sleep(600)
"""


@pytest.mark.slow
def test_a_large_item_comes_whole_although_one_of_its_holders_is_killed_in_the_middle(tmp_path: Path) -> None:
    body = os.urandom(SIZE)
    slow = Limits(upload_bytes_per_second=2 << 20)  # else it may give all before the child says what it holds
    with running(limits=slow) as (maker, address):
        command = [sys.executable, "-c", CHILD, str(tmp_path), str(address)]
        with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}) as child:
            try:
                wait_until(lambda: maker.counters().peers == 1, 30, "the child")
                maker.publish(body)
                wait_until((tmp_path / "holds").exists, 60, "the child to hold the item")
                relay = Address.parse((tmp_path / "address").read_text())
                with running(relay, address) as (receiver, _):
                    (item,) = collect(receiver, 1, timeout=60)
                    assert item.body == body
                    assert child.wait(timeout=1) == -signal.SIGKILL
                    assert receiver.counters().bytes_received < SIZE + DIES_AFTER
                    assert receiver.counters().rejected == {}
            finally:
                child.kill()


def test_thirty_two_long_completions_get_through_in_text() -> None:
    rng = random.Random(1)
    words = [bytes(rng.choices(b"abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    body = b"".join(b" ".join(rng.choices(words, k=11_000)) for _ in range(32))
    assert len(body) > 2 << 20
    with running() as (one, address), running(address) as (two, _):
        wait_until(lambda: two.counters().peers == 1, 20)
        one.publish(body)
        (item,) = collect(two, 1)
        assert item.body == body
        assert two.counters().bytes_received < 0.6 * len(body)


def test_small_items_overtake_a_large_one() -> None:
    limits = Limits(upload_bytes_per_second=4e6)
    with running(limits=limits) as (one, address), running(address) as (two, _):
        wait_until(lambda: two.counters().peers == 1, 20)
        large = one.publish(os.urandom(14 << 20))
        wait_until(lambda: two.counters().bytes_received > 4 * CHUNK_BYTES, 20, "the first chunks")
        small = [one.publish(b"%d" % number) for number in range(20)]
        *first, last = [item.id for item in collect(two, 21, timeout=60)]
        assert set(first) == set(small) and last == large


def test_what_is_larger_than_the_limit_is_neither_published_nor_fetched() -> None:
    with (
        running(limits=Limits(max_item_bytes=1 << 20)) as (strict, address),
        running(address) as (other, _),
    ):
        wait_until(lambda: other.counters().peers == 1, 20)
        with pytest.raises(ValueError, match="at most 1048576 bytes"):
            strict.publish(bytes((1 << 20) + 1))
        other.publish(os.urandom((1 << 20) + 1000))
        other.publish(os.urandom(1 << 20))
        other.publish(bytes(8 << 20))  # a bomb of 300 bytes
        assert [len(item.body) for item in collect(strict, 1)] == [1 << 20]
        wait_until(lambda: strict.receive(10) or strict.counters().rejected == {"oversized": 1}, 20)
        assert strict.receive(10) == []


def test_what_does_not_unpack_takes_as_much_of_a_receive_as_the_largest_that_does() -> None:
    packed = zstandard.ZstdCompressor(write_content_size=True, write_checksum=True).compress(bytes(16 << 20))
    with running() as (victim, address), raw_peer(address, SWARM) as peer:
        peer.send(peer.hello())
        for number in range(1, 13):
            peer.give(peer.frame(Kind.ITEM, packed[:-1] + bytes([packed[-1] ^ number]), form=ZSTD))
        wait_until(lambda: victim.counters().items_received == 12, 20)
        for looked_at in (4, 8, 12):
            assert victim.receive(100) == []
            wait_until(lambda count=looked_at: victim.counters().rejected.get("malformed", 0) >= count, 20)
            assert victim.counters().rejected == {"malformed": looked_at}


def test_what_does_not_unpack_does_not_end_a_wait_for_what_does() -> None:
    with running() as (victim, address), raw_peer(address, SWARM) as peer, ThreadPoolExecutor(1) as pool:
        peer.send(peer.hello())
        waiting = pool.submit(victim.receive, 10, 60.0)
        peer.give(peer.frame(Kind.ITEM, b"nothing packed", form=ZSTD))
        wait_until(lambda: victim.counters().rejected == {"malformed": 1}, 20)
        peer.give(peer.frame(Kind.ITEM, b"good"))
        assert [item.body for item in waiting.result(20)] == [b"good"]
