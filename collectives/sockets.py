"""Dialling without waiting."""

import socket
from typing import Any

from protocol.records import Endpoint


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


def numeric(endpoint: Endpoint) -> tuple[Any, Any]:
    """Return family and socket address of a numeric host. Raises `OSError` for a name."""
    found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    return found[0][0], found[0][4]
