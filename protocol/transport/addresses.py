"""Names and addresses: this machine's, to bind to and to tell peers, and others', which are looked up on other threads.

A name server may take many seconds. libzmq would look a name up on its only I/O thread, and would use one family of
addresses only.
"""

import errno
import ipaddress
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain

import psutil

from protocol.credentials.records import Endpoint
from protocol.errors import BadAddress, PortInUse

MAX_LOOKUPS = 16  # in flight; each is a thread that waits
MAX_ADDRESSES = 4  # tried of one name
MAX_OWN = 2  # addresses of a family that we tell: a record has room for four

# Linux's (RFC 5014): the address that lasts, and not the temporary one (RFC 8981), which is gone within a week.
_IPV6_ADDR_PREFERENCES, _IPV6_PREFER_SRC_PUBLIC = 72, 2

Found = tuple[object, list[Endpoint]]


def bindable_host(host: str) -> str:
    """Return an address to bind to, as libzmq takes no names. It is the IPv4 address of a name that has both families.

    Raises:
        BadAddress: the name does not resolve.
    """
    if host == "*" or is_address(host):
        return host
    try:
        resolved = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return str(min(resolved, key=lambda answer: answer[0] != socket.AF_INET)[4][0])
    except (OSError, UnicodeError):
        raise BadAddress(f"cannot listen on {host!r}: no such host; give an address of this machine") from None


def cannot_listen(listen: Endpoint, number: int | None, reason: str) -> PortInUse | BadAddress:
    """Return what a person is told where binding to `listen` failed with the error `number`."""
    if number == errno.EADDRINUSE:
        return PortInUse(f"{listen} is in use: choose another port, or port 0 for any free one")
    if number == errno.EADDRNOTAVAIL:
        return BadAddress(
            f"cannot listen on {listen}: no address of this machine; listen on tcp://0.0.0.0:{listen.port}, "
            "and where a router forwards to it, advertise the address that others dial"
        )
    return BadAddress(f"cannot listen on {listen}: {reason}")


def check_bindable(listen: Endpoint) -> None:
    """Bind to `listen` as the transport will, and let go of it.

    Raises:
        PortInUse: somebody listens there.
        BadAddress: this machine has no such address.
    """
    host = bindable_host(listen.host)
    is_ipv6 = ":" in host
    with socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # these two as libzmq does
        if is_ipv6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            probe.bind(("" if host == "*" else host, listen.port))
        except OSError as error:
            raise cannot_listen(listen, error.errno, error.strerror or str(error)) from None


def own_hosts(host: str) -> tuple[str, ...]:
    """Return the hosts to tell peers for a node that listens at `host`: for a wildcard, addresses of this machine.

    The wildcard "::" listens for both families, so it gives addresses of both, IPv6 first. Of a family it gives the
    address on the default route; without such a route those of the interfaces, `MAX_OWN` at most; else loopback's.
    """
    if host not in {"*", "0.0.0.0", "::"}:
        return (host,)
    families = (socket.AF_INET6, socket.AF_INET) if host == "::" else (socket.AF_INET,)
    return tuple(chain.from_iterable(map(_addresses_of, families))) or (("127.0.0.1", "::1")[host == "::"],)


def _addresses_of(family: socket.AddressFamily) -> Iterable[str]:
    target = "2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1"  # of documentation (RFC 3849, RFC 5737)
    if (source := source_towards(target)) is not None:
        return [source]
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = [
        address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if name in up and address.family == family and not _is_for_neighbours_only(address.address)
    ]
    return found[:MAX_OWN]


def _is_for_neighbours_only(address: str) -> bool:
    """Tell whether an address is a loopback one, or an IPv6 link-local one, which needs the name of an interface."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return parsed.is_loopback or (parsed.version == 6 and parsed.is_link_local)


def source_towards(address: str) -> str | None:
    """Return this machine's address on its route to `address`, None without a route. Nothing is sent."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            if probe.family == socket.AF_INET6 and sys.platform == "linux":
                probe.setsockopt(socket.IPPROTO_IPV6, _IPV6_ADDR_PREFERENCES, _IPV6_PREFER_SRC_PUBLIC)
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return None


def is_address(host: str) -> bool:
    """Tell a literal IPv4 or IPv6 address from a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Resolver:
    """Looks names up. `wake` is called from another thread when there is something to `take`."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._found: deque[Found] = deque()
        self._slots = threading.BoundedSemaphore(MAX_LOOKUPS)

    def ask(self, asker: object, endpoint: Endpoint) -> bool:
        """Look `endpoint.host` up for `asker`; False: too many lookups wait already."""
        if not self._slots.acquire(blocking=False):
            return False
        threading.Thread(target=self._look_up, args=(asker, endpoint), name="gossamer-lookup", daemon=True).start()
        return True

    def take(self) -> list[Found]:
        """Return the askers that were answered since the last call, each with its endpoints, best first."""
        addresses = []
        while self._found:
            addresses.append(self._found.popleft())
        return addresses

    def _look_up(self, asker: object, endpoint: Endpoint) -> None:
        try:
            answers = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
            hosts = list(dict.fromkeys(str(address[0]) for *_, address in answers))
        except (OSError, UnicodeError):  # no such name; a label that no name can have
            hosts = []
        finally:
            self._slots.release()
        self._found.append((asker, [Endpoint(host, endpoint.port) for host in hosts[:MAX_ADDRESSES]]))
        self._wake()
