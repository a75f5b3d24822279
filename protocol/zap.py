"""Answering libzmq's question who may connect (ZAP, ZeroMQ RFC 27).

Without a handler CURVE encrypts but lets anybody in, silently. This one answers on our own
thread: CURVE only, any key, and the key itself becomes the connection's `User-Id`. Who the
key belongs to is settled one step later, by the signed record in its hello.
"""

import zmq

DOMAIN = b"gossamer"
_ENDPOINT = "inproc://zeromq.zap.01"
_VERSION = b"1.0"


class ZapHandler:
    """The one ZAP handler of a ZeroMQ context; start it before the first bind."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_ENDPOINT)

    def answer(self) -> None:
        """Answer every request that waits."""
        while True:
            try:
                request = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self.socket.send_multipart(decide(request))


def decide(request: list[bytes]) -> list[bytes]:
    """Return the reply to one ZAP request: version, request id, status, text, user id, metadata."""
    if len(request) != 7 or request[0] != _VERSION:
        return [_VERSION, request[1] if len(request) > 1 else b"", b"500", b"bad request", b"", b""]
    _, request_id, domain, _, _, mechanism, key = request
    if domain != DOMAIN or mechanism != b"CURVE" or len(key) != 32:
        return [_VERSION, request_id, b"400", b"CURVE only", b"", b""]
    return [_VERSION, request_id, b"200", b"OK", key.hex().encode(), b""]
