"""What counts as one network, and what one network may do."""

import pytest

from protocol.config import Limits
from protocol.limits.rate_limits import MAX_PREFIXES, Prefixes, prefix_of


@pytest.mark.parametrize(
    ("address", "prefix"),
    [
        ("192.0.2.77", "192.0.2.0/24"),
        ("::ffff:192.0.2.77", "192.0.2.0/24"),
        ("2001:db8:1:2ff:3::1", "2001:db8:1:200::/56"),
        ("fe80::1%eth0", "fe80::/56"),
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.2", "127.0.0.2"),
        ("::1", "::1"),
        ("no address", "no address"),
    ],
)
def test_the_prefix_of_an_address(address: str, prefix: str) -> None:
    assert prefix_of(address) == prefix


def test_each_prefix_has_its_own_buckets() -> None:
    prefixes = Prefixes(Limits(prefix_handshakes_burst=2, prefix_handshakes_per_second=1, prefix_bytes_burst=10))
    assert [prefixes.may_connect("a", 0.0) for _ in range(3)] == [True, True, False]
    assert prefixes.may_connect("b", 0.0)
    assert prefixes.may_connect("a", 1.0)
    assert prefixes.may_send("a", 1, 10, 0.0)
    assert not prefixes.may_send("a", 1, 1, 0.0)


def test_a_prefix_that_goes_on_is_remembered_among_any_number_of_others() -> None:
    prefixes = Prefixes(Limits(prefix_handshakes_burst=1, prefix_handshakes_per_second=0))
    assert prefixes.may_connect("a", 0.0)
    for other in range(2 * MAX_PREFIXES):
        prefixes.may_connect(str(other), 0.0)
        if other % 1000 == 0:
            assert not prefixes.may_connect("a", 0.0)
