"""Discovery in one's own network: nodes of one swarm behind one router find each other by multicast DNS (RFC 6762).

A node that can be dialled at a private address announces one service:

    HASH-KEY._gossamer._tcp.local.    HASH 16 hex digits of a hash of the swarm's id, KEY the first 12 of the CURVE key
    its private IPv4 addresses and its port;  key=HEX, the CURVE key in full

So anybody in the network learns that a node is here. Only those who know the swarm's id learn of which swarm. What is
heard is hostile input: an address counts only if it is on the network of one of our interfaces, and the node there has
to prove the key and show a record that the swarm admits, as every node has to.

All this runs on threads of its own: zeroconf's, and one that starts zeroconf anew when this machine's addresses change.
"""

import hashlib
import ipaddress
import re
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import psutil
import structlog

from protocol.credentials.records import Address, Endpoint
from protocol.limits.networks import Scope, scope_of
from protocol.lru import Recent

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, ServiceStateChange, Zeroconf

TYPE = "_gossamer._tcp.local."
LOOK_S = 30.0  # between two looks at this machine's addresses
STOP_S = 5.0  # to take the announcement back takes less than a second
ANSWER_MS = 1000  # how long a node that was announced may take to say where it is
MAX_HEARD = 64  # names that are followed up between two looks at this machine's addresses
MAX_REASON = 200
MAX_ADDRESSES = 4  # of one node
NO_LIBRARY = "cannot look for nodes of this network: pip install zeroconf"
_KEY = re.compile(rb"[0-9a-f]{64}")

log = structlog.get_logger()


def private_interfaces() -> list[ipaddress.IPv4Interface]:
    """Return this machine's private IPv4 addresses, each with its network."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return [
        ipaddress.IPv4Interface(f"{address.address}/{address.netmask}")
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if name in up
        and address.family == socket.AF_INET
        and address.netmask
        and scope_of(address.address) is Scope.PRIVATE
    ]


def swarm_label(swarm: bytes) -> str:
    """Return the name under which a swarm is announced. The swarm's id cannot be computed from it."""
    return hashlib.sha256(b"gossamer: a swarm in this network" + swarm).hexdigest()[:16]


def told_addresses(
    port: int | None, hosts: Iterable[str], key: bytes | None, own: Sequence[ipaddress.IPv4Interface]
) -> list[Address]:
    """Return where an announced node may be dialled; nowhere if it is on no network of ours, or makes no sense.

    A node whose addresses are all ours is on this machine. One that has others may be dialled at those only: each
    machine with Docker has 172.17.0.1.
    """
    if port is None or not 0 < port < 1 << 16 or key is None or not _KEY.fullmatch(key):
        return []
    ours = {str(interface.ip) for interface in own}
    hosts = list(hosts)
    if not ours.issuperset(hosts):
        hosts = [host for host in hosts if host not in ours]
    addresses: list[Address] = []
    for host in hosts:
        try:
            address = ipaddress.IPv4Address(host)
        except ValueError:
            continue
        is_near = any(address in interface.network for interface in own)
        if scope_of(host) is Scope.PRIVATE and is_near:
            addresses.append(Address(Endpoint(str(address), port), bytes.fromhex(key.decode())))
    return addresses[:MAX_ADDRESSES]


class LocalDiscovery:
    """Announces a node and looks for others of its swarm, from `start` to `stop`.

    `found` is called with the `Address`es of a node, from a thread of zeroconf's, at most `MAX_HEARD` times in
    `LOOK_S` seconds. `listen` is the host that the node listens on: what it does not listen on is not announced.
    """

    def __init__(self, swarm: bytes, key: bytes, listen: str, port: int, found: Callable[..., None]) -> None:
        self._label = swarm_label(swarm)
        self._key = key
        self._listen = listen
        self._port = port
        self._found = found
        self._heard: Recent[str, None] = Recent(MAX_HEARD)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gossamer-neighbours", daemon=True)

    def start(self) -> None:
        """Begin, without waiting."""
        self._thread.start()

    def stop(self) -> None:
        """Take the announcement back; waits up to `STOP_S` seconds for that."""
        self._stopping.set()
        self._thread.join(STOP_S)

    @property
    def _here(self) -> list[ipaddress.IPv4Interface]:
        everywhere = self._listen in {"*", "0.0.0.0", "::"}
        return [interface for interface in private_interfaces() if everywhere or str(interface.ip) == self._listen]

    def _run(self) -> None:
        if find_spec("zeroconf") is None:
            log.warning(NO_LIBRARY)
            return
        import zeroconf

        said = ""
        while not self._stopping.is_set():
            here = self._here
            try:
                if here:
                    self._take_part(here)
                else:
                    self._stopping.wait(LOOK_S)
            except (OSError, RuntimeError, zeroconf.Error) as error:  # another has our name; no room for sockets
                reason = repr(error)[:MAX_REASON]
                if reason != said:
                    said = reason
                    log.warning("cannot look for nodes of this network", reason=reason, again_in_s=LOOK_S)
                self._stopping.wait(LOOK_S)

    def _take_part(self, here: list[ipaddress.IPv4Interface]) -> None:
        """Announce and look until the node stops or its addresses change."""
        from zeroconf import IPVersion, ServiceBrowser, Zeroconf

        zeroconf = Zeroconf(interfaces=[str(interface.ip) for interface in here], ip_version=IPVersion.V4Only)
        try:
            browser = ServiceBrowser(zeroconf, TYPE, handlers=[self._changed])
            zeroconf.register_service(self._announcement(here))
            while not self._stopping.wait(LOOK_S) and self._here == here:
                self._heard.take_all()
            browser.cancel()
        finally:
            zeroconf.close()

    def _announcement(self, here: list[ipaddress.IPv4Interface]) -> "ServiceInfo":
        from zeroconf import ServiceInfo

        name = f"{self._label}-{self._key.hex()[:12]}"
        return ServiceInfo(
            TYPE,
            f"{name}.{TYPE}",
            port=self._port,
            addresses=[interface.ip.packed for interface in here],
            properties={"key": self._key.hex()},
            server=f"{name}.local.",
        )

    def _changed(self, zeroconf: "Zeroconf", service_type: str, name: str, state_change: "ServiceStateChange") -> None:
        """Follow a name up, if it may be one of our swarm; called by zeroconf."""
        if state_change.name == "Removed" or not name.startswith(f"{self._label}-"):
            return
        if name in self._heard or len(self._heard) >= MAX_HEARD:
            return
        self._heard.set(name, None)
        from zeroconf import Error

        try:
            info = zeroconf.get_service_info(service_type, name, timeout=ANSWER_MS)
        except Error:  # the name is no name of a service; the error would end zeroconf's thread
            return
        if info is None:
            return
        addresses = told_addresses(info.port, info.parsed_addresses(), info.properties.get(b"key"), self._here)
        if addresses and addresses[0].key != self._key:
            self._found(*addresses)
