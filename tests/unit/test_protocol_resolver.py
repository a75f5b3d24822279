"""Names are looked up elsewhere, and a name that is none is an empty answer."""

import threading

import pytest

from protocol.credentials.records import Endpoint
from protocol.transport.addresses import MAX_LOOKUPS, Resolver
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
