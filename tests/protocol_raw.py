"""A peer that says whatever it is told to: raw ZeroMQ with CURVE, under no rule of the protocol."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zmq
from zmq.utils import z85

from protocol.credentials.records import Address, make_record
from protocol.identity import Identity
from protocol.wire.compression import PLAIN
from protocol.wire.envelope import Kind, claimed_id, read_control
from protocol.wire.messages import NO_TOPIC, Entry, Have, Hello, Want
from tests.protocol_frames import frame_of


class RawPeer:
    """A DEALER that dialled `address` with the CURVE key of `identity`, from the IP address `source` if one is given.

    It does not dial again by itself, and once it is cut nothing is taken any more. `context` is shared by peers that
    are many.
    """

    def __init__(
        self,
        identity: Identity,
        address: Address,
        swarm: bytes,
        *,
        curve: bool = True,
        source: str = "",
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        self.identity = identity
        self.swarm = swarm
        self._sequence = int(time.time() * 1e6)
        self._own_context = None if context else zmq.Context()
        context = context or self._own_context
        assert context is not None
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndtimeo = 5000
        self._socket.reconnect_ivl = -1
        self._socket.immediate = 1  # or libzmq takes, for nobody, what is sent before the handshake and after a cut
        if curve:
            self._socket.curve_publickey = z85.encode(identity.curve_key)
            self._socket.curve_secretkey = z85.encode(identity.curve_secret)
            self._socket.curve_serverkey = z85.encode(address.key)
        target = str(address.endpoint)
        self._socket.connect(target.replace("tcp://", f"tcp://{source}:0;") if source else target)

    def frame(
        self,
        kind: int,
        body: bytes,
        *,
        signer: Identity | None = None,
        swarm: bytes | None = None,
        age: float = 0.0,
        form: bytes = PLAIN,
    ) -> bytes:
        """Return a well-formed envelope, of an item in that form of content."""
        self._sequence += 1
        body = NO_TOPIC + form + body if kind == Kind.ITEM else body
        time_ms = int((time.time() - age) * 1000)
        return frame_of(signer or self.identity, swarm or self.swarm, kind, self._sequence, time_ms, body)

    def hello(self, of: Identity | None = None, *, needy: bool = False, incarnation: int = 1) -> bytes:
        """Return our hello, with the record of another node if `of` is given."""
        expiry_ms = int((time.time() + 3600) * 1000)
        record = make_record(of or self.identity, self.swarm, (), incarnation, "raw", expiry_ms)
        return self.frame(Kind.HELLO, Hello(record.encoded, needy).encode())

    def send(self, *parts: bytes) -> None:
        """Send one message."""
        self._socket.send_multipart(parts)

    def give(self, frame: bytes) -> None:
        """Announce an item, wait until we are asked for it, and send it."""
        item = claimed_id(frame)
        self.send(self.frame(Kind.HAVE, Have((Entry(item, len(frame)),)).encode()))
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            said = read_control(self.receive(1) or b"")
            if said is not None and said.kind == Kind.WANT and item in dict(Want.decode(said.body).parts):
                self.send(frame)
                return
        raise TimeoutError("nobody asked for it within 20 s")

    def try_send(self, *parts: bytes) -> bool:
        """Send one message, or return False at once if nobody takes it."""
        try:
            self._socket.send_multipart(parts, zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout: float) -> bytes | None:
        """Return the next frame, or None after `timeout` seconds."""
        return self._socket.recv() if self._socket.poll(int(timeout * 1000)) else None

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
        if self._own_context is not None:
            self._own_context.destroy(linger=0)


@contextmanager
def raw_peer(address: Address, swarm: bytes, identity: Identity | None = None, **options: Any) -> Iterator[RawPeer]:
    """Dial, and hang up at the end."""
    peer = RawPeer(identity or Identity.generate(), address, swarm, **options)
    try:
        yield peer
    finally:
        peer.close()
