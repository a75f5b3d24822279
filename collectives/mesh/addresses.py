"""Where members listen, and how they are dialled without waiting.

An address is `tcp://HOST:PORT`, with IPv6 in brackets, and who must answer, `?id=NODEID`.

Members on one machine have a Unix socket beside the TCP one, for their data streams. Its name is the process's session,
in Linux's abstract namespace: it leaves no file behind, ends with the process, and is found by those who share the
network namespace, so finding it tells that both are on one machine. The one that answers there has to prove itself by
the same handshake as over TCP. If that fails, or there is no such socket, streams go over TCP.
"""

import ipaddress
import os
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from collectives.errors import CollectiveError
from protocol.credentials.records import Endpoint
from protocol.identity import NodeId
from protocol.transport.addresses import own_hosts

MAX_ADDRESS_BYTES = 300  # a host name has at most 253
_ID_CHARACTERS = set("abcdefghijklmnopqrstuvwxyz234567")


class BadAddress(CollectiveError, ValueError):  # noqa: N818
    """An address that cannot be read; the message shows the form."""


@dataclass(frozen=True, slots=True)
class Address:
    """`member` must answer there; None: any node may."""

    host: str
    port: int
    member: NodeId | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of this machine are there: by number, or as `localhost`."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}" + (f"?id={self.member}" if self.member else "")

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read `tcp://HOST:PORT[?id=NODEID]`. Raises `BadAddress`."""
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        query = parts.query
        member = query.removeprefix("id=")
        if (
            parts.scheme != "tcp"
            or port is None
            or len(text) > MAX_ADDRESS_BYTES
            or parts.path
            or parts.fragment
            or parts.username is not None
            or (query and not (query.startswith("id=") and len(member) == 32 and set(member) <= _ID_CHARACTERS))
        ):
            raise BadAddress(f"{text!r} is no address: write tcp://HOST:PORT, or tcp://[IPV6]:PORT")
        return cls(parts.hostname or "", port, NodeId(member) if member else None)


def listen(address: Address) -> tuple[socket.socket, Address]:
    """Bind and listen; return the socket and the address that others can dial.

    A wildcard host is advertised as this machine's own address (see `own_hosts`), and a name as the address that it
    has here: others may know the name as nobody, or as somebody else.

    Raises:
        BadAddress: the host is not this machine's, or the port is taken.
    """
    host = None if address.host in ("", "*") else address.host
    try:
        family, *_, where = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise BadAddress(f"cannot listen at {address}: {error}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise BadAddress(f"cannot listen at {address}: {error.strerror}") from None
    sock.setblocking(False)
    return sock, Address(own_hosts(str(where[0]))[0], int(sock.getsockname()[1]))


_CREDENTIALS = struct.Struct("iII")  # struct ucred: process, user, group; all of them empty before it is connected
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


def is_vouched(sock: socket.socket) -> bool:
    """Tell whether the kernel says that the other end of this connection is a process of this process's user."""
    if sys.platform != "linux" or sock.family != socket.AF_UNIX:
        return False
    try:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        return False
    process, user, _ = _CREDENTIALS.unpack(credentials)
    return process != 0 and user == os.geteuid()


# A path that drops everything without a word ends its connection in 30 s, or what members may be silent if that is
# longer, and not in TCP's 15 minutes. One that has nothing to send is asked, too: so a NAT does not forget it (some do
# after 60 s), and its end is seen.
KEEPALIVE = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
UNACKNOWLEDGED_S = 30.0


def prepare(sock: socket.socket, unacknowledged_s: float = 0.0) -> None:
    """Set a connected or connecting socket's options.

    The kernel ends the connection once the other end has acknowledged nothing for `unacknowledged_s`, or
    `UNACKNOWLEDGED_S` if that is longer.
    """
    if sock.family == socket.AF_UNIX:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER_BYTES)
        return
    patience_ms = int(1000 * max(UNACKNOWLEDGED_S, unacknowledged_s))
    for name, value in {"TCP_NODELAY": 1, **KEEPALIVE, "TCP_USER_TIMEOUT": patience_ms}.items():
        if hasattr(socket, name):  # macOS has no user time-out
            with suppress(OSError):
                level = socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP
                sock.setsockopt(level, getattr(socket, name), value)


def numeric(endpoint: Endpoint) -> tuple[Any, Any]:
    """Return family and socket address of a numeric host. Raises `OSError` or `UnicodeError` for a name."""
    resolved = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    return resolved[0][0], resolved[0][4]


def local_name(session: bytes) -> str:
    """Return the address of the process with this session."""
    return f"\0gossamer-collectives-{session.hex()}"


def listen_locally(session: bytes) -> socket.socket | None:
    """Listen for others on this machine; None where there is no abstract namespace."""
    if sys.platform != "linux":
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(local_name(session))
        sock.listen(128)
    except OSError:
        sock.close()
        return None
    sock.setblocking(False)
    return sock
