"""Machines of their own on one kernel: network namespaces, behind firewalls and NAT. Needs root on Linux.

Each namespace has one interface on the common wire, "wire", with an IPv4 and an IPv6 address.
Firewall and NAT are rules of nf_tables, written in netlink because no tool for it is sure to
be installed:

    filter input        tcp flags & (syn | ack) == syn  drop
    nat postrouting     masquerade
"""

import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Namespace:
    """A namespace by name, its addresses, and where its wire ends."""

    name: str
    ipv4: str
    ipv6: str
    hub: str = ""
    port: str = ""

    def command(self, *words: str) -> list[str]:
        """Return `words` as a command that runs inside."""
        return ["ip", "netns", "exec", self.name, *words]

    def drop_inbound(self) -> None:
        """From now on nobody can open a TCP connection to this namespace."""
        self._add_rule("firewall")

    def masquerade(self) -> None:
        """From now on what this namespace forwards bears its own IPv4 address."""
        self._add_rule("nat")
        subprocess.run(self.command("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"), check=True, timeout=30)

    def can_connect(self, address: str, port: int) -> bool:
        """Tell whether a TCP connection opens from here within a second."""
        code = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1)"
        words = self.command(sys.executable, "-c", code, address, str(port))
        return subprocess.run(words, capture_output=True, timeout=30).returncode == 0

    def move(self, ipv4: str) -> None:
        """Give up the IPv4 address for another."""
        _ip(f"-n {self.name} address del {self.ipv4}/24 dev wire")
        _ip(f"-n {self.name} address add {ipv4}/24 dev wire")

    def _add_rule(self, name: str) -> None:
        subprocess.run(self.command(sys.executable, "-m", "tests.namespaces", name), cwd=ROOT, check=True, timeout=30)


