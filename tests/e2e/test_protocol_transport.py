"""The ZeroMQ transport by itself: names, both families, endings, and hostile nodes that we dialled."""

import os
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import psutil
import pytest
import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from protocol.credentials.records import Address, Endpoint
from protocol.events import Accepted, Arrived, Closed, Link, NetworkEvent, Opened, RefusedEarly
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.limits.networks import Scope, read_address
from protocol.transport import inbound
from protocol.transport.sockets import MAX_DESCRIPTORS
from protocol.transport.zeromq import ZmqTransport
from tests.waiting import wait_until
from tests.withholding import Withholding


class Node:
    """A transport with its identity and everything that happened."""

    def __init__(self, listen: str | None = "tcp://127.0.0.1:0", **options) -> None:
        self.identity = Identity.generate()
        endpoint = None if listen is None else Endpoint.parse(listen, bind=True)
        self.transport = ZmqTransport(self.identity, endpoint, **options)
        self.seen: list[NetworkEvent] = []

    def address(self, host: str | None = None) -> Address:
        endpoint = self.transport.endpoint
        assert endpoint is not None
        return Address(Endpoint(host or endpoint.host, endpoint.port), self.identity.curve_key)

    def wait_for(self, what: type, *others: "Node", **fields: object) -> NetworkEvent:
        """Poll, and the others too, until an event with these fields was seen."""

        def seen() -> NetworkEvent | None:
            for node in (self, *others):
                node.seen += node.transport.poll(0.01)
            match = (e for e in self.seen if isinstance(e, what) and all(getattr(e, f) == v for f, v in fields.items()))
            return next(match, None)

        return wait_until(seen, 20, f"{what.__name__} {fields} among {self.seen[-5:]}")


@contextmanager
def nodes(*made: Node) -> Iterator[tuple[Node, ...]]:
    try:
        yield made
    finally:
        for node in made:
            node.transport.close()


def meet(server: Node, client: Node, host: str | None = None) -> tuple[Link, Link]:
    """Let the client dial; return the server's link to the client and the client's to the server."""
    there = Link(server.identity.curve_key, dialled=True)
    here = Link(client.identity.curve_key, dialled=False)
    server.seen.clear()
    client.seen.clear()
    client.transport.dial(server.address(host))
    opened = client.wait_for(Opened, server, link=there)
    assert client.transport.send(there, b"hello")
    accepted = server.wait_for(Accepted, client, link=here)
    server.wait_for(Arrived, client, link=here, frame=b"hello")
    assert isinstance(opened, Opened) and isinstance(accepted, Accepted)
    for seen_at in (opened.host, accepted.host):
        address = read_address(seen_at)
        assert address is not None and address.is_loopback
    assert server.transport.send(here, b"welcome")
    client.wait_for(Arrived, server, link=there, frame=b"welcome")
    return here, there


def resolve_to(monkeypatch: pytest.MonkeyPatch, name: str, *addresses: str) -> None:
    def look_up(host: str, port: int | None, *args: object, **options: object) -> list:
        assert host == name
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in addresses
        ]

    monkeypatch.setattr("socket.getaddrinfo", look_up)


@pytest.mark.parametrize(
    ("listen", "addresses"),
    [
        ("tcp://127.0.0.1:0", ["127.0.0.1"]),
        ("tcp://[::1]:0", ["::1"]),
        ("tcp://127.0.0.1:0", ["::1", "127.0.0.1"]),  # nobody listens on the first
        ("tcp://[::1]:0", ["127.0.0.1", "::1"]),
        ("tcp://127.0.0.1:0", ["::1", "127.0.0.2", "127.0.0.1"]),
    ],
)
def test_a_name_is_dialled_at_whichever_of_its_addresses_answers(
    monkeypatch: pytest.MonkeyPatch, listen: str, addresses: list[str]
) -> None:
    resolve_to(monkeypatch, "box.example", *addresses)
    with nodes(Node(listen), Node(None)) as (server, client):
        meet(server, client, "box.example")


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["::1"], ["::1", "127.0.0.1"]])
def test_a_listener_on_a_name(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> None:
    resolve_to(monkeypatch, "box.example", *addresses)
    with nodes(Node("tcp://box.example:0"), Node(None)) as (server, client):
        assert server.address().endpoint.host == "box.example"
        meet(server, client)


def test_a_listener_on_every_address_of_both_families() -> None:
    with nodes(Node("tcp://[::]:0"), Node(None), Node(None)) as (server, four, six):
        meet(server, four, "127.0.0.1")
        meet(server, six, "::1")


def test_an_address_to_which_there_is_no_route_is_given_up_at_once() -> None:
    with nodes(Node(None)) as (client,):
        link = Link(bytes(32), dialled=True)
        client.transport.dial(Address(Endpoint("255.255.255.255", 5), link.key))
        client.wait_for(Closed, link=link)


def test_a_name_that_is_none_closes_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "nowhere.example")
    with nodes(Node(None)) as (client,):
        link = Link(bytes(32), dialled=True)
        client.transport.dial(Address(Endpoint("nowhere.example", 5), link.key))
        client.wait_for(Closed, link=link)


