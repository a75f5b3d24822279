"""A child process for the tests that attacks a node in the ways of a hostile stranger, at a rate that it is told.

python -m tests.protocol_attacks ADDRESS SWARM_HEX

It reads lines on its standard input: "NAME" begins the attack of that name, "go" and "stop"
let it act or hold still, and it keeps its connections meanwhile; "count" is answered with how often
it has acted. An attack is a generator: each step between two `yield`s is one act, and `ATTACKS` says
how many there are a second. An attacker that was thrown out comes back with a new key.
"""

import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import zmq

from protocol.credentials.records import RENEWAL_BITS, Address, make_record
from protocol.identity import Identity
from protocol.wire.envelope import ItemId, Kind, claimed_id, read_control, seal
from protocol.wire.messages import MAX_IDS, Entry, Have, Peers, Ping, Want, WantedPart
from tests.protocol_frames import opened
from tests.protocol_raw import RawPeer
from tests.withholding import Withholding

Steps = Iterator[None]
CURVE_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
Attack = Callable[["Target"], Steps]


class Target:
    """Whom to attack."""

    def __init__(self, address: Address, swarm: bytes) -> None:
        self.address = address
        self.swarm = swarm
        self.context = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, 4096)
        self._peers = 0

    def stranger(self, identity: Identity | None = None, address: Address | None = None, source: str = "") -> RawPeer:
        """Dial, and say nothing."""
        identity = identity or Identity.generate()
        return RawPeer(identity, address or self.address, self.swarm, source=source, context=self.context)

    def peer(self, through: Callable[[str], Address] | None = None) -> RawPeer:
        """Dial, say a good hello, and wait for one in answer: who finds no room is told so, and tries again.

        From another address of this machine each time, a network of its own: that of an offender is soon refused.
        `through` starts a relay that dials from there in our stead, for one connection.
        """
        while True:
            self._peers += 1
            source = f"127.1.{self._peers // 250 % 250}.{1 + self._peers % 250}"
            peer = self.stranger(address=through(source)) if through else self.stranger(source=source)
            with suppress(zmq.Again):  # refused all the same
                peer.send(peer.hello())
                answer = peer.receive(3)
                if answer and opened(answer).kind == Kind.HELLO:
                    return peer
            peer.close()

    def tcp(self) -> socket.socket:
        """Open a bare TCP connection."""
        return socket.create_connection((self.address.endpoint.host, self.address.endpoint.port), timeout=5)


def repeat(make: Callable[[RawPeer], list[bytes]]) -> Attack:
    """Say what `make` returns, again and again."""

    def attack(target: Target) -> Steps:
        peer = target.peer()
        while True:
            while peer.receive(0):
                pass
            if not peer.try_send(*make(peer)):
                peer.close()
                peer = target.peer()
            yield

    return attack


def flip(frame: bytes, position: int) -> bytes:
    return frame[:position] + bytes([frame[position] ^ 1]) + frame[position + 1 :]


def give(make: Callable[[RawPeer], bytes]) -> Attack:
    """Announce the items that `make` returns, one an act, and send them when they are asked for."""

    def attack(target: Target) -> Steps:
        peer, made = target.peer(), dict[bytes, bytes]()
        while True:
            frame = make(peer)
            made[claimed_id(frame)] = frame
            announcement = Have((Entry(claimed_id(frame), len(frame)),)).encode()
            is_there = peer.try_send(peer.frame(Kind.HAVE, announcement))
            while is_there and (heard := peer.receive(0)):
                said = read_control(heard)
                for part in Want.decode(said.body).parts if said is not None and said.kind == Kind.WANT else ():
                    is_there = is_there and peer.try_send(made.pop(part.id, frame))
            if not is_there:
                peer.close()
                peer = target.peer()
            yield

    return attack


def false_record(peer: RawPeer) -> list[bytes]:
    record = make_record(Identity.generate(), peer.swarm, (), 1, "false", int((time.time() + 3600) * 1000))
    return [peer.frame(Kind.PEERS, Peers((flip(record.encoded, 40),)).encode())]


def promise(peer: RawPeer) -> list[bytes]:
    entries = tuple(Entry(os.urandom(32), 10_000) for _ in range(32))
    return [peer.frame(Kind.HAVE, Have(entries).encode())]


REPEATED = Have(tuple(Entry(ItemId(bytes([number]) * 32), 10_000) for number in range(32))).encode()


def speak(dialled: list[RawPeer], say: Callable[[RawPeer], bytes]) -> None:
    """Let the last but one speak, whose handshake is over by now unless it was refused."""
    if len(dialled) > 1:
        dialled[-2].try_send(say(dialled[-2]))


def one_key_from_many_addresses(target: Target) -> Steps:
    identity, kept = Identity.generate(), []
    while True:
        for host in range(2, 250):
            kept.append(target.stranger(identity, source=f"127.0.0.{host}"))
            speak(kept, lambda peer: peer.hello())
            while len(kept) > 20:
                kept.pop(0).close()
            yield


def many_keys_from_one_address(target: Target) -> Steps:
    """Half of them with a good record, asking for room as a node does that has no other peer."""
    kept: list[RawPeer] = []
    while True:
        kept.append(target.stranger())
        if len(kept) % 2:
            speak(kept, lambda peer: peer.hello(needy=True))
        while len(kept) > 200:
            kept.pop(0).close()
        yield


def endless_message(target: Target) -> Steps:
    """Parts without end: libzmq sends a message only when it has all of it, so a relay holds the last part back."""
    relays: list[Withholding] = []

    def relay(source: str) -> Address:
        relays[:] = [Withholding(target.address, 60 << 20, source=source)]
        return relays[0].address

    while True:
        peer = target.peer(relay)
        peer.send(*[bytes(100_000)] * 640)
        while not relays[0].cut:
            relays[0].allow(8)
            yield
        peer.close()


