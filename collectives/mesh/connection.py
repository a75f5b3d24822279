"""One control connection: a handshake, then frames, on a socket that never blocks.

A frame is a length (4 bytes, big endian) and a record. The length is checked before any of the frame is kept. Unwritten
bytes are bounded too: a peer that does not read is hung up on.

`ChannelState` and `MemberLink` hold what a mesh knows of a connection and of a linked member.
"""

import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from collectives.agreement.message_codec import MAX_MESSAGE_BYTES
from collectives.mesh.addresses import Address
from collectives.mesh.handshake import Handshake, ProvenPeer
from protocol.errors import PeerError
from protocol.identity import NodeId

MAX_FRAME_BYTES = MAX_MESSAGE_BYTES + 1024  # and its seal
MAX_UNSENT_BYTES = 4 * MAX_FRAME_BYTES
MAX_READS = 16  # of one connection in one turn of the loop, so that no peer keeps the others waiting
_READ_BYTES, _HANDSHAKE_READ_BYTES = 256 << 10, 4096
_LENGTH = struct.Struct("!I")


class ChannelError(PeerError):
    """The connection is of no more use; `reason` says why."""


class Channel:
    """A connection that was just made; `peer` is None until the handshake is over. Not thread-safe."""

    def __init__(self, sock: socket.socket, handshake: Handshake) -> None:
        """Take over a connected (or connecting), non-blocking socket."""
        self.socket = sock
        self.peer: ProvenPeer | None = None
        self._handshake = handshake
        self._in = bytearray()
        self._out = bytearray(handshake.start())

    @property
    def wants_to_write(self) -> bool:
        """Tell whether bytes wait for the socket to take them."""
        return bool(self._out)

    def send(self, body: bytes) -> None:
        """Send a frame, or queue what the socket does not take. Only after the handshake.

        Raises:
            ChannelError: the peer does not read, or the connection is broken.
        """
        assert self.peer is not None
        record = self.peer.sealer.seal(body)
        if len(record) > MAX_FRAME_BYTES:
            raise ChannelError("own_frame_size")
        self._out += _LENGTH.pack(len(record))
        self._out += record
        if len(self._out) > MAX_UNSENT_BYTES:
            raise ChannelError("does_not_read")
        self.write()

    def write(self) -> None:
        """Give the socket what it takes. Raises `ChannelError` when the connection is broken."""
        while self._out:
            try:
                sent = self.socket.send(self._out)
            except BlockingIOError:
                return
            except OSError as error:
                raise ChannelError("broken") from error
            del self._out[:sent]

    def read(self) -> list[bytes]:
        """Return the frames that have come.

        Once the handshake of a data connection is over nothing more is read here: its bytes belong to
        the stream that is made of it.

        Raises:
            PeerError: hang up. Frames that came before the connection ended are returned first, and this is raised the
            next time.
        """
        frames: list[bytes] = []
        for _ in range(MAX_READS):
            try:
                data = self.socket.recv(_HANDSHAKE_READ_BYTES if self.peer is None else _READ_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if frames:
                    break
                raise ChannelError("broken") from error
            if not data:
                if frames:
                    break
                raise ChannelError("closed")
            if self.peer is None:
                self._out += self._handshake.feed(data)
                self.write()
                if self._handshake.peer is None:
                    continue
                self.peer = self._handshake.peer
                if self.peer.purpose != self.peer.purpose.CONTROL:
                    break
                data = self.peer.leftover
            self._in += data
            self._cut(frames)
        return frames

    def close(self) -> None:
        """Hang up, without waiting."""
        with suppress(OSError):
            self.socket.close()

    def _cut(self, frames: list[bytes]) -> None:
        assert self.peer is not None
        while len(self._in) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._in)
            if length > MAX_FRAME_BYTES:
                raise ChannelError("frame_size")
            end = _LENGTH.size + length
            if len(self._in) < end:
                return
            frames.append(self.peer.opener.open(bytes(self._in[_LENGTH.size : end])))
            del self._in[:end]


@dataclass(slots=True, eq=False)
class ChannelState:
    """One that is being made, or a control connection."""

    channel: Channel
    proven_by: float
    wanted: Address | None = None  # what was dialled; None of inbound ones
    others: list[Any] = field(default_factory=list)  # further addresses of the same name
    where: Any = None  # the (family, socket address) dialled
    stream_of: NodeId | None = None  # of an own data connection
    stream: int = 0
    introduced: bool = False
    prefix: str = ""  # the network that an inbound one counts for
    parked: bool = False  # a proven data connection of one that is no member yet

    @property
    def inbound(self) -> bool:
        """Tell whether somebody dialled us."""
        return self.wanted is None and self.stream_of is None


@dataclass(slots=True)
class MemberLink:
    """The ways to one member's process."""

    session: bytes
    address: str
    channels: list[ChannelState]
    dialled: Any = None
    is_local: bool = True  # until no Unix socket of its was found
    dialling: set[int] = field(default_factory=set)  # streams whose handshakes are under way
