"""Names and addresses of the machine we run on: what to bind to, and what to tell peers."""

import ipaddress
import socket

from protocol.errors import BadAddress


def bindable_host(host: str) -> str:
    """Return what libzmq can bind to: it takes addresses, not names. Of a name with both, the IPv4 address.

    Raises:
        BadAddress: the name does not resolve.
    """
    if host == "*" or is_address(host):
        return host
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return str(min(found, key=lambda answer: answer[0] != socket.AF_INET)[4][0])
    except (OSError, UnicodeError):
        raise BadAddress(f"cannot listen on {host!r}: no such host; give an address of this machine") from None


def advertised_host(host: str) -> str:
    """Return the host to tell peers: for a wildcard, this machine's own address on its default route."""
    if host not in {"*", "0.0.0.0", "::"}:
        return host
    family, target = (socket.AF_INET6, "2001:db8::1") if host == "::" else (socket.AF_INET, "192.0.2.1")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))  # chooses a route; a UDP connect sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "::1" if family == socket.AF_INET6 else "127.0.0.1"


def is_address(host: str) -> bool:
    """Tell a literal IPv4 or IPv6 address from a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
