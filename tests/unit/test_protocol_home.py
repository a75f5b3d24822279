"""What a node hears from its router and its own network is hostile: bounded, checked, and waited for by nobody."""

import ipaddress
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import zeroconf
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from protocol.credentials.records import Address, Endpoint
from protocol.transport import local_discovery, nat_pmp, port_mapping, upnp
from protocol.transport.local_discovery import MAX_HEARD, LocalDiscovery, swarm_label, told_addresses
from protocol.transport.port_mapping import MAX_REASON, Mapping, PortMapping, ask_by_upnp, read_answer
from tests.waiting import wait_until

KEY = bytes(range(32))
HERE = [ipaddress.IPv4Interface("192.168.0.7/24"), ipaddress.IPv4Interface("10.1.0.7/16")]


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        (b'{"external": "198.41.0.4"}', Mapping("198.41.0.4")),
        (
            b'{"external": "100.64.0.9"}',
            Mapping("100.64.0.9", "the router is itself behind another one, which knows it"),
        ),
        (b'{"external": "example.org"}', Mapping(failure="the router names no address of its own")),
        (b'{"failure": "no\\u001b[2J"}', Mapping(failure="no?[2J")),
        (b"{}", Mapping(failure="the router names no address of its own")),
        (b"", Mapping(failure="the router's answer cannot be read")),
        (b"[" * 4096, Mapping(failure="the router's answer cannot be read")),
        (b"[]", Mapping(failure="the router's answer cannot be read")),
    ],
)
def test_what_a_router_says_is_read_as_an_address_or_a_reason(answer: bytes, read: Mapping) -> None:
    said = read_answer(answer)
    assert said.external == read.external and said.failure.startswith(read.failure)
    assert bool(said.failure) == bool(read.failure)


@given(st.binary(max_size=200) | st.text().map(lambda text: f'{{"failure": "{text}"}}'.encode()))
def test_nothing_that_a_router_says_raises_or_is_long(answer: bytes) -> None:
    said = read_answer(answer)
    assert said.external == "" and len(said.failure) <= MAX_REASON and said.failure.isprintable()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "failure"),
    [
        ("import time; time.sleep(1000)", "cannot be read"),
        ("import os; os.abort()", "cannot be read"),
        ("import sys\nwhile True: sys.stdout.write('[' * 1000)", "cannot be read"),
    ],
    ids=["it hangs", "it crashes", "it never ends to talk"],
)
def test_a_router_that_breaks_who_asks_it_breaks_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, failure: str
) -> None:
    (tmp_path / "upnp.py").write_text(program)
    monkeypatch.setattr(port_mapping, "PROGRAM", tmp_path / "upnp.py")
    monkeypatch.setattr(port_mapping, "ANSWER_S", 0.3)
    monkeypatch.setattr(port_mapping, "find_spec", lambda _: "is there")
    assert failure in ask_by_upnp("map", 4001).failure


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_mapping, "find_spec", lambda _: None)
    assert "pip install miniupnpc" in ask_by_upnp("map", 4001).failure