def why_impossible() -> str:
    """Return why this machine cannot make namespaces, or nothing."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the command ip (iproute2)"
    probe = ["ip", "netns", "add", f"gossamer-{os.getpid()}-probe"]
    tried = subprocess.run(probe, capture_output=True, text=True, timeout=30)
    if tried.returncode != 0:  # root of a container without CAP_SYS_ADMIN
        return f"no network namespaces here: {tried.stderr.strip()}"
    _ip(f"netns delete {probe[-1]}")
    return ""


@contextmanager
def wired(*hosts: str) -> Iterator[list[Namespace]]:
    """One namespace a host, all on one bridge in a further one."""
    prefix = f"gossamer-{os.getpid()}"
    hub = f"{prefix}-hub"
    with ExitStack() as stack:
        for name in (hub, *(f"{prefix}-{host}" for host in hosts)):
            _ip(f"netns add {name}")
            stack.callback(_ip, f"netns delete {name}")
        _ip(f"-n {hub} link add bridge type bridge")
        _ip(f"-n {hub} link set bridge up")
        made = []
        for number, host in enumerate(hosts, 1):
            space = Namespace(f"{prefix}-{host}", f"10.77.0.{number}", f"fd77::{number}", hub, f"port{number}")
            _ip(f"-n {hub} link add port{number} type veth peer name wire netns {space.name}")
            _ip(f"-n {hub} link set port{number} master bridge up")
            _ip(f"-n {space.name} address add {space.ipv4}/24 dev wire")
            _ip(f"-n {space.name} address add {space.ipv6}/64 dev wire nodad")
            _ip(f"-n {space.name} link set lo up")
            _ip(f"-n {space.name} link set wire up")
            made.append(space)
        yield made


@contextmanager
def cut_off(*spaces: Namespace) -> Iterator[None]:
    """For as long as the block lasts these reach each other and nobody else. No end is told: packets are lost."""
    hub = spaces[0].hub
    _ip(f"-n {hub} link add island type bridge")
    _ip(f"-n {hub} link set island up")
    for space in spaces:
        _ip(f"-n {hub} link set {space.port} master island")
    try:
        yield
    finally:
        for space in spaces:
            _ip(f"-n {hub} link set {space.port} master bridge")
        _ip(f"-n {hub} link delete island")


@contextmanager
def all_behind(router: Namespace, *names: str) -> Iterator[list[Namespace]]:
    """Namespaces with private IPv4 addresses on one wire; its only way out is `router`, which does NAT for them."""
    with ExitStack() as stack:
        _ip(f"-n {router.name} link add inside type bridge")
        _ip(f"-n {router.name} address add 192.168.7.1/24 dev inside")
        _ip(f"-n {router.name} link set inside up")
        # Else the router does NAT for what its boxes say to each other, too.
        bridged = "f=/proc/sys/net/bridge/bridge-nf-call-iptables; [ ! -e $f ] || echo 0 > $f"
        subprocess.run(router.command("sh", "-c", bridged), check=True, timeout=30)
        made = []
        for number, name in enumerate(names, 2):
            home = Namespace(f"{router.name}-{name}", f"192.168.7.{number}", "")
            _ip(f"netns add {home.name}")
            stack.callback(_ip, f"netns delete {home.name}")
            _ip(f"-n {router.name} link add box{number} type veth peer name wire netns {home.name}")
            _ip(f"-n {router.name} link set box{number} master inside up")
            _ip(f"-n {home.name} address add {home.ipv4}/24 dev wire")
            _ip(f"-n {home.name} link set lo up")
            _ip(f"-n {home.name} link set wire up")
            _ip(f"-n {home.name} route add default via 192.168.7.1")
            made.append(home)
        router.masquerade()
        yield made


@contextmanager
def behind(router: Namespace) -> Iterator[Namespace]:
    """One namespace behind a router, as `all_behind` has them."""
    with all_behind(router, "home") as (home,):
        yield home


def _ip(words: str) -> None:
    done = subprocess.run(["ip", *words.split()], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"ip {words}: {done.stderr.strip()}"


# From linux/netfilter/nfnetlink.h and nf_tables.h.
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEWTABLE, _NEWCHAIN, _NEWRULE = 0xA00, 0xA03, 0xA06
_REQUEST, _ACK, _CREATE = 0x1, 0x4, 0x400
_INET = 1
_NESTED = 0x8000


def _attribute(kind: int, value: bytes | int | list[bytes]) -> bytes:
    if isinstance(value, list):
        kind, data = kind | _NESTED, b"".join(value)
    else:
        data = value if isinstance(value, bytes) else struct.pack(">I", value)
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _message(kind: int, flags: int, sequence: int, family: int, resource: int, *attributes: bytes) -> bytes:
    body = struct.pack(">BBH", family, 0, resource) + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(body), kind, flags | _REQUEST, sequence, 0) + body


def _expression(name: str, *attributes: bytes) -> bytes:
    return _attribute(1, [_text(1, name), _attribute(2, list(attributes))])


def _compare(value: bytes) -> bytes:
    return _expression("cmp", _attribute(1, 1), _attribute(2, 0), _attribute(3, [_attribute(1, value)]))


_REGISTER = _attribute(1, 1)
_FLAGS_OFFSET, _FLAGS_LENGTH = 13, 1  # in a TCP header
_DROP_OPENING_SEGMENTS = [
    _expression("meta", _attribute(2, 16), _REGISTER),  # the transport protocol
    _compare(bytes([socket.IPPROTO_TCP])),
    _expression("payload", _REGISTER, _attribute(2, 2), _attribute(3, _FLAGS_OFFSET), _attribute(4, _FLAGS_LENGTH)),
    _expression(
        "bitwise",
        _REGISTER,
        _attribute(2, 1),
        _attribute(3, _FLAGS_LENGTH),
        _attribute(4, [_attribute(1, b"\x12")]),  # syn | ack
        _attribute(5, [_attribute(1, b"\x00")]),
    ),
    _compare(b"\x02"),  # syn
    _expression("immediate", _attribute(1, 0), _attribute(2, [_attribute(2, [_attribute(1, 0)])])),  # drop
]
# Name: type of chain, hook, priority, expressions.
_RULES = {
    "firewall": ("filter", 1, 0, _DROP_OPENING_SEGMENTS),
    "nat": ("nat", 4, 100, [_expression("masq")]),
}


def _add_rule(table: str) -> None:
    chain, hook_number, priority, expressions = _RULES[table]
    hook = _attribute(4, [_attribute(1, hook_number), _attribute(2, priority)])
    create = _CREATE | _ACK
    batch = [
        _message(_BATCH_BEGIN, 0, 0, 0, 0xA),
        _message(_NEWTABLE, create, 1, _INET, 0, _text(1, table)),
        _message(_NEWCHAIN, create, 2, _INET, 0, _text(1, table), _text(3, "chain"), hook, _text(7, chain)),
        _message(_NEWRULE, create, 3, _INET, 0, _text(1, table), _text(2, "chain"), _attribute(4, expressions)),
        _message(_BATCH_END, 0, 4, 0, 0xA),
    ]
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netlink:  # NETLINK_NETFILTER
        netlink.settimeout(10)
        netlink.send(b"".join(batch))
        answered: set[int] = set()
        while answered != {1, 2, 3}:
            answer = netlink.recv(1 << 16)
            while answer:
                length, _, _, sequence, _, error = struct.unpack_from("=IHHIIi", answer)
                if error:
                    raise OSError(-error, f"nf_tables refused message {sequence}: {os.strerror(-error)}")
                answered.add(sequence)
                answer = answer[(length + 3) // 4 * 4 :]


if __name__ == "__main__":
    _add_rule(sys.argv[1])