def test_a_strangers_name_that_means_this_machine_is_not_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "box.example", "127.0.0.1", "10.0.0.1", "::1", "0.0.0.0")
    with nodes(Node(), Node(None)) as (server, client):
        client.transport.dial(server.address("box.example"), Scope.PUBLIC)
        client.wait_for(Closed, server, link=Link(server.identity.curve_key, dialled=True))
        meet(server, client, "box.example")  # as a person who gives it as a seed wants it


def test_hanging_up_on_who_dialled_us_ends_the_connection() -> None:
    with nodes(Node(), Node(None)) as (server, client):
        here, there = meet(server, client)
        server.transport.hang_up(here)
        client.wait_for(Closed, server, link=there)
        assert not server.transport.send(here, b"more")
        meet(server, client)


def test_the_end_of_an_inbound_link_is_noticed_without_sending() -> None:
    with nodes(Node(), Node(None)) as (server, client):
        here, there = meet(server, client)
        client.transport.send(there, b"last words")
        client.transport.poll(0)
        wait_until(lambda: server.wait_for(Arrived, client, frame=b"last words"), 5)
        client.transport.hang_up(there)
        server.wait_for(Closed, link=here)


def test_what_came_before_a_connection_ended_is_read_before_its_end_is_told() -> None:
    with nodes(Node()) as (server,), zmq.Context() as context:
        identity = Identity.generate()
        link = Link(identity.curve_key, dialled=False)
        dealer = context.socket(zmq.DEALER)
        dealer.curve_serverkey = z85.encode(server.identity.curve_key)
        dealer.curve_publickey, dealer.curve_secretkey = (
            z85.encode(half) for half in (identity.curve_key, identity.curve_secret)
        )
        dealer.connect(str(server.address().endpoint))
        dealer.send(b"hello")
        server.wait_for(Arrived, frame=b"hello")
        for number in range(20):
            dealer.send(b"%d" % number)
        dealer.close()
        context.term()  # all of it has left
        wait_until(lambda: not server.transport.send(link, b"are you there"), 10, "libzmq to know of the end")
        server.wait_for(Closed, link=link)
        assert server.seen[-21:] == [*(Arrived(link, b"%d" % number) for number in range(20)), Closed(link)]


def test_a_graylisted_key_is_refused_in_the_handshake() -> None:
    refused: set[bytes] = set()
    with nodes(Node(refuses=refused.__contains__), Node(None)) as (server, client):
        here, there = meet(server, client)
        refused.add(client.identity.curve_key)
        server.transport.hang_up(here)
        client.wait_for(Closed, server, link=there)
        client.seen.clear()
        client.transport.dial(server.address())
        client.wait_for(Closed, server, link=there)
        server.wait_for(RefusedEarly, reason="graylisted")
        assert not any(isinstance(event, Opened) for event in client.seen)