class NatPmpRouter:
    """Answers NAT-PMP on loopback, by verb, after `deaf` questions; each one's verb and seconds are in `asked`."""

    def __init__(self, answers: dict[int, bytes], deaf: int = 0) -> None:
        self.asked: list[tuple[int, int]] = []
        self._answers, self._deaf = answers, deaf
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        while question := self._socket.recvfrom(64):
            words, asker = question
            if words == b"end":
                return
            self.asked.append((words[1], int.from_bytes(words[8:12], "big")))
            if len(self.asked) > self._deaf and words[1] in self._answers:
                self._socket.sendto(self._answers[words[1]], asker)

    def stop(self) -> None:
        """Hear what was asked so far, and end."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"end", ("127.0.0.1", self.port))
        self._thread.join(10)
        self._socket.close()


def nat_pmp_answers(*, port: int = 4001, result: int = 0) -> dict[int, bytes]:
    """Return what a router answers that gives that port, or refuses, for each verb."""
    head = result.to_bytes(2, "big") + bytes(4)
    mapped = b"\0\x82" + head + (4001).to_bytes(2, "big") + port.to_bytes(2, "big") + (3600).to_bytes(4, "big")
    return {0: b"\0\x80" + head + bytes([198, 41, 0, 4]), 2: mapped}


SHORT, LONG = 0.02, 20.0  # seconds to wait where no answer comes, and where one does


@pytest.mark.slow
@pytest.mark.parametrize(
    ("router", "waits", "verb", "said", "asked"),
    [
        ((nat_pmp_answers(),), (LONG,), "map", {"external": "198.41.0.4"}, [(2, 3600), (0, 0)]),
        ((nat_pmp_answers(), 1), (SHORT, LONG), "unmap", {}, [(2, 0)] * 2),
        (
            (nat_pmp_answers(port=4002),),
            (LONG,),
            "map",
            {"failure": "the router forwards port 4001 to another machine: listen on another port"},
            [(2, 3600), (2, 0)],  # and the other port is given back
        ),
        (
            (nat_pmp_answers(result=2),),
            (LONG,),
            "map",
            {"failure": "the router refuses to forward the port by NAT-PMP: its owner does not allow it"},
            [(2, 3600)],
        ),
        (({2: b"\0\x82"},), (SHORT,) * 3, "map", {"failure": nat_pmp.SILENT}, [(2, 3600)] * 3),
        (({2: b"\0\x80" + bytes(14)},), (SHORT,) * 3, "map", {"failure": nat_pmp.SILENT}, [(2, 3600)] * 3),
        (({},), (SHORT,) * 3, "unmap", {"failure": nat_pmp.SILENT}, [(2, 0)] * 3),
        ((nat_pmp_answers(),), (LONG,), "unmap", {}, [(2, 0)]),
    ],
    ids=["granted", "a question lost", "another port", "refused", "cut short", "of another verb", "silent", "back"],
)
def test_a_router_is_asked_by_nat_pmp_again_until_it_answers_and_what_it_answers_is_checked(
    monkeypatch: pytest.MonkeyPatch, router: tuple, waits: tuple, verb: str, said: dict, asked: list
) -> None:
    there = NatPmpRouter(*router)
    monkeypatch.setattr(nat_pmp, "PORT", there.port)
    monkeypatch.setattr(nat_pmp, "WAITS_S", waits)
    try:
        assert nat_pmp.act(verb, 4001, "127.0.0.1") == said
    finally:
        there.stop()
    assert there.asked == asked


@pytest.mark.parametrize(
    ("routes", "gateway"),
    [
        ("wire 0007A8C0 00000000 0001 0 0 0 00FFFFFF\nwire 00000000 0107A8C0 0003 0 0 0 00000000", "192.168.7.1"),
        ("wire 0007A8C0 00000000 0001 0 0 0 00FFFFFF", None),
        ("wire 00000000 00000000 0001 0 0 0 00000000", None),  # a line to one other machine has no gateway
        ("nonsense", None),
        (None, None),
    ],
)
def test_the_router_is_the_default_gateway(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, routes: str | None, gateway: str | None
) -> None:
    monkeypatch.setattr(nat_pmp, "ROUTES", tmp_path / "route")
    if routes is not None:
        (tmp_path / "route").write_text(f"Iface Destination Gateway Flags RefCnt Use Metric Mask\n{routes}\n")
    assert nat_pmp.default_gateway() == gateway
    if gateway is None:
        assert nat_pmp.act("map", 4001) == {"failure": nat_pmp.SILENT}


class Router:
    """Answers what it is told to; `asked` is what it was asked."""

    def __init__(self, *answers: Mapping) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    def __call__(self, verb: str, port: int) -> Mapping:
        self.asked.append((verb, port))
        return self.answers.pop(0) if self.answers else Mapping("198.41.0.4")


def test_a_mapping_is_renewed_its_news_are_told_once_and_it_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_mapping, "RENEWAL_S", 0.0)
    monkeypatch.setattr(port_mapping, "RETRY_S", 0.0)
    router, told = Router(Mapping(failure="no router"), Mapping(failure="no router")), []
    mapping = PortMapping(4001, told.append, [router])
    mapping.start()
    wait_until(lambda: len(router.asked) > 4, 10, "renewals")
    mapping.stop()
    assert told == [Mapping(failure="no router"), Mapping("198.41.0.4")]
    assert set(router.asked[:-1]) == {("map", 4001)} and router.asked[-1] == ("unmap", 4001)


@pytest.mark.parametrize(
    ("first", "second", "said", "asked"),
    [
        (Mapping("198.41.0.4"), Mapping("198.41.0.5"), Mapping("198.41.0.4"), (["map", "unmap"], [])),
        (
            Mapping("100.64.0.9", "behind"),
            Mapping("198.41.0.5"),
            Mapping("100.64.0.9", "behind"),
            (["map", "unmap"], []),
        ),
        (Mapping(failure="no UPnP"), Mapping("198.41.0.5"), Mapping("198.41.0.5"), (["map"], ["map", "unmap"])),
        (Mapping(failure="no"), Mapping(failure="nor"), Mapping(failure="no; nor"), (["map"], ["map"])),
        (Mapping(failure="taken"), Mapping(failure="taken"), Mapping(failure="taken"), (["map"], ["map"])),
    ],
)
def test_one_way_is_tried_after_the_other_and_the_port_is_given_back_in_the_way_that_got_it(
    first: Mapping, second: Mapping, said: Mapping, asked: tuple
) -> None:
    ways, told = (Router(first), Router(second)), []
    mapping = PortMapping(4001, told.append, ways)
    mapping.start()
    wait_until(lambda: told, 10, "the routers' word")
    mapping.stop()
    assert told == [said] and tuple([verb for verb, _ in way.asked] for way in ways) == asked


def test_nobody_waits_for_a_router_that_hangs_and_one_that_maps_nothing_is_given_nothing_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(port_mapping, "STOP_S", 0.1)
    hang, asked = threading.Event(), []

    def ask(verb: str, port: int) -> Mapping:
        asked.append(verb)
        hang.wait(20)
        return Mapping(failure="too late")

    mapping = PortMapping(4001, lambda said: None, [ask])
    mapping.start()
    wait_until(lambda: asked, 10, "it to be asked")
    mapping.stop()
    hang.set()
    mapping._thread.join(10)
    assert asked == ["map"]


class Igd:
    """miniupnpc's UPnP, for a router that has `held`, and refuses as `refusals` say, one after the other."""

    lanaddr = "192.168.0.7"

    def __init__(self, *refusals: str, held: tuple | None = None, here: bool = True) -> None:
        self.refusals, self.held, self.here = list(refusals), held, here
        self.done: list = []

    def discover(self) -> int:
        return 0

    def selectigd(self) -> None:
        if not self.here:
            raise Exception("No UPnP device discovered")  # as the library does

    def getspecificportmapping(self, port: int, protocol: str) -> tuple | None:
        return self.held

    def addportmapping(self, *what: object) -> None:
        if self.refusals:
            raise Exception(self.refusals.pop(0))  # as the library does
        self.done.append(what)

    def deleteportmapping(self, *what: object) -> None:
        self.done.append(what)

    def externalipaddress(self) -> str:
        return "198.41.0.4"


