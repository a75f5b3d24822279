"""Connections below ZeroMQ: a descriptor that is given again does not confuse one connection with another."""

import os
import socket
import struct
from collections import deque
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import zmq

from protocol.events import Accepted, Link, RefusedEarly
from protocol.limits.connections import POINT_HANDSHAKES
from protocol.limits.limits import Limits
from protocol.transport.sockets import Change, Monitor, Sources
from protocol.transport.tcp import TcpView, TcpWatch
from tests.waiting import wait_until

DIALLED, CAME = Link(b"d" * 32, dialled=True), Link(b"c" * 32, dialled=False)


def connection(server: socket.socket) -> tuple[socket.socket, socket.socket]:
    far = socket.create_connection(server.getsockname())
    return far, server.accept()[0]


def lives(descriptor: int) -> bool:
    return False


def review(watch: TcpWatch, now: float) -> None:
    watch.measure()
    watch.drained(None)
    watch.review(now)


@pytest.mark.slow
def test_the_end_of_a_dialled_connection_is_not_that_of_an_inbound_one_with_its_descriptor() -> None:
    events: deque = deque()
    watch = TcpWatch(Limits(), events)
    with socket.create_server(("127.0.0.1", 0)) as server:
        far, mine = connection(server)
        descriptor = mine.fileno()
        number = watch.connected(descriptor, lives, DIALLED)
        mine.close()  # as libzmq does; what its monitor says of that is read later
        far.close()
        far, mine = connection(server)
        if mine.fileno() != descriptor:
            os.dup2(mine.fileno(), descriptor)
        watch.accepted(descriptor, lives, 1.0)
        assert watch.took(watch.inbound(descriptor), CAME, [100])
        assert events.popleft() == Accepted(CAME, "127.0.0.1")
        watch.gone(number, None, 0.0)
        watch.forget(number)
        for second in (2.0, 3.0):
            review(watch, second)
        assert len(watch) == 1 and not events
        far.close()
        watch.gone(watch.inbound(descriptor), None, 0.0)
        for second in (4.0, 5.0):
            review(watch, second)
        assert len(watch) == 0
        mine.close()
        watch.close()


@pytest.mark.slow
def test_a_frame_for_which_libzmq_ends_a_dialled_connection_costs_its_network_though_the_link_is_forgotten() -> None:
    events: deque = deque()
    watch = TcpWatch(Limits(prefix_handshakes_burst=2 * POINT_HANDSHAKES), events)
    with socket.create_server(("127.0.0.1", 0)) as server:
        far, mine = connection(server)
        number = watch.connected(mine.fileno(), lives, DIALLED)
        mine.close()  # as libzmq does, of a connection that the other end keeps
        watch.gone(number, None, 0.0)
        watch.forget(number)
        assert list(events) == [RefusedEarly("framing", DIALLED)]
        far.close()
        far, mine = connection(server)
        watch.accepted(mine.fileno(), lives, 0.0)
        assert events[-1] == RefusedEarly("handshake_flood")
        far.close()
        mine.close()
        watch.close()


@pytest.mark.slow
def test_what_has_ended_by_the_time_it_is_looked_at_is_not_looked_at() -> None:
    watch = TcpWatch(Limits(), deque())
    with socket.create_server(("127.0.0.1", 0)) as server:
        far, mine = connection(server)
        assert watch.connected(mine.fileno(), lambda descriptor: descriptor == mine.fileno(), DIALLED) == -1
        watch.accepted(mine.fileno(), lambda descriptor: True, 1.0)
        assert len(watch) == 0 and watch.inbound(mine.fileno()) == -1
        far.close()
        mine.close()


def test_a_number_that_is_a_files_by_now_is_let_go_of_and_costs_no_descriptor(tmp_path: Path) -> None:
    watch, before = TcpWatch(Limits(), deque()), psutil.Process().num_fds()
    with (tmp_path / "file").open("wb") as file:
        for _ in range(10):
            watch.accepted(file.fileno(), lives, 1.0)
    assert len(watch) == 0 and psutil.Process().num_fds() <= before  # an earlier test's may be closed meanwhile


def test_a_number_that_is_another_socket_by_now_is_let_go_of() -> None:
    """A port scanner that comes and goes while a process is busy leaves its number to a pipe of some library."""
    watch = TcpWatch(Limits(), deque())
    one, other = socket.socketpair()
    with one, other:
        watch.accepted(other.fileno(), lives, 1.0)
    assert len(watch) == 0


def test_a_defect_in_what_a_poll_calls_is_told_and_the_poll_goes_on() -> None:
    failed: list[int] = []
    sources = Sources(lambda: failed.append(1))
    one, other = socket.socketpair()
    handled: list[bytes] = []

    def read() -> None:
        handled.append(other.recv(10))
        if len(handled) == 1:
            raise IndexError

    with one, other:
        sources.add(other.fileno(), read)
        for word in (b"bad", b"good"):
            one.send(word)
            sources.poll(1.0)
    assert handled == [b"bad", b"good"] and failed == [1]


class Descriptor(int):
    """A descriptor that counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Descriptor.compared += 1
        return int(self) == other

    __hash__ = int.__hash__


@pytest.mark.slow
def test_whether_a_connection_has_ended_is_known_without_a_search_through_all_that_happened() -> None:
    """While a node is busy, whoever connects a thousand times must not make it look a thousand times at each."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as told, context.socket(zmq.PAIR) as heard:
        for one in (told, heard):
            one.setsockopt(zmq.SNDHWM, 0)
            one.setsockopt(zmq.RCVHWM, 0)
        told.bind("inproc://told")
        heard.connect("inproc://told")
        monitor = Monitor(heard)

        def tell(event: int, descriptor: int) -> None:
            told.send_multipart([struct.pack("=hi", event, descriptor), b""])

        for descriptor in range(1000):
            tell(zmq.EVENT_DISCONNECTED, descriptor)
        tell(zmq.EVENT_ACCEPTED, 7)
        assert monitor.has_ended(7)  # the first of the two
        assert not any(monitor.has_ended(Descriptor(descriptor)) for descriptor in range(1000, 2000))
        assert Descriptor.compared < 2000
        for descriptor in range(1000):
            assert monitor.take() == Change(zmq.EVENT_DISCONNECTED, descriptor)
        assert monitor.take() == Change(zmq.EVENT_ACCEPTED, 7) and not monitor.has_ended(7)
        assert monitor.take() is None


@pytest.mark.slow
def test_a_line_that_is_full_shows_in_what_waits_and_what_was_acknowledged() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        far, mine = connection(server)
        view = TcpView(mine.fileno())
        mine.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                mine.send(bytes(1 << 16))
        full = view.measure()
        assert full is not None and full.unsent > 0 and full.received == 0

        def moved() -> bool:
            far.recv(1 << 20)
            now = view.measure()
            return now is not None and now.acknowledged > full.acknowledged

        wait_until(moved, 20)
        for owned in (view, far, mine):
            owned.close()
