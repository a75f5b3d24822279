"""The network in memory: what it does to frames and connections, and when it says so."""

import gc
import random

from protocol.credentials.records import Address, Endpoint
from protocol.events import Arrived, Closed, Link, Opened
from protocol.transport.memory import KEEPALIVE_S, QUEUE_BYTES, Conditions, MemoryNetwork, MemoryTransport, NetworkCut

A, B = b"A" * 32, b"B" * 32
TO_B, FROM_A = Link(B, dialled=True), Link(A, dialled=False)
SLOW = 0.1  # more than any frame takes


class Pair:
    """Node A, which dialled B."""

    def __init__(self, conditions: Conditions | None = None) -> None:
        self.seen: list[bytes] = []
        self.network = MemoryNetwork(conditions or Conditions(), random.Random(1), self.seen.append)
        self.a = MemoryTransport(self.network, A, None)
        self.b = MemoryTransport(self.network, B, "tcp://b.invalid:1")
        self.address = Address(Endpoint("b.invalid", 1), B)
        self.a.dial(self.address)
        self.pass_time(SLOW)
        assert self.a.poll(0) == [Opened(TO_B)]

    def pass_time(self, seconds: float) -> None:
        until = self.network.now + seconds
        while self.network.next_time() <= until:
            self.network.now = self.network.next_time()
            self.network.deliver_due()
        self.network.now = until


def test_frames_keep_their_order_and_a_hang_up_comes_after_them() -> None:
    pair = Pair()
    frames = [b"%d" % number for number in range(50)]
    assert all(pair.a.send(TO_B, frame) for frame in frames)
    pair.a.hang_up(TO_B)
    assert not pair.a.send(TO_B, b"too late")
    pair.pass_time(SLOW)
    assert pair.b.poll(0) == [*(Arrived(FROM_A, frame) for frame in frames), Closed(FROM_A)]
    assert pair.seen == frames


def test_what_was_on_its_way_to_a_closed_connection_is_lost() -> None:
    pair = Pair()
    pair.a.send(TO_B, b"hello")
    pair.b.hang_up(FROM_A)
    pair.pass_time(SLOW)
    assert pair.b.poll(0) == [] and pair.a.poll(0) == [Closed(TO_B)]


def test_a_cut_stops_one_way_and_both_ends_close_in_time() -> None:
    pair = Pair()
    pair.network.split(NetworkCut({A: 1}, frozenset({(1, 0)})))
    assert pair.a.send(TO_B, b"vanishes") and pair.b.send(FROM_A, b"arrives")
    pair.pass_time(KEEPALIVE_S - 1)
    assert pair.b.poll(0) == [] and pair.a.poll(0) == [Arrived(TO_B, b"arrives")]
    pair.pass_time(1 + SLOW)
    assert pair.b.poll(0) == [Closed(FROM_A)] and pair.a.poll(0) == [Closed(TO_B)]
    pair.a.dial(pair.address)
    pair.pass_time(KEEPALIVE_S)
    assert pair.a.poll(0) == []
    pair.a.hang_up(TO_B)
    pair.network.heal()
    pair.a.dial(pair.address)
    pair.pass_time(SLOW)
    assert pair.a.poll(0) == [Opened(TO_B)]


def test_a_cut_that_heals_in_time_closes_nothing() -> None:
    pair = Pair()
    pair.network.split(NetworkCut({A: 1}, frozenset({(1, 0), (0, 1)})))
    pair.pass_time(KEEPALIVE_S - 1)
    pair.network.heal()
    pair.pass_time(KEEPALIVE_S)
    assert pair.a.poll(0) == [] and pair.b.poll(0) == []


