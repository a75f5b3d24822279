"""Members on one machine find each other's Unix socket, and share memory; who cannot goes over TCP.

So does a member that finds somebody else at the other's name.
"""

import gc
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch

from collectives import Aborted, Op, Protection
from collectives.mesh import data_plane, mesh
from collectives.mesh.addresses import local_name
from collectives.mesh.shared_memory import Arena, is_possible
from collectives.mesh.stream import Stream
from collectives.operations import AllReduce
from collectives.reduce import shared
from tests.groups import group, join, together
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the abstract namespace is Linux's")
shares_memory = pytest.mark.skipif(not is_possible(), reason="Linux on x86-64")


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


@pytest.fixture
def in_memory(monkeypatch):
    """The values, in bytes, of each reduction that a member carried out in shared memory."""
    seen = []
    reduce = shared.all_reduce

    def seeing(port, job, values, bays):
        seen.append(values.nbytes)
        return reduce(port, job, values, bays)

    monkeypatch.setattr(shared, "all_reduce", seeing)
    return seen


def sum_until(comms, reached):
    """Sum up until `reached`; the first sums hand the memory over."""
    for _ in range(50):
        check_a_sum(comms)
        if reached():
            return
    raise AssertionError("50 sums without shared memory")


@shares_memory
@pytest.mark.parametrize("protection", Protection)
def test_members_of_one_user_come_to_share_memory(in_memory, protection):
    with group(3, protection=protection) as comms:
        sum_until(comms, lambda: len(in_memory) == 3)
        results = together(*(lambda c=c: c.all_reduce(torch.ones(2, 500_000).t(), op=Op.SUM) for c in comms))
        assert len(in_memory) == 6 and all(torch.equal(r.value, torch.full((500_000, 2), 3.0)) for r in results)
        each = pytest.approx(2 * 4_000_000 * 2 / 3, rel=0.01)
        assert {(r.bytes_sent == each, r.bytes_received == each) for r in results} == {(True, True)}
        assert all(health.moved is not None for health in comms[0].health().values())


@shares_memory
def test_a_member_that_comes_or_goes_costs_the_others_a_few_sums_by_sockets(in_memory):
    with group(2) as comms:
        sum_until(comms, lambda: len(in_memory) == 2)
        comms.append(join(comms))
        in_memory.clear()
        sum_until(comms, lambda: len(in_memory) == 3)
        before = {arena_of(comm) for comm in comms[:2]}
        comms.pop().leave()
        wait_until(lambda: {comm.world_size for comm in comms} == {2}, 10, "the view without it")
        in_memory.clear()
        sum_until(comms, lambda: len(in_memory) == 2)
        assert not before & {arena_of(comm) for comm in comms}, "one that was stopped might read what is written now"


def arena_of(comm):
    lease = comm.data_plane.lease_memory(frozenset(comm.members))
    lease.end()
    return lease.offer.serial


@shares_memory
def test_a_descriptor_that_is_refused_costs_nothing_but_the_shared_memory(in_memory, monkeypatch):
    make = Arena.make

    def unsealed():
        arena = make()
        arena.descriptor = zero.fileno()
        return arena

    monkeypatch.setattr(Arena, "make", unsealed)
    with Path("/dev/zero").open("rb+", buffering=0) as zero, group(2) as comms:
        for _ in range(12):
            check_a_sum(comms)
    assert not in_memory


@shares_memory
def test_a_member_that_is_slow_to_copy_its_result_has_the_right_one(in_memory, monkeypatch):
    """Others begin further operations meanwhile: none is where the slow member still reads."""
    with group(2) as comms:
        sum_until(comms, lambda: len(in_memory) == 2)
        held, go_on = threading.Event(), threading.Event()
        publish = AllReduce.publish

        def slow(job, outcome):
            if job.digest[1] == ("count", 400_000) and not held.is_set():
                held.set()
                assert go_on.wait(60)
            return publish(job, outcome)

        monkeypatch.setattr(AllReduce, "publish", slow)
        handles = [
            comm.all_reduce_async(torch.full((400_000,), 1.0 + i), Op.SUM, tag=7) for i, comm in enumerate(comms)
        ]
        assert held.wait(60)
        for _ in range(3):
            check_a_sum(comms)
        go_on.set()
        assert all(torch.equal(handle.wait(60).value, torch.full((400_000,), 3.0)) for handle in handles)


@shares_memory
def test_a_call_that_is_called_off_leaves_the_buffer_and_the_next_one_is_right(in_memory, monkeypatch):
    with group(2) as comms:
        sum_until(comms, lambda: len(in_memory) == 2)
        perform = AllReduce.perform

        def fail(job, start, port):
            perform(job, start, port)
            if port.own == comms[0].node_id:
                raise OSError("it broke after all was reduced")

        monkeypatch.setattr(AllReduce, "perform", fail)
        inputs = [torch.full((400_000,), 1.0 + i) for i in range(2)]
        errors = together(*(lambda c=c, x=x: c.all_reduce(x, Op.SUM) for c, x in zip(comms, inputs, strict=True)))
        assert [type(error) for error in errors] == [OSError, Aborted]
        assert all(torch.equal(x, torch.full((400_000,), 1.0 + i)) for i, x in enumerate(inputs))
        monkeypatch.setattr(AllReduce, "perform", perform)
        in_memory.clear()
        check_a_sum(comms)
        assert len(in_memory) == 2


@shares_memory
def test_a_group_that_ended_leaves_no_descriptor_and_no_mapping(in_memory):
    def left():
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir())), Path("/proc/self/maps").read_text().count("gossamer-arena")

    before = left()
    with group(3) as comms:
        sum_until(comms, lambda: len(in_memory) == 3)
        assert left()[1] == before[1] + 9
    del comms
    wait_until(lambda: left() <= before, 20, "descriptors and mappings to be gone")