def test_handshakes_over_the_rate_of_a_prefix_get_nowhere() -> None:
    limits = Limits(prefix_handshakes_burst=3, prefix_handshakes_per_second=0)
    with nodes(Node(limits=limits), Node(None), Node(None)) as (server, first, second):
        meet(server, first)
        second.transport.dial(server.address())
        endpoint = server.address().endpoint
        kept = [socket.create_connection((endpoint.host, endpoint.port)) for _ in range(3)]
        server.wait_for(RefusedEarly, second, first, reason="handshake_flood")
        for connection in kept:
            connection.close()
        assert first.transport.send(Link(server.identity.curve_key, dialled=True), b"still here")
        server.wait_for(Arrived, first, frame=b"still here")


@pytest.mark.slow  # the deadline itself takes ten seconds
def test_who_proves_a_key_and_says_nothing_valid_is_cut() -> None:
    with nodes(Node(), Node(None), Node(None)) as (server, guest, mute):
        meet(server, guest)
        link = Link(server.identity.curve_key, dialled=True)
        mute.transport.dial(server.address())
        mute.wait_for(Opened, server, guest)
        mute.transport.send(link, b"not a hello")
        server.wait_for(RefusedEarly, guest, mute, reason="no_hello", link=Link(mute.identity.curve_key, dialled=False))
        mute.wait_for(Closed, server, guest, link=link)
        assert not any(isinstance(event, Closed) for event in guest.seen)


def acknowledged(connection: socket.socket) -> int:
    """Return how many bytes the other end's kernel has taken: tcpi_bytes_acked of Linux's struct tcp_info."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    return int(struct.unpack_from("=Q", info, 120)[0])


BUSY = """
import time
from protocol.credentials.records import Endpoint
from protocol.identity import Identity
from protocol.transport.zeromq import ZmqTransport
identity = Identity.generate()
transport = ZmqTransport(identity, Endpoint.parse("tcp://127.0.0.1:0", bind=True))
print(transport.endpoint.port, identity.curve_key.hex(), flush=True)
while not transport.poll(0.1):
    pass