def huge_frame(target: Target) -> Steps:
    while True:
        peer = target.peer()
        peer.send(bytes(5 << 20))
        while peer.try_send(b"x"):
            yield
        peer.close()


def huge_length_before_curve(target: Target) -> Steps:
    kept: list[socket.socket] = []
    while True:
        connection = target.tcp()
        connection.sendall(CURVE_GREETING + b"\x06" + struct.pack(">Q", 1 << 62) + bytes(1000))
        kept.append(connection)
        while len(kept) > 20:
            kept.pop(0).close()
        yield


def deep_nesting(peer: RawPeer) -> list[bytes]:
    return [peer.frame(Kind.PEERS, b"\x91" * 150_000)]


HUGE_LENGTHS = b"\x91" + b"\xdd\xff\xff\xff\xff" + b"\xc6\xff\xff\xff\xff" + bytes(50)


def slow_loris(target: Target) -> Steps:
    """Greet with one byte every two seconds, over 40 connections."""
    kept: list[tuple[socket.socket, Iterator[int]]] = []
    while True:
        connection, rest = kept.pop(0) if len(kept) >= 40 else (target.tcp(), iter(CURVE_GREETING))
        try:
            connection.sendall(bytes([next(rest)]))
            kept.append((connection, rest))
        except OSError:
            connection.close()
        yield


def curve_probe(target: Target) -> Steps:
    """Prove a key and say nothing, or say much without a hello."""
    kept: list[RawPeer] = []
    while True:
        kept.append(target.stranger())
        if len(kept) % 2:
            speak(kept, lambda peer: peer.frame(Kind.ITEM, b"let me in"))
        while len(kept) > 60:
            kept.pop(0).close()
        yield


def talk_without_hello(target: Target) -> Steps:
    """Prove a key, and send what costs a signature to check, but never who it is."""
    peer = target.stranger()
    while True:
        yield
        frame = peer.frame(Kind.PING, Ping(1).encode())
        if not all(peer.try_send(frame) for _ in range(100)):
            peer.close()
            peer = target.stranger()


def restarted(peer: RawPeer) -> list[bytes]:
    """Say hello as a process that has just started, whom everything is told again."""
    return [peer.hello(incarnation=time.time_ns() // 10**6 << RENEWAL_BITS)]


def glutton(target: Target) -> Steps:
    """Ask for one item 512 times at once, again and again, and read nothing of it."""
    while True:
        peer = target.peer()
        wanted: ItemId | None = None
        while wanted is None:
            said = read_control(peer.receive(0.1) or b"")
            if said is not None and said.kind == Kind.HAVE:
                wanted = Have.decode(said.body).items[0].id
            yield
        while peer.try_send(peer.frame(Kind.WANT, Want((WantedPart(wanted),) * MAX_IDS).encode())):
            yield
        peer.close()


def flood(target: Target) -> Steps:
    peer = target.peer()
    while True:
        for token in range(100):
            if not peer.try_send(peer.frame(Kind.PING, Ping(token).encode())):
                peer.close()
                peer = target.peer()
        while peer.receive(0):
            pass
        yield


# Acts a second, enough to do harm without a defence: what is tested is the defence and not this machine's CPU.
ATTACKS: dict[str, tuple[Attack, float]] = {
    "sending unasked": (repeat(lambda peer: [peer.frame(Kind.ITEM, os.urandom(60_000))]), 50),
    "stale time stamps": (give(lambda peer: peer.frame(Kind.ITEM, os.urandom(8), age=7200)), 50),
    "forged signatures": (give(lambda peer: flip(peer.frame(Kind.ITEM, os.urandom(8)), 40)), 50),
    "sealing what is not sealed": (
        repeat(lambda peer: [seal(peer.identity, peer.swarm, Kind.PING, 1, 1, Ping(1).encode())]),
        50,
    ),
    "false records": (repeat(false_record), 50),
    "announcing what is not there": (repeat(promise), 10),
    "announcing it again and again": (repeat(lambda peer: [peer.frame(Kind.HAVE, REPEATED)]), 10),
    "one key, many addresses": (one_key_from_many_addresses, 20),
    "many keys, one address": (many_keys_from_one_address, 50),
    "endless multipart": (endless_message, 50),
    "huge frames": (huge_frame, 10),
    "huge lengths before CURVE": (huge_length_before_curve, 20),
    "deep nesting": (repeat(deep_nesting), 20),
    "huge lengths in MessagePack": (repeat(lambda peer: [peer.frame(Kind.PEERS, HUGE_LENGTHS)]), 20),
    "slow-loris handshakes": (slow_loris, 20),
    "CURVE probing": (curve_probe, 20),
    "talking without a hello": (talk_without_hello, 10),
    "restarting again and again": (repeat(restarted), 50),
    "flood": (flood, 10),
    "asking and not reading": (glutton, 10),
}


def main() -> None:
    target = Target(Address.parse(sys.argv[1]), bytes.fromhex(sys.argv[2]))
    steps: Steps = iter(())
    interval, going, due, acts = 1.0, False, 0.0, 0
    print("ready", flush=True)
    while True:
        wait = max(0.0, due - time.monotonic()) if going else None
        if select.select([sys.stdin], [], [], wait)[0]:
            line = os.read(0, 1000).decode()
            if not line:
                return
            for word in line.splitlines():
                if word in ATTACKS:
                    attack, rate = ATTACKS[word]
                    steps, interval = attack(target), 1 / rate
                if word == "count":
                    print(acts, flush=True)
                else:
                    going = word != "stop"
        elif going:
            due = max(due + interval, time.monotonic() - interval)
            next(steps)
            acts += 1


if __name__ == "__main__":
    main()
