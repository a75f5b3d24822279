"""Answering libzmq's question who may connect (ZAP, ZeroMQ RFC 27).

Without a handler CURVE encrypts but lets anybody in, silently. This one answers on our own
thread: CURVE only, any key that is not graylisted, and the key itself becomes the connection's
`User-Id`. Who the key belongs to is settled one step later, by the signed record in its hello.
"""

from collections.abc import Callable

import zmq

DOMAIN = b"gossamer"
_ENDPOINT = "inproc://zeromq.zap.01"
_VERSION = b"1.0"

Refuses = Callable[[bytes], bool]


def refuse_nobody(key: bytes) -> bool:
    """The rule where nobody keeps scores."""
    return False


class ZapHandler:
    """The one ZAP handler of a ZeroMQ context; start it before the first bind."""

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", refuses: Refuses, refused: Callable[[bytes], None]
    ) -> None:
        """Keys (32 bytes) that `refuses` says yes to are kept out; `refused` hears of each."""
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_ENDPOINT)
        self._refuses = refuses
        self._refused = refused

    def answer(self) -> None:
        """Answer every request that waits."""
        while True:
            try:
                request = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            reply = decide(request, self._refuses)
            self.socket.send_multipart(reply)
            if reply[2] == b"403":
                self._refused(request[6])


def decide(request: list[bytes], refuses: Refuses) -> list[bytes]:
    """Return the reply to one ZAP request: version, request id, status, text, user id, metadata."""
    if len(request) != 7 or request[0] != _VERSION:
        return [_VERSION, request[1] if len(request) > 1 else b"", b"500", b"bad request", b"", b""]
    _, request_id, domain, _, _, mechanism, key = request
    if domain != DOMAIN or mechanism != b"CURVE" or len(key) != 32:
        return [_VERSION, request_id, b"400", b"CURVE only", b"", b""]
    if refuses(key):
        return [_VERSION, request_id, b"403", b"refused", b"", b""]
    return [_VERSION, request_id, b"200", b"OK", key.hex().encode(), b""]