def test_a_paused_node_takes_a_queue_full_and_reads_it_when_it_goes_on() -> None:
    pair = Pair()
    pair.b.pause(acknowledges=True)
    frame = bytes(QUEUE_BYTES // 8)
    assert [pair.a.send(TO_B, frame) for _ in range(9)] == [True] * 8 + [False]
    pair.pass_time(2 * KEEPALIVE_S)
    assert pair.a.poll(0) == []
    pair.b.resume()
    assert pair.b.poll(0) == [Arrived(FROM_A, frame)] * 8
    assert pair.a.send(TO_B, b"again")


def test_a_stopped_process_loses_its_connections_in_time() -> None:
    pair = Pair()
    pair.b.pause(acknowledges=False)
    pair.pass_time(KEEPALIVE_S + SLOW)
    assert pair.a.poll(0) == [Closed(TO_B)]
    pair.b.resume()
    assert pair.b.poll(0) == [Closed(FROM_A)]


def test_a_killed_node_is_missed_at_once_and_a_vanished_one_in_time() -> None:
    killed, vanished = Pair(), Pair()
    killed.b.close()
    vanished.b.vanish()
    for pair in (killed, vanished):
        pair.pass_time(SLOW)
    assert killed.a.poll(0) == [Closed(TO_B)] and vanished.a.poll(0) == []
    assert vanished.a.send(TO_B, b"into the void")
    vanished.pass_time(KEEPALIVE_S + SLOW)
    assert vanished.a.poll(0) == [Closed(TO_B)]
    for pair in (killed, vanished):
        pair.a.dial(pair.address)
        pair.pass_time(KEEPALIVE_S)
    assert killed.a.poll(0) == [Closed(TO_B)] and vanished.a.poll(0) == []  # refused, and no answer


def test_who_comes_back_replaces_its_older_connection() -> None:
    pair = Pair()
    pair.a.vanish()
    again = MemoryTransport(pair.network, A, None)
    again.dial(pair.address)
    pair.pass_time(SLOW)
    again.send(TO_B, b"here again")
    pair.pass_time(2 * KEEPALIVE_S)
    assert pair.b.poll(0) == [Arrived(FROM_A, b"here again")] and pair.b.links == 1


def test_connections_that_ended_are_freed_without_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()  # as the command does
    try:
        pair = Pair()
        before = _ends()
        for ends in (lambda: pair.a.hang_up(TO_B), lambda: pair.b.hang_up(FROM_A), lambda: _both_hang_up(pair)):
            ends()
            pair.pass_time(SLOW)
            pair.a.dial(pair.address)
            pair.pass_time(SLOW)
        assert pair.a.links == pair.b.links == 1 and _ends() == before
    finally:
        gc.enable()


def _both_hang_up(pair: Pair) -> None:
    pair.a.hang_up(TO_B)
    pair.b.hang_up(FROM_A)


def _ends() -> int:
    return sum(type(thing).__name__ == "_End" for thing in gc.get_objects())


def test_another_region_is_farther_away() -> None:
    pair = Pair(Conditions(0.01, 0.02, regions=1, far_delay=1.0))
    pair.a.send(TO_B, b"near")
    pair.pass_time(0.02)
    assert pair.b.poll(0) == [Arrived(FROM_A, b"near")]
    pair.b.region = 1
    pair.a.send(TO_B, b"far")
    pair.pass_time(1.0)
    assert pair.b.poll(0) == []
    pair.pass_time(0.02)
    assert pair.b.poll(0) == [Arrived(FROM_A, b"far")]


def test_a_line_carries_so_many_bytes_a_second_at_either_end_whatever_the_connection() -> None:
    pair = Pair(Conditions(0.0, 0.0, line=1000.0))
    other = MemoryTransport(pair.network, b"C" * 32, None)
    other.dial(pair.address)
    pair.pass_time(SLOW)
    for _ in range(2):
        assert pair.a.send(TO_B, bytes(500)) and other.send(TO_B, bytes(500))
    arrived = []
    for tenth in range(1, 31):
        pair.pass_time(0.1)
        arrived += [tenth] * sum(isinstance(event, Arrived) for event in pair.b.poll(0))
    # Half a second in the sender's line; then two senders' frames, one after the other, half a second each in B's.
    assert arrived == [10, 15, 20, 25]


def test_what_waits_for_the_line_becomes_a_frame_when_that_is_free_and_what_is_urgent_overtakes() -> None:
    pair = Pair(Conditions(0.0, 0.0, line=1000.0))
    waiting, made = [b"0", b"1", b"2", b"3"], list[bytes]()

    def make(link: Link) -> bytes:
        made.append(waiting.pop(0) if waiting else b"")
        return made[-1].ljust(100) if made[-1] else b""

    pair.a.serve(make)
    pair.a.fill(TO_B)
    assert made == [b"0"]
    assert pair.a.send(TO_B, b"control")
    pair.pass_time(0.15)
    assert made == [b"0", b"1"]
    pair.pass_time(0.6)
    frames = [event.frame.strip() for event in pair.b.poll(0) if isinstance(event, Arrived)]
    assert frames == [b"0", b"control", b"1", b"2", b"3"] and made == [b"0", b"1", b"2", b"3", b""]


def test_a_hang_up_drops_what_waits_and_not_what_is_on_its_way() -> None:
    pair = Pair(Conditions(0.0, 0.0, line=1000.0))
    assert pair.a.send(TO_B, bytes(500)) and pair.a.send(TO_B, bytes(500))
    pair.a.hang_up(TO_B)
    pair.pass_time(2)
    assert [type(event) for event in pair.b.poll(0)] == [Arrived, Closed]
