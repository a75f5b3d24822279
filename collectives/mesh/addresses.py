"""Where members listen: `tcp://HOST:PORT`, with IPv6 in brackets, and who must answer, `?id=NODEID`."""

import socket
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from collectives.errors import CollectiveError
from protocol.identity import NodeId

MAX_ADDRESS_BYTES = 300  # a host name has at most 253
_WILDCARDS = {"0.0.0.0", "::", "*", ""}
_ANYWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}  # documentation only: RFC 5737, RFC 3849
_ID_CHARACTERS = set("abcdefghijklmnopqrstuvwxyz234567")


class BadAddress(CollectiveError, ValueError):  # noqa: N818
    """An address that cannot be read; the message shows the form."""


@dataclass(frozen=True, slots=True)
class Address:
    """`member` is who must answer there, None for whoever does."""

    host: str
    port: int
    member: NodeId | None = None

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

    A wildcard host is advertised as this machine's own address on the way out.

    Raises:
        BadAddress: the host is not this machine's, or the port is taken.
    """
    wildcard = address.host in _WILDCARDS
    host = {"*": "", "": ""}.get(address.host, address.host)
    try:
        family, *_, where = socket.getaddrinfo(
            host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
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
    return sock, Address(_own_host(family) if wildcard else address.host, int(sock.getsockname()[1]))


def _own_host(family: socket.AddressFamily) -> str:
    """Return the source address of packets that leave this machine; none is sent to learn it."""
    with suppress(OSError, KeyError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((_ANYWHERE[family], 9))
        return str(probe.getsockname()[0])
    return "::1" if family == socket.AF_INET6 else "127.0.0.1"
