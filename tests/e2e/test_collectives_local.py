"""Members on one machine find each other's Unix socket; who cannot, or finds somebody else there, goes over TCP."""

import socket
import sys
import threading

import pytest
import torch

from collectives import Op, Protection
from collectives.mesh import data_plane, mesh
from collectives.mesh.addresses import local_name
from collectives.mesh.stream import Stream
from tests.groups import group, together

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the abstract namespace is Linux's")


@pytest.fixture
def families(monkeypatch):
    """The kinds of socket that data streams are made of."""
    seen = []

    def made(peer, sock, *others):
        seen.append(sock.family)
        return Stream(peer, sock, *others)

    monkeypatch.setattr(data_plane, "Stream", made)
    return seen


def check_a_sum(comms):
    inputs = [torch.arange(1_000_000) * (i + 1) for i in range(len(comms))]
    together(*(lambda c=c, x=x: c.all_reduce(x, op=Op.SUM) for c, x in zip(comms, inputs, strict=True)))
    factor = sum(range(1, len(comms) + 1))
    assert all(torch.equal(x, torch.arange(1_000_000) * factor) for x in inputs)


@pytest.mark.parametrize("protection", Protection)
def test_members_on_one_machine_exchange_data_over_unix_sockets(families, protection):
    with group(3, protection=protection, streams=2) as comms:
        check_a_sum(comms)
    assert set(families) == {socket.AF_UNIX}


def test_a_member_without_such_a_socket_is_reached_over_tcp(families, monkeypatch):
    monkeypatch.setattr(mesh, "listen_locally", lambda _: None)
    with group(2) as comms:
        check_a_sum(comms)
    assert set(families) == {socket.AF_INET}


def test_somebody_else_under_a_members_name_only_costs_a_try(families, monkeypatch):
    """Whoever answers there without the member's key is hung up on, and the streams go over TCP."""
    squatters, visited = [], threading.Event()

    def squat(session):
        squatter = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        squatter.bind(local_name(session))
        squatter.listen()
        squatters.append(squatter)

        def answer():
            while True:
                try:
                    visitor, _ = squatter.accept()
                except OSError:
                    return
                visited.set()
                visitor.sendall(b"GSMC" + bytes(300))
                visitor.close()

        threading.Thread(target=answer, daemon=True).start()

    monkeypatch.setattr(mesh, "listen_locally", squat)
    try:
        with group(2) as comms:
            check_a_sum(comms)
    finally:
        for squatter in squatters:
            squatter.shutdown(socket.SHUT_RDWR)
            squatter.close()
    assert visited.is_set() and set(families) == {socket.AF_INET}
