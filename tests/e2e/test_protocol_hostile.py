"""A live host under attack over real sockets, while an honest pair goes on."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from subprocess import PIPE

import pytest
import zmq
from structlog.testing import capture_logs

from protocol.credentials.records import Address
from protocol.host import Host
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.wire.envelope import MAX_FRAME_BYTES, Kind, kind_of, seal
from protocol.wire.messages import Goodbye, Ping
from tests.protocol_frames import opened
from tests.protocol_hosts import ROOT, collect, running, written
from tests.protocol_raw import RawPeer, raw_peer
from tests.waiting import wait_until

SWARM = b"a swarm of tests"


class Pair:
    """Two honest hosts; `address` is where the first listens."""

    def __init__(self) -> None:
        self.victim = Host(Identity.generate(), SWARM, "tcp://127.0.0.1:0", [], watch=written())
        address = self.victim.start()
        assert address is not None
        self.address: Address = address
        self.friend = Host(Identity.generate(), SWARM, "tcp://127.0.0.1:0", [address])
        self.friend.start()
        self.sent = 0
        # An item of before the link comes with the first reminder of what is newest, up to two seconds later.
        wait_until(lambda: self.victim.counters().peers == self.friend.counters().peers == 1, 20, "the pair")

    def go_on(self) -> None:
        """Exchange one item each way."""
        self.sent += 1
        body = b"honest %d" % self.sent
        for giver, taker in ((self.victim, self.friend), (self.friend, self.victim)):
            giver.publish(body)
            wait_until(lambda taker=taker: any(i.body == body for i in taker.receive(100)), 20, "an honest item")

    def rejected(self, reason: str) -> int:
        """How often the victim counted `reason`."""
        return self.victim.counters().rejected.get(reason, 0)

    def wait_for(self, reason: str, count: int = 1) -> None:
        """Wait until the victim has counted `reason` so often."""
        wait_until(lambda: self.rejected(reason) >= count, 20, f"{count} x {reason}")

    @property
    def peers(self) -> int:
        """The victim's live peers."""
        return self.victim.counters().peers


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    try:
        made.go_on()
        yield made
        made.go_on()
        assert made.victim.counters().rejected.get("internal", 0) == 0
    finally:
        made.victim.stop()
        made.friend.stop()


POOR = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
from protocol.host import Host
from protocol.identity import Identity
host = Host(Identity.generate(), b"a swarm of tests", "tcp://127.0.0.1:0", [])
print(host.start(), flush=True)
for _ in sys.stdin:
    print(len(os.listdir("/proc/self/fd")), host.counters().rejected.get("too_many_connections", 0), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other addresses of loopback are Linux's")
def test_silent_connections_take_half_of_the_descriptors_at_most() -> None:
    with (
        subprocess.Popen([sys.executable, "-c", POOR], stdin=PIPE, stdout=PIPE, text=True, cwd=ROOT) as poor,
        ExitStack() as open_until_the_end,
    ):
        assert poor.stdin is not None and poor.stdout is not None
        answers = poor.stdout
        address = Address.parse(answers.readline().strip())
        for number in range(280):
            source = f"127.0.0.{2 + number % 2}"
            silent = socket.create_connection(("127.0.0.1", address.endpoint.port), 10, (source, 0))
            open_until_the_end.enter_context(silent)
        friend, _ = open_until_the_end.enter_context(running(address, listen=None))
        wait_until(lambda: friend.counters().peers == 1, 30, "the friend to join")
        print(file=poor.stdin, flush=True)
        descriptors, cut = map(int, answers.readline().split())
        assert descriptors < 400 // 2 and cut > 0
        poor.communicate("")


@contextmanager
def admitted(pair: Pair) -> Iterator[RawPeer]:
    """A raw peer that the victim has let in."""
    with raw_peer(pair.address, SWARM) as peer:
        peer.send(peer.hello())
        assert peer.receive(10), "no answer to a good hello"
        wait_until(lambda: pair.peers == 2, 20)
        yield peer


def flip(frame: bytes, position: int) -> bytes:
    return frame[:position] + bytes([frame[position] ^ 1]) + frame[position + 1 :]


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("malformed", lambda peer: [b""]),
        ("malformed", lambda peer: [os.urandom(50)]),
        ("forged", lambda peer: [os.urandom(5000)]),
        ("malformed", lambda peer: [peer.frame(Kind.ITEM, b"x"), b"a second part"]),
        ("malformed", lambda peer: [peer.frame(Kind.WANT, os.urandom(33))]),
        ("forged", lambda peer: [peer.frame(Kind.ITEM, os.urandom(9))[:-3]]),
        ("forged", lambda peer: [flip(peer.frame(Kind.ITEM, os.urandom(9)), 0)]),
        ("forged", lambda peer: [flip(peer.frame(Kind.ITEM, os.urandom(9)), 120)]),
        ("forged", lambda peer: [flip(peer.frame(Kind.ITEM, os.urandom(9)), 99)]),
        ("oversized", lambda peer: [bytes(MAX_FRAME_BYTES + 1)]),
        ("wrong_swarm", lambda peer: [peer.frame(Kind.ITEM, os.urandom(9), swarm=b"another swarm id")]),
        ("stale", lambda peer: [peer.frame(Kind.ITEM, os.urandom(9), age=2 * 3600)]),
        ("malformed", lambda peer: [seal(peer.identity, peer.swarm, Kind.PING, 1, 1, Ping(1).encode())]),
    ],
)
def test_each_kind_of_bad_frame_is_counted_by_its_reason(
    pair: Pair, reason: str, make: Callable[[RawPeer], list[bytes]]
) -> None:
    with admitted(pair) as peer:
        for count in range(1, 4):
            parts = make(peer)
            if len(parts) == 1 and kind_of(parts[0]) == Kind.ITEM:
                peer.give(*parts)
            else:
                peer.send(*parts)
            pair.wait_for(reason, count)
        pair.go_on()
        assert pair.rejected(reason) == 3
    assert [item.body for item in pair.victim.receive(100)] == []