time.sleep(8)
print(len(transport.poll(1.0)) > 0, flush=True)
"""


@pytest.mark.slow  # a heartbeat of libzmq's, 5 seconds after the last, would end the process
def test_connections_that_are_reset_while_a_node_is_busy_do_not_end_its_process() -> None:
    busy = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
    assert busy.stdout is not None
    port, key = busy.stdout.readline().split()
    identity = Identity.generate()
    with zmq.Context() as context:
        dealer = context.socket(zmq.DEALER)
        dealer.linger, dealer.sndhwm = 0, 0
        dealer.curve_serverkey = z85.encode(bytes.fromhex(key))
        dealer.curve_publickey, dealer.curve_secretkey = (
            z85.encode(half) for half in (identity.curve_key, identity.curve_secret)
        )
        monitor = dealer.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        dealer.connect(f"tcp://127.0.0.1:{port}")
        descriptor = recv_monitor_message(monitor)["value"]
        recv_monitor_message(monitor)
        for _ in range(5000):
            dealer.send(bytes(100))
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed by a reset
            wait_until(lambda: acknowledged(connection) > 100_000, 20, "more to have come than a busy node takes in")
        dealer.disable_monitor()
        monitor.close()
        dealer.close()
    assert busy.communicate(timeout=30)[0] == "True\n"
    assert busy.returncode == 0


def hostile_listener(identity: Identity) -> tuple[zmq.Socket, Address]:
    context: zmq.Context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.linger = 0
    router.curve_server = True
    router.curve_publickey = z85.encode(identity.curve_key)
    router.curve_secretkey = z85.encode(identity.curve_secret)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    return router, Address(Endpoint("127.0.0.1", port), identity.curve_key)


@pytest.mark.parametrize(
    ("size", "count", "reason"), [(100_000, 400, "endless_message"), (5 << 20, 1, "framing"), (10, 3, "malformed")]
)
def test_a_node_that_we_dialled_is_measured_too(size: int, count: int, reason: str) -> None:
    identity = Identity.generate()
    router, address = hostile_listener(identity)
    relay = Withholding(address, size * (count - 1), of_target=True)
    relay.allow(10_000)
    try:
        with nodes(Node(None)) as (client,):
            link = Link(identity.curve_key, dialled=True)
            client.transport.dial(relay.address if reason == "endless_message" else address)
            client.wait_for(Opened)
            client.transport.send(link, b"hello")
            assert router.poll(10_000)
            who, _ = router.recv_multipart()
            router.send_multipart([who, *[bytes(size)] * count])
            client.wait_for(RefusedEarly, reason=reason, link=link)
            if reason != "malformed":
                client.wait_for(Closed, link=link)
    finally:
        router.context.destroy(linger=0)


def test_a_service_of_others_that_is_dialled_for_a_node_is_no_offender_and_neither_is_its_network() -> None:
    """Whoever signs a record chooses what is dialled: no key was proven there."""
    key, limits = Identity.generate().curve_key, Limits()
    with socket.create_server(("127.0.0.1", 0)) as server, nodes(Node(None, limits=limits)) as (node,):
        link = Link(key, dialled=True)
        for banner in (b"SSH-2.0-OpenSSH_9.6\r\n", b"-ERR unknown command\r\n", b"\x15\x03\x03\x00\x02\x02\x46" * 10):
            node.seen.clear()
            node.transport.dial(Address(Endpoint("127.0.0.1", server.getsockname()[1]), key))
            server.settimeout(0.0)

            def come() -> socket.socket | None:
                node.seen += node.transport.poll(0.01)
                with suppress(BlockingIOError):
                    return server.accept()[0]
                return None

            with wait_until(come, 20, "the node to dial") as service:
                service.sendall(banner)
                node.wait_for(Closed, link=link)
            assert not [event for event in node.seen if isinstance(event, RefusedEarly)]


def test_descriptors_are_given_back() -> None:
    with nodes(Node()) as (server,):
        before = psutil.Process().num_fds()
        for _ in range(5):
            with nodes(Node(None), Node(None)) as (one, two):
                meet(server, one)
                here, _ = meet(server, two)
                server.transport.hang_up(here)
            server.wait_for(Closed)
            server.seen.clear()
        wait_until(lambda: server.transport.poll(0.01) or psutil.Process().num_fds() <= before, 20, "descriptors")


def test_a_connection_that_ends_before_we_look_does_not_get_another_socket_of_ours_cut() -> None:
    nobody = Limits(prefix_handshakes_per_second=0.0, prefix_handshakes_burst=0.0)  # whoever is looked at is cut
    with nodes(Node(limits=nobody)) as (server,):
        endpoint = server.transport.endpoint
        assert endpoint is not None

        def connections() -> int:
            found = psutil.Process().net_connections("tcp")
            return sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == endpoint.port for c in found)

        stranger = socket.create_connection((endpoint.host, endpoint.port))
        wait_until(connections, 20, "libzmq to accept")
        stranger.close()
        wait_until(lambda: not connections(), 20, "libzmq to close its descriptor")
        with socket.create_server(("127.0.0.1", 0)) as elsewhere, ExitStack() as stack:
            pairs = []
            for _ in range(20):  # one of them gets the number that libzmq used
                far = stack.enter_context(socket.create_connection(elsewhere.getsockname(), 10))
                pairs.append((far, stack.enter_context(elsewhere.accept()[0])))
            server.wait_for(RefusedEarly, reason="handshake_unfinished")
            for far, near in pairs:
                far.sendall(b"still here")
                near.settimeout(10)
                assert near.recv(20) == b"still here"


def test_without_measurements_links_work_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.transport.tcp._LINUX", False)
    with nodes(Node(), Node(None)) as (server, client):
        here, there = meet(server, client)
        client.transport.hang_up(there)
        server.wait_for(Closed, link=here)


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        with nodes(Node(None)):
            raised, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            assert raised == (MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_quiet_peer_is_answered_however_many_strangers_came_since_and_those_leave_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inbound, "MAX_KEYS", 2)
    server, quiet, strangers = Node(), Node(None), [Node(None) for _ in range(4)]
    with nodes(server, quiet, *strangers):
        here, there = meet(server, quiet)
        links = [meet(server, stranger)[0] for stranger in strangers]
        assert server.transport.send(here, b"still here")
        quiet.wait_for(Arrived, server, link=there, frame=b"still here")
        for link, stranger in zip(links, strangers, strict=True):
            stranger.transport.close()
            server.wait_for(Closed, link=link)
            assert not server.transport.send(link, b"are you there?")
