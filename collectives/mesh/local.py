"""Members on one machine: a Unix socket beside the TCP one, for their data streams.

Its name is the process's session, in Linux's abstract namespace: it leaves no file behind, ends with
the process, and is found by those who share the network namespace, so finding it tells that both are on
one machine. Who answers there has to prove itself by the same handshake as over TCP; where that
fails, or there is no such socket, streams go over TCP.
"""

import socket
import sys


def name(session: bytes) -> str:
    """Return the address of the process with this session."""
    return f"\0gossamer-collectives-{session.hex()}"


def listen(session: bytes) -> socket.socket | None:
    """Listen for others on this machine; None where there is no abstract namespace."""
    if sys.platform != "linux":
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(name(session))
        sock.listen(128)
    except OSError:
        sock.close()
        return None
    sock.setblocking(False)
    return sock
