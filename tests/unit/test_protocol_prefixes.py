"""What counts as one network, and how far an address reaches."""

import pytest

from protocol.limits.networks import Scope, netgroup, scope_of


@pytest.mark.parametrize(
    ("host", "scope"),
    [
        ("127.0.0.1", Scope.LOOPBACK),
        ("::1", Scope.LOOPBACK),
        ("::ffff:127.0.0.1", Scope.LOOPBACK),
        ("0.0.0.0", Scope.LOOPBACK),
        ("::", Scope.LOOPBACK),
        ("localhost", Scope.LOOPBACK),
        ("10.1.2.3", Scope.PRIVATE),
        ("169.254.169.254", Scope.PRIVATE),
        ("100.64.0.1", Scope.PRIVATE),
        ("fe80::1%eth0", Scope.PRIVATE),
        ("fd00::1", Scope.PRIVATE),
        ("fec0::1", Scope.PRIVATE),
        ("::ffff:192.168.1.1", Scope.PRIVATE),
        ("64:ff9b::192.168.1.1", Scope.PRIVATE),
        ("64:ff9b::198.41.0.4", Scope.PUBLIC),
        ("2002:c629:4::1", Scope.PUBLIC),  # 6to4
        ("2001:0:c629:4::1", Scope.PUBLIC),  # Teredo
        ("198.41.0.4", Scope.PUBLIC),
        ("2001:4860:4860::8888", Scope.PUBLIC),
        ("box.example", Scope.PUBLIC),  # until it is resolved
    ],
)
def test_the_scope_of_an_address(host: str, scope: Scope) -> None:
    assert scope_of(host) is scope


@pytest.mark.parametrize(
    ("host", "group"),
    [
        ("198.41.0.4", "198.41.0.0/24"),
        ("::ffff:198.41.0.4", "198.41.0.0/24"),
        ("64:ff9b::198.41.0.4", "198.41.0.0/24"),
        ("fec0::1", ""),
        ("2001:4860:4860:7::1", "2001:4860:4860::/48"),
        ("a.b.pool.example.", "pool.example"),
        ("A.POOL.example", "pool.example"),
        ("2002:c629:4:7::1", "2002:c629:4::/48"),
        ("localhost", ""),
        ("127.0.0.1", ""),
        ("10.0.0.1", ""),
        ("fd00::1", ""),
    ],
)
def test_the_network_group_of_a_host(host: str, group: str) -> None:
    assert netgroup(host) == group
