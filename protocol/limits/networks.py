"""Networks: which addresses one attacker may hold together, and from how far an address can be reached.

Keys cost nothing, addresses do. The smallest network that an attacker rents is about a /24 of IPv4, or a /48 of IPv6:
the most that a customer of a hosting company gets easily (RFC 6177). As many homes share a /48 as share a /24.
"""

import ipaddress
from enum import IntEnum
from functools import lru_cache

IPV4_NETWORK_BITS, IPV6_NETWORK_BITS = 24, 48
IPV6_SEGMENT_BITS = 64  # the least that a customer gets (RFC 6177)
TUNNELS = ipaddress.IPv6Network("2002::/16"), ipaddress.IPv6Network("2001::/32")  # 6to4 and Teredo, from anywhere
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # how a machine without IPv4 sees IPv4 addresses (RFC 6052)
MAX_CACHED = 4096


class Scope(IntEnum):
    """From how far an address can be reached: larger is farther."""

    LOOPBACK = 0
    PRIVATE = 1  # RFC 1918, RFC 4193, RFC 6598, link-local, site-local (RFC 3879), and what is reserved
    PUBLIC = 2


@lru_cache(maxsize=MAX_CACHED)
def scope_of(host: str) -> Scope:
    """Return the scope of an address; a name counts as public until it is resolved."""
    parsed = read_address(host)
    if parsed is None:
        return Scope.LOOPBACK if host == "localhost" else Scope.PUBLIC
    if parsed.is_loopback or parsed.is_unspecified:  # connecting to 0.0.0.0 is connecting to ourselves
        return Scope.LOOPBACK
    if isinstance(parsed, ipaddress.IPv6Address):
        if any(parsed in tunnel for tunnel in TUNNELS):  # private for newer versions of Python
            return Scope.PUBLIC
        if parsed.is_site_local:
            return Scope.PRIVATE
    return Scope.PUBLIC if parsed.is_global else Scope.PRIVATE


@lru_cache(maxsize=MAX_CACHED)
def netgroup(host: str) -> str:
    """Return the public network of a host; "" for a loopback or private address.

    It is a /24 of IPv4, a /48 of IPv6, or the last two labels of a name.
    """
    if read_address(host) is None and scope_of(host) is Scope.PUBLIC:
        return ".".join(host.lower().rstrip(".").split(".")[-2:])
    return _public_prefix(host, IPV6_NETWORK_BITS)


@lru_cache(maxsize=MAX_CACHED)
def segment(host: str) -> str:
    """Return the part of a public network in which an attacker has few addresses, seen from a machine that is in it.

    It is a /24 of IPv4, or a /64 of IPv6: who rents a machine elsewhere in a /48 has a /64 of addresses of its own. A
    name is in none.
    """
    return _public_prefix(host, IPV6_SEGMENT_BITS)


def _public_prefix(host: str, ipv6_bits: int) -> str:
    """Return the /24 of a public IPv4 address, or so many bits of a public IPv6 address; "" for all else."""
    parsed = read_address(host)
    if parsed is None or scope_of(host) is not Scope.PUBLIC:
        return ""
    bits = IPV4_NETWORK_BITS if parsed.version == 4 else ipv6_bits
    return str(ipaddress.ip_network((parsed, bits), strict=False))


def counts_as(host: str, own: str) -> str:
    """Return the name by which a node at `host` counts: its public network, else its private address, else `own`.

    This name is the voice with which it tells of others, its place for distances, and who pays for its connections.
    Keys cost nothing, so a node in our own network, or behind a gateway that hides its address, counts by the address
    that we see. `own`, such as its key, counts only on this machine, or where the address is not known.
    """
    return netgroup(host) or (str(read_address(host)) if scope_of(host) is Scope.PRIVATE else own)


def read_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the IP address that a host is, without a zone; None for a name."""
    try:
        parsed = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        return parsed.ipv4_mapped  # how a socket that listens on both families sees IPv4
    if isinstance(parsed, ipaddress.IPv6Address) and parsed in NAT64:
        return ipaddress.IPv4Address(parsed.packed[-4:])
    return parsed
