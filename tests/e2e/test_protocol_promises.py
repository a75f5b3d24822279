"""A peer that announces and never delivers, against a live node: it is refused, and honest peers do not notice."""

import hashlib
import os
import time
from dataclasses import replace

import pytest

from protocol.host import Host
from protocol.identity import Identity
from protocol.limits.timing import LOCAL
from protocol.wire.envelope import ItemId, Kind
from protocol.wire.messages import Entry, Have
from tests.protocol_raw import RawPeer
from tests.waiting import wait_until

SWARM = b"a swarm of tests"
HASTY = replace(LOCAL, pull_patience=0.2, suspicion=3.0)  # who is silent is found out within three seconds


def promises(batch: int) -> bytes:
    """An announcement of ten items that nobody has."""
    names = (hashlib.sha256(b"%d %d" % (batch, number)).digest() for number in range(10))
    return Have(tuple(Entry(ItemId(name), 1000) for name in names)).encode()


def test_a_peer_that_sends_what_nobody_asked_for_is_refused_and_does_not_keep_others_items_away() -> None:
    host = Host(Identity.generate(), SWARM, "tcp://127.0.0.1:0", [], timing=LOCAL)
    address = host.start()
    host.subscribe(None, 4.0)
    honest = Host(Identity.generate(), SWARM, None, [address], timing=LOCAL)
    honest.start()
    pusher = RawPeer(Identity.generate(), address, SWARM)
    bodies: list[bytes] = []

    def push() -> None:
        pusher.try_send(pusher.frame(Kind.ITEM, b"unasked" + os.urandom(10_000)))
        while pusher.receive(0):
            pass
        bodies.extend(item.body for item in host.receive(1000))

    try:
        pusher.send(pusher.hello())
        wait_until(lambda: host.counters().peers == 2, 20, "both")
        published = {os.urandom(100_000) for _ in range(10)}
        for body in published:
            honest.publish(body)
        wait_until(lambda: push() or len(bodies) == 10, 40, "the honest peer's items")
        wait_until(lambda: push() or host.counters().rejected.get("graylisted"), 20, "the other's refusal")
        assert set(bodies) == published and host.counters().rejected["unasked_item"]
        assert honest.counters().rejected == {}
    finally:
        pusher.close()
        honest.stop()
        host.stop()


@pytest.mark.slow
def test_promises_that_are_broken_get_a_peer_refused_while_an_honest_one_is_heard() -> None:
    host = Host(Identity.generate(), SWARM, "tcp://127.0.0.1:0", [], timing=HASTY)
    address = host.start()
    honest = Host(Identity.generate(), SWARM, None, [address], timing=HASTY)
    honest.start()
    liar = RawPeer(Identity.generate(), address, SWARM)
    published, heard, batch = 0, 0, 0
    try:
        wait_until(lambda: host.counters().peers == 1, 20, "the honest peer")
        liar.send(liar.hello())
        wait_until(lambda: host.counters().peers == 2, 20, "the liar")
        deadline = time.monotonic() + 40
        while not host.counters().rejected.get("graylisted"):
            assert time.monotonic() < deadline, host.counters()
            liar.try_send(liar.frame(Kind.HAVE, promises(batch)))
            batch += 1
            honest.publish(b"%d" % published)
            published += 1
            heard += len(host.receive(100))
            while liar.receive(0.1):
                pass
        wait_until(lambda: host.counters().peers == 1, 20, "the liar's absence")

        def all_heard() -> bool:
            nonlocal heard
            heard += len(host.receive(100))
            return heard == published

        wait_until(all_heard, 20, "what the honest peer said")
        assert host.counters().rejected["unanswered"] >= 2
        assert honest.counters().rejected == {}
    finally:
        liar.close()
        honest.stop()
        host.stop()