def test_a_replayed_item_is_delivered_once_and_counted(pair: Pair) -> None:
    with admitted(pair) as peer:
        frame = peer.frame(Kind.ITEM, b"once")
        peer.give(frame)
        for _ in range(4):
            peer.send(frame)
        pair.wait_for("unasked_item", 4)
        assert [item.body for item in pair.victim.receive(100)] == [b"once"]


def test_a_persistent_offender_is_refused_and_its_score_survives_a_reconnect(pair: Pair) -> None:
    with admitted(pair) as peer:
        wait_until(lambda: not peer.try_send(os.urandom(50)), 20, "the victim to hang up")
        assert pair.rejected("graylisted") > 0
        wait_until(lambda: pair.peers == 1, 20, "the offender's exclusion")
    before = pair.rejected("graylisted")
    with raw_peer(pair.address, SWARM, peer.identity) as again:
        pair.wait_for("graylisted", before + 1)
        assert not again.try_send(again.hello()), "it got through the handshake"
    assert pair.peers == 1


def test_who_is_refused_for_what_it_did_is_told_and_so_are_both_operators(pair: Pair) -> None:
    with capture_logs() as lines:
        with admitted(pair) as peer:
            for _ in range(6):
                peer.send(flip(peer.hello(), 40))
            pair.wait_for("forged", 6)

            def goodbye() -> str:
                peer.try_send(peer.frame(Kind.PING, Ping(1).encode()))
                envelope = opened(peer.receive(0.02) or peer.hello())
                return Goodbye.decode(envelope.body).reason if envelope.kind == Kind.GOODBYE else ""

            assert wait_until(goodbye, 20) == "graylisted"
        wait_until(lambda: any(line.get("who") == peer.identity.node_id for line in lines), 20, "the victim's line")
        (ours,) = (line for line in lines if line.get("who") == peer.identity.node_id)
        assert ours["most_of_all"] == "forged" and ours["log_level"] == "warning"
        with running(pair.address, identity=peer.identity, watch=written()) as (offender, _):
            wait_until(lambda: offender.refusal == "graylisted", 20)
            where = str(pair.address.endpoint)
            wait_until(lambda: any(line.get("by") == where for line in lines), 20, "the offender's line")


def test_a_client_without_curve_gets_nothing(pair: Pair) -> None:
    with raw_peer(pair.address, SWARM, curve=False) as peer:
        # Both ends see that they speak differently: whichever hangs up first decides what it is called here.
        failures = ("handshake_malformed", "handshake_unfinished")
        wait_until(lambda: any(map(pair.rejected, failures)), 20, f"one of {failures}")
        pair.go_on()
        assert peer.receive(0.5) is None
    assert pair.peers == 1


