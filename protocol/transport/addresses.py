"""Names and addresses: of this machine, what to bind to and to tell peers; of others, looked up on other threads.

A name server may take many seconds. libzmq would resolve a name on its only I/O thread, and take
one family of addresses or the other, whether or not anybody listens there.
"""

import errno
import ipaddress
import socket
import threading
from collections import deque
from collections.abc import Callable

from protocol.credentials.records import Endpoint
from protocol.errors import BadAddress, PortInUse

MAX_LOOKUPS = 16  # in flight; each is a thread that waits
MAX_ADDRESSES = 4  # tried of one name

Found = tuple[object, list[Endpoint]]


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
        found = []
        while self._found:
            found.append(self._found.popleft())
        return found

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