@pytest.mark.parametrize(
    ("igd", "verb", "said", "done"),
    [
        (Igd(), "map", {"external": "198.41.0.4"}, [(4001, "TCP", "192.168.0.7", 4001, "gossamer", "", 3600)]),
        (
            Igd("OnlyPermanentLeasesSupported"),
            "map",
            {"external": "198.41.0.4"},
            [(4001, "TCP", "192.168.0.7", 4001, "gossamer", "", 0)],
        ),
        (Igd("Forbidden"), "map", {"failure": "the router refuses to forward port 4001: Forbidden"}, []),
        (Igd(here=False), "map", {"failure": "no router of this network answers UPnP"}, []),
        (Igd(held=("192.168.0.7", 4001)), "unmap", {}, [(4001, "TCP")]),
        (
            Igd(held=("192.168.0.9", 4001)),
            "map",
            {"failure": "the router forwards port 4001 to another machine: listen on another port"},
            [],
        ),
        (
            Igd(held=("192.168.0.9", 4001)),
            "unmap",
            {"failure": "the router forwards port 4001 to another machine: listen on another port"},
            [],
        ),
    ],
)
def test_the_router_is_asked_for_a_lease_and_nobody_elses_port_is_touched(
    monkeypatch: pytest.MonkeyPatch, igd: Igd, verb: str, said: dict, done: list
) -> None:
    monkeypatch.setitem(sys.modules, "miniupnpc", SimpleNamespace(UPnP=lambda: igd))  # type: ignore[arg-type]
    assert (upnp.act(verb, 4001), igd.done) == (said, done)