@pytest.mark.parametrize("with_hello_of", ["nobody", "another node"])
def test_a_client_without_a_record_of_its_own_gets_nothing(pair: Pair, with_hello_of: str) -> None:
    with raw_peer(pair.address, SWARM) as peer:
        if with_hello_of == "another node":
            peer.send(peer.hello(of=Identity.generate()))
            pair.wait_for("impostor")
        peer.send(peer.frame(Kind.ITEM, b"let me in"))
        pair.wait_for("no_hello")
        pair.go_on()
        assert peer.receive(0.5) is None
    assert pair.peers == 1
    assert pair.victim.receive(100) == []


def test_a_record_that_was_overheard_does_not_let_its_thief_in(pair: Pair) -> None:
    owner, thief = Identity.generate(), Identity.generate()
    with raw_peer(pair.address, SWARM, owner) as honest:
        overheard = honest.hello()
        honest.send(overheard)
        assert honest.receive(10)
    with raw_peer(pair.address, SWARM, thief) as peer:
        peer.send(overheard)
        pair.wait_for("impostor")
        assert peer.receive(0.5) is None


def test_garbage_on_the_bare_port_disturbs_nobody(pair: Pair) -> None:
    endpoint = pair.address.endpoint
    for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"\xff" * 64):
        with socket.create_connection((endpoint.host, endpoint.port), timeout=5) as connection:
            connection.sendall(garbage)
    pair.go_on()
    assert pair.peers == 1


def test_a_frame_beyond_what_libzmq_takes_ends_its_connection_only(pair: Pair) -> None:
    with admitted(pair) as peer:
        peer.send(bytes(8 << 20))
        pair.wait_for("framing")
        pair.go_on()
        assert pair.friend.counters().peers >= 1


def test_strangers_at_a_peers_address_that_talk_on_are_cut_and_its_link_stays() -> None:
    # What a peer says costs more than a stranger's message does, and no stranger is cut before for saying no hello.
    limits = Limits(hello_s=600.0, waiting_bytes=0)
    with running(limits=limits) as (victim, address), running(address) as (friend, _), ExitStack() as stack:
        wait_until(lambda: victim.counters().peers == 1, 20)
        strangers = [stack.enter_context(raw_peer(address, SWARM)) for _ in range(8)]

        def talk() -> list[bool]:
            """Let each stranger talk; return which frames could be sent."""
            frame = strangers[0].frame(Kind.PING, Ping(1).encode())
            return [stranger.try_send(frame) for stranger in strangers for _ in range(20)]

        def refused() -> int:
            return victim.counters().rejected.get("graylisted", 0)

        wait_until(lambda: talk() and refused() >= len(strangers), 60, "each stranger to be refused")
        wait_until(lambda: not any(talk()), 60, "strangers to be cut")
        assert victim.counters().peers == 1
        friend.publish(b"still here")
        collect(victim, 1)


def test_bad_keys_of_one_address_make_its_new_connections_wait_and_its_live_ones_stay() -> None:
    limits = Limits(prefix_handshakes_burst=40.0, prefix_handshakes_per_second=8.0)  # 12 points cost 60
    with running(limits=limits) as (victim, address), running(address) as (friend, _):
        wait_until(lambda: victim.counters().peers == 1, 20)
        with raw_peer(address, SWARM) as bad:
            for _ in range(6):  # two points each
                bad.send(b"garbage")
            wait_until(lambda: victim.counters().rejected.get("malformed", 0) == 6, 20)
            with running(address) as (late, _):
                wait_until(lambda: victim.counters().rejected.get("handshake_flood", 0) > 0, 20)
                wait_until(lambda: late.counters().peers > 0, 20, "the wait to end")
        assert friend.counters().peers >= 1 and victim.counters().rejected.get("graylisted", 0) == 0


def test_strangers_of_one_address_bring_few_bytes_that_nobody_asked_for(pair: Pair) -> None:
    """They brought 700 MB in the first minute, at no cost."""
    before, sent = pair.victim.counters().bytes_received, 0
    while not pair.rejected("handshake_flood"):
        with raw_peer(pair.address, SWARM) as peer:
            with suppress(zmq.Again):  # its network is refused by now
                peer.send(peer.hello())
                peer.receive(5)
            while peer.try_send(peer.frame(Kind.ITEM, os.urandom(60_000))) and sent < 1 << 30:
                sent += 60_000
    came = pair.victim.counters().bytes_received - before
    print(f"{sent / 1e6:.0f} MB sent, {came / 1e6:.0f} MB read")
    assert came < 60_000_000
