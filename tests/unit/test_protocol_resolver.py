"""Names are looked up elsewhere, and a name that is none is an empty answer. Which own addresses are told."""

import socket
import threading
from types import SimpleNamespace

import pytest

from protocol.credentials.records import Endpoint
from protocol.transport.addresses import MAX_LOOKUPS, Resolver, own_hosts, source_towards
from tests.waiting import wait_until


@pytest.mark.parametrize(
    ("host", "found"), [("localhost", True), ("no-such-host.invalid", False), ("a" * 64 + ".example", False)]
)
def test_an_answer_comes_and_wakes(host: str, found: bool) -> None:
    woken = threading.Event()
    resolver = Resolver(woken.set)
    assert resolver.ask("asker", Endpoint(host, 5))
    assert woken.wait(30)
    [(asker, endpoints)] = resolver.take()
    assert asker == "asker"
    assert bool(endpoints) == found
    assert all(endpoint.port == 5 for endpoint in endpoints)
    assert resolver.take() == []


def test_lookups_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: go_on.wait(30) and [])
    resolver = Resolver(lambda: None)
    assert [resolver.ask(n, Endpoint("x", 1)) for n in range(MAX_LOOKUPS + 1)] == [True] * MAX_LOOKUPS + [False]
    go_on.set()
    answers: list = []
    wait_until(lambda: answers.extend(resolver.take()) or len(answers) == MAX_LOOKUPS, 30, "the answers")
    assert resolver.ask("again", Endpoint("x", 1))


FOUR, SIX = socket.AF_INET, socket.AF_INET6
INTERFACES = {
    "lo": [(FOUR, "127.0.0.1"), (SIX, "::1")],
    "down": [(FOUR, "10.9.9.9")],
    "wire": [(FOUR, "10.77.0.1"), (SIX, "fe80::1%wire"), (SIX, "fd77::1"), (FOUR, "10.78.0.1"), (FOUR, "10.79.0.1")],
}


@pytest.mark.parametrize(
    ("listen", "routes", "interfaces", "told"),
    [
        ("192.168.0.7", {}, INTERFACES, ("192.168.0.7",)),
        ("0.0.0.0", {FOUR: "192.168.0.7", SIX: "2a00::7"}, INTERFACES, ("192.168.0.7",)),
        ("::", {FOUR: "192.168.0.7", SIX: "2a00::7"}, INTERFACES, ("2a00::7", "192.168.0.7")),
        ("0.0.0.0", {}, INTERFACES, ("10.77.0.1", "10.78.0.1")),
        ("*", {}, INTERFACES, ("10.77.0.1", "10.78.0.1")),
        ("::", {}, INTERFACES, ("fd77::1", "10.77.0.1", "10.78.0.1")),
        ("::", {FOUR: "192.168.0.7"}, {"lo": INTERFACES["lo"]}, ("192.168.0.7",)),
        ("0.0.0.0", {}, {"lo": INTERFACES["lo"]}, ("127.0.0.1",)),
        ("::", {}, {"lo": INTERFACES["lo"]}, ("::1",)),
    ],
)
def test_a_node_tells_the_address_on_its_default_route_or_without_one_those_of_its_interfaces(
    monkeypatch: pytest.MonkeyPatch, listen: str, routes: dict, interfaces: dict, told: tuple[str, ...]
) -> None:
    addresses = {
        name: [SimpleNamespace(family=family, address=address) for family, address in some]
        for name, some in interfaces.items()
    }
    up = {name: SimpleNamespace(isup=name != "down") for name in interfaces}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: addresses)
    monkeypatch.setattr("psutil.net_if_stats", lambda: up)
    monkeypatch.setattr(
        "protocol.transport.addresses.source_towards", lambda address: routes.get(SIX if ":" in address else FOUR)
    )
    assert own_hosts(listen) == told


@pytest.mark.slow
def test_there_is_a_route_to_this_machine_and_none_to_everybody() -> None:
    assert source_towards("127.0.0.1") == "127.0.0.1" and source_towards("255.255.255.255") is None
