"""Dialling without waiting, and what every socket is set to."""

import socket
from contextlib import suppress
from typing import Any

from protocol.credentials.records import Endpoint

UNIX_BUFFER_BYTES = 1 << 20  # the kernel counts what the reader has yet to take as the sender's


def connecting(family: Any, where: Any) -> socket.socket | None:
    """Return a socket that is on its way to `where`, or None if there is no way."""
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        return None
    sock.setblocking(False)
    try:
        sock.connect(where)
    except BlockingIOError:
        pass
    except OSError:
        sock.close()
        return None
    return sock


def prepare(sock: socket.socket) -> None:
    """Set a connected or connecting socket's options."""
    with suppress(OSError):
        if sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER_BYTES)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def numeric(endpoint: Endpoint) -> tuple[Any, Any]:
    """Return family and socket address of a numeric host. Raises `OSError` for a name."""
    found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    return found[0][0], found[0][4]
