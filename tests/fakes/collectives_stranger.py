"""A process that knows a group's name, and nothing else, at its worst: `python -m tests.fakes.collectives_stranger`.

KIND ADDRESS...: it does KIND to the members at these addresses until it is ended, and prints "at it" once it has begun.
"""

import os
import socket
import struct
import sys
import time
from contextlib import suppress
from itertools import count

from collectives.agreement import messages
from collectives.agreement.message_codec import encode
from collectives.agreement.views import Ballot, Member, OpId, View
from collectives.mesh.framing import PIECE_BYTES, Piece, PieceKind, header
from collectives.mesh.handshake import Handshake, Party, Purpose, group_id, group_key
from collectives.types import Protection
from protocol.identity import Identity, NodeId
from protocol.wire.encoding import pack

NAME = "test"
GROUP = group_id(group_key(NAME))
PATIENCE_S = 5.0
SOURCE = ("127.0.0.2", 0)  # another prefix than the members': on loopback each address is one
_LENGTH = struct.Struct("!I")


class Link:
    """A connection with a member whose handshake was completed."""

    def __init__(self, address: str, party: Party, purpose: Purpose = Purpose.CONTROL, stream: int = 0) -> None:
        """Dial, shake hands, and introduce oneself."""
        host, port = address.removeprefix("tcp://").split(":")
        self.socket = socket.create_connection((host, int(port)), PATIENCE_S, SOURCE)
        handshake = Handshake(party, initiator=True, purpose=purpose, stream=stream)
        self.socket.sendall(handshake.start())
        while handshake.peer is None:
            data = self.socket.recv(4096)
            if not data:
                raise ConnectionResetError("hung up on")
            self.socket.sendall(handshake.feed(data))
        self.peer = handshake.peer
        if purpose is Purpose.CONTROL:
            self.say(pack(["tcp://127.0.0.1:9"]))

    def record(self, body: bytes) -> bytes:
        """Return a frame's bytes."""
        sealed = self.peer.sealer.seal(body)
        return _LENGTH.pack(len(sealed)) + sealed

    def say(self, body: bytes) -> None:
        """Send a frame."""
        self.socket.sendall(self.record(body))


def party() -> Party:
    """Return a new key's."""
    return Party(Identity.generate(), group_key(NAME), os.urandom(8), Protection.ENCRYPTED)


def views(member: NodeId) -> list[bytes]:
    """Return messages with which a view might be dissolved, or a member stopped."""
    roster = [Member(NodeId(letter * 32), "tcp://127.0.0.1:9", b"session!") for letter in "bcdefgh"]
    view = View.of(GROUP, 1000, b"fakemark", [*roster, Member(member, "", b"session!")])
    ballot = Ballot(2**40, member)
    return [
        encode(message)
        for message in (
            messages.ViewNotice(view),
            messages.Propose(ballot, 1000, view.members),
            messages.Decide(ballot, view, ()),
            messages.Welcome(b"session!", view),
            messages.Beat(b"fakemark", 1000, 2**40, view.members),
            messages.Apply("tcp://127.0.0.1:9", b"session!", 2**40),
            messages.Abort(OpId(b"fakemark", 1000, 0, 0), reason="because"),
            messages.Initiate(OpId(b"fakemark", 1000, 0, 0), "reduce", (), bytes(60_000)),
        )
    ]


def flood(address: str) -> None:
    """Say as much as the member takes."""
    mine = party()
    link = Link(address, mine)
    said = views(mine.identity.node_id)
    while True:
        link.socket.sendall(b"".join(link.record(body) for body in said * 20))


def trickle(address: str) -> None:
    """Send byte after byte of a frame that never ends."""
    link = Link(address, party())
    link.socket.sendall(_LENGTH.pack(90_000))
    while True:
        link.socket.sendall(b"\0")


def oversize(address: str) -> None:
    """Announce the longest frame that a member may send, and send it."""
    link = Link(address, party())
    link.socket.sendall(_LENGTH.pack(16 << 20) + bytes(1 << 20))
    while link.socket.recv(1 << 16):
        pass


def lanes(address: str) -> None:
    """Open data streams, and send pieces of operations that nobody began."""
    mine = party()
    link = Link(address, mine)
    streams = [Link(address, mine, Purpose.DATA, number) for number in range(16)]
    for stream in streams:
        stream.socket.setblocking(False)
        piece = header(os.urandom(16), PieceKind.DATA, Piece(0, 0, PIECE_BYTES, PIECE_BYTES))
        with suppress(BlockingIOError):
            stream.socket.send(stream.peer.sealer.seal(piece) + bytes(1 << 20))
    while link.socket.recv(1 << 16):
        pass


def handshakes(address: str) -> None:
    """Complete handshakes, each under a new key, and go."""
    Link(address, party()).socket.close()


def idle(address: str) -> None:
    """Connect, and say nothing."""
    host, port = address.removeprefix("tcp://").split(":")
    _kept.append(socket.create_connection((host, int(port)), PATIENCE_S, SOURCE))
    del _kept[:-400]


def keys(address: str) -> None:
    """Be many: link under new keys, stay, and say things."""
    mine = party()
    link = Link(address, mine)
    link.socket.sendall(b"".join(link.record(body) for body in views(mine.identity.node_id)))
    _kept.append(link.socket)
    del _kept[:-400]


KINDS = {kind.__name__: kind for kind in (flood, trickle, oversize, lanes, handshakes, idle, keys)}
_kept: list[socket.socket] = []


def attack(kind: str, address: str) -> None:
    """Go on, whatever the member does about it."""
    for _ in count():
        try:
            KINDS[kind](address)
        except OSError:
            time.sleep(0.001)  # hung up on: once more


if __name__ == "__main__":
    import threading

    def give_up(arguments: threading.ExceptHookArgs) -> None:
        """End the process: an attack that does not take place must not look like one that costs nothing."""
        threading.__excepthook__(arguments)
        os._exit(1)

    threading.excepthook = give_up
    kind, *addresses = sys.argv[1:]
    for address in addresses:
        for _ in range(2):
            threading.Thread(target=attack, args=(kind, address), daemon=True).start()
    print("at it", flush=True)
    threading.Event().wait()