@pytest.mark.parametrize(
    ("port", "hosts", "key", "told"),
    [
        (4001, ["192.168.0.9"], KEY.hex().encode(), ["192.168.0.9"]),
        (4001, ["198.41.0.4", "not one", "fd77::1", "10.2.0.1", "10.1.9.9"], KEY.hex().encode(), ["10.1.9.9"]),
        # Ours is not the other's: docker0 has one address on every machine.
        (4001, ["10.1.0.7", "192.168.0.9", "10.1.9.9"], KEY.hex().encode(), ["192.168.0.9", "10.1.9.9"]),
        (4001, ["10.1.0.7"], KEY.hex().encode(), ["10.1.0.7"]),  # another node of this machine
        (4001, ["10.1.0.7", "192.168.1.9"], KEY.hex().encode(), []),  # of another machine, which has Docker, too
        (4001, [f"10.1.2.{number}" for number in range(99)], KEY.hex().encode(), [f"10.1.2.{n}" for n in range(4)]),
        (4001, ["198.41.0.4"], KEY.hex().encode(), []),  # we dial no third party
        (4001, ["192.168.1.9"], KEY.hex().encode(), []),  # nor another network of this house
        (4001, ["127.0.0.1"], KEY.hex().encode(), []),
        (4001, [], KEY.hex().encode(), []),
        (0, ["192.168.0.9"], KEY.hex().encode(), []),
        (None, ["192.168.0.9"], KEY.hex().encode(), []),
        (70000, ["192.168.0.9"], KEY.hex().encode(), []),
        (4001, ["192.168.0.9"], None, []),
        (4001, ["192.168.0.9"], b"\xff" * 64, []),
        (4001, ["192.168.0.9"], KEY.hex().encode() + b"0", []),
    ],
)
def test_a_neighbour_counts_on_this_machine_or_at_others_addresses_of_the_networks_that_we_are_in(
    port, hosts, key, told
) -> None:
    assert told_addresses(port, hosts, key, HERE) == [Address(Endpoint(host, 4001), KEY) for host in told]


def test_names_of_our_swarm_alone_are_followed_up_each_once_and_a_bounded_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_discovery, "private_interfaces", lambda: HERE)
    found: list[Address] = []
    asked: list[str] = []
    discovery = LocalDiscovery(b"a swarm of tests", KEY, "0.0.0.0", 4001, found.append)

    def info(kind: str, name: str, timeout: int) -> SimpleNamespace:
        asked.append(name)
        key = (KEY if "me" in name else bytes(32)).hex().encode()
        return SimpleNamespace(port=4001, parsed_addresses=lambda: ["192.168.0.9"], properties={b"key": key})

    network, added = SimpleNamespace(get_service_info=info), SimpleNamespace(name="Added")
    ours = swarm_label(b"a swarm of tests")
    for name in ("printer", f"{swarm_label(b'another')}-1", f"{ours}-1", f"{ours}-1", f"{ours}-me"):
        discovery._changed(network, local_discovery.TYPE, name, added)  # type: ignore[arg-type]
    assert asked == [f"{ours}-1", f"{ours}-me"] and found == [Address(Endpoint("192.168.0.9", 4001), bytes(32))]
    for number in range(1000):
        discovery._changed(network, local_discovery.TYPE, f"{ours}-x{number}", added)  # type: ignore[arg-type]
    assert len(asked) == MAX_HEARD


def test_a_name_of_another_kind_of_service_does_not_end_the_thread_that_hears_names() -> None:
    ours = swarm_label(b"a swarm of tests")
    discovery = LocalDiscovery(b"a swarm of tests", KEY, "0.0.0.0", 4001, lambda address: None)
    network = SimpleNamespace(get_service_info=lambda kind, name, timeout: zeroconf.ServiceInfo(kind, name))
    for name in (f"{ours}-1._printer._tcp.local.", f"{ours}-1", f"{ours}-1..{local_discovery.TYPE}"):
        discovery._changed(network, local_discovery.TYPE, name, SimpleNamespace(name="Added"))  # type: ignore[arg-type]


def test_a_network_without_room_for_it_is_told_once_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def refuse(**_: object) -> None:
        tries.append(1)
        raise OSError("no buffers")

    monkeypatch.setattr(local_discovery, "private_interfaces", lambda: HERE)
    monkeypatch.setattr(local_discovery, "LOOK_S", 0.0)
    monkeypatch.setattr("zeroconf.Zeroconf", refuse)
    discovery = LocalDiscovery(b"a swarm of tests", KEY, "0.0.0.0", 4001, lambda address: None)
    with capture_logs() as said:
        discovery.start()
        wait_until(lambda: len(tries) > 3, 10, "it to be tried again")
        discovery.stop()
    assert [line["reason"] for line in said] == ["OSError('no buffers')"]


def test_what_is_announced_is_the_hash_of_the_swarm_the_key_and_where_it_listens() -> None:
    discovery = LocalDiscovery(b"a swarm of tests", KEY, "0.0.0.0", 4001, lambda address: None)
    info = discovery._announcement(HERE)
    assert info.name == f"{swarm_label(b'a swarm of tests')}-{KEY.hex()[:12]}.{local_discovery.TYPE}"
    assert (info.port, info.parsed_addresses()) == (4001, ["192.168.0.7", "10.1.0.7"])
    assert info.properties == {b"key": KEY.hex().encode()}
