"""Where a node listens, what it tells its peers of it, and how patient it is with them."""

from pathlib import Path
from typing import ClassVar

import pytest

from node.config import NetworkConfig, parse_config
from node.fleet.local_swarm import LOOPBACK, RunPlan, node_config
from node.swarm.peering import item_life, listens_at, open_network, timing_of
from protocol.credentials.records import Address
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.limits.timing import LOCAL, WAN
from protocol.transport.zeromq import ZmqTransport

KEY = Identity(bytes(32)).curve_key.hex()
HERE = f"tcp://127.0.0.1:4001?key={KEY}"
NAMED = f"tcp://localhost:4001?key={KEY}"
AWAY = f"tcp://192.0.2.7:4001?key={KEY}"
ANY = "tcp://0.0.0.0:4001"
ANY_PORT = "tcp://0.0.0.0:0"
FORWARDED = "tcp://198.51.100.1:4001"


@pytest.mark.parametrize(
    ("network", "listens", "timing"),
    [
        ({}, LOOPBACK, LOCAL),
        ({"seeds": [HERE, NAMED]}, LOOPBACK, LOCAL),
        ({"seeds": [AWAY]}, None, WAN),
        ({"seeds": [HERE, AWAY]}, None, WAN),
        ({"seeds": [AWAY], "listen": "tcp://127.0.0.1:4001"}, None, WAN),
        ({"seeds": [AWAY], "listen": ANY}, ANY, WAN),
        ({"seeds": [HERE], "listen": ANY}, ANY, WAN),
        ({"seeds": [AWAY], "advertise": [FORWARDED]}, LOOPBACK, WAN),
        ({"listen": ""}, None, WAN),
    ],
)
def test_a_node_with_seeds_elsewhere_tells_nobody_of_its_loopback(network: dict, listens: str | None, timing) -> None:
    config = NetworkConfig(**network)
    found = listens_at(config)
    assert (None if found is None else str(found)) == listens
    assert timing_of(config) is timing


class Beside:
    """Stands for what asks the router, or looks around."""

    running: ClassVar[list[str]] = []
    said = None

    def __init__(self, *what: object) -> None:
        self.name = "port" if len(what) == 2 else "peers"

    def start(self) -> None:
        self.running.append(self.name)

    def stop(self) -> None:
        self.running.remove(self.name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "host", "asks"),
    [
        ({"listen": ANY_PORT}, "192.168.0.7", ["port", "peers"]),
        ({"listen": ANY_PORT, "local": "port"}, "192.168.0.7", ["port"]),
        ({"listen": ANY_PORT, "local": "peers"}, "192.168.0.7", ["peers"]),
        ({"listen": ANY_PORT, "local": "off"}, "192.168.0.7", []),
        ({"listen": ANY_PORT, "swarm": ""}, "192.168.0.7", ["port"]),  # it was given no swarm to look for
        ({"listen": ANY_PORT}, "198.41.0.4", ["peers"]),  # no router is between
        ({"listen": ANY_PORT, "advertise": [FORWARDED]}, "192.168.0.7", ["peers"]),  # a person forwards the port
        ({"listen": ""}, "192.168.0.7", []),
        ({}, "192.168.0.7", []),
    ],
)
def test_a_node_that_listens_for_others_asks_its_router_and_looks_around_unless_it_is_told_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: dict, host: str, asks: list[str]
) -> None:
    monkeypatch.setattr("node.swarm.peering.PortMapping", Beside)
    monkeypatch.setattr("node.swarm.peering.LocalDiscovery", Beside)
    monkeypatch.setattr("protocol.host.own_hosts", lambda listen: (host,))
    with open_network(parse_config({"network": {"swarm": "ab" * 16} | network}), tmp_path):
        assert Beside.running == asks
    assert Beside.running == []


def opened(folder: Path, *seeds: str) -> list[str]:
    """Open and close the network of a node with these seeds; return the endpoints that it told of."""
    config = parse_config({"network": {"seeds": list(seeds)}})
    with open_network(config, folder) as network:
        record = network.host._core.membership.record  # type: ignore[union-attr]
        assert (network.address is None) == (record.endpoints == ())
        return [str(endpoint) for endpoint in record.endpoints]


@pytest.mark.slow
def test_it_runs_as_a_node_that_nobody_dials_and_says_how_it_could_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    (endpoint,) = opened(tmp_path, HERE)
    assert endpoint.startswith("tcp://127.0.0.1:")
    assert Address.parse((tmp_path / "address").read_text()).endpoint.is_loopback
    assert opened(tmp_path, AWAY) == []
    assert not (tmp_path / "address").exists()  # nobody answers at the one of the first start
    assert "--listen tcp://0.0.0.0:4001" in caplog.text + "".join(capfd.readouterr())


@pytest.mark.slow
def test_the_bound_that_a_person_sets_is_the_transports(tmp_path: Path, monkeypatch) -> None:
    limits: list[Limits] = []

    class Watched(ZmqTransport):
        def __init__(self, identity, listen, given, refuses) -> None:
            limits.append(given)
            super().__init__(identity, listen, given, refuses)

    monkeypatch.setattr("protocol.host.ZmqTransport", Watched)
    for network in ({"upload_limit": 250_000}, {}):
        with open_network(parse_config({"network": network}), tmp_path):
            pass
    assert [given.upload_bytes_per_second for given in limits] == [250_000.0, 0.0]


def test_a_swarm_on_this_machine_listens_on_loopback_whatever_it_is_given(tmp_path: Path) -> None:
    given = parse_config({"network": {"seeds": [AWAY], "listen": ANY, "advertise": [FORWARDED]}})
    network = node_config(RunPlan(tmp_path, "ab" * 16, 2, 1, given), 0, 2).network
    assert str(listens_at(network)) == LOOPBACK
    assert timing_of(network) is LOCAL
    assert network.seeds == []


@pytest.mark.parametrize(("given", "taken"), [(0, 2), (3, 3)])
def test_nodes_of_a_swarm_on_this_machine_share_its_cores_unless_they_are_given_threads(
    given: int, taken: int, tmp_path: Path
) -> None:
    plan = RunPlan(tmp_path, "ab" * 16, 2, 1, parse_config({"threads": given}))
    assert node_config(plan, 0, cores=4).threads == taken


def test_an_item_of_a_clock_that_is_ahead_comes_for_longer() -> None:
    assert item_life(3600) == 3600 + Limits().max_clock_ahead_s
